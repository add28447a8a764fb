"""In-Place TTT on TPU: one Pallas (Mosaic) kernel, swept once for the forward and three times for the backward.

B batch, T tokens, D model width, F MLP width, C chunk size, M chunks (a trailing partial one included), S accumulated update
of the fast weight (D F), G its gradient (D F). P and Q are D and F, or F and D.

The sweep. A tile of P, with all of Q, of a matrix X_PQ stays in VMEM while the chunks of one sequence go by, in time order or
in reverse:

    y_i = a_i (W + X)^T            [C, bP]     sums over Q, so blocks of Q are streamed through a float32 accumulator
    X  += p_i^T q_i                [bP, bQ]    block by block, in the same step that has just applied the block

Tiles of P need nothing from each other. X costs HBM traffic only where a sequence starts and ends; XLA's scan reads and
writes it in every chunk. Everything the op and its gradient need has this form (rows: what X, a, p, q are):

    forward   S tiled over D   o = z (W + S)^T          S += lr v^T z
    replay    S tiled over F   dz = do (W + S)          S += lr v^T z        forward in time again
    reverse   G tiled over D   dv = lr z G^T            G += do^T z          also dW, dS_0 and dlr
    reverse   G tiled over F   dz += lr v G             G += do^T z

dv sums over F and dz over D, so no single tiling serves both. Computing G twice costs 2TDF FLOPs: 12TDF for the backward
instead of 10TDF. The alternative, one reverse sweep over tiles of D that adds its parts of dz up in HBM, moves 8TF bytes more
per tile, keeps a float32 copy of dz, and makes the tiles wait for each other, so that v5p's second core has nothing to do.
At D = 2560 that traffic could hide behind the matmuls on v5e (10TDF, then), and could not on v6e (docs/performance.md).

In the forward W and S are applied by two products in one float32 accumulator, so that an update that is small beside W
survives bf16; where only a gradient is at stake (replay) W + S is rounded and one product serves both.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.varying import varying_alike

LANES, SUBLANES = 128, 16  # of a bf16 tile; float32 needs 8 sublanes only
DEFAULT_VMEM = 64 * 2**20  # of v5p and v7x, per core; v5e and v6e have twice as much
HEADROOM = 8 * 2**20  # of VMEM: what the estimate in `_vmem` does not see (the compiler's own temporaries)

LONGEST = 1024  # side of a tile
# For comparing tiles, in FLOPs: what v6e computes while it moves a byte of HBM, and (assumed) in a grid step's overhead of a
# third of a microsecond. The other generations compute less meanwhile, so their compute hides more.
FLOPS_PER_BYTE, FLOPS_PER_STEP = 560, 3e8
PRODUCTS = {"separate": 3, "folded": 2, "none": 2}  # matmuls of a step


@dataclasses.dataclass(frozen=True)
class Target:
    """What the kernels are compiled for: VMEM of a core; and for tests, (bP, bQ) and `interpret` of `pallas_call`."""

    vmem_bytes: int = DEFAULT_VMEM
    tiles: tuple[int, int] | None = None  # None: the best that fit
    interpret: Any = False


_interpreted: contextvars.ContextVar[Target | None] = contextvars.ContextVar("interpreted", default=None)


@contextlib.contextmanager
def interpreted(interpret: bool | pltpu.InterpretParams = True, tiles: tuple[int, int] | None = (2 * LANES, LANES)):
    """Kernels traced inside run in Pallas' interpreter, on any platform, in small tiles. For tests: slow."""
    token = _interpreted.set(Target(tiles=tiles, interpret=interpret))
    try:
        yield
    finally:
        _interpreted.reset(token)


def _target() -> Target:
    if (target := _interpreted.get()) is not None:
        return target
    try:
        return Target(pltpu.get_tpu_info().vmem_capacity_bytes)
    except ValueError:  # no TPU here and none named by the mesh: compiling ahead of time
        return Target()


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One of the four sweeps of the module's docstring."""

    name: str
    reverse: bool  # from the last chunk to the first
    transposed: bool  # X is tiled over F: P = F, Q = D, and HBM holds its transpose
    weight: Literal["separate", "folded", "none"]  # W beside X: two products, one with the rounded sum, or no W
    gradients: bool = False  # also dW, summed over sequences and documents, and the rows of dlr
    final: bool = False  # X after the last step is a result


