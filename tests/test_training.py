"""The training step with TTT off in some of the steps."""

import jax
import numpy as np
import pytest
from test_guard import SMALL, batch

from ttt_jax.config import Config, from_dict, replace
from ttt_jax.sharding import make_mesh
from ttt_jax.training import abstract_state, init_state, make_train_step


def runs(steps, times=1, **fields):
    """(metrics of each step, final parameters) of runs of a small model."""
    config = replace(from_dict(Config, SMALL), {"steps": 40, **fields})
    abstract, tx = abstract_state(config, make_mesh(config.mesh))
    step = make_train_step(config, tx)
    for _ in range(times):
        state, metrics = init_state(config, abstract, tx), []
        for _ in range(steps):
            state, got = step(state, batch())
            metrics.append({name: float(value) for name, value in got.items()})
        yield metrics, state.model


def test_a_dropped_step_is_a_step_without_ttt():
    """With every step dropped: the same losses as where the op writes next to nothing, and nothing was written."""
    fields = {"optimizer.accumulate": 2}
    ((dropped, model),) = runs(3, **fields, **{"optimizer.ttt_drop": 1.0})
    ((silent, expected),) = runs(3, **fields, **{"model.ttt.lr": 1e-12})
    for got, want in zip(dropped, silent, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-6)
        assert got["ttt/layer_00/state_ratio"] == got["ttt/layer_00/update_norm"] == 0
        assert want["ttt/layer_00/state_ratio"] > 0
    for got, want in zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_share_of_dropped_steps_and_their_places():
    """A function of seed and step, so that an interrupted run goes on as it would have."""
    drop = {"optimizer.ttt_drop": 0.5}
    found = [*runs(24, times=2, **drop), *runs(24, seed=1, **drop)]
    places = [[step["ttt/layer_00/state_ratio"] == 0 for step in metrics] for metrics, _ in found]
    assert places[0] == places[1] != places[2]
    assert all(6 <= sum(row) <= 18 for row in places)  # 12 on average; outside once in 300 seeds
