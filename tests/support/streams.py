"""Models that read token by token, and prompts for them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from support.models import config, make

from ttt_jax.model.param_path import param_path

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


def changed(model, name, change):
    """A model in which the parameters whose path ends with `name` are others."""
    edit = lambda path, x: change(x) if param_path(path).endswith(name) else x
    return jax.tree_util.tree_map_with_path(edit, model)


def with_nan_at(token):
    """A model that computes NaN from the token on, in the row that holds it."""
    return changed(one_layer_model(), "embed", lambda x: x.at[token].set(jnp.nan))


# what is said of a model whose targets are all zero
ZERO = "the fast weights of every TTT layer stay zero"