FORWARD = Sweep("ttt_forward", reverse=False, transposed=False, weight="separate", final=True)
REPLAY = Sweep("ttt_replay", reverse=False, transposed=True, weight="folded")
REVERSE_DV = Sweep("ttt_reverse_dv", reverse=True, transposed=False, weight="none", gradients=True, final=True)
REVERSE_DZ = Sweep("ttt_reverse_dz", reverse=True, transposed=True, weight="none")
SWEEPS = (FORWARD, REPLAY, REVERSE_DV, REVERSE_DZ)


def why_not(platform: str, dtype, C: int, D: int, F: int, T: int) -> str | None:
    """Why these sizes cannot run here, or None."""
    if platform != "tpu" and _interpreted.get() is None:
        return f"it needs a TPU, and the platform is {platform}"
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"it computes in float32 and bfloat16, not in {jnp.dtype(dtype)}"
    if T == 0:
        return "there are no tokens"
    target = _target()
    sizes = _round_up(D, LANES), _round_up(F, LANES)
    for sweep in SWEEPS:
        P, Q = reversed(sizes) if sweep.transposed else sizes
        if _tiles(sweep, target, P, Q, _round_up(min(C, T), SUBLANES), jnp.dtype(dtype).itemsize) is None:
            return (
                f"chunk_size = {C} with D = {D}, F = {F} needs more than the {target.vmem_bytes // 2**20} MiB of VMEM of a "
                "core; use smaller chunks"
            )
    return None


def in_place_ttt_tpu(z_BTF, v_BTD, w_DF, *, lr, chunk_size, state_BDF, keep_BM=None):
    """Same contract as `in_place_ttt_xla`; z, v and W share one dtype, lr, the state and keep are float32.

    Sizes that do not fill tiles are padded with zeros, which change nothing: a token with z = v = 0 writes nothing, and rows
    and columns of zeros stay zero. Whole chunks of a multiple of 16 tokens and D and F in multiples of 128 are not copied.
    """
    (B, T, F), D, C = z_BTF.shape, v_BTD.shape[2], min(chunk_size, z_BTF.shape[1])
    M = -(-T // C)
    # A trailing partial chunk becomes a whole one that writes nothing. (With T < C, C is T, and that chunk is "partial", too.)
    v_BTD = v_BTD[:, : T // chunk_size * chunk_size]
    Cp, Dp, Fp = _round_up(C, SUBLANES), _round_up(D, LANES), _round_up(F, LANES)

    def chunks(x_BTX, X):
        x_BTX = _pad(x_BTX, (B, M * C, x_BTX.shape[2]))
        return _pad(x_BTX.reshape(B, M, C, -1), (B, M, Cp, X))

    keep_BM = jnp.ones((B, M), jnp.float32) if keep_BM is None else keep_BM
    w_DF, state_BDF = _pad(w_DF, (Dp, Fp)), _pad(state_BDF, (B, Dp, Fp))
    arguments = varying_alike(chunks(z_BTF, Fp), chunks(v_BTD, Dp), w_DF, lr, state_BDF, keep_BM)
    results: Any = _in_place_ttt(_target(), *arguments)
    o_BMCD, S_BDF = results
    return o_BMCD[:, :, :C, :D].reshape(B, M * C, D)[:, :T], S_BDF[:, :D, :F]


def _pad(x, shape):
    return x if x.shape == shape else jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, shape, strict=True)])


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_place_ttt(target, z_BMCF, v_BMCD, w_DF, lr, state_BDF, keep_BM):
    return _forward(target, z_BMCF, v_BMCD, w_DF, lr, state_BDF, keep_BM)[0]


