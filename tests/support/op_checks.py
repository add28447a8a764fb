"""One check for all implementations of the op: values, final state and every gradient against the
float64 reference.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from support.tolerance import TOLERANCE, assert_close

from ttt_jax.ops import IMPLEMENTATIONS, in_place_ttt

NAMES = ("z", "v", "w", "lr", "state")
F64, F32, BF16 = map(jnp.dtype, (jnp.float64, jnp.float32, jnp.bfloat16))

# the others: test_gpu_kernels.py, tests/gpu
HERE = [name for name in IMPLEMENTATIONS if name not in ("pallas_gpu", "triton")]
FAST = [name for name in HERE if name != "reference"]
KERNELS = ("pallas_tpu",)  # float32 and bfloat16 only
# padded to 384: the second tile, of 256, is half full; three blocks
SIZES = {"pallas_tpu": {"D": 260, "F": 300}}

DTYPES = {name: (F32, BF16) if name in KERNELS else (F64, F32, BF16) for name in HERE}


def cases(*values, implementations=FAST, fast=1):
    """Implementations x tuples of values, without dtypes that an implementation lacks. Of the
    interpreter's, which take long, only the first `fast` are fast tests.
    """
    for implementation in implementations:
        tuples = [case if isinstance(case, tuple) else (case,) for case in values]
        lacks = {F64, F32, BF16} - set(DTYPES[implementation])
        for i, case in enumerate(case for case in tuples if lacks.isdisjoint(case)):
            slow = implementation in KERNELS and i >= fast
            name = "-".join(map(str, (implementation, *case)))
            yield pytest.param(
                implementation, *case, id=name, marks=[pytest.mark.slow] if slow else []
            )


def make_inputs(B=2, T=40, D=12, F=20, seed=0, state_scale=0.3):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((B, T, F))
    v = rng.standard_normal((B, T, D)) / np.sqrt(T)
    w = rng.standard_normal((D, F)) / np.sqrt(F)
    state = rng.standard_normal((B, D, F)) * state_scale / np.sqrt(F)
    do, dS = rng.standard_normal((B, T, D)), rng.standard_normal((B, D, F))
    return (z, v, w, 0.7, state), (do, dS)


@functools.cache
def compiled(fresh=False, unread=False, **options):
    """One program per shape and option. `fresh`: no initial state; `unread`: no gradient reaches
    the final state.
    """

    def both(arguments, cotangents, segment_ids, clip_norm):
        def run(z, v, w, lr, state):
            start = None if fresh else state
            return in_place_ttt(
                z, v, w, lr=lr, state=start, segment_ids=segment_ids, clip_norm=clip_norm, **options
            )

        if unread:
            o, vjp, S = jax.vjp(run, *arguments, has_aux=True)
            return (o, S), vjp(cotangents[0])
        out, vjp = jax.vjp(run, *arguments)
        return out, vjp(cotangents)

    return jit(both)


def results(arguments, cotangents, dtype, segment_ids=None, clip_norm=None, **options):
    """(o, S) and the gradients of <o, do> + <S, dS> for z, v, w, lr and state, as float64 numpy."""
    z, v, w, lr, state = arguments
    acc = jnp.float64 if dtype == jnp.float64 else jnp.float32
    cast = [np.asarray(x, dtype) for x in (z, v, w)] + [np.asarray(x, acc) for x in (lr, state)]
    do, dS = np.asarray(cotangents[0], dtype), np.asarray(cotangents[1], acc)
    out, grads = compiled(**options)(cast, (do, dS), segment_ids, clip_norm)
    named = {"o": out[0], "final_state": out[1]} | {
        f"d{n}": g for n, g in zip(NAMES, grads, strict=True)
    }
    return {name: np.asarray(x, np.float64) for name, x in named.items()}


def rounded(arguments, cotangents, dtype):
    """What the implementation under test receives, in float64: the oracle must not be charged for
    rounding inputs.
    """
    cast = lambda x: np.asarray(x, dtype).astype(np.float64)
    z, v, w, lr, state = arguments
    lower = cast if dtype != jnp.float64 else np.float64
    single = (
        (lambda x: np.asarray(x, np.float32).astype(np.float64))
        if dtype != jnp.float64
        else np.float64
    )
    do, dS = cotangents
    return (lower(z), lower(v), lower(w), float(single(lr)), single(state)), (lower(do), single(dS))


def check(arguments, cotangents, dtype, implementation, **options):
    with jax.enable_x64(True):
        arguments, cotangents = rounded(arguments, cotangents, dtype)
        oracle = results(arguments, cotangents, jnp.float64, implementation="reference", **options)
    context = jax.enable_x64(True) if dtype == jnp.float64 else jax.enable_x64(False)
    with context:
        got = results(arguments, cotangents, dtype, implementation=implementation, **options)
    tolerance = TOLERANCE[jnp.dtype(dtype).name]
    for name, value in got.items():
        # an inner product <v, dv> / lr, which may cancel (to zero, once every update is clipped)
        if name == "dlr":
            scale = (
                np.linalg.norm(arguments[1])
                * np.linalg.norm(oracle["dv"])
                / max(arguments[3], 1e-2)
            )
            assert abs(value - oracle[name]) <= tolerance * max(scale, abs(oracle[name])), name
        else:
            assert_close(name, value, oracle[name], tolerance)


DOCUMENTS = {
    "none": None,
    "boundaries": lambda T, C: np.minimum(np.arange(T) // C // 2 + 1, 3),
    "padding": lambda T, C: np.where(
        np.arange(T) % (3 * C) < 2 * C + C // 2, np.arange(T) // (3 * C) + 1, 0
    ),
    "all_padding": lambda T, C: np.zeros(T, int),
}
