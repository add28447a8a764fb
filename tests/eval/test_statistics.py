"""Bootstrap intervals of many documents against the normal approximation, which holds there."""

import numpy as np
import pytest

from ttt_jax.eval import statistics
from ttt_jax.eval.statistics import mean_with_interval


@pytest.mark.parametrize("block", [1 << 22, 5000, 1])
def test_long_lists_are_resampled_as_often(monkeypatch, block):
    """However few draws are held at a time (`block`), there are 2000 resamples, and the interval is
    the same.
    """
    monkeypatch.setattr(statistics, "_BLOCK", block)
    value = np.random.default_rng(0).normal(3.0, 2.0, 1000)
    found = mean_with_interval(value)
    error = 1.96 * value.std() / np.sqrt(1000)
    assert found["mean"] == pytest.approx(value.mean(), rel=1e-12)
    assert found["low"] == pytest.approx(value.mean() - error, abs=0.1 * error)
    assert found["high"] == pytest.approx(value.mean() + error, abs=0.1 * error)
    assert found == mean_with_interval(value), "the seed decides"
