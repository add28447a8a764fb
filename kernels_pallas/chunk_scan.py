"""In-Place TTT as a scan over chunks whose products are GPU kernels, for `triton.py`.

The op is that of section 3 of arXiv 2604.06169. B batch, T tokens, D model width, F MLP width, C
chunk size, M whole chunks, S accumulated update of the fast weight (D F), G its gradient (D F), R
what is read of S or G: a copy in the dtype of z, bfloat16 mostly.

A chunk's products read only what the chunk before it left, so their output tiles share one grid and
fill the machine together; alone, z S^T has 80 tiles for an H100's 132 multiprocessors.

    forward    o_i = base_i + z_i R^T    S += u_i^T z_i    R = bf16(S)      base = z W^T; u is lr v
    replay     dz_i = do_i R             S += u_i^T z_i    R = bf16(W + S)  forward in time again
    reverse    dv_i = lr z_i R^T         G += do_i^T z_i   R = bf16(G)
               dz_i += u_i R

An update writes S and R in one pass over the float32 state, which nothing else touches. R has two
slots: chunk i reads one and writes the other. Where a document ends, `keep` is 0 and the update
drops the state before it; with decay it is less than 1 everywhere. dW is what G has summed; where G
drops something, it is a product of its own. `live` is 0 for sequences without an initial state,
whose first apply is skipped.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ttt_jax.kernels_pallas.varying import varying_alike, varying_like

BASE_TOKENS = 32768  # of which z W^T exists in float32 at one time, at least


class Scalars(NamedTuple):
    """What a launch reads from small arrays in device memory."""

    i: jax.Array  # [1] int32: the launch's chunk
    row: jax.Array  # [1] int32: where it starts in `base`
    lr: jax.Array  # [1] float32
    keep_BM: jax.Array  # [B, M] float32: what an update multiplies the state before it by
    live_BM: jax.Array  # [B, M] int32: 0 where R is zero


class Launches(Protocol):
    """The kernels, each for chunk `scalars.i`.

    Arrays in the place of results are updated in place. `base_BTD`, S and G are float32, the
    others are of the op's dtype.
    """

    def forward(
        self, C: int, scalars: Scalars, z_BTF, u_BTD, base_BTD, o_BTD, S_BDF, R_2BDF
    ) -> tuple[Any, Any, Any]:
        """Return o, S, R.

        `base_BTD` holds these tokens or more, the first chunk from `scalars.row` on.
        """
        ...

    def replay(
        self, C: int, scalars: Scalars, z_BTF, u_BTD, do_BTD, w_DF, dz_BTF, S_BDF, R_2BDF
    ) -> tuple[Any, Any, Any]:
        """Return dz, S, R."""
        ...

    def reverse(
        self,
        C: int,
        scalars: Scalars,
        z_BTF,
        u_BTD,
        v_BTD,
        do_BTD,
        dz_BTF,
        dv_BTD,
        G_BDF,
        R_2BDF,
    ) -> tuple[Any, Any, Any, Any, Any]:
        """Return dz, dv, G, R, and partial sums of <v, z R^T>, an array of any shape."""
        ...


def in_place_ttt(
    launches: Launches, z_BTF, v_BTD, w_DF, *, lr, chunk_size, state_BDF, keep_BM=None
):
    """Scan over the chunks with these launches. Same contract as `in_place_ttt_xla`.

    Args:
      z_BTF, v_BTD, w_DF: of one dtype.
      lr, state_BDF, keep_BM: float32; keep as there, None: no documents.

    Returns:
      o_BTD in that dtype, and the state after the last whole chunk, float32.
    """
    arrays = varying_alike(z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM)
    results: Any = _in_place_ttt(launches, chunk_size, *arrays)
    return results


def scaled(v_BTD, lr):
    """lr v in v's dtype: sums start from the state, so what they sum has to have its scale."""
    return (lr * v_BTD.astype(jnp.float32)).astype(v_BTD.dtype)


def slow_apply(z_BTF, w_DF):
    """Compute z W^T of many chunks in one matmul, float32."""
    with jax.named_scope("ttt_apply_slow"):
        return dot("btf,df->btd", z_BTF, w_DF)


def dot(subscripts, x, y):
    precision = jax.lax.Precision.DEFAULT if x.dtype.itemsize <= 2 else jax.lax.Precision.HIGHEST
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32, precision=precision)


def _scan(step, carry, chunks: range, reverse=False):
    """`carry` after `step(carry, i)` for all chunks. With no chunk nothing is traced."""

    def body(carry, i):
        return step(carry, i), None

    if not chunks:
        return carry
    return jax.lax.scan(body, carry, jnp.arange(chunks.start, chunks.stop), reverse=reverse)[0]