def _forward(target, z_BMCF, v_BMCD, w_DF, lr, state_BDF, keep_BM):
    o_BMCD, S_BDF = _sweep(FORWARD, target, lr, keep_BM, state_BDF, a=z_BMCF, p=v_BMCD, q=z_BMCF, w_PQ=w_DF)
    return (o_BMCD, S_BDF), (z_BMCF, v_BMCD, w_DF, lr, state_BDF, keep_BM)


def _backward(target, residuals, cotangents):
    z_BMCF, v_BMCD, w_DF, lr, state_BDF, keep_BM = residuals
    do_BMCD, G_BDF = cotangents
    # The transpose of W is one small copy per call; inside it would be one per chunk and tile.
    (dz_BMCF,) = _sweep(REPLAY, target, lr, keep_BM, state_BDF, a=do_BMCD, p=z_BMCF, q=v_BMCD, w_PQ=w_DF.T)
    dv_BMCD, dstate_BDF, dw_DF, dlr_BM1D = _sweep(
        REVERSE_DV, target, lr, keep_BM, G_BDF, a=z_BMCF, p=do_BMCD, q=z_BMCF, v_BMCP=v_BMCD
    )
    (dz_BMCF,) = _sweep(REVERSE_DZ, target, lr, keep_BM, G_BDF, a=v_BMCD, p=z_BMCF, q=do_BMCD, base_BMCP=dz_BMCF)
    return dz_BMCF, dv_BMCD, dw_DF.astype(w_DF.dtype), dlr_BM1D.sum(), dstate_BDF, jnp.zeros_like(keep_BM)


_in_place_ttt.defvjp(_forward, _backward)


def _sweep(sweep: Sweep, target: Target, lr, keep_BM, x_init, *, a, p, q, w_PQ=None, v_BMCP=None, base_BMCP=None):
    """Run one sweep.

    Args:
      x_init: X before the first step, [B, P, Q], or [B, Q, P] for a transposed sweep.
      a, p, q: [B, M, C, Q], [B, M, C, P], [B, M, C, Q]; a may be q.
      w_PQ: W, where the sweep has one.
      v_BMCP: for the gradient of lr, <v, z G^T>.
      base_BMCP: what y is added to, in place.

    Returns: y [B, M, C, P]; then what the sweep has of: final X, dW [P, Q] float32, rows of dlr [B, M, 1, P].
    """
    (B, M, C, P), Q, dtype = p.shape, q.shape[3], p.dtype
    tiles = _tiles(sweep, target, P, Q, C, dtype.itemsize)
    if tiles is None:
        raise ValueError(f"{sweep.name}: no tiles for C = {C}, P = {P}, Q = {Q}; `why_not` says so")
    bP, bQ = tiles
    grid = (pl.cdiv(P, bP), B, M, Q // bQ)  # what lies beyond P in the last tile never meets the rest, and is not written
    last_t, last_q = M - 1, Q // bQ - 1
    time = (lambda t: last_t - t) if sweep.reverse else (lambda t: t)

    # Index maps take (tile of P, sequence, step in time, block of Q). A block that is needed at one step in time only keeps
    # a constant index elsewhere, so that it is moved once.
    at_start = lambda t, k: jnp.where(t == 0, k, last_q)
    at_end = lambda t, k: jnp.where(t == last_t, k, 0)
    streamed = pl.BlockSpec((None, None, C, bQ), lambda j, b, t, k: (b, time(t), 0, k))
    resident = pl.BlockSpec((None, None, C, bP), lambda j, b, t, k: (b, time(t), 0, j))
    if sweep.transposed:
        initial = pl.BlockSpec((None, bQ, bP), lambda j, b, t, k: (b, at_start(t, k), j))
    else:
        initial = pl.BlockSpec((None, bP, bQ), lambda j, b, t, k: (b, j, at_start(t, k)))

    scalars = jnp.concatenate([lr.reshape(1), keep_BM.reshape(-1)])
    inputs = {"scalars": (scalars, pl.BlockSpec(memory_space=pltpu.SMEM)), "x_init": (x_init, initial)}
    inputs |= {"p": (p, resident), "q": (q, streamed)}
    if a is not q:
        inputs["a"] = (a, streamed)
    if w_PQ is not None:
        inputs["w"] = (w_PQ, pl.BlockSpec((bP, bQ), lambda j, b, t, k: (j, k)))
    if v_BMCP is not None:
        inputs["v"] = (v_BMCP, resident)
    if base_BMCP is not None:
        inputs["base"] = (base_BMCP, resident)

    struct = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(p).manual_axis_type)
    outputs = {"y": (struct((B, M, C, P), dtype), resident)}
    scratch = {
        "X": pltpu.VMEM((Q // bQ, bP, bQ), jnp.float32),
        "pT": pltpu.VMEM((bP, C), dtype),
        "acc": pltpu.VMEM((C, bP), jnp.float32),
    }
    if sweep.final:
        spec = pl.BlockSpec((None, bP, bQ), lambda j, b, t, k: (b, j, at_end(t, k)))
        outputs["x_final"] = (struct((B, P, Q), jnp.float32), spec)
    if sweep.gradients:
        spec = pl.BlockSpec((bP, bQ), lambda j, b, t, k: (j, jnp.where(b == B - 1, at_end(t, k), 0)))
        outputs["dw"] = (struct((P, Q), jnp.float32), spec)
        spec = pl.BlockSpec((None, None, 1, bP), lambda j, b, t, k: (b, time(t), 0, j))
        outputs["dlr"] = (struct((B, M, 1, P), jnp.float32), spec)
        scratch["dW"] = scratch["X"]

    names = (*inputs, *outputs, *scratch)

    def body(*refs):
        _step(sweep, B, **dict(zip(names, refs, strict=True)))

    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()],
        scratch_shapes=list(scratch.values()),
        input_output_aliases={} if base_BMCP is None else {list(inputs).index("base"): 0},
        # dW is summed over the sequences, one after the other.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary" if sweep.gradients else "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=target.vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * PRODUCTS[sweep.weight] * B * M * C * P * Q,
            bytes_accessed=B * M * _traffic(sweep, P, Q, C, dtype.itemsize, bP),
            transcendentals=0,
        ),
        interpret=target.interpret,
        name=sweep.name,
    )(*(x for x, _ in inputs.values()))


