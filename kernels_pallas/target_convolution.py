"""The convolution of the targets on NVIDIA GPUs in Pallas (Triton): a pass over memory each way.

N chunks of C tokens, D model width, K taps (odd; the middle one is the token itself), R rows and W
columns at one time, S rows of a program.

    t[c] = sum_k taps[k] n[c + k - K/2]       n[c] = scale[c] x[c], zero outside of the chunk

XLA makes the same of five shifted reads that ask for every number whether it exists, and of a pass
for each of them in the backward. Here a row is in memory once, and the other taps find it in L1.

jax calls Pallas' Triton backend deprecated from 0.11 on; 0.12 still has it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

ROWS, COLUMNS = 4, 256  # at one time, by four warps: 16 bytes a thread
PROGRAM_ROWS = 128  # their sums for the taps' gradient stay in registers


def why_not(dtype, C: int, D: int) -> str | None:
    """Say why such sources cannot run on the GPUs here, or None."""
    # Compiling ahead of time, there is no device to ask.
    capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))
    major = capability.partition(".")[0]
    if not (major.isdigit() and int(major) >= 8):
        return f"it needs an NVIDIA GPU of compute capability 8.0 or more, not {capability}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"it reads bfloat16 and float32, not {jnp.dtype(dtype)}"
    for name, size, unit in (("C", C, PROGRAM_ROWS), ("D", D, COLUMNS)):
        if size % unit:
            return f"{name} = {size} is not a multiple of {unit}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def convolved(x_NCD, scale_NC, taps_KD, interpret: bool = False):
    """Compute t in x's dtype.

    Args:
      x_NCD: bfloat16 or float32.
      scale_NC, taps_KD: float32.
      interpret: run in Pallas' interpreter, on any platform.
    """
    return _forward(x_NCD, scale_NC, taps_KD, interpret)[0]


def _forward(x_NCD, scale_NC, taps_KD, interpret):
    (N, C, D), K = x_NCD.shape, taps_KD.shape[0]
    chunk, row, taps = _specs(C, K)
    t_NCD = pl.pallas_call(
        functools.partial(_sum_of_taps, C, K),
        grid=(N, C // PROGRAM_ROWS, D // COLUMNS),
        in_specs=[chunk, row, taps],
        out_specs=chunk,
        out_shape=jax.ShapeDtypeStruct(x_NCD.shape, x_NCD.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="ttt_target_convolution",
    )(x_NCD, scale_NC, taps_KD)
    return t_NCD, (x_NCD, scale_NC, taps_KD)


def _backward(interpret, residuals, dt_NCD):
    x_NCD, scale_NC, taps_KD = residuals
    (N, C, D), K = x_NCD.shape, taps_KD.shape[0]
    parts, blocks = C // PROGRAM_ROWS, D // COLUMNS
    chunk, row, taps = _specs(C, K)
    dx_NCD, dscale_NJC, dtaps_NPKD = pl.pallas_call(
        functools.partial(_gradients, C, K),
        grid=(N, parts, blocks),
        in_specs=[chunk, row, taps, chunk],
        out_specs=[
            chunk,
            pl.BlockSpec((None, None, C), lambda n, p, j: (n, j, 0)),
            pl.BlockSpec((None, None, K, COLUMNS), lambda n, p, j: (n, p, 0, j)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(x_NCD.shape, x_NCD.dtype),
            jax.ShapeDtypeStruct((N, blocks, C), jnp.float32),
            jax.ShapeDtypeStruct((N, parts, K, D), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="ttt_target_convolution_backward",
    )(x_NCD, scale_NC, taps_KD, dt_NCD)
    return dx_NCD, dscale_NJC.sum(axis=1), dtaps_NPKD.sum(axis=(0, 1))


convolved.defvjp(_forward, _backward)


def _specs(C: int, K: int):
    """What a program sees: COLUMNS of a chunk, its scales, the same columns of the taps."""
    return (
        pl.BlockSpec((None, C, COLUMNS), lambda n, p, j: (n, 0, j)),
        pl.BlockSpec((None, C), lambda n, p, j: (n, 0)),
        pl.BlockSpec((K, COLUMNS), lambda n, p, j: (0, j)),
    )


def _each_rows(step, carry):
    """`carry` after `step(carry, row_R)` for all rows of this program, ROWS at a time."""
    first = pl.program_id(1) * PROGRAM_ROWS

    def body(s, carry):
        return step(carry, first + s * ROWS + jnp.arange(ROWS, dtype=jnp.int32))

    return jax.lax.fori_loop(0, PROGRAM_ROWS // ROWS, body, carry)


def _rows(x_CW, row_R):
    """These rows in float32; zeros where the chunk has none."""
    C = x_CW.shape[0]
    inside_R = (row_R >= 0) & (row_R < C)
    row_R = jnp.clip(row_R, 0, C - 1)
    part = x_CW.at[row_R[:, None], jnp.arange(COLUMNS, dtype=jnp.int32)[None, :]]
    mask_RW = jnp.broadcast_to(inside_R[:, None], (ROWS, COLUMNS))
    return plgpu.load(part, mask=mask_RW, other=0.0).astype(jnp.float32)


def _scales(scale_C, row_R):
    return plgpu.load(scale_C.at[jnp.clip(row_R, 0, scale_C.shape[0] - 1)])


def _store(x_CW, row_R, values_RW):
    columns_W = jnp.arange(COLUMNS, dtype=jnp.int32)
    plgpu.store(x_CW.at[row_R[:, None], columns_W[None, :]], values_RW.astype(x_CW.dtype))


def _sum_of_taps(C, K, x_CW, scale_C, taps_KW, t_CW):
    taps = [taps_KW[k] for k in range(K)]

    def step(_, row_R):
        sum_RW = jnp.zeros((ROWS, COLUMNS), jnp.float32)
        for k, tap_W in enumerate(taps):
            source_R = row_R + (k - K // 2)
            n_RW = _scales(scale_C, source_R)[:, None] * _rows(x_CW, source_R)
            sum_RW += n_RW * tap_W[None]
        _store(t_CW, row_R, sum_RW)

    _each_rows(step, None)


def _gradients(C, K, x_CW, scale_C, taps_KW, dt_CW, dx_CW, dscale_C, dtaps_KW):
    taps = [taps_KW[k] for k in range(K)]

    def step(dtaps, row_R):
        x_RW, scale_R1 = _rows(x_CW, row_R), _scales(scale_C, row_R)[:, None]
        n_RW, dn_RW, new = scale_R1 * x_RW, jnp.zeros_like(x_RW), []
        for k, tap_W in enumerate(taps):
            dt_RW = _rows(dt_CW, row_R - (k - K // 2))  # where row_R was read by tap k
            dn_RW += dt_RW * tap_W[None]
            new.append(dtaps[k] + dt_RW * n_RW)
        _store(dx_CW, row_R, scale_R1 * dn_RW)
        plgpu.store(dscale_C.at[row_R], jnp.sum(dn_RW * x_RW, axis=1))
        return tuple(new)

    zeros = tuple(jnp.zeros((ROWS, COLUMNS), jnp.float32) for _ in taps)
    for k, dtap_RW in enumerate(_each_rows(step, zeros)):
        dtaps_KW[k] = jnp.sum(dtap_RW, axis=0)