def _stretches(B: int, M: int, C: int) -> list[range]:
    """Chunks whose z W^T exists at one time: a long sequence needs no float32 array of its length.

    Only for one sequence: there the tokens of a stretch are a contiguous part of z, which XLA hands
    to cuBLAS without a copy.
    """
    size = max(BASE_TOKENS // C, -(-M // 8), 1) if B == 1 else max(M, 1)
    return [range(first, min(first + size, M)) for first in range(0, M, size)]


def factors(keep_BM, B, M):
    """keep of every whole chunk."""
    return jnp.ones((B, M), jnp.float32) if keep_BM is None else keep_BM[:, :M].astype(jnp.float32)


def _slots(R_BDF):
    """Both slots of R; chunk 0 reads the first and writes the second."""
    return jnp.stack([R_BDF, R_BDF])


def _empty_like(x_BTX):
    """A result's memory, every part of which some launch writes."""
    return jax.lax.empty(x_BTX.shape, x_BTX.dtype)


def _scalars(i, row, lr, keep_BM, live_BM):
    i, row = (jnp.asarray(x, jnp.int32).reshape(1) for x in (i, row))
    return Scalars(i, row, lr.reshape(1), keep_BM, live_BM.astype(jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_place_ttt(launches, C, z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM):
    return _forward(launches, C, z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM)[0]


def _forward(launches, C, z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM):
    (B, T, _), dtype = z_BTF.shape, z_BTF.dtype
    M, tail = divmod(T, C)
    residuals = z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM
    z_whole_BTF, z_tail_BCF = split(z_BTF, M * C)
    v_whole_BTD, _ = split(v_BTD, M * C)
    factors_BM, u_BTD = factors(keep_BM, B, M), scaled(v_whole_BTD, lr)
    live_B1 = jnp.any(state_BDF != 0, axis=(1, 2))[:, None]
    live_BM = jnp.concatenate([live_B1, jnp.ones((B, max(M - 1, 0)), bool)], axis=1)

    def step(base_BTD, first, carry, i):
        with jax.named_scope("ttt_forward"):
            scalars = _scalars(i, (i - first) * C, lr, factors_BM, live_BM)
            results = launches.forward(C, scalars, z_whole_BTF, u_BTD, base_BTD, *carry)
            return varying_like(z_BTF, results)

    carry = _empty_like(v_whole_BTD), state_BDF, _slots(state_BDF.astype(dtype))
    carry = varying_like(z_BTF, carry)
    for chunks in _stretches(B, M, C):
        if chunks.start:  # not all of z W^T before the first launch, which XLA prefers
            w_DF, carry = jax.lax.optimization_barrier((w_DF, carry))
        base_BTD = slow_apply(z_whole_BTF[:, chunks.start * C : chunks.stop * C], w_DF)
        carry = _scan(functools.partial(step, base_BTD, chunks.start), carry, chunks)
    o_BTD, S_BDF, R_2BDF = carry
    if tail:  # the trailing partial chunk reads the state and does not write it
        o_BCD = slow_apply(z_tail_BCF, w_DF) + dot("bcf,bdf->bcd", z_tail_BCF, R_2BDF[M % 2])
        o_BTD = jnp.concatenate([o_BTD, o_BCD.astype(dtype)], axis=1)
    return (o_BTD, S_BDF), residuals


def split(x_BTX, size) -> tuple[Any, Any]:
    """Whole chunks, which launches read as an array of their own, and the rest.

    No copy where there is no rest.
    """
    return (x_BTX, None) if x_BTX.shape[1] == size else (x_BTX[:, :size], x_BTX[:, size:])


class _Whole(NamedTuple):
    """What the launches of the backward read, of whole chunks."""

    z_BTF: Any
    u_BTD: Any
    v_BTD: Any
    do_BTD: Any
    w_DF: Any
    lr: Any
    factors_BM: Any
    live_BM: Any


def sum_of(w_DF, S_BDF, dtype):
    """W + S, rounded once."""
    return (w_DF.astype(jnp.float32)[None] + S_BDF).astype(dtype)


def _backward(launches, C, residuals, cotangents):
    z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM = residuals
    do_BTD, G_BDF = cotangents
    B, T, _ = z_BTF.shape
    M, tail = divmod(T, C)
    z_BTF, z_tail_BCF = split(z_BTF, M * C)
    do_BTD, do_tail_BCD = split(do_BTD, M * C)
    v_BTD, _ = split(v_BTD, M * C)
    factors_BM, u_BTD = factors(keep_BM, B, M), scaled(v_BTD, lr)
    live_BM = jnp.ones((B, M), jnp.int32)
    whole = _Whole(z_BTF, u_BTD, v_BTD, do_BTD, w_DF, lr, factors_BM, live_BM)

    dz_BTF, R_2BDF = _replay(launches, C, whole, state_BDF)

    if keep_BM is None:
        dw_DF = -G_BDF.sum(axis=0)  # what G starts with is not the slow weight's
    else:  # G drops something: one product costs less than to collect it chunk by chunk
        with jax.named_scope("ttt_grad_slow"):
            dw_DF = dot("btd,btf->df", cotangents[0], residuals[0])
    dz_tail_BCF = None
    if tail:
        dz_tail_BCF = dot("bcd,bdf->bcf", do_tail_BCD, R_2BDF[M % 2]).astype(z_BTF.dtype)
        G_BDF = G_BDF + dot("bcd,bcf->bdf", do_tail_BCD, z_tail_BCF)

    dz_BTF, dv_BTD, G_BDF, dlr = _reverse(launches, C, whole, dz_BTF, G_BDF)
    dw_DF = dw_DF + G_BDF.sum(axis=0) if keep_BM is None else dw_DF
    return gradients(residuals, dz_BTF, dv_BTD, dw_DF, dlr, G_BDF, dz_tail_BCF)


def gradients(residuals, dz_BTF, dv_BTD, dw_DF, dlr, G_BDF, dz_tail_BCF):
    """The op's gradients, in the order of its arguments, from those of whole chunks.

    Args:
      dw_DF: of all tokens, float32.
      G_BDF: that of the state that the op started with.
      dz_tail_BCF: of the trailing partial chunk, whose v is never read; None without one.
    """
    _, _, w_DF, lr, state_BDF, keep_BM = residuals
    if dz_tail_BCF is not None:
        dz_BTF = jnp.concatenate([dz_BTF, dz_tail_BCF], axis=1)
        dv_BTD = jnp.pad(dv_BTD, ((0, 0), (0, dz_tail_BCF.shape[1]), (0, 0)))
    dkeep_BM = None if keep_BM is None else jnp.zeros_like(keep_BM)
    dstate_BDF = None if state_BDF is None else G_BDF
    return dz_BTF, dv_BTD, dw_DF.astype(w_DF.dtype), dlr.astype(lr.dtype), dstate_BDF, dkeep_BM


def _replay(launches, C, whole, state_BDF):
    """Go forward in time again. Returns dz = do (W + S), and both slots of R."""
    z_BTF, w_DF = whole.z_BTF, whole.w_DF

    def step(carry, i):
        with jax.named_scope("ttt_replay"):
            scalars = _scalars(i, 0, whole.lr, whole.factors_BM, whole.live_BM)
            results = launches.replay(C, scalars, z_BTF, whole.u_BTD, whole.do_BTD, w_DF, *carry)
            return varying_like(z_BTF, results)

    weight_BDF = sum_of(w_DF, state_BDF, z_BTF.dtype)
    carry = varying_like(z_BTF, (_empty_like(z_BTF), state_BDF, _slots(weight_BDF)))
    dz_BTF, _, R_2BDF = _scan(step, carry, range(z_BTF.shape[1] // C))
    return dz_BTF, R_2BDF


def _reverse(launches, C, whole, dz_BTF, G_BDF):
    """Go backwards in time. Returns dz, dv, G, and dlr."""
    z_BTF, u_BTD, v_BTD, do_BTD = whole[:4]

    def step(carry, i):
        *carry, dlr = carry
        with jax.named_scope("ttt_reverse"):
            scalars = _scalars(i, 0, whole.lr, whole.factors_BM, whole.live_BM)
            results = launches.reverse(C, scalars, z_BTF, u_BTD, v_BTD, do_BTD, *carry)
            *carry, partial_dlr = varying_like(z_BTF, results)
            return (*carry, dlr + partial_dlr.sum())

    dv_BTD, dlr = _empty_like(v_BTD), jnp.zeros((), jnp.float32)
    R_2BDF = _slots(G_BDF.astype(z_BTF.dtype))  # chunk i reads slot i % 2
    carry = varying_like(z_BTF, (dz_BTF, dv_BTD, G_BDF, R_2BDF, dlr))
    carry = _scan(step, carry, range(z_BTF.shape[1] // C), reverse=True)
    dz_BTF, dv_BTD, G_BDF, _, dlr = carry
    return dz_BTF, dv_BTD, G_BDF, dlr


_in_place_ttt.defvjp(_forward, _backward)