def _step(
    sweep: Sweep, B, *, scalars, x_init, p, q, y, X, pT, acc, a: Any = None, w: Any = None, v: Any = None, base: Any = None,
    x_final: Any = None, dw: Any = None, dlr: Any = None, dW: Any = None,
):  # fmt: skip
    """One chunk, one tile of P, one block of Q: apply the block of X, then update it."""
    b, t, k = pl.program_id(1), pl.program_id(2), pl.program_id(3)
    last_t, last_k = pl.num_programs(2) - 1, pl.num_programs(3) - 1
    chunk = last_t - t if sweep.reverse else t
    lr, keep = scalars[0], scalars[1 + b * pl.num_programs(2) + chunk]
    dtype = p.dtype
    dot = functools.partial(
        jax.lax.dot_general,
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.DEFAULT if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
    )

    @pl.when(t == 0)
    def _():
        X[k] = x_init[...].T if sweep.transposed else x_init[...]

    @pl.when(k == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        pT[...] = p[...].T  # once per chunk, so that the update of every block is a plain matmul

    x_PQ = X[k]
    if not sweep.reverse:  # a document starts before its first chunk reads
        x_PQ = keep * x_PQ

    a_CQ = q[...] if a is None else a[...]
    read_PQ = x_PQ + w[...].astype(jnp.float32) if sweep.weight == "folded" else x_PQ
    y_CP = dot(a_CQ, read_PQ.astype(dtype), (((1,), (1,)), ((), ())))
    if sweep.weight == "separate":
        y_CP += dot(a_CQ, w[...], (((1,), (1,)), ((), ())))
    acc[...] += y_CP

    def updated():
        step_PQ = dot(pT[...], q[...], (((1,), (0,)), ((), ())))
        return x_PQ + (step_PQ if sweep.reverse else lr * step_PQ)

    if sweep.gradients:
        _collect(updated(), x_PQ, keep, b, t, k, B, last_t, X=X, dW=dW, dw=dw, x_final=x_final)
    elif sweep.final:
        X[k] = updated()

        @pl.when(t == last_t)
        def _():
            x_final[...] = X[k]
    else:  # nobody reads X after the last step

        @pl.when(t < last_t)
        def _():
            X[k] = keep * updated() if sweep.reverse else updated()

    @pl.when(k == last_k)
    def _():
        if sweep.reverse:
            if dlr is not None:
                dlr[...] = jnp.sum(v[...].astype(jnp.float32) * acc[...], axis=0, keepdims=True)
            y_CP = lr * acc[...]
        else:
            y_CP = acc[...]
        if base is not None:
            y_CP += base[...].astype(jnp.float32)
        y[...] = y_CP.astype(dtype)


def _collect(g_PQ, before_PQ, keep, b, t, k, B, last_t, *, X, dW, dw, x_final):
    """G leaves the chunk, and dW = sum do^T z over all chunks is read off it: where a document starts G returns to zero, and
    what it held is the share of the tokens from there on; the rest is in it at the end, less what it began with."""

    @pl.when((t == 0) & (b == 0))
    def _():
        dW[k] = -before_PQ

    @pl.when((t == 0) & (b > 0))
    def _():
        dW[k] -= before_PQ

    @pl.when(keep != 1)
    def _():
        dW[k] += (1 - keep) * g_PQ

    X[k] = keep * g_PQ

    @pl.when(t == last_t)
    def _():
        x_final[...] = X[k]
        dW[k] += X[k]

    @pl.when((t == last_t) & (b == B - 1))
    def _():
        dw[...] = dW[k]


def _vmem(sweep: Sweep, C, Q, itemsize, bP, bQ) -> int:
    """Bytes of VMEM: scratch, blocks (twice, for the pipeline) and what the step's matmuls return."""
    block = bP * bQ
    scratch = bP * Q * 4 * (2 if sweep.gradients else 1) + bP * C * (itemsize + 4)
    states = 1 + sweep.final + sweep.gradients
    streams = C * bQ * itemsize * (2 if sweep.transposed else 1)
    tokens = C * bP * itemsize * (3 if sweep.gradients or sweep is REVERSE_DZ else 2)
    weight = 0 if sweep.weight == "none" else block * itemsize
    values = C * bP * 4 + block * (8 + itemsize) + C * bQ * itemsize
    return scratch + 2 * (states * block * 4 + streams + tokens + weight) + values


def _traffic(sweep: Sweep, P, Q, C, itemsize, bP) -> int:
    """Bytes of HBM per chunk: every tile of P streams a and q (and W), and its own tokens."""
    streams = pl.cdiv(P, bP) * C * Q * itemsize * (2 if sweep.transposed else 1)
    tokens = C * P * itemsize * (3 if sweep.gradients or sweep is REVERSE_DZ else 2)
    return streams + tokens + (0 if sweep.weight == "none" else P * Q * itemsize)


@functools.cache
def _tiles(sweep: Sweep, target: Target, P, Q, C, itemsize) -> tuple[int, int] | None:
    """(bP, bQ) of the lowest cost among those that fit: wide tiles of P, because streams are read once per tile, but no
    wider than P needs, and long blocks of Q. P need not be a multiple of bP."""
    if target.tiles is not None:
        return target.tiles

    def cost(tile):
        bP, bQ = tile
        tiles = pl.cdiv(P, bP)
        flops = 2 * PRODUCTS[sweep.weight] * C * tiles * bP * Q
        return flops + FLOPS_PER_BYTE * _traffic(sweep, P, Q, C, itemsize, bP) + FLOPS_PER_STEP * tiles * (Q // bQ)

    sides = range(LANES, LONGEST + 1, LANES)
    candidates = [(bP, bQ) for bP in sides if bP <= P for bQ in sides if Q % bQ == 0]
    fitting = [tile for tile in candidates if _vmem(sweep, C, Q, itemsize, *tile) <= target.vmem_bytes - HEADROOM]
    return min(fitting, key=cost, default=None)
