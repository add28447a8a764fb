"""In-Place TTT in plain JAX: `jax.lax.scan` over chunks with the state as carry and a closed-form
backward.

B batch, T tokens, D model width, F MLP width, C chunk size, M whole chunks, S accumulated update of
the fast weight (D F), G its gradient (D F).

    forward    o_i = z_i W^T + z_i S_i^T
               S_{i+1} = keep_i S_i + lr v_i^T z_i
    backward   dz_i = do_i (W + S_i) + lr v_i G_i
               dv_i = lr z_i G_i^T
               G_{i-1} = keep_i G_i + do_i^T z_i
               dW = sum_i do_i^T z_i, which G has accumulated already: it is collected where G is
               reset and at the end

W and S are applied by two matmuls, not as one bf16 matrix W + S, unless `apply` is "fused":
rounding the sum to bf16 swallows an update that is small beside W (docs/numerics.md). Only z, v, W
and the initial state are kept for the backward, which runs the states forward again; its temporary
memory does not depend on the number of chunks (arXiv 2604.06169, section 3; docs/design.md). What
is known to be zero is not computed with: no initial state is nothing to apply to the first chunk,
and where no gradient reaches the final state, G is nothing to the last one.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ttt_jax.ops.numerics import dot


def in_place_ttt_xla(
    z_BTF, v_BTD, w_DF, *, lr, chunk_size, state_BDF, keep_BM=None, apply: str = "split"
):
    """Apply and update chunk by chunk; see `ttt_jax.ops.ttt.api`.

    Args:
      state_BDF: None is zero.
      keep_BM: float, what each chunk's update multiplies the state before it by: 0 where that
        state's document ends, else 1. None means all ones. A trailing partial chunk has no update;
        if there is a factor for it, it is not read. Rows of v that must not be written are zero
        already.
      apply: "split", or "fused"; a single token is applied in two products all the same.
    """
    fused = apply == "fused" and z_BTF.shape[1] > 1
    return _in_place_ttt(chunk_size, fused, z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM)


def _chunk(x_BTX, i, C, size=None):
    return jax.lax.dynamic_slice_in_dim(x_BTX, i * C, size or C, axis=1)


def _put(x_BTX, i, C, piece_BCX):
    return jax.lax.dynamic_update_slice_in_dim(x_BTX, piece_BCX.astype(x_BTX.dtype), i * C, axis=1)


def kept(x_BDF, keep_BM, i):
    """S or G, less what the update of chunk i drops. No x is zero."""
    if x_BDF is None or keep_BM is None:
        return x_BDF
    return jax.lax.dynamic_slice_in_dim(keep_BM, i, 1, axis=1)[:, :, None] * x_BDF


def _sum_of(w_DF, S_BDF, dtype):
    """W + S, rounded once."""
    return (w_DF.astype(S_BDF.dtype)[None] + S_BDF).astype(dtype)


def scaled(v_BCD, lr):
    return (lr * v_BCD.astype(lr.dtype)).astype(v_BCD.dtype)


def write(S_BDF, v_BCD, z_BCF, lr):
    """S + lr v^T z. The factor goes into v, so that the matmul can accumulate straight into S. No S
    is zero.
    """
    with jax.named_scope("ttt_update"):
        return _add(S_BDF, dot("bcd,bcf->bdf", scaled(v_BCD, lr), z_BCF, lr.dtype))


def _add(x, y):
    return y if x is None else x + y


def _scan(step, carry, start, stop, reverse=False):
    """`carry` after `step(carry, i)` for i in start .. stop - 1; nothing is traced for none: there
    may be no chunk to slice.
    """
    body = lambda carry, i: (step(carry, i), None)
    return (
        jax.lax.scan(body, carry, jnp.arange(start, stop), reverse=reverse)[0]
        if start < stop
        else carry
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_place_ttt(C, fused, z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM):
    return _forward(C, fused, z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM)


def _forward(C, fused, z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM):
    (B, T, F), D = z_BTF.shape, v_BTD.shape[2]
    acc, dtype = lr.dtype, z_BTF.dtype
    M, tail = divmod(T, C)
    slow = lambda z_BTF: dot("btf,df->btd", z_BTF, w_DF, acc)
    if state_BDF is None and M == 0:
        return slow(z_BTF).astype(dtype), jnp.zeros((B, D, F), acc)
    if not fused:
        with jax.named_scope("ttt_apply_slow"):
            # One matmul over all tokens fills the machine better than one per chunk.
            base_BTD = slow(z_BTF)

    def apply(o_BTD, S_BDF, i, size):
        with jax.named_scope("ttt_apply"):
            z_BCF = _chunk(z_BTF, i, C, size)
            if fused:
                weight_BDF = _sum_of(w_DF, S_BDF, dtype)
                return _put(o_BTD, i, C, dot("bcf,bdf->bcd", z_BCF, weight_BDF, acc))
            if size == 1:  # decoding is bound by reading S: a matmul would cast a copy of it first
                fast_BCD = jnp.sum(S_BDF * z_BCF.astype(acc), axis=-1)[:, None]
            else:
                fast_BCD = dot("bcf,bdf->bcd", z_BCF, S_BDF.astype(dtype), acc)
            return _put(o_BTD, i, C, _chunk(base_BTD, i, C, size) + fast_BCD)

    def step(carry, i):
        o_BTD, S_BDF = carry
        return apply(o_BTD, S_BDF, i, C), write(
            kept(S_BDF, keep_BM, i), _chunk(v_BTD, i, C), _chunk(z_BTF, i, C), lr
        )

    o_BTD, S_BDF, start = jnp.zeros((B, T, D), dtype), state_BDF, 0
    if S_BDF is None:
        first_BCD = slow(_chunk(z_BTF, 0, C)) if fused else _chunk(base_BTD, 0, C)
        o_BTD = _put(o_BTD, 0, C, first_BCD)
        S_BDF, start = write(None, _chunk(v_BTD, 0, C), _chunk(z_BTF, 0, C), lr), 1
    o_BTD, S_BDF = _scan(step, (o_BTD, S_BDF), start, M)
    if tail:  # the trailing partial chunk reads the state and does not write it
        o_BTD = apply(o_BTD, S_BDF, M, tail)
    return o_BTD, S_BDF


def _forward_rule(C, fused, *args):
    args = jax.tree.map(lambda primal: primal.value, args)
    return _forward(C, fused, *args), args


def _backward(C, fused, residuals, cotangents):
    del fused  # gradients tolerate the rounding of W + S anyway
    z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM = residuals
    do_BTD, G_BDF = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    do_BTD = jnp.zeros(v_BTD.shape, z_BTF.dtype) if do_BTD is None else do_BTD
    dz_BTF = _backward_of_reads(C, residuals, do_BTD)
    dz_BTF, dv_BTD, dlr, dw_DF, G_BDF = _backward_of_writes(C, residuals, do_BTD, G_BDF, dz_BTF)
    dw_DF = dw_DF + G_BDF.sum(axis=0)
    dkeep_BM = None if keep_BM is None else jnp.zeros_like(keep_BM)
    dstate_BDF = None if state_BDF is None else G_BDF
    return dz_BTF, dv_BTD, dw_DF.astype(w_DF.dtype), dlr.astype(lr.dtype), dstate_BDF, dkeep_BM


def _backward_of_reads(C, residuals, do_BTD):
    """do_i (W + S_i) for every chunk, [B, T, F]: the states are run forward again."""
    z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM = residuals
    acc, dtype = lr.dtype, z_BTF.dtype
    M, tail = divmod(z_BTF.shape[1], C)

    def read_grad(dz_BTF, S_BDF, i, size):
        # One matmul serves W and S.
        with jax.named_scope("ttt_grad_apply"):
            do_BCD = _chunk(do_BTD, i, C, size)
            if S_BDF is None:
                return _put(dz_BTF, i, C, dot("bcd,df->bcf", do_BCD, w_DF, acc))
            weight_BDF = _sum_of(w_DF, S_BDF, dtype)
            return _put(dz_BTF, i, C, dot("bcd,bdf->bcf", do_BCD, weight_BDF, acc))

    def replay(carry, i):
        dz_BTF, S_BDF = carry
        return read_grad(dz_BTF, S_BDF, i, C), write(
            kept(S_BDF, keep_BM, i), _chunk(v_BTD, i, C), _chunk(z_BTF, i, C), lr
        )

    # Nothing reads the state after the last token, so the update before it need not be replayed.
    last, size = (M, tail) if tail else (M - 1, C)
    carry, start = (jnp.zeros_like(z_BTF), state_BDF), 0
    if state_BDF is None and last > 0:
        carry, start = replay(carry, 0), 1
    dz_BTF, S_BDF = _scan(replay, carry, start, last)
    return read_grad(dz_BTF, S_BDF, last, size)


def _backward_of_writes(C, residuals, do_BTD, G_BDF, dz_BTF):
    """Run G from the last chunk to the first.

    Args:
      G_BDF: gradient of the final state; None is zero.
      dz_BTF: what the reads have given; the writes' share is added.

    Returns: dz_BTF, dv_BTD, dlr, dw_DF without what G_BDF still holds, G_BDF.
    """
    z_BTF, v_BTD, w_DF, lr, _, keep_BM = residuals
    acc, dtype = lr.dtype, z_BTF.dtype
    M, tail = divmod(z_BTF.shape[1], C)

    def collect(G_BDF, i, size=C):
        with jax.named_scope("ttt_grad_state"):
            z_BCF, do_BCD = _chunk(z_BTF, i, C, size), _chunk(do_BTD, i, C, size)
            return _add(G_BDF, dot("bcd,bcf->bdf", do_BCD, z_BCF, acc))

    def leave(dw_DF, G_BDF, i):
        """Where a document ends G returns to zero; what it held is the share of dW of the tokens
        behind.
        """
        if keep_BM is None:
            return dw_DF, G_BDF
        kept_BDF = kept(G_BDF, keep_BM, i)
        return dw_DF + (G_BDF - kept_BDF).sum(axis=0), kept_BDF

    # What G starts with is not the slow weight's.
    dw_DF = jnp.zeros(w_DF.shape, acc) if G_BDF is None else -G_BDF.sum(axis=0)
    if tail:
        G_BDF = collect(G_BDF, M, tail)

    def reverse(carry, i):
        dz_BTF, dv_BTD, dlr, dw_DF, G_BDF = carry
        z_BCF, v_BCD = _chunk(z_BTF, i, C), _chunk(v_BTD, i, C)
        with jax.named_scope("ttt_grad_update"):
            G_cast_BDF = G_BDF.astype(dtype)
            dv_BCD = dot("bcf,bdf->bcd", z_BCF, G_cast_BDF, acc)
            # In 16 bit cuBLAS adds to the chunk's dz before it rounds; a sum in float32 would be
            # passes over memory.
            dz_BCF = _chunk(dz_BTF, i, C) + dot(
                "bcd,bdf->bcf", scaled(v_BCD, lr), G_cast_BDF, dtype
            )
        dw_DF, G_BDF = leave(dw_DF, G_BDF, i)
        G_BDF = collect(G_BDF, i)
        dlr = dlr + jnp.sum(v_BCD.astype(acc) * dv_BCD)
        return _put(dz_BTF, i, C, dz_BCF), _put(dv_BTD, i, C, lr * dv_BCD), dlr, dw_DF, G_BDF

    stop = M
    if G_BDF is None:  # the last chunk's update reached nothing
        stop = M - 1
        G_BDF = collect(None, stop)
    carry = (dz_BTF, jnp.zeros_like(v_BTD), jnp.zeros((), acc), dw_DF, G_BDF)
    return _scan(reverse, carry, 0, stop, reverse=True)


_in_place_ttt.defvjp(_forward_rule, _backward, symbolic_zeros=True)
