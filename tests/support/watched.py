from __future__ import annotations

import functools

from support.models import config, make
from support.streams import C


@functools.cache
def model_of(**changes):
    small = {"ttt.chunk_size": C, "num_layers": 1, "ttt.layers": (0,), "tie_embeddings": False}
    return make(config(**small | changes), "float32")
