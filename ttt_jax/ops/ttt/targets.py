"""The source of a layer's targets on its way into `W_target`: normalised and convolved.

B batch, T tokens, D model width, C chunk size, M chunks, K taps.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax.ops import platform
from ttt_jax.ops.numerics import accumulator
from ttt_jax.ops.ttt.chunk_updates import only_written

_TINY = 1e-12  # far below the mean square of any embedding: the scale of the source cancels


def convolved(source_BTD, conv_D1K, chunk_size: int, normalize: bool, written_BM=None):
    """Convolve along the tokens of each chunk, every channel by itself, [B, T, D].

    The convolution is centred: it sees future tokens, and zeros outside of the chunk.

    Args:
      source_BTD: float32, bfloat16 or float64, whose dtype the result has; T is a multiple of the
        chunk.
      conv_D1K: an odd number of taps, as checkpoints store them.
      normalize: divide each token's vector by its root mean square first; zeros stay zeros.
      written_BM: bool; zeros come out of the other chunks. None: of none.
    """
    if _kernel_runs(source_BTD.dtype, chunk_size, source_BTD.shape[2]):
        return _convolved_by_kernel(source_BTD, conv_D1K, chunk_size, normalize, written_BM)
    if written_BM is not None:
        source_BTD = only_written(source_BTD, written_BM, chunk_size)
    source_BTD = unit_rms(source_BTD) if normalize else source_BTD
    return _sum_of_taps(source_BTD, conv_D1K, chunk_size)


def unit_rms(x_BTD: jax.Array) -> jax.Array:
    """Divide each token's vector by its root mean square, in x's dtype; zeros stay zeros."""
    x = x_BTD.astype(accumulator(x_BTD.dtype))
    return (x * _inverse_rms(x)).astype(x_BTD.dtype)


def _inverse_rms(x):
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + _TINY)


def _sum_of_taps(source_BTD, conv_D1K, C: int):
    (B, T, D), K = source_BTD.shape, conv_D1K.shape[2]
    acc, dtype = accumulator(source_BTD.dtype), source_BTD.dtype
    conv_DK = conv_D1K.astype(acc)[:, 0]
    source_BMCD = source_BTD.reshape(B, T // C, C, D)
    padded = jnp.pad(source_BMCD, ((0, 0), (0, 0), (K // 2, K // 2), (0, 0)))
    t_BMCD = jnp.zeros(source_BMCD.shape, acc)
    for k in range(K):
        tap_D = jnp.broadcast_to(conv_DK[:, k], source_BMCD.shape)
        t_BMCD = t_BMCD + padded[:, :, k : k + C].astype(acc) * tap_D
    return t_BMCD.astype(dtype).reshape(B, T, D)


def _kernel_runs(dtype, C: int, D: int) -> bool:
    if not (platform.compiled_for() in ("gpu", "cuda") and platform.on_one_device()):
        return False
    from ttt_jax.kernels_pallas import target_convolution as kernel

    return kernel.why_not(dtype, C, D) is None


def _convolved_by_kernel(source_BTD, conv_D1K, C: int, normalize: bool, written_BM):
    from ttt_jax.kernels_pallas import target_convolution as kernel

    B, T, D = source_BTD.shape
    scale_BT = jnp.ones((B, T), jnp.float32)
    if normalize:
        scale_BT = _inverse_rms(source_BTD.astype(jnp.float32))[..., 0]
    if written_BM is not None:  # no pass over the targets, nor over their gradients
        scale_BT = only_written(scale_BT[..., None], written_BM, C)[..., 0]
    t_NCD: Any = kernel.convolved(
        source_BTD.reshape(-1, C, D),
        scale_BT.reshape(-1, C),
        conv_D1K.astype(jnp.float32)[:, 0].T,
    )
    return t_NCD.reshape(B, T, D)
