"""In-Place TTT on TPU: one Pallas (Mosaic) kernel, swept once forward and three times backward.

B batch, T tokens, D model width, F MLP width, C chunk size, M chunks (a trailing partial one
included), S accumulated update of the fast weight (D F), G its gradient (D F). P and Q are D and F,
or F and D.

The sweep. A tile of P, with all of Q, of a matrix X_PQ stays in VMEM while the chunks of one
sequence go by, in time order or in reverse:

    y_i = a_i (W + X)^T            [C, bP]     sums over Q, so blocks of Q are streamed through a
                                               float32 accumulator
    X   = keep_i X + p_i^T q_i     [bP, bQ]    block by block, in the same step that has just
                                               applied the block

Tiles of P need nothing from each other. X costs HBM traffic only where a sequence starts and ends;
XLA's scan reads and writes it in every chunk. Everything the op (section 3 of arXiv 2604.06169) and
its gradient need has this form (rows: what X, a, p, q are):

    forward   S tiled over D   o = z (W + S)^T          S += lr v^T z
    replay    S tiled over F   dz = do (W + S)          S += lr v^T z        forward in time again
    reverse   G tiled over D   dv = lr z G^T            G += do^T z          also dW, dS_0 and dlr
    reverse   G tiled over F   dz += lr v G             G += do^T z

dv sums over F and dz over D, so no single tiling serves both. Computing G twice costs 2TDF FLOPs:
12TDF for the backward instead of 10TDF. The alternative, one reverse sweep over tiles of D that
adds its parts of dz up in HBM, moves 8TF bytes more per tile, keeps a float32 copy of dz, and makes
the tiles wait for each other, so that v5p's second core has nothing to do. At D = 2560 that traffic
could hide behind the matmuls on v5e (10TDF, then), and could not on v6e (docs/performance.md).

In the forward W and S are applied by two products in one float32 accumulator, so that an update
that is small next to W survives bf16. Where only a gradient is at stake (replay), and where the
caller says so (fused), W + S is rounded and one product serves both.

    tpu.py         what can run, padding, and the gradient: which sweep computes what
    tpu_sweep.py   one sweep: its blocks, and a step of its grid
    tpu_tiles.py   the four sweeps, and the tiles that fit VMEM
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from ttt_jax.kernels_pallas.tpu_sweep import run_sweep
from ttt_jax.kernels_pallas.tpu_tiles import (
    FORWARD,
    FUSED,
    LANES,
    REPLAY,
    REVERSE_DV,
    REVERSE_DZ,
    SUBLANES,
    SWEEPS,
    Core,
    choose_tiles,
    round_up,
)
from ttt_jax.kernels_pallas.varying import varying_alike

_interpreted: contextvars.ContextVar[Core | None] = contextvars.ContextVar(
    "interpreted", default=None
)


@contextlib.contextmanager
def interpreted(
    interpret: bool | pltpu.InterpretParams = True,
    tiles: tuple[int, int] | None = (2 * LANES, LANES),
):
    """Run kernels that are traced inside in Pallas' interpreter, on any platform, in small tiles.

    For tests: slow.

    Args:
      interpret: of `pallas_call`.
      tiles: (bP, bQ); None: the best that fit.
    """
    token = _interpreted.set(Core(tiles=tiles, interpret=interpret))
    try:
        yield
    finally:
        _interpreted.reset(token)


def _core() -> Core:
    if (core := _interpreted.get()) is not None:
        return core
    try:
        return Core(pltpu.get_tpu_info().vmem_capacity_bytes)
    except ValueError:  # no TPU here and none named by the mesh: compiling ahead of time
        return Core()


def why_not(platform: str, dtype, C: int, D: int, F: int, T: int) -> str | None:
    """Say why these sizes cannot run here, or None."""
    if platform != "tpu" and _interpreted.get() is None:
        return f"it needs a TPU, and the platform is {platform}"
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"it computes in float32 and bfloat16, not in {jnp.dtype(dtype)}"
    if T == 0:
        return "there are no tokens"
    core = _core()
    sizes, rows = (round_up(D, LANES), round_up(F, LANES)), round_up(min(C, T), SUBLANES)
    for sweep in SWEEPS:
        P, Q = reversed(sizes) if sweep.transposed else sizes
        if choose_tiles(sweep, core, P, Q, rows, jnp.dtype(dtype).itemsize) is None:
            return (
                f"chunk_size = {C} with D = {D}, F = {F} needs more than the "
                f"{core.vmem_bytes // 2**20} MiB of VMEM of a core; use smaller chunks"
            )
    return None


def in_place_ttt_tpu(
    z_BTF, v_BTD, w_DF, *, lr, chunk_size, state_BDF, keep_BM=None, apply: str = "split"
):
    """Apply and update the fast weight: section 3 of arXiv 2604.06169, o_i = z_i (W + S_i)^T.

    Same contract as `in_place_ttt_xla`. Sizes that do not fill tiles are padded with zeros, which
    change nothing: a token with z = v = 0 writes nothing, and rows and columns of zeros stay zero.
    Whole chunks of a multiple of 16 tokens and D and F in multiples of 128 are not copied.

    Args:
      z_BTF, v_BTD, w_DF: of one dtype, float32 or bfloat16.
      lr: float32 scalar.
      chunk_size: C.
      state_BDF: float32, S_0.
      keep_BM: float32, 0 where the state before an update is dropped; None: no documents.

    Returns:
      o_BTD in the dtype of z, and the state after the last whole chunk, float32.
    """
    (B, T, F), D, C = z_BTF.shape, v_BTD.shape[2], min(chunk_size, z_BTF.shape[1])
    M = -(-T // C)
    # A trailing partial chunk becomes a whole one that writes nothing. With T < C, C is T, and that
    # chunk is "partial", too.
    v_BTD = v_BTD[:, : T // chunk_size * chunk_size]
    Cp, Dp, Fp = round_up(C, SUBLANES), round_up(D, LANES), round_up(F, LANES)

    def chunks(x_BTX, X):
        x_BTX = _pad(x_BTX, (B, M * C, x_BTX.shape[2]))
        return _pad(x_BTX.reshape(B, M, C, -1), (B, M, Cp, X))

    keep_BM = jnp.ones((B, M), jnp.float32) if keep_BM is None else keep_BM
    w_DF, state_BDF = _pad(w_DF, (Dp, Fp)), _pad(state_BDF, (B, Dp, Fp))
    arrays = chunks(z_BTF, Fp), chunks(v_BTD, Dp), w_DF, lr, state_BDF, keep_BM
    forward = FORWARD if apply == "split" else FUSED
    results: Any = _in_place_ttt(_core(), forward, *varying_alike(*arrays))
    o_BMCD, S_BDF = results
    return o_BMCD[:, :, :C, :D].reshape(B, M * C, D)[:, :T], S_BDF[:, :D, :F]


def _pad(x, shape):
    if x.shape == shape:
        return x
    return jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, shape, strict=True)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_place_ttt(core, forward, z_BMCF, v_BMCD, w_DF, lr, state_BDF, keep_BM):
    return _forward(core, forward, z_BMCF, v_BMCD, w_DF, lr, state_BDF, keep_BM)[0]


def _forward(core, forward, z_BMCF, v_BMCD, w_DF, lr, state_BDF, keep_BM):
    o_BMCD, S_BDF = run_sweep(
        forward, core, lr, keep_BM, state_BDF, a=z_BMCF, p=v_BMCD, q=z_BMCF, w_PQ=w_DF
    )
    # XLA may not fuse the sweep with a scan's write of S into its stack: that does not fit VMEM.
    S_BDF = jax.lax.optimization_barrier(S_BDF)
    return (o_BMCD, S_BDF), (z_BMCF, v_BMCD, w_DF, lr, state_BDF, keep_BM)


def _backward(core, forward, residuals, cotangents):
    del forward
    z_BMCF, v_BMCD, w_DF, lr, state_BDF, keep_BM = residuals
    do_BMCD, G_BDF = cotangents
    # The transpose of W is one small copy per call; inside it would be one per chunk and tile.
    (dz_BMCF,) = run_sweep(
        REPLAY, core, lr, keep_BM, state_BDF, a=do_BMCD, p=z_BMCF, q=v_BMCD, w_PQ=w_DF.T
    )
    dv_BMCD, dstate_BDF, dw_DF, dlr_BM1D = run_sweep(
        REVERSE_DV, core, lr, keep_BM, G_BDF, a=z_BMCF, p=do_BMCD, q=z_BMCF, v_BMCP=v_BMCD
    )
    (dz_BMCF,) = run_sweep(
        REVERSE_DZ, core, lr, keep_BM, G_BDF, a=v_BMCD, p=z_BMCF, q=do_BMCD, base_BMCP=dz_BMCF
    )
    dw_DF, dlr = dw_DF.astype(w_DF.dtype), dlr_BM1D.sum()
    return dz_BMCF, dv_BMCD, dw_DF, dlr, dstate_BDF, jnp.zeros_like(keep_BM)


_in_place_ttt.defvjp(_forward, _backward)
