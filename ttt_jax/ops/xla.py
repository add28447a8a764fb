"""In-Place TTT in plain JAX: `jax.lax.scan` over chunks with the state as carry and a closed-form backward.

B batch, T tokens, D model width, F MLP width, C chunk size, M whole chunks, S accumulated update of the fast weight
(D F), G its gradient (D F).

    forward    o_i = z_i W^T + z_i S_i^T           S_{i+1} = keep_{i+1} (S_i + lr v_i^T z_i)
    backward   dz_i = do_i (W + S_i) + lr v_i G_i  dv_i = lr z_i G_i^T      G_{i-1} = keep_i (G_i + do_i^T z_i)
               dW = sum_i do_i^T z_i, which G has accumulated already: it is collected where G is reset and at the end

W and S are applied by two matmuls, not as one bf16 matrix W + S: rounding the sum to bf16 would swallow an update that is
small beside W (docs/numerics.md). Only z, v, W and the initial state are kept for the backward, which runs the states
forward again; its temporary memory does not depend on the number of chunks (arXiv 2604.06169, section 3; docs/design.md).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


_ROW_BY_ROW_BYTES = 16 * 2**20  # states from this size on are worked off one row of the batch at a time


def precision_for(dtype):
    """float32 inputs ask for float32 products; bf16 ones are exact in any mode."""
    return jax.lax.Precision.DEFAULT if jnp.dtype(dtype).itemsize <= 2 else jax.lax.Precision.HIGHEST


def accumulator(dtype):
    """The dtype that sums are kept in: float32, and float64 for float64."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def in_place_ttt_xla(z_BTF, v_BTD, w_DF, *, lr, chunk_size, state_BDF, keep_BM=None):
    """Apply and update chunk by chunk; see `ttt_jax.ops.in_place_ttt`.

    Args:
      keep_BM: float, what the state is multiplied by at the start of each chunk (a trailing partial one included): 0 at a
        document's first chunk, else 1. None means all ones. Rows of v that must not be written are zero already.
    """
    return _in_place_ttt(chunk_size, z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM)


def _dot(subscripts, x, y, acc):
    return jnp.einsum(subscripts, x, y, preferred_element_type=acc, precision=precision_for(x.dtype))


class _Tiles:
    """Where the scans stand: R rows of the batch at a time, chunk by chunk, and the partial chunk at the end."""

    def __init__(self, B: int, T: int, C: int, state_bytes: int):
        # A large state stays in the cache while one row is worked off; small ones share their matmuls instead.
        self.R = 1 if state_bytes >= _ROW_BY_ROW_BYTES else B
        self.C, self.M, self.tail, self.groups = C, T // C, T % C, B // self.R

    def chunk(self, x_BTX, g, i, size=None):
        return jax.lax.dynamic_slice(x_BTX, (g * self.R, i * self.C, 0), (self.R, size or self.C, x_BTX.shape[2]))

    def put(self, x_BTX, g, i, piece_RCX):
        return jax.lax.dynamic_update_slice(x_BTX, piece_RCX.astype(x_BTX.dtype), (g * self.R, i * self.C, 0))

    def rows(self, x_BX, g):
        return jax.lax.dynamic_slice_in_dim(x_BX, g * self.R, self.R, axis=0)

    def put_rows(self, x_BX, g, rows_RX):
        return jax.lax.dynamic_update_slice_in_dim(x_BX, rows_RX, g * self.R, axis=0)

    def keep(self, keep_BM, g, i):
        """[R, 1, 1] factors on the state at the start of chunk i, or None."""
        if keep_BM is None:
            return None
        return jax.lax.dynamic_slice(keep_BM, (g * self.R, i), (self.R, 1))[:, :, None]


def _times(keep_R11, S_RDF):
    return S_RDF if keep_R11 is None else keep_R11 * S_RDF


def _scaled(v_RCD, lr):
    return (lr * v_RCD.astype(lr.dtype)).astype(v_RCD.dtype)


