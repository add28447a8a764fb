"""What tells one model from another: hashes over its config and the bits of its parameters.

L layers of a stack, X elements of a layer.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.config import to_dict
from ttt_jax.model.param_path import param_path
from ttt_jax.model.transformer import Transformer
from ttt_jax.pretrained.hf_weights import tensor_names, tensor_shapes
from ttt_jax.pretrained.safetensors_io import TensorSource

_ROUNDED = "bfloat16"


def fingerprint(model: Transformer) -> str:
    """Hash the model's config and every parameter's bits, the same however layers are stacked and
    placed.
    """
    sums = {
        name: [str(leaf.dtype), *pair] for leaf, named in _named_sums(model) for name, pair in named
    }
    text = json.dumps([_config(model), sums], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _config(model: Transformer) -> dict[str, Any]:
    """The config, without fields that are younger than sessions and say nothing new."""
    fields = to_dict(model.config)
    young = {"decay": 1, "apply": "split", "last_target": None, "read_cap": None}
    for name, value in young.items():
        if fields["ttt"][name] == value:
            del fields["ttt"][name]
    return fields


def weights_fingerprint(model: Transformer) -> str:
    """Hash every parameter, rounded to bfloat16, under its checkpoint name, and no config.

    A model has one such hash whether it was loaded in float32 or in bfloat16.
    """
    rounded = _named_sums(model, _ROUNDED)
    return _hash_of({name: pair for _, named in rounded for name, pair in named})


def tensors_fingerprint(abstract: Transformer, source: TensorSource) -> str:
    """The same hash of tensors that are read one by one.

    Raises: CheckpointError for a tensor that cannot be read.
    """
    return _hash_of({name: _tensor_sums(source.read(name)) for name in tensor_shapes(abstract)})


def _tensor_sums(x: np.ndarray) -> list[int]:
    row_1X = x.astype(np.float32).reshape(1, -1)  # as a model loads it
    return np.asarray(_checksums(row_1X, 1, 1, _ROUNDED))[0].tolist()


def _hash_of(sums: dict[str, list[int]]) -> str:
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def _named_sums(model: Transformer, dtype: str | None = None):
    """(leaf, [(checkpoint name, checksums of that layer in `dtype`)]) of every leaf."""
    names = tensor_names(model)
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        own = names[param_path(path)]
        stack_axes = 2 * param_path(path).startswith("groups.")
        sums = np.asarray(_checksums(leaf, len(own), stack_axes, dtype)).tolist()
        yield leaf, list(zip(own, sums, strict=True))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _checksums(x, layers: int, stack_axes: int, dtype: str | None):
    """Two uint32 sums over the bits of each layer: plain, and weighted by place. Exact whatever the
    order of summation, and wherever the parts of a layer lie: it is never made one row.

    Args:
      x: the first `stack_axes` axes count the `layers`; with none of them it is one layer.
      dtype: what x is rounded to; None: it stays as it is.
    """
    x_LX = x.reshape(layers, *x.shape[stack_axes:]).astype(dtype or x.dtype)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x_LX.dtype.itemsize]
    bits_LX = jax.lax.bitcast_convert_type(x_LX, unsigned).astype(jnp.uint32)
    place_LX, stride = jnp.zeros(x_LX.shape, jnp.uint32), 1
    for axis in reversed(range(1, x_LX.ndim)):
        step = jnp.uint32(stride % 2**32)
        place_LX += jax.lax.broadcasted_iota(jnp.uint32, x_LX.shape, axis) * step
        stride *= x_LX.shape[axis]
    place_LX = place_LX * jnp.uint32(2) + jnp.uint32(1)
    total = lambda x: jnp.sum(x, axis=tuple(range(1, x.ndim)), dtype=jnp.uint32)
    return jnp.stack([total(bits_LX), total(bits_LX * place_LX)], axis=1)
