"""Models that read token by token, and prompts for them."""

from __future__ import annotations

import functools

import numpy as np
from support.models import config, make

C = 4
CHANGES = {"ttt.chunk_size": C}


@functools.cache
def model_of(**changes):
    return make(config(**CHANGES | changes), "float32")


@functools.cache
def one_layer_model(**changes):
    """One layer, with fast weights: what goes wrong in it is seen at once."""
    small = {"num_layers": 1, "ttt.layers": (0,), "tie_embeddings": False}
    return make(config(**CHANGES | small | changes), "float32")


def prompts(lengths, vocab=23, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n).astype(np.int32) for n in lengths]
