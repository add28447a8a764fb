"""A config, a batch and a comparison for tests that train for a few steps in their own process."""

from __future__ import annotations

import jax
import numpy as np

SMALL = {
    "model": {
        "d_model": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
        "d_ff": 24,
        "ttt": {"layers": [0], "chunk_size": 8},
    },
    "data": {"seq_len": 16, "batch_size": 8},
    "optimizer": {"warmup_steps": 0},
    "guard": {"skips": 2, "rollbacks": 2},
}


def batch(weight=1.0):
    ids = np.random.default_rng(0).integers(0, 250, (8, 17)).astype(np.int32)
    ones = np.ones((8, 16), np.int32)
    return jax.device_put(
        {
            "ids": ids[:, :-1],
            "targets": ids[:, 1:],
            "weights": np.full((8, 16), weight, np.float32),
            "segment_ids": ones,
            "positions": np.arange(16, dtype=np.int32)[None] * ones,
        }
    )


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
