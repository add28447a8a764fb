"""The kernel of the targets' convolution without a GPU: in the interpreter, and where it is taken.
tests/gpu has it on a device, tests/kernels/test_gpu_aot.py compiles it for one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from support.tolerance import TOLERANCE, assert_close

from ttt_jax.kernels_pallas import target_convolution as kernel
from ttt_jax.ops import platform
from ttt_jax.ops.ttt.targets import convolved

B, T, C, D, K = 2, 512, 256, 512, 5


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    source = rng.standard_normal((B, T, D)) * np.exp(rng.standard_normal((B, T, 1)))
    source[:, 7] = 0.0  # a token of zeros stays one
    return source, rng.standard_normal((D, K)), rng.standard_normal((B, T, D))


def oracle(source, conv, normalize):
    """Token by token, in float64."""
    if normalize:
        mean = jnp.mean(source**2, axis=2, keepdims=True)
        source = source * jax.lax.rsqrt(mean + 1e-12)
    t = jnp.zeros_like(source)
    for k in range(K):
        c = np.arange(T) % C + k - K // 2
        inside = ((c >= 0) & (c < C))[None, :, None]
        t += jnp.where(inside, jnp.roll(source, K // 2 - k, axis=1), 0) * conv[None, None, :, k]
    return t


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As on one GPU, with the kernel in the interpreter."""
    run = functools.partial(kernel.convolved, interpret=True)
    monkeypatch.setattr(platform, "compiled_for", lambda: "gpu")
    monkeypatch.setattr(platform, "on_one_device", lambda: True)
    monkeypatch.setattr(kernel, "convolved", run)


def values(run, source, conv, dt):
    """The result and both gradients, as one program."""

    def program(source, conv, dt):
        out, pull = jax.vjp(run, source, conv)
        return out, *pull(dt)

    return jit(program)(source, conv, dt)


@pytest.mark.parametrize("written", [None, [[True, False], [False, True]]])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernel_matches_float64_with_gradients(on_a_gpu, dtype, normalize, written):
    """Chunks that are not written come out as zeros, and nothing of them has a gradient."""
    assert kernel.why_not(dtype, C, D) is None
    arrays = [jnp.asarray(x, dtype).astype(dtype) for x in inputs()]
    source, conv, dt = (np.asarray(x, "float64") for x in arrays)
    with jax.enable_x64(True):
        mask = np.repeat([[True] * 2] * B if written is None else written, C, axis=1)[:, :, None]
        rule = lambda source, conv: jnp.where(mask, oracle(source, conv, normalize), 0)
        expected = values(rule, source, conv, dt)
    options = C, normalize, None if written is None else jnp.asarray(written)
    got = values(lambda source, conv: convolved(source, conv[:, None], *options), *arrays)
    for name, x, y in zip(("t", "dsource", "dconv"), got, expected, strict=True):
        assert x.dtype == dtype
        assert_close(name, x, y, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("C", "D", "dtype", "field"),
    [(192, 512, "float32", "C"), (256, 96, "float32", "D"), (256, 512, "float64", "float64")],
)
def test_other_sources_are_xlas(C, D, dtype, field):
    assert field in str(kernel.why_not(dtype, C, D))
