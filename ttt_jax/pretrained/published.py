"""Fields of `config.json` of the published models that presets start from, by the models' names.

`ttt-jax plan` and the benchmarks need shapes and no weights, so they need not fetch anything.
"""

from __future__ import annotations

from typing import Any

_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}


def _qwen3(D: int, layers: int, heads: int, F: int, tied: bool = True) -> dict[str, Any]:
    sizes = {"hidden_size": D, "num_hidden_layers": layers, "num_attention_heads": heads}
    return _QWEN3 | sizes | {"intermediate_size": F, "tie_word_embeddings": tied}


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": _qwen3(1024, 28, 16, 3072),
    "Qwen3-1.7B": _qwen3(2048, 28, 16, 6144),
    "Qwen3-4B": _qwen3(2560, 36, 32, 9728),
    "Qwen3-8B": _qwen3(4096, 36, 32, 12288, tied=False),
    "Llama-3.1-8B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
}