def _write(S_RDF, v_RCD, z_RCF, lr):
    """S + lr v^T z. The factor goes into v, so that the matmul can accumulate straight into S."""
    return S_RDF + _dot("bcd,bcf->bdf", _scaled(v_RCD, lr), z_RCF, S_RDF.dtype)


def _scan(step, carry, length, reverse=False):
    """`carry` after `step(carry, i)` for all i; with none, nothing is traced, because there may be no chunk to slice."""
    body = lambda carry, i: (step(carry, i), None)
    return jax.lax.scan(body, carry, jnp.arange(length), reverse=reverse)[0] if length else carry


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_place_ttt(C, z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM):
    return _forward(C, z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM)[0]


def _forward(C, z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM):
    acc, dtype = state_BDF.dtype, z_BTF.dtype
    tiles = _Tiles(*z_BTF.shape[:2], C, w_DF.size * acc.itemsize)
    with jax.named_scope("ttt_apply_slow"):
        # One matmul over all tokens fills the machine better than one per chunk.
        base_BTD = _dot("btf,df->btd", z_BTF, w_DF, acc)

    def apply(o_BTD, S_RDF, g, i, size):
        with jax.named_scope("ttt_apply"):
            fast_RCD = _dot("bcf,bdf->bcd", tiles.chunk(z_BTF, g, i, size), S_RDF.astype(dtype), acc)
            return tiles.put(o_BTD, g, i, tiles.chunk(base_BTD, g, i, size) + fast_RCD)

    def rows(carry, g):
        def step(carry, i):
            o_BTD, S_RDF = carry
            S_RDF = _times(tiles.keep(keep_BM, g, i), S_RDF)
            o_BTD = apply(o_BTD, S_RDF, g, i, C)
            with jax.named_scope("ttt_update"):
                return o_BTD, _write(S_RDF, tiles.chunk(v_BTD, g, i), tiles.chunk(z_BTF, g, i), lr)

        o_BTD, final_BDF = carry
        o_BTD, S_RDF = _scan(step, (o_BTD, tiles.rows(state_BDF, g)), tiles.M)
        if tiles.tail:  # the trailing partial chunk reads the state and does not write it
            S_RDF = _times(tiles.keep(keep_BM, g, tiles.M), S_RDF)
            o_BTD = apply(o_BTD, S_RDF, g, tiles.M, tiles.tail)
        return o_BTD, tiles.put_rows(final_BDF, g, S_RDF)

    carry = (jnp.zeros(base_BTD.shape, dtype), jnp.zeros_like(state_BDF))
    return _scan(rows, carry, tiles.groups), (z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM)


