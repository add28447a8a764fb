"""The targets' convolution against a sum written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from support.tolerance import TOLERANCE, assert_close

from ttt_jax.ops.ttt.chunk_conv import chunk_conv


def written_out(x, taps):
    """sum_k taps_k x_{c + k - K // 2}, zeros beyond the chunk's edges."""
    C, K = x.shape[2], taps.shape[1]
    t = np.zeros_like(x)
    for c in range(C):
        for k in range(K):
            if 0 <= c + k - K // 2 < C:
                t[:, :, c] += taps[:, k] * x[:, :, c + k - K // 2]
    return t


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(("C", "K"), [(7, 5), (1, 5), (2, 3), (6, 1)])
def test_matches_the_sum_written_out(C, K, dtype):
    """Chunks shorter than the kernel, too; two rows of three chunks; both gradients."""
    rng = np.random.default_rng(0)
    x, dt = (rng.standard_normal((2, 3, C, 4)) for _ in range(2))
    taps = rng.standard_normal((4, K))
    with jax.enable_x64(dtype == "float64"):
        x, dt = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, dt))
        acc = "float64" if dtype == "float64" else "float32"
        taps = np.asarray(jnp.asarray(taps, acc), np.float64)
        arrays = jnp.asarray(x, dtype), jnp.asarray(taps, acc)

        def both(x, taps, dt):
            t, pull = jax.vjp(chunk_conv, x, taps)
            return t, *pull(dt)

        got = jit(both)(*arrays, jnp.asarray(dt, dtype))
    assert [a.dtype for a in got] == [dtype, dtype, acc]
    # linear in both: gradients from basis vectors
    t = written_out(x, taps)
    dx = written_out(dt, taps[:, ::-1])
    dtaps = np.zeros_like(taps)
    for k in range(K):
        one = np.zeros_like(taps)
        one[:, k] = 1
        dtaps[:, k] = (written_out(x, one) * dt).sum((0, 1, 2))
    for name, a, b in zip(("t", "dx", "dtaps"), got, (t, dx, dtaps), strict=True):
        if np.linalg.norm(b):
            assert_close(name, np.asarray(a, np.float64), b, TOLERANCE[dtype])
        else:
            assert not np.asarray(a).any(), name
