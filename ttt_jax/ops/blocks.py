"""Several chunks per step of the scan: the exact dual form inside a block, so that the state moves once per block.

B batch, T tokens, D model width, F MLP width, C chunk size, n chunks of a block (a power of two), H tokens of half a block.

The chunks of a block read the state at its start, and what the chunks before them in the block write is applied to them without
being written: for chunk i of a block that starts with S,

    o_i = z_i (W + S)^T + lr sum_{j<i} (z_i z_j^T) v_j          then  S += lr sum_j v_j^T z_j

The first term and the update are the same op with chunks of nC tokens, whatever implements it. The sum is taken by halves: the
second C tokens of a pair read the first ones, the second 2C those before them, and so on, so that every product is dense and
no entry is computed for nothing. It costs T C (n - 1) (D + F) FLOPs. The caller sees to it that there are no documents: they
would have to end with a block.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax.ops.xla import accumulator, precision_for


def in_blocks(run, n: int, z_BTF, v_BTD, w_DF, *, lr, chunk_size: int, state_BDF):
    """What `run(z, v, w, lr=, chunk_size=, state_BDF=, keep_BM=None)` returns, in steps of `n` chunks.

    Chunks that fill no block are run one by one behind the others.
    """
    T = z_BTF.shape[1] // (n * chunk_size) * (n * chunk_size)
    if n == 1 or T == 0:
        return run(z_BTF, v_BTD, w_DF, lr=lr, chunk_size=chunk_size, state_BDF=state_BDF, keep_BM=None)
    z_whole_BTF, v_whole_BTD = z_BTF[:, :T], v_BTD[:, :T]
    o_BTD, S_BDF = run(z_whole_BTF, v_whole_BTD, w_DF, lr=lr, chunk_size=n * chunk_size, state_BDF=state_BDF, keep_BM=None)
    with jax.named_scope("ttt_inside_blocks"):
        inside_BTD: Any = inside_blocks(z_whole_BTF, v_whole_BTD, lr, chunk_size, n)
        o_BTD = (o_BTD.astype(inside_BTD.dtype) + inside_BTD).astype(o_BTD.dtype)
    if z_BTF.shape[1] > T:
        rest = z_BTF[:, T:], v_BTD[:, T:]
        tail_BTD, S_BDF = run(*rest, w_DF, lr=lr, chunk_size=chunk_size, state_BDF=S_BDF, keep_BM=None)
        o_BTD = jnp.concatenate([o_BTD, tail_BTD], axis=1)
    return o_BTD, S_BDF


@functools.partial(jax.checkpoint, static_argnums=2)  # scores are made again in the backward, not kept
def _halves(z_BTF, u_BTD, H):
    """The second H of every 2H tokens read the first H: float32 (float64) [B, T, D], zero for the first ones."""
    (B, T, _), D = z_BTF.shape, u_BTD.shape[2]
    acc, precision = accumulator(z_BTF.dtype), precision_for(z_BTF.dtype)
    dot = lambda subscripts, x, y: jnp.einsum(subscripts, x, y, preferred_element_type=acc, precision=precision)
    z_BM2HF, u_BM2HD = (x.reshape(B, T // (2 * H), 2, H, x.shape[2]) for x in (z_BTF, u_BTD))
    scores_BMHH = dot("bmif,bmjf->bmij", z_BM2HF[:, :, 1], z_BM2HF[:, :, 0]).astype(z_BTF.dtype)
    read_BMHD = dot("bmij,bmjd->bmid", scores_BMHH, u_BM2HD[:, :, 0])
    return jnp.stack([jnp.zeros_like(read_BMHD), read_BMHD], axis=2).reshape(B, T, D)


def inside_blocks(z_BTF, v_BTD, lr, C: int, n: int):
    """lr sum_{j<i} (z_i z_j^T) v_j over the chunks j before chunk i in its block, in the accumulation dtype."""
    u_BTD = (lr * v_BTD.astype(lr.dtype)).astype(v_BTD.dtype)
    halves = [C << k for k in range(n.bit_length() - 1)]  # C, 2C, .. nC / 2
    return sum((_halves(z_BTF, u_BTD, H) for H in halves[1:]), start=_halves(z_BTF, u_BTD, halves[0]))
