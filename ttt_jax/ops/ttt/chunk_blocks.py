"""Several chunks per step of the scan: the exact dual form inside a block, so that the state moves
once per block.

B batch, T tokens, D model width, F MLP width, C chunk size, n chunks of a block (a power of two), L
= nC its tokens, N blocks, P pairs of halves of a block, of H tokens each.

The chunks of a block read the state at its start, and what the chunks before them in the block
write is applied to them without being written: for chunk i of a block that starts with S,

    o_i = z_i (W + S)^T + lr sum_{j<i} (z_i z_j^T) v_j          then  S += lr sum_j v_j^T z_j

The first term and the update are the same op with chunks of L tokens, whatever implements it. The
sum is taken by halves: the second C tokens of a pair read the first ones, the second 2C those
before them, and so on, so that every product is dense and no entry is computed for nothing. It
costs T C (n - 1) (D + F) FLOPs. The caller sees to it that there are no documents: they would have
to end with a block.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax.kernels_pallas.varying import varying_alike
from ttt_jax.ops.numerics import dot
from ttt_jax.ops.ttt.xla import scaled

# Computed inside their blocks at one time, so that temporaries do not grow with T.
TOKENS = 16384


def in_blocks(run, n: int, z_BTF, v_BTD, w_DF, *, lr, chunk_size: int, state_BDF):
    """What `run(z, v, w, lr=, chunk_size=, state_BDF=, keep_BM=None)` returns, in steps of `n`
    chunks.

    Chunks that fill no block are run one by one behind the others.
    """
    if n == 1 or z_BTF.shape[1] < n * chunk_size:
        return run(
            z_BTF, v_BTD, w_DF, lr=lr, chunk_size=chunk_size, state_BDF=state_BDF, keep_BM=None
        )
    results: Any = _in_blocks(run, n, chunk_size, *varying_alike(z_BTF, v_BTD, w_DF, lr, state_BDF))
    return results


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _in_blocks(run, n, C, z_BTF, v_BTD, w_DF, lr, state_BDF):
    o_BTD, S_BDF = _between(run, n, C, z_BTF, v_BTD, w_DF, lr, state_BDF)
    return _inside(n, C, o_BTD, z_BTF, v_BTD, lr), S_BDF


def _forward(run, n, C, *arrays):
    return _in_blocks(run, n, C, *arrays), arrays


def _backward(run, n, C, arrays, cotangents):
    z_BTF, v_BTD, _, lr, _ = arrays
    _, vjp = jax.vjp(functools.partial(_between, run, n, C), *arrays)
    dz_BTF, dv_BTD, dw_DF, dlr, dstate_BDF = vjp(cotangents)
    dz_BTF, dv_BTD, dlr = _inside_backward(
        n, C, dz_BTF, dv_BTD, dlr, cotangents[0], z_BTF, v_BTD, lr
    )
    return dz_BTF, dv_BTD, dw_DF, dlr, dstate_BDF


_in_blocks.defvjp(_forward, _backward)


def _between(run, n, C, z_BTF, v_BTD, w_DF, lr, state_BDF):
    """All but what chunks read of their own block; chunks behind the last block one by one."""
    T = z_BTF.shape[1] // (n * C) * (n * C)
    run = functools.partial(run, lr=lr, keep_BM=None)
    o_BTD, S_BDF = run(z_BTF[:, :T], v_BTD[:, :T], w_DF, chunk_size=n * C, state_BDF=state_BDF)
    if z_BTF.shape[1] > T:
        tail_BTD, S_BDF = run(z_BTF[:, T:], v_BTD[:, T:], w_DF, chunk_size=C, state_BDF=S_BDF)
        o_BTD = jnp.concatenate([o_BTD, tail_BTD], axis=1)
    return o_BTD, S_BDF


@jax.named_scope("ttt_inside_blocks")
def _inside(n, C, o_BTD, z_BTF, v_BTD, lr):
    """o + lr sum_{j<i} (z_i z_j^T) v_j over the chunks j before chunk i in its block."""

    def add(_, o_NLD, z_NLF, v_NLD):
        total_NLD, u_NLD = o_NLD.astype(lr.dtype), scaled(v_NLD, lr)
        for H in _halves(n, C):
            z_NP2HF, u_NP2HD = _paired(z_NLF, H), _paired(u_NLD, H)
            read_NPHD = dot(
                "nphk,npkd->nphd", _scores(z_NP2HF, lr.dtype), u_NP2HD[:, :, 0], lr.dtype
            )
            total_NLD += jnp.stack([jnp.zeros_like(read_NPHD), read_NPHD], axis=2).reshape(
                total_NLD.shape
            )
        return None, total_NLD

    _, o_BTD = _by_groups(n * C, add, None, (o_BTD,), (z_BTF, v_BTD))
    return o_BTD


@jax.named_scope("ttt_inside_blocks")
def _inside_backward(n, C, dz_BTF, dv_BTD, dlr, do_BTD, z_BTF, v_BTD, lr):
    """dz, dv and dlr with the shares of `_inside` added to them. Scores are made again, not
    kept.
    """
    dtype = z_BTF.dtype

    def add(dlr, dz_NLF, dv_NLD, do_NLD, z_NLF, v_NLD):
        u_NLD, du_NLD = scaled(v_NLD, lr), jnp.zeros(v_NLD.shape, lr.dtype)
        for H in _halves(n, C):
            z_NP2HF, u_NP2HD, do_NPHD = (
                _paired(z_NLF, H),
                _paired(u_NLD, H),
                _paired(do_NLD, H)[:, :, 1],
            )
            dscores_NPHH = dot("nphd,npkd->nphk", do_NPHD, u_NP2HD[:, :, 0], lr.dtype).astype(dtype)
            second_NPHF = dot("nphk,npkf->nphf", dscores_NPHH, z_NP2HF[:, :, 0], dtype)
            first_NPHF = dot("nphk,nphf->npkf", dscores_NPHH, z_NP2HF[:, :, 1], dtype)
            dz_NLF += jnp.stack([first_NPHF, second_NPHF], axis=2).reshape(dz_NLF.shape)
            du_NPHD = dot("nphk,nphd->npkd", _scores(z_NP2HF, lr.dtype), do_NPHD, lr.dtype)
            du_NLD += jnp.stack([du_NPHD, jnp.zeros_like(du_NPHD)], axis=2).reshape(du_NLD.shape)
        return (
            dlr + jnp.sum(du_NLD * v_NLD.astype(lr.dtype)),
            dz_NLF,
            dv_NLD.astype(lr.dtype) + lr * du_NLD,
        )

    dlr, dz_BTF, dv_BTD = _by_groups(n * C, add, dlr, (dz_BTF, dv_BTD), (do_BTD, z_BTF, v_BTD))
    return dz_BTF, dv_BTD, dlr


def _by_groups(L, add, total, updated, others):
    """`total, *updated = add(total, *updated, *others)` of some blocks after others; blocks know
    nothing of each other.

    Args:
      add: takes and returns arrays [N, L, ..].
      updated, others: arrays [B, T, ..]; what lies behind the last whole block of a row is left as
        it is.
    """
    B, T = updated[0].shape[:2]
    N, whole = B * (T // L), T // L * L
    some = max(1, TOKENS // L)
    flat = lambda arrays: [x[:, :whole].reshape(N, L, x.shape[2]) for x in arrays]
    others = flat(others)

    def group(size, first, carry):
        total, *done = carry
        total, *new = add(
            total, *(jax.lax.dynamic_slice_in_dim(x, first, size) for x in (*done, *others))
        )
        put = lambda x, piece: jax.lax.dynamic_update_slice_in_dim(
            x, piece.astype(x.dtype), first, axis=0
        )
        return [total, *map(put, done, new)]

    carry = [total, *flat(updated)]
    if some <= N:
        carry = jax.lax.fori_loop(
            0, N // some, lambda i, carry: group(some, i * some, carry), carry
        )
    if N % some:
        carry = group(N % some, N // some * some, carry)
    total, *done = carry
    done = [x.reshape(B, whole, x.shape[2]) for x in done]
    if whole < T:
        done = [
            jnp.concatenate([x, before[:, whole:]], axis=1)
            for x, before in zip(done, updated, strict=True)
        ]
    return total, *done


def _halves(n, C) -> list[int]:
    """C, 2C, .. half a block."""
    return [C << k for k in range(n.bit_length() - 1)]


def _paired(x_NLX, H):
    return x_NLX.reshape(x_NLX.shape[0], -1, 2, H, x_NLX.shape[2])


def _scores(z_NP2HF, acc):
    """Of the second half of every pair with the first."""
    return dot("nphf,npkf->nphk", z_NP2HF[:, :, 1], z_NP2HF[:, :, 0], acc).astype(z_NP2HF.dtype)
