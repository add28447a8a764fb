"""One sweep of the TPU kernel: the `pallas_call`, and what a step of its grid does.

Letters and the four sweeps as in `tpu.py`. The grid goes over tiles of P, sequences, chunks in the
order of the sweep, and blocks of Q, the last one fastest.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ttt_jax.kernels_pallas.tpu_tiles import PRODUCTS, Core, Sweep, choose_tiles, traffic


def run_sweep(
    sweep: Sweep,
    core: Core,
    lr,
    keep_BM,
    x_init,
    *,
    a,
    p,
    q,
    w_PQ=None,
    v_BMCP=None,
    base_BMCP=None,
):
    """Run one sweep of `tpu.py`.

    Args:
      x_init: X before the first step, float32 [B, P, Q], or [B, Q, P] for a transposed sweep.
      a, p, q: [B, M, C, Q], [B, M, C, P], [B, M, C, Q], of one dtype; a may be q.
      w_PQ: W, where the sweep has one.
      v_BMCP: for the gradient of lr, <v, z G^T>.
      base_BMCP: what y is added to, in place.

    Returns:
      y [B, M, C, P]; then what the sweep has of: final X, dW [P, Q] float32, rows of dlr
      [B, M, 1, P].

    Raises:
      ValueError: no tiles fit; `tpu.why_not` says so before.
    """
    (B, M, C, P), Q, dtype = p.shape, q.shape[3], p.dtype
    tiles = choose_tiles(sweep, core, P, Q, C, dtype.itemsize)
    if tiles is None:
        raise ValueError(f"{sweep.name}: no tiles for C = {C}, P = {P}, Q = {Q}; `why_not` says so")
    bP, bQ = tiles
    specs = _Specs(sweep, B, M, Q // bQ, C, bP, bQ)

    inputs = _inputs(specs, lr, keep_BM, x_init, a, p, q, w_PQ, v_BMCP, base_BMCP)
    outputs, scratch = _outputs(sweep, specs, p, Q), _scratch(sweep, specs, dtype)
    names = (*inputs, *outputs, *scratch)

    def body(*refs):
        _step(sweep, B, **dict(zip(names, refs, strict=True)))

    # dW is summed over the sequences, one after the other.
    sequences = "arbitrary" if sweep.gradients else "parallel"
    return pl.pallas_call(
        body,
        # What lies beyond P in the last tile never meets the rest, and is not written.
        grid=(pl.cdiv(P, bP), B, M, Q // bQ),
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()],
        scratch_shapes=list(scratch.values()),
        input_output_aliases={} if base_BMCP is None else {list(inputs).index("base"): 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", sequences, "arbitrary", "arbitrary"),
            vmem_limit_bytes=core.vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * PRODUCTS[sweep.weight] * B * M * C * P * Q,
            bytes_accessed=B * M * traffic(sweep, P, Q, C, dtype.itemsize, bP),
            transcendentals=0,
        ),
        interpret=core.interpret,
        name=sweep.name,
    )(*(x for x, _ in inputs.values()))


class _Specs(NamedTuple):
    """Blocks of the arrays.

    Index maps take (tile of P, sequence, step in time, block of Q). A block that is needed at one
    step in time only keeps a constant index elsewhere, so that it is moved once.
    """

    sweep: Sweep
    B: int
    M: int
    blocks: int  # of Q
    C: int
    bP: int
    bQ: int

    def _chunk(self, t):
        return self.M - 1 - t if self.sweep.reverse else t

    def _at_start(self, t, k):
        return jnp.where(t == 0, k, self.blocks - 1)

    def _at_end(self, t, k):
        return jnp.where(t == self.M - 1, k, 0)

    def streamed(self):
        """Tokens, block of Q by block of Q."""
        shape = (None, None, self.C, self.bQ)
        return pl.BlockSpec(shape, lambda j, b, t, k: (b, self._chunk(t), 0, k))

    def resident(self):
        """Tokens, one tile of P for all blocks of Q."""
        shape = (None, None, self.C, self.bP)
        return pl.BlockSpec(shape, lambda j, b, t, k: (b, self._chunk(t), 0, j))

    def initial(self):
        """X before the first step."""
        if self.sweep.transposed:
            shape = (None, self.bQ, self.bP)
            return pl.BlockSpec(shape, lambda j, b, t, k: (b, self._at_start(t, k), j))
        shape = (None, self.bP, self.bQ)
        return pl.BlockSpec(shape, lambda j, b, t, k: (b, j, self._at_start(t, k)))

    def final(self):
        """X after the last step."""
        shape = (None, self.bP, self.bQ)
        return pl.BlockSpec(shape, lambda j, b, t, k: (b, j, self._at_end(t, k)))

    def weight(self):
        """W, at every step."""
        return pl.BlockSpec((self.bP, self.bQ), lambda j, b, t, k: (j, k))

    def dw(self):
        """dW, after the last step of the last sequence."""
        last = self.B - 1
        return pl.BlockSpec(
            (self.bP, self.bQ),
            lambda j, b, t, k: (j, jnp.where(b == last, self._at_end(t, k), 0)),
        )

    def dlr(self):
        """Rows of dlr, one per chunk."""
        shape = (None, None, 1, self.bP)
        return pl.BlockSpec(shape, lambda j, b, t, k: (b, self._chunk(t), 0, j))


def _inputs(specs, lr, keep_BM, x_init, a, p, q, w_PQ, v_BMCP, base_BMCP):
    """Arrays that the sweep reads and their blocks, by name."""
    scalars = jnp.concatenate([lr.reshape(1), keep_BM.reshape(-1)])
    inputs = {"scalars": (scalars, pl.BlockSpec(memory_space=pltpu.SMEM))}
    inputs |= {"x_init": (x_init, specs.initial()), "p": (p, specs.resident())}
    inputs["q"] = (q, specs.streamed())
    if a is not q:
        inputs["a"] = (a, specs.streamed())
    if w_PQ is not None:
        inputs["w"] = (w_PQ, specs.weight())
    if v_BMCP is not None:
        inputs["v"] = (v_BMCP, specs.resident())
    if base_BMCP is not None:
        inputs["base"] = (base_BMCP, specs.resident())
    return inputs


def _outputs(sweep, specs, p, Q):
    """Types and blocks of the results, by name."""
    B, M, C, P = p.shape
    struct = functools.partial(
        jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(p).manual_axis_type
    )
    outputs = {"y": (struct((B, M, C, P), p.dtype), specs.resident())}
    if sweep.final:
        outputs["x_final"] = (struct((B, P, Q), jnp.float32), specs.final())
    if sweep.gradients:
        outputs["dw"] = (struct((P, Q), jnp.float32), specs.dw())
        outputs["dlr"] = (struct((B, M, 1, P), jnp.float32), specs.dlr())
    return outputs


def _scratch(sweep, specs, dtype):
    """VMEM that stays from step to step, by name."""
    scratch = {
        "X": pltpu.VMEM((specs.blocks, specs.bP, specs.bQ), jnp.float32),
        "pT": pltpu.VMEM((specs.bP, specs.C), dtype),
        "acc": pltpu.VMEM((specs.C, specs.bP), jnp.float32),
    }
    if sweep.gradients:
        scratch["dW"] = scratch["X"]
    return scratch


def _step(
    sweep: Sweep,
    B,
    *,
    scalars,
    x_init,
    p,
    q,
    y,
    X,
    pT,
    acc,
    a: Any = None,
    w: Any = None,
    v: Any = None,
    base: Any = None,
    x_final: Any = None,
    dw: Any = None,
    dlr: Any = None,
    dW: Any = None,
):
    """Do one chunk, one tile of P, one block of Q: apply the block of X, then update it."""
    b, t, k = pl.program_id(1), pl.program_id(2), pl.program_id(3)
    last_t, last_k = pl.num_programs(2) - 1, pl.num_programs(3) - 1
    chunk = last_t - t if sweep.reverse else t
    lr, keep = scalars[0], scalars[1 + b * pl.num_programs(2) + chunk]
    _start(sweep, t, k, x_init, p, X, pT, acc)

    x_PQ = X[k]
    y_CP = _apply(sweep, q if a is None else a, w, x_PQ)
    acc[...] += y_CP

    if sweep.gradients:
        _collect(x_PQ, keep, b, t, k, dW=dW)
        X[k] = _updated(sweep, lr, keep, x_PQ, pT, q)
        _finish(b, t, k, B, last_t, X=X, dW=dW, dw=dw, x_final=x_final)
    elif sweep.final:
        X[k] = _updated(sweep, lr, keep, x_PQ, pT, q)

        @pl.when(t == last_t)
        def _():
            x_final[...] = X[k]
    else:  # nobody reads X after the last step

        @pl.when(t < last_t)
        def _():
            X[k] = _updated(sweep, lr, keep, x_PQ, pT, q)

    @pl.when(k == last_k)
    def _():
        _write_y(sweep, lr, acc, v, base, y, dlr)


def _start(sweep, t, k, x_init, p, X, pT, acc):
    """Load X before the first chunk; before each chunk, clear the accumulator and transpose p."""

    @pl.when(t == 0)
    def _():
        X[k] = x_init[...].T if sweep.transposed else x_init[...]

    @pl.when(k == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        pT[...] = p[...].T  # once per chunk, so that the update of every block is a plain matmul


def _dot(x, y, contracted):
    """A matmul over (dimensions of x, dimensions of y), float32."""
    exact = x.dtype != jnp.bfloat16
    return jax.lax.dot_general(
        x,
        y,
        (contracted, ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _apply(sweep, a, w, x_PQ):
    """a (W + X)^T of a block, [C, bP] float32.

    In the forward in two products, so that an update that is small next to W survives bfloat16.
    """
    a_CQ = a[...]
    read_PQ = x_PQ + w[...].astype(jnp.float32) if sweep.weight == "folded" else x_PQ
    y_CP = _dot(a_CQ, read_PQ.astype(a.dtype), ((1,), (1,)))
    if sweep.weight == "separate":
        y_CP += _dot(a_CQ, w[...], ((1,), (1,)))
    return y_CP


def _updated(sweep, lr, keep, x_PQ, pT, q):
    """Keep X + lr p^T q of a block, or keep G + p^T q, float32."""
    step_PQ = _dot(pT[...], q[...], ((1,), (0,)))
    return keep * x_PQ + (step_PQ if sweep.reverse else lr * step_PQ)


def _write_y(sweep, lr, acc, v, base, y, dlr):
    """Write the tile of y that all blocks of Q have been summed for, and its rows of dlr."""
    if sweep.reverse:
        if dlr is not None:
            dlr[...] = jnp.sum(v[...].astype(jnp.float32) * acc[...], axis=0, keepdims=True)
        y_CP = lr * acc[...]
    else:
        y_CP = acc[...]
    if base is not None:
        y_CP += base[...].astype(jnp.float32)
    y[...] = y_CP.astype(y.dtype)


def _collect(before_PQ, keep, b, t, k, *, dW):
    """Read dW = sum do^T z over all chunks off G.

    Where a document ends, G returns to zero, and what it held is the share of the tokens behind.
    The rest is in it at the end, less what it began with.
    """

    @pl.when((t == 0) & (b == 0))
    def _():
        dW[k] = -before_PQ

    @pl.when((t == 0) & (b > 0))
    def _():
        dW[k] -= before_PQ

    @pl.when(keep != 1)
    def _():
        dW[k] += (1 - keep) * before_PQ


def _finish(b, t, k, B, last_t, *, X, dW, dw, x_final):
    """After the last chunk, add what is left in G to dW; write both."""

    @pl.when(t == last_t)
    def _():
        x_final[...] = X[k]
        dW[k] += X[k]

    @pl.when((t == last_t) & (b == B - 1))
    def _():
        dw[...] = dW[k]
