"""The training step with TTT off in some of the steps."""

import jax
import numpy as np
import pytest
from test_guard import SMALL, batch

from ttt_jax.config import Config, from_dict, replace
from ttt_jax.sharding import make_mesh
from ttt_jax.training import abstract_state, init_state, make_train_step


def run(steps, **fields):
    """(metrics of each step, final parameters) of a small model."""
    config = replace(from_dict(Config, SMALL), {"steps": 40, **fields})
    abstract, tx = abstract_state(config, make_mesh(config.mesh))
    state, step, metrics = init_state(config, abstract, tx), make_train_step(config, tx), []
    for _ in range(steps):
        state, got = step(state, batch())
        metrics.append({name: float(value) for name, value in got.items()})
    return metrics, state.model


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_dropped_step_is_a_step_without_ttt(accumulate):
    """With every step dropped: the same losses as where the op writes nothing, and nothing was written."""
    fields = {"optimizer.accumulate": accumulate}
    dropped, model = run(3, **fields, **{"optimizer.ttt_drop": 1.0})
    silent, expected = run(3, **fields, **{"model.ttt.lr": 1e-30})
    for got, want in zip(dropped, silent, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-6)
        assert got["ttt/layer_00/state_ratio"] == got["ttt/layer_00/update_norm"] == 0
    for got, want in zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_share_of_dropped_steps_and_their_places():
    """A function of seed and step, so that an interrupted run goes on as it would have."""
    ratios = [[m["ttt/layer_00/state_ratio"] for m in run(24, **{"optimizer.ttt_drop": 0.5, "seed": s})[0]] for s in (0, 0, 1)]
    places = [[ratio == 0 for ratio in row] for row in ratios]
    assert places[0] == places[1] != places[2]
    assert all(6 <= sum(row) <= 18 for row in places)  # 12 on average; outside once in 300 seeds


def test_none_is_dropped_by_default():
    assert all(m["ttt/layer_00/state_ratio"] > 0 for m in run(4)[0])