def _backward(C, residuals, cotangents):
    z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM = residuals
    do_BTD, dfinal_BDF = cotangents
    acc, dtype = state_BDF.dtype, z_BTF.dtype
    tiles = _Tiles(*z_BTF.shape[:2], C, w_DF.size * acc.itemsize)
    M, tail = tiles.M, tiles.tail

    def read_grad(dz_BTF, S_RDF, g, i, size):
        # Gradients tolerate the rounding of W + S, so one matmul serves both.
        with jax.named_scope("ttt_grad_apply"):
            weight_RDF = (w_DF.astype(acc)[None] + S_RDF).astype(dtype)
            return tiles.put(dz_BTF, g, i, _dot("bcd,bdf->bcf", tiles.chunk(do_BTD, g, i, size), weight_RDF, acc))

    def collect(dw_DF, G_RDF, g, i):
        """Reset G where a document starts; what it held is the share of dW of the tokens from there on."""
        keep_R11 = tiles.keep(keep_BM, g, i)
        if keep_R11 is None:
            return dw_DF, G_RDF
        reset = lambda: (dw_DF + (G_RDF - keep_R11 * G_RDF).sum(axis=0), keep_R11 * G_RDF)
        return jax.lax.cond(jnp.any(keep_R11 != 1), reset, lambda: (dw_DF, G_RDF))

    def rows(carry, g):
        dz_BTF, dv_BTD, dlr, dw_DF, dstate_BDF = carry

        def replay(carry, i):
            dz_BTF, S_RDF = carry
            S_RDF = _times(tiles.keep(keep_BM, g, i), S_RDF)
            dz_BTF = read_grad(dz_BTF, S_RDF, g, i, C)
            with jax.named_scope("ttt_update"):
                return dz_BTF, _write(S_RDF, tiles.chunk(v_BTD, g, i), tiles.chunk(z_BTF, g, i), lr)

        # The state after the last token is not read by anything, so the last update need not be replayed.
        read_last = (M, tail) if tail else (M - 1, C)
        dz_BTF, S_RDF = _scan(replay, (dz_BTF, tiles.rows(state_BDF, g)), read_last[0])
        S_RDF = _times(tiles.keep(keep_BM, g, read_last[0]), S_RDF)
        dz_BTF = read_grad(dz_BTF, S_RDF, g, *read_last)

        G_RDF = tiles.rows(dfinal_BDF, g)
        dw_DF = dw_DF - G_RDF.sum(axis=0)  # what G starts with is not the slow weight's
        if tail:
            do_tail_RCD, z_tail_RCF = tiles.chunk(do_BTD, g, M, tail), tiles.chunk(z_BTF, g, M, tail)
            dw_DF, G_RDF = collect(dw_DF, G_RDF + _dot("bcd,bcf->bdf", do_tail_RCD, z_tail_RCF, acc), g, M)

        def reverse(carry, i):
            dz_BTF, dv_BTD, dlr, dw_DF, G_RDF = carry
            z_RCF, v_RCD = tiles.chunk(z_BTF, g, i), tiles.chunk(v_BTD, g, i)
            with jax.named_scope("ttt_grad_update"):
                G_cast_RDF = G_RDF.astype(dtype)
                dv_RCD = _dot("bcf,bdf->bcd", z_RCF, G_cast_RDF, acc)
                dz_RCF = tiles.chunk(dz_BTF, g, i).astype(acc)
                dz_RCF = dz_RCF + _dot("bcd,bdf->bcf", _scaled(v_RCD, lr), G_cast_RDF, acc)
            with jax.named_scope("ttt_grad_state"):
                G_RDF = G_RDF + _dot("bcd,bcf->bdf", tiles.chunk(do_BTD, g, i), z_RCF, acc)
                dw_DF, G_RDF = collect(dw_DF, G_RDF, g, i)
            dlr = dlr + jnp.sum(v_RCD.astype(acc) * dv_RCD)
            return tiles.put(dz_BTF, g, i, dz_RCF), tiles.put(dv_BTD, g, i, lr * dv_RCD), dlr, dw_DF, G_RDF

        carry = (dz_BTF, dv_BTD, dlr, dw_DF, G_RDF)
        dz_BTF, dv_BTD, dlr, dw_DF, G_RDF = _scan(reverse, carry, M, reverse=True)
        return dz_BTF, dv_BTD, dlr, dw_DF + G_RDF.sum(axis=0), tiles.put_rows(dstate_BDF, g, G_RDF)

    carry = (
        jnp.zeros_like(z_BTF),
        jnp.zeros_like(v_BTD),
        jnp.zeros((), acc),
        jnp.zeros(w_DF.shape, acc),
        jnp.zeros_like(state_BDF),
    )
    dz_BTF, dv_BTD, dlr, dw_DF, dstate_BDF = _scan(rows, carry, tiles.groups)
    dkeep_BM = None if keep_BM is None else jnp.zeros_like(keep_BM)
    return dz_BTF, dv_BTD, dw_DF.astype(w_DF.dtype), dlr.astype(lr.dtype), dstate_BDF, dkeep_BM


_in_place_ttt.defvjp(_forward, _backward)
