"""The public op: one interface, interchangeable implementations.

B batch, T tokens, D model width, F MLP width, C chunk size, M chunks, S accumulated update of the
fast weight (D F).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ttt_jax.errors import UserError
from ttt_jax.ops import platform
from ttt_jax.ops.numerics import accumulator
from ttt_jax.ops.ttt.chunk_blocks import in_blocks
from ttt_jax.ops.ttt.chunk_updates import decay_factors, fold_clip, fold_segments
from ttt_jax.ops.ttt.reference import in_place_ttt_reference
from ttt_jax.ops.ttt.xla import in_place_ttt_xla, kept, write


class _Call(NamedTuple):
    """What decides whether an implementation can run."""

    platform: str  # "cpu", "gpu" or "tpu"
    dtype: Any
    B: int
    T: int
    D: int
    F: int
    C: int
    documents: bool = False  # segment_ids are given
    apply: str = "split"


class _Implementation(NamedTuple):
    """`run` takes what `in_place_ttt_xla` takes; `why_not` says why it cannot, or None. Both import
    their kernels lazily.
    """

    why_not: Callable[[_Call], str | None]
    run: Callable[..., Any]
    kernel: bool = True  # a custom call, which the compiler cannot partition over a mesh
    # Where None may take it: measured, or estimated, to be fastest.
    pays: Callable[[_Call], bool] = lambda call: True
    # Chunks of a block (chunk_blocks.py), where that was measured to be faster.
    block: Callable[[_Call], int] = lambda call: 1


def _why_not_pallas_tpu(call: _Call) -> str | None:
    from ttt_jax.kernels_pallas import tpu

    return tpu.why_not(call.platform, call.dtype, call.C, call.D, call.F, call.T)


def _run_pallas_tpu(*args, **kwargs):
    from ttt_jax.kernels_pallas import tpu

    return tpu.in_place_ttt_tpu(*args, **kwargs)


def _why_not_pallas_gpu(call: _Call) -> str | None:
    from ttt_jax.kernels_pallas import gpu

    return gpu.why_not(call.platform, call.dtype, call.C, call.D, call.F)


def _run_pallas_gpu(*args, **kwargs):
    from ttt_jax.kernels_pallas import gpu

    return gpu.in_place_ttt_gpu(*args, **kwargs)


def _why_not_triton(call: _Call) -> str | None:
    from ttt_jax.kernels_pallas import triton

    return triton.why_not(call.platform, call.dtype, call.apply)


def _run_triton(*args, **kwargs):
    from ttt_jax.kernels_pallas import triton

    return triton.in_place_ttt_triton(*args, **kwargs)


def _pallas_gpu_pays(call: _Call) -> bool:
    """Measured faster than XLA on an H100 or H200 at every shape that was tried: C = 1024 from D, F
    = 1024, 3072 to 5120, 17408, and to C = 4096 at 2560, 9728; C = 512 from 768, 2048 on; C = 256
    at 2560, 9728 (docs/performance.md). Not measured beside collectives, which take multiprocessors
    away from a kernel that has divided its work among all of them.
    """
    smallest = 768 * 2048 if call.C >= 512 else 2560 * 9728
    return call.C <= call.T and smallest <= call.D * call.F and not platform.one_of_several()


def _pallas_gpu_block(call: _Call) -> int:
    """Blocks of 1024 tokens were the fastest where they were tried, and chunk by chunk at small
    shapes, whose states cost less to move than blocks cost to multiply. Packed rows were tried at
    C = 512 only, and gain less. All this with the kernel that moved the state once a chunk
    (docs/lab/2026-11-30-sweeps.md).
    """
    size, smallest = call.D * call.F, 2048 * 6144
    if call.documents:
        smallest = 2560 * 9728 if call.C >= 512 else math.inf
    if size < smallest:
        return 1
    return max(1, min(1024, 1 << (call.T.bit_length() - 1)) // call.C)


# The fastest first. "reference" is not among them: it takes documents and clipping as they come.
_FAST = {
    "pallas_tpu": _Implementation(_why_not_pallas_tpu, _run_pallas_tpu),
    "pallas_gpu": _Implementation(
        _why_not_pallas_gpu, _run_pallas_gpu, pays=_pallas_gpu_pays, block=_pallas_gpu_block
    ),
    # pallas_gpu was faster wherever it runs.
    "triton": _Implementation(_why_not_triton, _run_triton, pays=lambda call: False),
    "xla": _Implementation(lambda call: None, in_place_ttt_xla, kernel=False),
}
IMPLEMENTATIONS = ("reference", *reversed(_FAST))


def in_place_ttt(
    z_BTF: Float[Array, "B T F"],
    v_BTD: Float[Array, "B T D"],
    w_DF: Float[Array, "D F"],
    *,
    lr: float | Float[Array, ""],
    chunk_size: int,
    state: Float[Array, "B D F"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    written: Bool[Array, "B M"] | None = None,
    decay: float = 1.0,
    whole_chunks: Int[Array, " B"] | None = None,
    clip_norm: float | None = None,
    apply: str = "split",
    implementation: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D F"]]:
    """Apply a fast weight and update it chunk by chunk (In-Place TTT,
    https://arxiv.org/abs/2604.06169, section 3).

    For chunk i of `chunk_size` tokens:

        o_i = z_i (W + S_i)^T    then    S_{i+1} = decay * S_i + lr * v_i^T z_i

    A trailing partial chunk is applied with the current S and updates nothing. Each sequence of the
    batch has its own S. Nothing of chunk i reaches the outputs of chunk i, so v may look ahead
    inside its chunk and the op stays causal.

    Args:
      z_BTF: MLP activations; float32, bfloat16 or float64. Its dtype is the compute and output
        dtype.
      v_BTD: targets; cast to z's dtype.
      w_DF: slow weight (the pretrained down-projection); cast to z's dtype.
      lr: inner learning rate, a number or a scalar array (differentiable).
      chunk_size: C, at least 1.
      state: S_0, float32 (float64 with float64 inputs); None is zero. It belongs to the first
        document of each row.
      segment_ids: document of each token, 0 for padding. S returns to zero where a new document
        starts; documents must start on chunk boundaries. A chunk that holds padding updates
        nothing.
      written: what `written_chunks` says of `segment_ids`, from a caller whose v is zero in the
        other chunks. None: v may be anything there, and a pass over it makes it zero.
      decay: factor on S, 0 < decay <= 1, wherever a chunk is written (1 is the paper's rule).
      whole_chunks: of rows that are padded at the right, how many chunks each of them writes: S
        stays as it is in the others, whose v must be zero. None: all chunks.
      clip_norm: rescale each chunk's update to this Frobenius norm where it exceeds it (section 4,
        evaluation).
      apply: "split" applies W and S in two products, so that an update that is small beside W is
        not lost in bfloat16; "fused" rounds W + S once a chunk, for 4TDF FLOPs instead of 6TDF
        (docs/numerics.md says when). The same thing to "reference", which rounds nothing.
      implementation: "reference", "xla", "pallas_tpu", "pallas_gpu" (Hopper, bfloat16, C, D and F
        in multiples of 256), "triton" (NVIDIA, jax-triton), or None for the fastest that supports
        the platform and shapes. A named one that cannot run raises; it never falls back. Kernels
        (all but the first two) are not partitioned over a mesh by the compiler: with several
        devices, None takes them only inside a `shard_map` over every mesh axis, and on GPUs not at
        all.

    Returns:
      o_BTD in z's dtype, and the state after the last whole chunk (float32, or float64), to
      continue the stream with.

    Raises:
      UserError: shapes do not fit together, a chunk size below 1, another word for `apply`, or an
        implementation that is unknown or cannot run here.
    """
    _check(z_BTF, v_BTD, w_DF, chunk_size, state, segment_ids, written)
    if apply not in ("split", "fused"):
        raise UserError(f'in_place_ttt: apply = {apply!r}: must be "split" or "fused"')
    (B, T, F), D = z_BTF.shape, v_BTD.shape[2]
    documents = segment_ids is not None
    call = _Call(platform.compiled_for(), z_BTF.dtype, B, T, D, F, chunk_size, documents, apply)
    implementation = _choose(implementation, call)
    acc = accumulator(z_BTF.dtype)
    if state is None and implementation not in ("xla", "pallas_gpu"):  # they start by themselves
        state = jnp.zeros((B, D, F), acc)
    state, lr = None if state is None else state.astype(acc), jnp.asarray(lr, acc)
    options: dict[str, Any] = {"lr": lr, "chunk_size": chunk_size, "state_BDF": state}
    if implementation == "reference":
        return in_place_ttt_reference(
            z_BTF,
            v_BTD,
            w_DF,
            **options,
            segment_ids_BT=segment_ids,
            clip_norm=clip_norm,
            decay=decay,
            whole_chunks_B=whole_chunks,
        )
    v_BTD = v_BTD.astype(z_BTF.dtype)
    v_BTD, keep_BM = fold_segments(v_BTD, segment_ids, chunk_size, acc, written)
    if clip_norm is not None:
        v_BTD = fold_clip(z_BTF, v_BTD, lr, chunk_size, clip_norm, acc)
    fast, w_DF = _FAST[implementation], w_DF.astype(z_BTF.dtype)
    decay_BM = None
    if decay != 1 and chunk_size <= T:  # else nothing is written
        decay_BM = decay_factors(decay, (B, T), chunk_size, segment_ids, whole_chunks, acc)
    # Inside of a block every chunk would need another power of the decay.
    n = fast.block(call) if decay == 1 else 1
    options |= {"keep_BM": keep_BM, "decay_BM": decay_BM}
    return in_blocks(_applying(fast.run, apply), n, z_BTF, v_BTD, w_DF, **options)


def write_chunk(
    z_BCF: Float[Array, "B C F"],
    v_BCD: Float[Array, "B C D"],
    state_BDF: Float[Array, "B D F"],
    *,
    lr: float | Float[Array, ""],
    decay: float = 1.0,
    whole_chunks: Int[Array, " B"] | None = None,
    clip_norm: float | None = None,
) -> Float[Array, "B D F"]:
    """Write one whole chunk and apply nothing: the state that `in_place_ttt` leaves behind it.

    One matmul that adds to the state in place, 2CDF FLOPs a row. A kernel of `in_place_ttt` applies
    as well, 4CDF more, and the compiler cannot leave out what nobody reads of a kernel.

    Args:
      z_BCF, v_BCD: of the chunk's C tokens; float32, bfloat16 or float64.
      state_BDF, lr, decay, whole_chunks, clip_norm: as `in_place_ttt`; a row of 0 whole chunks
        keeps its state, and its v must be zero.

    Returns: the new state, float32 (float64 with float64 inputs).
    """
    (B, C, _), acc = z_BCF.shape, accumulator(z_BCF.dtype)
    v_BCD, lr = v_BCD.astype(z_BCF.dtype), jnp.asarray(lr, acc)
    if clip_norm is not None:
        v_BCD = fold_clip(z_BCF, v_BCD, lr, C, clip_norm, acc)
    decay_B1 = None if decay == 1 else decay_factors(decay, (B, C), C, None, whole_chunks, acc)
    return write(kept(state_BDF.astype(acc), decay_B1, 0), v_BCD, z_BCF, lr)


@functools.cache  # one function each, which jax knows again
def _applying(run, apply: str):
    return run if apply == "split" else functools.partial(run, apply=apply)


def _choose(implementation: str | None, call: _Call) -> str:
    """The implementation to run; raises where a named one cannot."""
    if implementation is None:
        kernels = platform.on_one_device()
        return next(
            name
            for name, i in _FAST.items()
            if (kernels or not i.kernel) and i.pays(call) and i.why_not(call) is None
        )
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"in_place_ttt: implementation {implementation!r} is not available; use one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "reference":
        return implementation
    reason = _FAST[implementation].why_not(call)
    if reason is None and _FAST[implementation].kernel and not platform.may_be_one_device():
        reason = (
            "a kernel is not partitioned over a mesh; call it inside a shard_map over every "
            "mesh axis"
        )
    if reason is not None:
        raise UserError(f"in_place_ttt: implementation {implementation!r} cannot run: {reason}")
    return implementation


def _check(z_BTF, v_BTD, w_DF, chunk_size, state, segment_ids, written) -> None:
    if z_BTF.ndim != 3 or v_BTD.ndim != 3 or w_DF.ndim != 2:
        raise UserError(
            f"in_place_ttt: expected z [B,T,F], v [B,T,D], w [D,F], got {z_BTF.shape}, "
            f"{v_BTD.shape}, {w_DF.shape}"
        )
    (B, T, F), D = z_BTF.shape, v_BTD.shape[2]
    if v_BTD.shape != (B, T, D) or w_DF.shape != (D, F):
        raise UserError(
            f"in_place_ttt: shapes do not fit: z [B,T,F] = {z_BTF.shape}, v [B,T,D] = "
            f"{v_BTD.shape}, w [D,F] = {w_DF.shape}"
        )
    if chunk_size < 1:
        raise UserError(f"in_place_ttt: chunk_size = {chunk_size}: must be at least 1")
    if state is not None and state.shape != (B, D, F):
        raise UserError(
            f"in_place_ttt: state has shape {state.shape}, expected [B,D,F] = {(B, D, F)}"
        )
    if segment_ids is not None and segment_ids.shape != (B, T):
        raise UserError(
            f"in_place_ttt: segment_ids has shape {segment_ids.shape}, expected [B,T] = {(B, T)}"
        )
    chunks = -(-T // chunk_size)
    if written is not None and (segment_ids is None or written.shape != (B, chunks)):
        raise UserError(
            f"in_place_ttt: written has shape {written.shape}, expected [B,M] = {(B, chunks)} "
            "beside segment_ids"
        )
