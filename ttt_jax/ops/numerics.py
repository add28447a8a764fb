"""Cutting the token axis into equal blocks for a scan, and joining them again."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def split_tokens(x_BTX, size: int):
    """[B, T, ...] -> [ceil(T / size), B, size, ...]; the last block is padded with zeros."""
    B, T = x_BTX.shape[:2]
    blocks = -(-T // size)
    x_BTX = jnp.pad(x_BTX, ((0, 0), (0, blocks * size - T)) + ((0, 0),) * (x_BTX.ndim - 2))
    return jnp.moveaxis(x_BTX.reshape(B, blocks, size, *x_BTX.shape[2:]), 1, 0)


def join_tokens(blocks, length: int):
    """The inverse: [n, B, size, ...] -> [B, length, ...]."""
    n, B, size = blocks.shape[:3]
    return jnp.moveaxis(blocks, 0, 1).reshape(B, n * size, *blocks.shape[3:])[:, :length]


def precision_for(dtype):
    """float32 inputs ask for float32 products; bf16 ones are exact in any mode."""
    return (
        jax.lax.Precision.DEFAULT if jnp.dtype(dtype).itemsize <= 2 else jax.lax.Precision.HIGHEST
    )


def accumulator(dtype):
    """The dtype that sums are kept in: float32, and float64 for float64."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def dot(subscripts, x, y, acc):
    return jnp.einsum(
        subscripts, x, y, preferred_element_type=acc, precision=precision_for(x.dtype)
    )
