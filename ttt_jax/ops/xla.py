"""In-Place TTT in plain JAX: `jax.lax.scan` over chunks with the state as carry and a closed-form backward.

B batch, T tokens, D model width, F MLP width, C chunk size, M whole chunks, S accumulated update of the fast weight
(D F), G its gradient (D F).

    forward    o_i = z_i W^T + z_i S_i^T           S_{i+1} = keep_{i+1} (S_i + lr v_i^T z_i)
    backward   dz_i = do_i (W + S_i) + lr v_i G_i  dv_i = lr z_i G_i^T      G_{i-1} = keep_i (G_i + do_i^T z_i)

W and S are applied by two matmuls, not as one bf16 matrix W + S: rounding the sum to bf16 would swallow an update that is
small beside W (docs/numerics.md). Only z, v, W and the initial state are kept for the backward, which runs the states
forward again; its temporary memory does not depend on the number of chunks (arXiv 2604.06169, section 3; docs/design.md).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


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


def _chunk(x_BTX, i, C):
    return jax.lax.dynamic_slice_in_dim(x_BTX, i * C, C, axis=1)


def _put(x_BTX, i, piece_BCX):
    C = piece_BCX.shape[1]
    return jax.lax.dynamic_update_slice_in_dim(x_BTX, piece_BCX.astype(x_BTX.dtype), i * C, axis=1)


def _keep(S_BDF, keep_BM, i):
    if keep_BM is None:
        return S_BDF
    keep_B = jax.lax.dynamic_index_in_dim(keep_BM, i, axis=1, keepdims=False).astype(S_BDF.dtype)
    return keep_B[:, None, None] * S_BDF


def _scan(step, carry, M, reverse=False):
    """Run `step` over the M whole chunks; with none there is no chunk to slice, so the body is not even traced."""
    return jax.lax.scan(step, carry, jnp.arange(M), reverse=reverse)[0] if M else carry


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_place_ttt(C, z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM):
    return _forward(C, z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM)[0]


def _forward(C, z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM):
    acc, dtype, T = state_BDF.dtype, z_BTF.dtype, z_BTF.shape[1]
    M = T // C
    with jax.named_scope("ttt_apply_slow"):
        # One matmul over all tokens fills the machine better than one per chunk.
        base_BTD = _dot("btf,df->btd", z_BTF, w_DF, acc)

    def step(carry, i):
        o_BTD, S_BDF = carry
        z_BCF, v_BCD = _chunk(z_BTF, i, C), _chunk(v_BTD, i, C)
        S_BDF = _keep(S_BDF, keep_BM, i)
        with jax.named_scope("ttt_apply"):
            fast_BCD = _dot("bcf,bdf->bcd", z_BCF, S_BDF.astype(dtype), acc)
        with jax.named_scope("ttt_update"):
            S_BDF = S_BDF + lr * _dot("bcd,bcf->bdf", v_BCD, z_BCF, acc)
        return (_put(o_BTD, i, _chunk(base_BTD, i, C) + fast_BCD), S_BDF), None

    o_BTD, S_BDF = _scan(step, (jnp.zeros(base_BTD.shape, dtype), state_BDF), M)
    if T % C:  # the trailing partial chunk reads the state and does not write it
        S_BDF = _keep(S_BDF, keep_BM, M)
        tail_BCD = base_BTD[:, M * C :] + _dot("bcf,bdf->bcd", z_BTF[:, M * C :], S_BDF.astype(dtype), acc)
        o_BTD = jax.lax.dynamic_update_slice_in_dim(o_BTD, tail_BCD.astype(dtype), M * C, axis=1)
    return (o_BTD, S_BDF), (z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM)


def _backward(C, residuals, cotangents):
    z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM = residuals
    do_BTD, G_BDF = cotangents
    acc, dtype, T = state_BDF.dtype, z_BTF.dtype, z_BTF.shape[1]
    M = T // C

    with jax.named_scope("ttt_grad_slow"):
        dw_DF = _dot("btd,btf->df", do_BTD, z_BTF, acc).astype(w_DF.dtype)

    def read_grad(do_BCD, S_BDF):  # gradients tolerate the rounding of W + S, so one matmul serves both
        return _dot("bcd,bdf->bcf", do_BCD, (w_DF.astype(acc)[None] + S_BDF).astype(dtype), acc)

    def replay(carry, i):
        dz_BTF, S_BDF = carry
        S_BDF = _keep(S_BDF, keep_BM, i)
        with jax.named_scope("ttt_grad_apply"):
            dz_BTF = _put(dz_BTF, i, read_grad(_chunk(do_BTD, i, C), S_BDF))
        with jax.named_scope("ttt_update"):
            S_BDF = S_BDF + lr * _dot("bcd,bcf->bdf", _chunk(v_BTD, i, C), _chunk(z_BTF, i, C), acc)
        return (dz_BTF, S_BDF), None

    dz_BTF, S_BDF = _scan(replay, (jnp.zeros_like(z_BTF), state_BDF), M)
    if T % C:
        z_tail_BCF, do_tail_BCD = z_BTF[:, M * C :], do_BTD[:, M * C :]
        dz_tail_BCF = read_grad(do_tail_BCD, _keep(S_BDF, keep_BM, M)).astype(dtype)
        dz_BTF = jax.lax.dynamic_update_slice_in_dim(dz_BTF, dz_tail_BCF, M * C, axis=1)
        G_BDF = _keep(G_BDF + _dot("bcd,bcf->bdf", do_tail_BCD, z_tail_BCF, acc), keep_BM, M)

    def reverse(carry, i):
        dz_BTF, dv_BTD, dlr, G_BDF = carry
        z_BCF, v_BCD = _chunk(z_BTF, i, C), _chunk(v_BTD, i, C)
        with jax.named_scope("ttt_grad_update"):
            G_cast_BDF = G_BDF.astype(dtype)
            dv_BCD = _dot("bcf,bdf->bcd", z_BCF, G_cast_BDF, acc)
            dz_BCF = lr * _dot("bcd,bdf->bcf", v_BCD, G_cast_BDF, acc)
        with jax.named_scope("ttt_grad_state"):
            G_BDF = _keep(G_BDF + _dot("bcd,bcf->bdf", _chunk(do_BTD, i, C), z_BCF, acc), keep_BM, i)
        dz_BTF = _put(dz_BTF, i, _chunk(dz_BTF, i, C).astype(acc) + dz_BCF)
        return (dz_BTF, _put(dv_BTD, i, lr * dv_BCD), dlr + jnp.sum(v_BCD.astype(acc) * dv_BCD), G_BDF), None

    carry = (dz_BTF, jnp.zeros_like(v_BTD), jnp.zeros((), acc), G_BDF)
    dz_BTF, dv_BTD, dlr, G_BDF = _scan(reverse, carry, M, reverse=True)
    dkeep_BM = None if keep_BM is None else jnp.zeros_like(keep_BM)
    return dz_BTF, dv_BTD, dw_DF, dlr.astype(lr.dtype), G_BDF, dkeep_BM


_in_place_ttt.defvjp(_forward, _backward)
