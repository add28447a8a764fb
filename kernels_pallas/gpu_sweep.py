"""In-Place TTT on Hopper GPUs as sweeps over states and products of all chunks.

Letters as in `chunk_scan.py`; n chunks of a stretch, whose states fit the memory that `STATES`
grants; Q = B M chunks of all sequences. A sweep (`gpu_states.py`) keeps tiles of the state in
registers and writes a copy R_i of what every chunk reads. The products that read it know nothing of
each other:

    forward    states of u and z: R = S          o_i = z_i R_i^T + z_i W^T, one sum
    fused      states of u and z: R = W + S      o_i = z_i R_i^T                 instead of forward
    replay     states of u and z: R = W + S      dz_i = do_i R_i
    reverse    states of do and z: R = G         du_i = z_i R_i^T   dz_i += lr v_i R_i

XLA makes u = lr v and dv = lr du, which at a rate of one are nothing. Where one stretch holds all
chunks, replay leaves its copies, and the launch `turn` after the second sweep makes dz_i = do_i (W
+ S_i) + u_i G_i in one sum. Those of `fused` are the same, and where the backward keeps them
(`remat_save: [ttt_states]`), it does not go forward again.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from ttt_jax.kernels_pallas.chunk_scan import (
    dot,
    factors,
    gradients,
    scaled,
    split,
    sum_of,
)
from ttt_jax.kernels_pallas.gpu_schedule import BLOCK_K, TILE
from ttt_jax.kernels_pallas.gpu_tiles import BLOCKS, device_multiprocessors
from ttt_jax.kernels_pallas.varying import varying_alike, varying_like

# Bytes of R at one time, for each of at most so many sequences. Long stretches are few launches.
STATES, SEQUENCES = 2**29, 2
KEPT = "ttt_states"  # under this name `remat_save` keeps copies of W + S
LAUNCH_STEPS = 10  # k-steps that a tile of the state takes to be read and written


def in_place_ttt(
    launches, z_BTF, v_BTD, w_DF, *, lr, chunk_size, state_BDF, keep_BM=None, apply: str = "split"
):
    """Same contract as `in_place_ttt_xla`; bfloat16, and sizes as `gpu.why_not` says."""
    arrays = varying_alike(z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM)
    results: Any = _in_place_ttt(launches, chunk_size, apply == "fused", *arrays)
    return results


def _stretches(B: int, M: int, C: int, D: int, F: int) -> list[range]:
    """Cut M chunks into stretches. Their length decides how much of a launch's last round of tiles
    is idle: at 4B shapes, five chunks of 1024 tokens have 200 tiles of o for 66 clusters.
    """
    most = max(1, STATES * min(B, SEQUENCES) // (2 * B * D * F))
    cuts = [
        [range(first, min(first + n, M)) for first in range(0, M, n)]
        for n in range(min(M, most), 0, -1)  # of equal ones the longest
    ]
    clusters = device_multiprocessors() // BLOCKS

    def steps(stretches):
        """K-steps of all launches: of the sweeps what a launch costs, of o all."""
        sweep = LAUNCH_STEPS * -(-B * D * F // (TILE**2 * clusters))
        rounds = sum(-(-B * len(chunks) * C * D // (TILE**2 * clusters)) for chunks in stretches)
        return rounds * 2 * F // BLOCK_K + 3 * sweep * len(stretches)

    return min(cuts, key=steps, default=[])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _in_place_ttt(launches, C, fused, z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM):
    return _forward(launches, C, fused, z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM)[0]


def _traced_forward(launches, C, fused, *primals):
    arrays = jax.tree.map(lambda primal: primal.value, primals)
    return _forward(launches, C, fused, *arrays)


def _forward(launches, C, fused, z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM):
    (B, T, F), D, dtype = z_BTF.shape, v_BTD.shape[2], z_BTF.dtype
    M, tail = divmod(T, C)
    (z_whole_BTF, _), factors_BM = split(z_BTF, M * C), factors(keep_BM, B, M)
    with jax.named_scope("ttt_scaled"):  # in the place of o: a sweep reads its chunks before
        o_BTD = scaled(split(v_BTD, M * C)[0], lr)  # they are written
    S_BDF, o_BTD = _start(state_BDF, (B, D, F), o_BTD)
    added_DF, applied_DF = (w_DF, None) if fused else (None, w_DF)
    stretches, R_BNDF = _stretches(B, M, C, D, F), None
    # Copies of W + S, which the backward makes again if need be. With a tail it needs the last
    # state, too.
    kept = fused and len(stretches) == 1 and not tail
    for chunks in stretches:
        S_BDF, o_BTD = jax.lax.optimization_barrier((S_BDF, o_BTD))  # one stretch at a time
        with jax.named_scope("ttt_forward"):
            sweep = z_whole_BTF, o_BTD, factors_BM, added_DF, S_BDF
            R_BNDF, S_BDF = varying_like(z_BTF, launches.states(C, chunks, False, *sweep))
            R_BNDF = checkpoint_name(R_BNDF, KEPT) if kept else R_BNDF
            arrays = z_whole_BTF, applied_DF, R_BNDF, o_BTD
            o_BTD = varying_like(z_BTF, launches.forward(C, chunks, *arrays))
    if tail:  # the trailing partial chunk reads the state and does not write it
        z_tail_BCF = z_BTF[:, M * C :]
        read_BDF = sum_of(w_DF, S_BDF, dtype) if fused else S_BDF.astype(dtype)
        o_BCD = dot("bcf,bdf->bcd", z_tail_BCF, read_BDF)
        o_BCD = o_BCD if fused else dot("bcf,df->bcd", z_tail_BCF, w_DF) + o_BCD
        o_BTD = jnp.concatenate([o_BTD, o_BCD.astype(dtype)], axis=1)
    W_BNDF = R_BNDF if kept else None
    return (o_BTD, S_BDF), (z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM, W_BNDF)


def _start(first_BDF, shape, behind):
    """What a state starts with, and `behind`, behind which zeros are made: as one array for all
    that starts with zeros XLA would keep them, and copy them wherever a launch writes.
    """
    if not (first_BDF is None or isinstance(first_BDF, SymbolicZero)):
        return first_BDF, behind
    zero, behind = jax.lax.optimization_barrier((jnp.float32(0), behind))
    return varying_like(behind, jnp.broadcast_to(zero, shape)), behind


def _empty(like, shape, dtype):
    """A result's memory, every part of which some launch writes."""
    return varying_like(like, jax.lax.empty(shape, dtype))


