"""The update of a chunk: its size, its direction, and documents and clipping as factors on it.

B batch, T tokens, D model width, F MLP width, C chunk size, M chunks.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ttt_jax.ops.numerics import accumulator, precision_for


def update_norm(z_BCF, v_BCD, lr) -> Float[Array, " B"]:
    """Frobenius norm of the update lr v^T z that one chunk writes, per sequence (accumulation
    dtype).
    """
    return jnp.sqrt(_update_square(z_BCF, v_BCD, lr))


def _update_square(z_BCF, v_BCD, lr):
    acc, precision = accumulator(z_BCF.dtype), precision_for(z_BCF.dtype)
    delta_BDF = lr * jnp.einsum(
        "bcd,bcf->bdf", v_BCD, z_BCF, preferred_element_type=acc, precision=precision
    )
    return jnp.sum(delta_BDF**2, axis=(1, 2))


def update_cosine(z_BTF, v_BTD, C, segment_ids_BT=None, sum_F=None) -> Float[Array, ""]:
    """Mean cosine between the updates of successive chunks of the first sequence; 0 where no two
    write one after the other.

    For telemetry: no gradient is meant to be taken.

    Args:
      sum_F: adds up what the devices that split F have (sharded.py).
    """
    acc, precision = accumulator(z_BTF.dtype), precision_for(z_BTF.dtype)
    ids_BT = None if segment_ids_BT is None else segment_ids_BT[:1]
    v_BTD, _ = fold_segments(v_BTD[:1], ids_BT, C, acc)
    M, F = z_BTF.shape[1] // C, z_BTF.shape[2]
    if M < 2:
        return jnp.zeros((), acc)

    def step(before_DF, i):
        z_CF, v_CD = (jax.lax.dynamic_slice_in_dim(x[0], i * C, C) for x in (z_BTF, v_BTD))
        delta_DF = jnp.einsum(
            "cd,cf->df", v_CD, z_CF, preferred_element_type=acc, precision=precision
        )
        products = jnp.stack([jnp.sum(delta_DF * before_DF), jnp.sum(delta_DF**2)])
        return delta_DF, products if sum_F is None else sum_F(products)

    _, products_M2 = jax.lax.scan(step, jnp.zeros((v_BTD.shape[2], F), acc), jnp.arange(M))
    dot, square = products_M2[1:, 0], products_M2[:, 1]
    norms = jnp.sqrt(square[1:]) * jnp.sqrt(square[:-1])
    counted = (norms > 0).astype(acc)
    return jnp.sum(counted * dot / jnp.where(norms > 0, norms, 1)) / jnp.maximum(counted.sum(), 1)


def fold_segments(v_BTD, segment_ids_BT, C, acc, written_BM=None):
    """Documents as per-token zeros in v (chunks whose write nothing reads) and a per-chunk factor
    on S (resets). `written_BM`: as `written_chunks` makes it, of a v that has these zeros.
    """
    if segment_ids_BT is None:
        return v_BTD, None
    first_BM, _ = _documents(segment_ids_BT, C)
    same_BM = jnp.pad(first_BM[:, 1:] == first_BM[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    if written_BM is None:
        v_BTD = only_written(v_BTD, written_chunks(segment_ids_BT, C), C)
    return v_BTD, same_BM.astype(acc)


def written_chunks(segment_ids_BT, C):
    """Say which chunks write what something may read, bool [B, M]: those without padding whose
    document goes on, and the last one. A trailing partial chunk is counted, and writes nothing.
    """
    first_BM, whole_BM = _documents(segment_ids_BT, C)
    goes_on_BM = first_BM[:, 1:] == first_BM[:, :-1]
    return whole_BM & jnp.pad(goes_on_BM, ((0, 0), (0, 1)), constant_values=True)


def only_written(x_BTX, written_BM, C):
    """x with zeros in all chunks that are not written."""
    written_BT = jnp.repeat(written_BM, C, axis=1)[:, : x_BTX.shape[1]]
    return jnp.where(written_BT[:, :, None], x_BTX, 0)


def _documents(segment_ids_BT, C):
    """Each chunk's first document, and whether the chunk is whole and of that document alone; a
    trailing partial chunk is not.
    """
    B, T = segment_ids_BT.shape
    M = -(-T // C)
    ids_BMC = jnp.pad(segment_ids_BT, ((0, 0), (0, M * C - T))).reshape(B, M, C)
    first_BM = ids_BMC[:, :, 0]
    return first_BM, (ids_BMC == first_BM[:, :, None]).all(2) & (first_BM != 0)


def decay_factors(decay, shape_BT, C, segment_ids_BT, whole_chunks_B, acc):
    """What each chunk's update multiplies the state before it by, a trailing partial chunk
    included, [B, M]: `decay` where the chunk is written, else 1.
    """
    B, T = shape_BT
    place_M = jnp.arange(-(-T // C), dtype=jnp.int32)[None]
    written_BM = jnp.broadcast_to(place_M < T // C, (B, place_M.shape[1]))
    if whole_chunks_B is not None:
        written_BM &= place_M < whole_chunks_B[:, None]
    if segment_ids_BT is not None:
        written_BM &= _documents(segment_ids_BT, C)[1]
    return jnp.where(written_BM, jnp.asarray(decay, acc), 1)


def fold_clip(z_BTF, v_BTD, lr, C, clip_norm, acc, sum_DF=None):
    """Clipping as a per-chunk factor on v. Differentiable; the recomputation keeps one chunk's
    update in memory.

    `sum_DF` adds up the squares of the devices that split D or F (sharded.py).
    """
    T = z_BTF.shape[1]

    @jax.checkpoint
    def clipped(i):
        z_BCF, v_BCD = (jax.lax.dynamic_slice_in_dim(x, i * C, C, axis=1) for x in (z_BTF, v_BTD))
        square_B = _update_square(z_BCF, v_BCD, lr)
        square_B = square_B if sum_DF is None else sum_DF(square_B)
        over_B = square_B > clip_norm**2
        scale_B = jnp.where(over_B, clip_norm * jax.lax.rsqrt(jnp.where(over_B, square_B, 1)), 1)
        return (scale_B[:, None, None] * v_BCD.astype(acc)).astype(v_BCD.dtype)

    if T < C:
        return v_BTD
    v_MBCD = jax.lax.map(clipped, jnp.arange(T // C))
    v_whole_BTD = jnp.moveaxis(v_MBCD, 0, 1).reshape(v_BTD.shape[0], -1, v_BTD.shape[2])
    return jnp.concatenate([v_whole_BTD, v_BTD[:, T // C * C :]], axis=1)


def last_update_square(z_BTF, v_BTD, lr, chunk_size: int, *, axis: str | None, shards: int):
    """Squared Frobenius norm of the update that the sequence's last chunk writes, for this device's
    first row and its share of F; zero on every shard but the last. No gradient is meant to be
    taken.
    """
    acc = accumulator(z_BTF.dtype)

    def square():
        v_CD, z_CF = v_BTD[0, -chunk_size:], z_BTF[0, -chunk_size:]
        dot = functools.partial(
            jnp.einsum, preferred_element_type=acc, precision=precision_for(z_BTF.dtype)
        )
        return jnp.sum(jnp.square(lr * dot("cd,cf->df", v_CD, z_CF)))

    if axis is None:
        return square()
    return jax.lax.cond(jax.lax.axis_index(axis) == shards - 1, square, lambda: jnp.zeros((), acc))
