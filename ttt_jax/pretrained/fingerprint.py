"""What tells one model from another: hashes over its config and the bits of its parameters.

L layers of a stack, X elements of a layer.
"""

from __future__ import annotations

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.config import to_dict
from ttt_jax.model.param_path import param_path
from ttt_jax.model.transformer import Transformer
from ttt_jax.pretrained.hf_weights import tensor_names


def fingerprint(model: Transformer) -> str:
    """Hash the model's config and every parameter's bits, the same however layers are stacked and
    placed.
    """
    sums = {
        name: [str(leaf.dtype), *pair]
        for leaf, named in _named_sums(model, lambda x: x)
        for name, pair in named
    }
    text = json.dumps([to_dict(model.config), sums], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def weights_fingerprint(model: Transformer) -> str:
    """Hash every parameter, rounded to bfloat16, under its checkpoint name, and no config.

    A model has one such hash whether it was loaded in float32 or in bfloat16.
    """
    rounded = _named_sums(model, lambda x: x.astype(jnp.bfloat16))
    sums = {name: pair for _, named in rounded for name, pair in named}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def _named_sums(model: Transformer, seen):
    """(leaf, [(checkpoint name, checksums of that layer as `seen` shows it)]) of every leaf."""
    names = tensor_names(model)
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        own = names[param_path(path)]
        sums = np.asarray(_checksums(seen(leaf.reshape(len(own), -1)))).tolist()
        yield leaf, list(zip(own, sums, strict=True))


@jax.jit
def _checksums(x_LX):
    """Two uint32 sums over the bits of each row: plain, and weighted by place. Exact whatever the
    order of summation.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x_LX.dtype.itemsize]
    bits_LX = (
        jax.lax.bitcast_convert_type(x_LX, unsigned).astype(jnp.uint32).reshape(x_LX.shape[0], -1)
    )
    place_LX = jax.lax.broadcasted_iota(jnp.uint32, bits_LX.shape, 1) * jnp.uint32(2) + jnp.uint32(
        1
    )
    total = lambda x: jnp.sum(x, axis=1, dtype=jnp.uint32)
    return jnp.stack([total(bits_LX), total(bits_LX * place_LX)], axis=1)