def _backward(launches, C, fused, residuals, cotangents):
    del fused  # gradients tolerate the rounding of W + S anyway
    z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM, W_BNDF = residuals
    do_BTD, G_BDF = cotangents
    (B, T, F), D = z_BTF.shape, v_BTD.shape[2]
    M, tail = divmod(T, C)
    if isinstance(do_BTD, SymbolicZero):
        do_BTD = varying_like(z_BTF, jnp.zeros(v_BTD.shape, z_BTF.dtype))
    (z_whole_BTF, _), factors_BM = split(z_BTF, M * C), factors(keep_BM, B, M)
    do_whole_BTD, do_tail_BCD = split(do_BTD, M * C)
    v_whole_BTD, _ = split(v_BTD, M * C)
    with jax.named_scope("ttt_scaled"):  # again, and not the forward's, kept until now
        u_BTD, do_whole_BTD = jax.lax.optimization_barrier((v_whole_BTD, do_whole_BTD))
        u_BTD = scaled(u_BTD, lr)

    stretches, S_BDF = _stretches(B, M, C, D, F), None
    several = len(stretches) > 1
    dz_BTF = _empty(z_BTF, z_whole_BTF.shape, z_BTF.dtype)
    if W_BNDF is None:
        S_BDF, u_BTD = _start(state_BDF, (B, D, F), u_BTD)
        for chunks in stretches:
            S_BDF, dz_BTF = jax.lax.optimization_barrier((S_BDF, dz_BTF))
            with jax.named_scope("ttt_replay"):
                sweep = z_whole_BTF, u_BTD, factors_BM, w_DF, S_BDF
                W_BNDF, S_BDF = varying_like(z_BTF, launches.states(C, chunks, False, *sweep))
                if several:  # of a single one, these copies and those of G make one sum
                    dz_BTF = launches.replay(C, chunks, do_whole_BTD, W_BNDF, dz_BTF)
                    dz_BTF = varying_like(z_BTF, dz_BTF)

    # what G starts with is not the slow weight's
    dw_DF = jnp.float32(0) if isinstance(G_BDF, SymbolicZero) else -G_BDF.sum(axis=0)
    G_BDF, dz_BTF = _start(G_BDF, (B, D, F), dz_BTF)
    dz_tail_BCF = None
    if tail:
        z_tail_BCF, read_BDF = z_BTF[:, M * C :], sum_of(w_DF, S_BDF, z_BTF.dtype)
        dz_tail_BCF = dot("bcd,bdf->bcf", do_tail_BCD, read_BDF).astype(z_BTF.dtype)
        G_BDF = G_BDF + dot("bcd,bcf->bdf", do_tail_BCD, z_tail_BCF)

    # In the place of u, where no launch reads both.
    du_BTD = u_BTD if several else _empty(z_BTF, u_BTD.shape, z_BTF.dtype)
    for chunks in reversed(stretches):
        before = G_BDF, dz_BTF, du_BTD, dw_DF
        G_BDF, dz_BTF, du_BTD, dw_DF = jax.lax.optimization_barrier(before)
        with jax.named_scope("ttt_reverse"):
            sweep = z_whole_BTF, do_whole_BTD, factors_BM, None, G_BDF
            R_BNDF, G_BDF = varying_like(z_BTF, launches.states(C, chunks, True, *sweep))
            if several:
                arrays = z_whole_BTF, v_whole_BTD, R_BNDF
                results = launches.reverse(C, chunks, lr, *arrays, dz_BTF, du_BTD)
            else:
                arrays = z_whole_BTF, u_BTD, do_whole_BTD, W_BNDF, R_BNDF
                results = launches.turn(C, chunks, *arrays, dz_BTF, du_BTD)
            dz_BTF, du_BTD = varying_like(z_BTF, results)
        if keep_BM is not None:
            dw_DF = dw_DF + _dropped(factors_BM[:, chunks.start : chunks.stop], R_BNDF)
    dw_DF = dw_DF + G_BDF.sum(axis=0)

    dlr = jnp.sum(v_whole_BTD.astype(jnp.float32) * du_BTD.astype(jnp.float32))
    with jax.named_scope("ttt_scaled"):
        dv_BTD = scaled(du_BTD, lr)
    residuals = z_BTF, v_BTD, w_DF, lr, state_BDF, keep_BM
    return gradients(residuals, dz_BTF, dv_BTD, dw_DF, dlr, G_BDF, dz_tail_BCF)


@jax.named_scope("ttt_grad_slow")
def _dropped(factors_BN, R_BNDF):
    """What a sweep of G has dropped, [D, F]. dW is that and what is left of G:

        sum_i do_i^T z_i = sum_i (G_i - keep_i G_{i+1}) = G_0 - G_M + sum_i (1 - keep_i) G_{i+1}

    The copies R_i of G_{i+1} are there. To read them once takes less than the product of do and z
    from 150 tokens a chunk on (at 700 TFLOP/s and 4.8 TB/s), and rounds G where bfloat16 inputs
    were rounded already.
    """
    weights_BN = 1 - factors_BN
    return jnp.sum(weights_BN[:, :, None, None] * R_BNDF.astype(jnp.float32), axis=(0, 1))


_in_place_ttt.defvjp(_traced_forward, _backward, symbolic_zeros=True)
