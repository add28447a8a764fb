"""In-Place TTT over a sequence that is split over a mesh axis: the three stages of the paper,
exact.

B batch, T tokens of this shard, D model width, F MLP width, C chunk size, M chunks of this shard, P
shards, X = ceil(D / P) rows of a slice, S accumulated update of the fast weight (D F), G its
gradient (D F). arXiv 2604.06169, section 3. The functions here run inside `jax.shard_map`, once per
shard.

    1  delta_p = sum over the shard's chunks of lr v_i^T z_i       one matmul over its tokens
    2  S_p     = what the earlier shards wrote                     exclusive prefix over the axis
    3  o       = the op on the shard's tokens, starting from S_p   any implementation

Documents that start inside a shard return S to zero, so a shard is an affine map S -> keep_p S +
delta_p, and the prefix runs over pairs (keep_p, delta_p), one per row of the batch.

The prefix moves 2 |S| (P - 1) / P values per device: an all_to_all hands every device the P deltas
of its slice of S, the device runs the prefix on its slice, a second all_to_all hands the results
back. The initial and the final state lie in those slices, so they cost nothing to move. The
backward is the same prefix from the other end, on gamma_p = sum of do_i^T z_i.

The deltas are summed twice, once here and once inside the op: 2 T D F FLOPs more, for 6 T D F of
the op. The alternative, the op from S = 0 and the prefix added by a matmul of its own, costs the
same 2 T D F, rounds o twice, and leaves the exchange nothing to hide behind; here the op's slow
matmul does not wait for S. Saving each chunk's delta instead would cost M |S| bytes. Kept for the
backward: z, v, W and S_p, what the op itself keeps. No per-chunk state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.errors import UserError
from ttt_jax.ops.numerics import accumulator, precision_for
from ttt_jax.ops.ttt.api import in_place_ttt
from ttt_jax.ops.ttt.chunk_updates import decay_factors, fold_clip, fold_segments


def in_place_ttt_shard(
    z_BTF,
    v_BTD,
    w_DF,
    *,
    lr,
    chunk_size: int,
    axis: str | None,
    shards: int,
    state_BXF=None,
    segment_ids_BT=None,
    decay: float = 1.0,
    whole_chunks_B=None,
    clip_norm: float | None = None,
    sum_DF: Callable[[Any], Any] | None = None,
    apply: str = "split",
    implementation: str | None = None,
) -> tuple[Any, Any]:
    """The op on one shard of a sequence; see `ttt_jax.ops.ttt.api` for what is not listed.

    Args:
      axis, shards: name and size of the mesh axis that splits T, None and 1 for a whole T (a
        partial chunk at the end is fine then). Shards lie in the order of the sequence.
      state_BXF: this device's slice of S_0: rows p X .. (p + 1) X of S_0 padded to P X rows. None
        is zero.
      whole_chunks_B: counts the chunks of the whole sequence, not of this shard.
      sum_DF: sums over the devices that split D or F; None when both are whole. Only clipping needs
        it: in all else rows of D know nothing of each other.

    Returns: o_BTD (a partial sum where F is split) and this device's slice of the final state, [B,
    X, F]. Raises: UserError when the shard does not hold whole chunks.
    """
    T, C = z_BTF.shape[1], chunk_size
    if axis is not None and (T == 0 or T % C):
        raise UserError(
            f"in_place_ttt: a shard of {T} tokens does not hold whole chunks of {C}; change one "
            "of them"
        )
    acc = accumulator(z_BTF.dtype)
    lr = jnp.asarray(lr, acc)
    v_BTD, keep_BM = fold_segments(v_BTD.astype(z_BTF.dtype), segment_ids_BT, C, acc)
    if keep_BM is not None and axis is not None:
        keep_BM = keep_BM.at[:, 0].set(_continues(segment_ids_BT, C, axis, shards).astype(acc))
    if clip_norm is not None:
        v_BTD = fold_clip(z_BTF, v_BTD, lr, C, clip_norm, acc, sum_DF)
    if axis is None:
        options = {"segment_ids": segment_ids_BT, "apply": apply, "implementation": implementation}
        options |= {"decay": decay, "whole_chunks": whole_chunks_B}
        return in_place_ttt(z_BTF, v_BTD, w_DF, lr=lr, chunk_size=C, state=state_BXF, **options)
    decay_BM = None
    if decay != 1:
        if whole_chunks_B is not None:
            whole_chunks_B = whole_chunks_B - jax.lax.axis_index(axis) * (T // C)
        shape_BT = z_BTF.shape[:2]
        decay_BM = decay_factors(decay, shape_BT, C, segment_ids_BT, whole_chunks_B, acc)
    static = _Static(C, axis, shards, apply, implementation, state_BXF is None, decay)
    w_DF, chunks = w_DF.astype(z_BTF.dtype), (keep_BM, decay_BM, segment_ids_BT, whole_chunks_B)
    out: Any = _sharded(static, z_BTF, v_BTD, w_DF, lr, state_BXF, chunks)
    return out


def slice_rows(rows: int, shards: int) -> int:
    """X, the rows of S that one device's slice holds."""
    return -(-rows // shards)


class _Static(NamedTuple):
    chunk_size: int
    axis: str
    shards: int
    apply: str
    implementation: str | None
    from_zero: bool  # there is no initial state
    decay: float


def _continues(segment_ids_BT, C: int, axis: str, shards: int):
    """Whether each row's first chunk goes on with the document that the last chunk before this
    shard starts with, bool [B].
    """
    forward = [(p, p + 1) for p in range(shards - 1)]
    before_B = jax.lax.ppermute(segment_ids_BT[:, -C], axis, forward)
    # The initial state belongs to the first document, whatever its number.
    return (before_B == segment_ids_BT[:, 0]) | (jax.lax.axis_index(axis) == 0)


def _sum_of_products(x_BTD, z_BTF, factor_BM, C, acc):
    """sum over chunks of factor_i x_i^T z_i in one matmul, [B, D, F]; the factor is folded into
    x.
    """
    if factor_BM is not None:
        factor_BT1 = jnp.repeat(factor_BM, C, axis=1)[:, :, None]
        x_BTD = (jnp.broadcast_to(factor_BT1, x_BTD.shape) * x_BTD.astype(acc)).astype(x_BTD.dtype)
    return jnp.einsum(
        "btd,btf->bdf",
        x_BTD,
        z_BTF,
        preferred_element_type=acc,
        precision=precision_for(z_BTF.dtype),
    )


def exclusive_prefix(
    delta_BDF, keep_B, start_BXF, *, axis: str, shards: int, reverse: bool = False
):
    """S_p for S_{p+1} = keep_p S_p + delta_p along a mesh axis; with `reverse`, from the last shard
    to the first.

    Args:
      delta_BDF, keep_B: this shard's map; keep None is one.
      start_BXF: slice of what the first shard (the last one with `reverse`) starts from; None is
        zero.

    Returns: what this shard starts from, [B, D, F], and the slice of what leaves the far end, [B,
    X, F].
    """
    B, D, F = delta_BDF.shape
    X = slice_rows(D, shards)
    with jax.named_scope("ttt_prefix"):
        slices = jnp.pad(delta_BDF, ((0, 0), (0, shards * X - D), (0, 0))).reshape(B, shards, X, F)
        delta_PBXF = jax.lax.all_to_all(
            jnp.moveaxis(slices, 1, 0), axis, split_axis=0, concat_axis=0
        )
        keep_PB = None if keep_B is None else jax.lax.all_gather(keep_B, axis)
        if start_BXF is None:
            start_BXF = jnp.zeros_like(delta_PBXF[0])

        def step(S_BXF, xs):
            delta_BXF, keep_B = xs
            kept_BXF = S_BXF if keep_B is None else keep_B[:, None, None] * S_BXF
            return kept_BXF + delta_BXF, S_BXF

        end_BXF, S_PBXF = jax.lax.scan(step, start_BXF, (delta_PBXF, keep_PB), reverse=reverse)
        slices = jax.lax.all_to_all(S_PBXF, axis, split_axis=0, concat_axis=0)
        return jnp.moveaxis(slices, 0, 1).reshape(B, shards * X, F)[:, :D], end_BXF


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sharded(static: _Static, z_BTF, v_BTD, w_DF, lr, state_BXF, chunks) -> Any:
    return _forward(static, z_BTF, v_BTD, w_DF, lr, state_BXF, chunks)[0]


def _forward(static: _Static, z_BTF, v_BTD, w_DF, lr, state_BXF, chunks):
    C, axis, shards, apply, implementation, _, decay = static
    keep_BM, _, segment_ids_BT, whole_chunks_B = chunks
    acc, dtype = lr.dtype, z_BTF.dtype
    later_BM, kept_B, _ = _factors(*chunks[:2])
    scaled_BTD = (lr * v_BTD.astype(acc)).astype(dtype)
    delta_BDF = _sum_of_products(scaled_BTD, z_BTF, later_BM, C, acc)
    S_BDF, end_BXF = exclusive_prefix(delta_BDF, kept_B, state_BXF, axis=axis, shards=shards)
    # the op below takes a state for its first document, so the shard's first reset is applied here
    if keep_BM is not None:
        S_BDF = keep_BM[:, :1, None] * S_BDF

    def op(z_BTF, v_BTD, w_DF, lr, S_BDF):
        return in_place_ttt(
            z_BTF,
            v_BTD,
            w_DF,
            lr=lr,
            chunk_size=C,
            state=S_BDF,
            segment_ids=segment_ids_BT,
            decay=decay,
            whole_chunks=whole_chunks_B,
            apply=apply,
            implementation=implementation,
        )

    (o_BTD, _), pull = jax.vjp(op, z_BTF, v_BTD, w_DF, lr, S_BDF)
    return (o_BTD, end_BXF), (pull, z_BTF, chunks)


def _factors(keep_BM, decay_BM):
    """What documents and decay leave, inside of this shard; None where there is neither.

    Returns: of what each chunk writes, in the state at the end, [B, M]; of the state that comes in,
    at the end, [B]; and of it, in what each chunk reads, [B, M].
    """
    if keep_BM is None and decay_BM is None:
        return None, None, None
    keep_BM = jnp.ones_like(decay_BM) if keep_BM is None else keep_BM
    # A document that starts with a chunk drops the state there; the chunk's update decays it.
    both_BM = keep_BM if decay_BM is None else keep_BM * decay_BM
    one_B1 = jnp.ones_like(keep_BM[:, :1])
    from_here_BM = jnp.flip(jnp.cumprod(jnp.flip(both_BM, 1), axis=1), 1)
    so_far_BM = jnp.concatenate([one_B1, jnp.cumprod(both_BM, axis=1)[:, :-1]], axis=1)
    later_BM = jnp.concatenate([from_here_BM[:, 1:], one_B1], axis=1)
    return later_BM, from_here_BM[:, 0], so_far_BM * keep_BM


def _backward(static: _Static, residuals, cotangents):
    C, axis, shards, _, _, from_zero, _ = static
    pull, z_BTF, chunks = residuals
    do_BTD, dend_BXF = cotangents
    acc = dend_BXF.dtype
    _, kept_B, so_far_BM = _factors(*chunks[:2])
    gamma_BDF = _sum_of_products(do_BTD, z_BTF, so_far_BM, C, acc)
    G_BDF, dstate_BXF = exclusive_prefix(
        gamma_BDF, kept_B, dend_BXF, axis=axis, shards=shards, reverse=True
    )
    # S_p's gradient is what the prefix has carried already
    dz_BTF, dv_BTD, dw_DF, dlr, _ = pull((do_BTD, G_BDF))
    return dz_BTF, dv_BTD, dw_DF, dlr, None if from_zero else dstate_BXF, None


_sharded.defvjp(_forward, _backward)
