"""Logits against transformers (torch on the CPU), for random models of every family and, where it
lies, SmolLM2.

    pip install torch transformers      # optional; the tests are skipped without
    TTT_JAX_SMOLLM2=checkpoints/smollm2 pytest -m slow tests/pretrained/test_transformers.py

examples/smollm2.md tells where the model is from.
"""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
from support.tolerance import assert_close

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch", reason="pip install torch transformers to compare with them")
transformers = pytest.importorskip(
    "transformers", reason="pip install torch transformers to compare with them"
)

SMALL = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = {
    "llama3": ("Llama", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}}),
    "smollm2": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-yarn": ("Qwen3", {"head_dim": 16, "rope_scaling": YARN}),
    "mistral": ("Mistral", {"sliding_window": 17}),
}


def compare(folder, reference, ids):
    from ttt_jax import load_pretrained, score

    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)).logits.numpy()
    with jax.numpy_rank_promotion("allow"):
        got = score(load_pretrained(folder), ids, logits=True, piece=64)
    assert_close("logits", got.logits_BTV, expected, 1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_random_models(name, tmp_path):
    family, extra = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, **extra, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():  # norms and biases too, so that none of them could be left out
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    compare(tmp_path / "model", model, np.random.default_rng(0).integers(0, 101, (2, 150)))


@pytest.mark.skipif(
    "TTT_JAX_SMOLLM2" not in os.environ, reason="TTT_JAX_SMOLLM2 does not name its folder"
)
def test_smollm2():
    folder = Path(os.environ["TTT_JAX_SMOLLM2"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    compare(folder, model.eval(), np.random.default_rng(0).integers(0, 40_000, (1, 300)))
