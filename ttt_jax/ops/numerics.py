"""Cutting the token axis into equal blocks for a scan, and joining them again."""

from __future__ import annotations

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
