"""In-Place TTT as a scan over chunks whose products are GPU kernels: what `triton.py` and `gpu.py` have in common.

B batch, T tokens, D model width, F MLP width, C chunk size, M whole chunks, S accumulated update of the fast weight (D F), G
its gradient (D F), R what is read of S or G: a bf16 copy.

A chunk's products read only what the chunk before it left, so their output tiles share one grid and fill the machine together;
alone, z S^T has 80 tiles for an H100's 132 multiprocessors. A launch computes one chunk, or several where it can make their
tiles wait for each other.

    forward    o_i = base_i + z_i R^T              S += u_i^T z_i      R = bf16(S)        base = z W^T; u is lr v
    replay     dz_i = do_i R                       S += u_i^T z_i      R = bf16(W + S)    forward in time again
    reverse    dv_i = lr z_i R^T, dz_i += u_i R    G += do_i^T z_i     R = bf16(G)

An update writes S and R in one pass over the float32 state, which nothing else touches. R has two slots: chunk i reads one and
writes the other. Where a document starts, `keep` is 0 and the update before it leaves zeros; `live` is 0 for chunks that read
zeros, whose apply is skipped.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from kernels_pallas.varying import varying_alike, varying_like

BASE_TOKENS = 32768  # of which z W^T exists in float32 at one time, at least


class Scalars(NamedTuple):
    """What a launch reads from small arrays in device memory."""

    i: jax.Array  # [1] int32: the launch's first chunk
    row: jax.Array  # [1] int32: where it starts in `base`
    lr: jax.Array  # [1] float32
    keep_BM: jax.Array  # [B, M] float32: what an update multiplies its state by, last thing
    live_BM: jax.Array  # [B, M] int32: 0 where R is zero


class Launches(Protocol):
    """The three kernels, each for n chunks from `scalars.i` on. Arrays in the place of results are updated in place."""

    def make_u(self, v_BTD, lr) -> Any:
        """u as the launches take it: lr v, or v itself where they multiply the products by lr."""
        ...

    def chunks_per_launch(self, B: int, C: int, D: int, F: int) -> int:
        """The most chunks that one launch takes."""
        ...

    def forward(self, C: int, n: int, scalars: Scalars, z_BTF, u_BTD, base_BTD, o_BTD, S_BDF, R_2BDF) -> tuple[Any, Any, Any]:
        """o, S, R. `base_BTD`, float32, holds these tokens or more, the first chunk from `scalars.row` on."""
        ...

    def replay(
        self, C: int, n: int, scalars: Scalars, z_BTF, u_BTD, do_BTD, w_DF, dz_BTF, S_BDF, R_2BDF
    ) -> tuple[Any, Any, Any]:
        """dz, S, R."""
        ...

    def reverse(
        self, C: int, n: int, scalars: Scalars, z_BTF, u_BTD, v_BTD, do_BTD, dz_BTF, dv_BTD, dw_BDF, G_BDF, R_2BDF
    ) -> tuple[Any, Any, Any, Any, Any, Any]:
        """dz, dv, dW, G, R, and partial sums of <v, z R^T> in an array of any shape; from chunk `scalars.i` backwards.

        dW [B, D, F] float32 collects G wherever `keep` is 0; it is None where the caller has no documents.
        """
        ...


def in_place_ttt(launches: Launches, z_BTF, v_BTD, w_DF, *, lr, chunk_size, state_BDF, keep_BM=None):
    """Same contract as `ttt_jax.ops.xla.in_place_ttt_xla`; z, v and W share one dtype, lr, the state and keep are float32."""
    arrays = varying_alike(z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM)
    results: Any = _in_place_ttt(launches, chunk_size, *arrays)
    return results


def slow_apply(z_BTF, w_DF):
    """z W^T of many chunks in one matmul, float32."""
    with jax.named_scope("ttt_apply_slow"):
        return _dot("btf,df->btd", z_BTF, w_DF)


def _dot(subscripts, x, y):
    precision = jax.lax.Precision.DEFAULT if x.dtype.itemsize <= 2 else jax.lax.Precision.HIGHEST
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32, precision=precision)


def _scan(step, carry, chunks: range, span: int, reverse=False):
    """`carry` after `step(carry, i, n)` for launches of at most `span` chunks, n each, i the first that it takes.

    With no chunk nothing is traced.
    """
    if not chunks:
        return carry
    n = -(-len(chunks) // -(-len(chunks) // span))
    full, rest = divmod(len(chunks), n)
    at = lambda done: chunks.stop - 1 - done if reverse else chunks.start + done
    if full == 1:
        carry = step(carry, at(0), n)
    else:
        carry, _ = jax.lax.scan(lambda carry, k: (step(carry, at(k * n), n), None), carry, jnp.arange(full))
    return step(carry, at(full * n), rest) if rest else carry


def _stretches(B: int, M: int, C: int) -> list[range]:
    """Chunks whose z W^T exists at one time, so that a long sequence needs no array of its length in float32.

    Only for one sequence: there the tokens of a stretch are a contiguous piece of z, which XLA hands to cuBLAS without a copy.
    """
    size = max(BASE_TOKENS // C, -(-M // 8), 1) if B == 1 else max(M, 1)
    return [range(first, min(first + size, M)) for first in range(0, M, size)]


def _factors(keep_BM, B, M):
    """keep of every chunk and of what follows the last whole one: [B, M + 1]."""
    if keep_BM is None:
        return jnp.ones((B, M + 1), jnp.float32)
    keep_BM = keep_BM.astype(jnp.float32)
    return jnp.concatenate([keep_BM, jnp.ones((B, M + 1 - keep_BM.shape[1]), jnp.float32)], axis=1)


def _slots(R_BDF):
    """Both slots of R; chunk 0 reads the first and writes the second."""
    return jnp.stack([R_BDF, R_BDF])


def _scalars(i, row, lr, keep_BM, live_BM):
    i, row = (jnp.asarray(x, jnp.int32).reshape(1) for x in (i, row))
    return Scalars(i, row, lr.reshape(1), keep_BM, live_BM.astype(jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_place_ttt(launches, C, z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM):
    return _forward(launches, C, z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM)[0]


def _enter(state_BDF, factors_BM):
    """The state that the first chunk reads, and which chunks read anything at all."""
    S_BDF = factors_BM[:, 0, None, None] * state_BDF
    live_B = jnp.any(S_BDF != 0, axis=(1, 2))
    return S_BDF, jnp.concatenate([live_B[:, None], factors_BM[:, 1:-1] != 0], axis=1)


def _forward(launches, C, z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM):
    (B, T, _), dtype = z_BTF.shape, z_BTF.dtype
    M, tail = divmod(T, C)
    residuals = z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM
    (z_whole_BTF, z_tail_BCF), (v_whole_BTD, _) = (_split(x, M * C) for x in (z_BTF, v_BTD))
    factors_BM, u_BTD = _factors(keep_BM, B, M), launches.make_u(v_whole_BTD, lr)
    S_BDF, live_BM = _enter(state_BDF, factors_BM)
    span = launches.chunks_per_launch(B, C, *w_DF.shape)

    def step(base_BTD, first, carry, i, n):
        with jax.named_scope("ttt_forward"):
            scalars = _scalars(i, (i - first) * C, lr, factors_BM[:, 1:], live_BM)
            return varying_like(z_BTF, launches.forward(C, n, scalars, z_whole_BTF, u_BTD, base_BTD, *carry))

    carry = varying_like(z_BTF, (jnp.zeros_like(v_whole_BTD), S_BDF, _slots(S_BDF.astype(dtype))))
    for chunks in _stretches(B, M, C):
        if chunks.start:  # not all of z W^T before the first launch, which XLA prefers
            w_DF, carry = jax.lax.optimization_barrier((w_DF, carry))
        base_BTD = slow_apply(z_whole_BTF[:, chunks.start * C : chunks.stop * C], w_DF)
        carry = _scan(functools.partial(step, base_BTD, chunks.start), carry, chunks, span)
    o_BTD, S_BDF, R_2BDF = carry
    if tail:  # the trailing partial chunk reads the state and does not write it
        o_BCD = slow_apply(z_tail_BCF, w_DF) + _dot("bcf,bdf->bcd", z_tail_BCF, R_2BDF[M % 2])
        o_BTD = jnp.concatenate([o_BTD, o_BCD.astype(dtype)], axis=1)
    return (o_BTD, S_BDF), residuals


def _split(x_BTX, size) -> tuple[Any, Any]:
    """Whole chunks, which launches read as an array of their own, and the rest. No copy where there is no rest."""
    return (x_BTX, None) if x_BTX.shape[1] == size else (x_BTX[:, :size], x_BTX[:, size:])


def _backward(launches, C, residuals, cotangents):
    z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM = residuals
    do_BTD, G_BDF = cotangents
    (B, T, _), dtype = z_BTF.shape, z_BTF.dtype
    M, tail = divmod(T, C)
    (z_BTF, z_tail_BCF), (do_BTD, do_tail_BCD), (v_BTD, _) = (_split(x, M * C) for x in (z_BTF, do_BTD, v_BTD))
    factors_BM, u_BTD = _factors(keep_BM, B, M), launches.make_u(v_BTD, lr)
    all_live_BM = jnp.ones((B, M), jnp.int32)

    span = launches.chunks_per_launch(B, C, *w_DF.shape)

    def replay(carry, i, n):
        with jax.named_scope("ttt_replay"):
            scalars = _scalars(i, 0, lr, factors_BM[:, 1:], all_live_BM)
            return varying_like(z_BTF, launches.replay(C, n, scalars, z_BTF, u_BTD, do_BTD, w_DF, *carry))

    S_BDF, _ = _enter(state_BDF, factors_BM)
    weight_BDF = (w_DF.astype(jnp.float32)[None] + S_BDF).astype(dtype)  # gradients tolerate the rounding of W + S
    dz_BTF, _, R_2BDF = _scan(replay, varying_like(z_BTF, (jnp.zeros_like(z_BTF), S_BDF, _slots(weight_BDF))), range(M), span)

    dw_DF = -G_BDF.sum(axis=0)  # what G starts with is not the slow weight's
    if tail:
        dz_tail_BCF = _dot("bcd,bdf->bcf", do_tail_BCD, R_2BDF[M % 2]).astype(dtype)
        G_BDF = G_BDF + _dot("bcd,bcf->bdf", do_tail_BCD, z_tail_BCF)
        # Where a document starts G returns to zero; what it held is the share of dW of the tokens from there on.
        keep_B11 = factors_BM[:, M, None, None]
        dw_DF = dw_DF + (G_BDF - keep_B11 * G_BDF).sum(axis=0)
        G_BDF = keep_B11 * G_BDF

    def reverse(carry, i, n):
        dz_BTF, dv_BTD, collected_BDF, G_BDF, R_2BDF, dlr = carry
        with jax.named_scope("ttt_reverse"):
            scalars = _scalars(i, 0, lr, factors_BM[:, :-1], all_live_BM)
            *carry, partial_dlr = varying_like(
                z_BTF,
                launches.reverse(C, n, scalars, z_BTF, u_BTD, v_BTD, do_BTD, dz_BTF, dv_BTD, collected_BDF, G_BDF, R_2BDF),
            )
            return (*carry, dlr + partial_dlr.sum())

    collected_BDF = None if keep_BM is None else jnp.zeros_like(G_BDF)
    # Chunk i reads slot i % 2.
    carry = (dz_BTF, jnp.zeros_like(v_BTD), collected_BDF, G_BDF, _slots(G_BDF.astype(dtype)), jnp.zeros((), jnp.float32))
    carry = _scan(reverse, varying_like(z_BTF, carry), range(M), span, reverse=True)
    dz_BTF, dv_BTD, collected_BDF, G_BDF, _, dlr = carry
    dw_DF = dw_DF + G_BDF.sum(axis=0)
    if collected_BDF is not None:
        dw_DF = dw_DF + collected_BDF.sum(axis=0)
    if tail:  # v of a partial chunk is never read
        dz_BTF = jnp.concatenate([dz_BTF, dz_tail_BCF], axis=1)
        dv_BTD = jnp.pad(dv_BTD, ((0, 0), (0, tail), (0, 0)))
    dkeep_BM = None if keep_BM is None else jnp.zeros_like(keep_BM)
    return dz_BTF, dv_BTD, dw_DF.astype(w_DF.dtype), dlr.astype(lr.dtype), G_BDF, dkeep_BM


_in_place_ttt.defvjp(_forward, _backward)
