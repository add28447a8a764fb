"""RMSNorm against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.model.layers import RMSNorm


@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_rms_norm_is_computed_in_float32(size):
    """bf16 in and out, rounded once: of 4096 elements few are not the bf16 number nearest to the
    exact one. At 1e-3 the mean square is as small as eps.
    """
    rng = np.random.default_rng(0)
    x = np.asarray(jnp.asarray(size * rng.standard_normal((4, 1024)), jnp.bfloat16), np.float64)
    norm = RMSNorm(1024, "embed", 1e-6, key=None)
    scale = (1 + 0.1 * rng.standard_normal(1024)).astype(np.float32)
    norm.scale.set_value(jnp.asarray(scale))
    exact = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale.astype(np.float64)
    nearest = np.asarray(jnp.asarray(exact.astype(np.float32), jnp.bfloat16), np.float64)
    got = norm(jnp.asarray(x, jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    assert np.mean(np.asarray(got, np.float64) != nearest) < 0.01
