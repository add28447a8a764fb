"""The training step: TTT off in some of the steps, schedules; and the closing evaluation."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_training import SMALL, batch, bits

from ttt_jax.config import Config, from_dict, replace
from ttt_jax.model.loss import token_nll
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.training.heldout import evaluate_by_position, make_position_nll
from ttt_jax.training.step import TrainState, abstract_state, init_state, make_train_step


def runs(steps, times=1, devices=None, **fields):
    """(metrics of each step, final parameters) of runs of a small model; devices None: all."""
    config = replace(from_dict(Config, SMALL), {"steps": 40, **fields})
    abstract, tx = abstract_state(config, make_mesh(config.mesh, devices))
    step = make_train_step(config, tx)
    for _ in range(times):
        state, metrics = init_state(config, abstract, tx), []
        for _ in range(steps):
            state, got = step(state, batch())
            metrics.append({name: float(value) for name, value in got.items()})
        yield metrics, state.model


def test_a_dropped_step_is_a_step_without_ttt():
    """With every step dropped: the same losses as where the op writes next to nothing, and nothing
    was written.
    """
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
    drop = {"optimizer.ttt_drop": 0.5, "devices": jax.devices()[:1]}
    found = [*runs(24, times=2, **drop), *runs(24, seed=1, **drop)]
    places = [[step["ttt/layer_00/state_ratio"] == 0 for step in metrics] for metrics, _ in found]
    assert places[0] == places[1] != places[2]
    assert all(6 <= sum(row) <= 18 for row in places)  # 12 on average; outside once in 300 seeds


def uneven():
    """Rows with 16 real tokens, 3, none, .. (all of one document)."""
    rows = batch()
    lengths = np.array([16, 3, 16, 0, 9, 1, 16, 2])
    real = np.arange(16)[None] < lengths[:, None]
    real = jnp.asarray(real, jnp.int32)
    return rows | {"weights": real.astype(jnp.float32), "segment_ids": real}


class Job(NamedTuple):
    config: Config
    step: Callable
    fresh: Callable[[], TrainState]  # whose targets write from the first step on


@pytest.fixture(scope="module")
def job():
    """A run with both warm-ups; compiled once."""
    fields = {"steps": 40, "optimizer.warmup_steps": 8, "optimizer.ttt_lr_warmup_steps": 8}
    fields["model.ttt.lr"] = 5.0
    config = replace(from_dict(Config, SMALL), fields)
    abstract, tx = abstract_state(config, make_mesh(config.mesh))
    first = init_state(config, abstract, tx)
    first = first._replace(model=jax.tree_util.tree_map_with_path(written, first.model))
    return Job(config, make_train_step(config, tx), lambda: jax.tree.map(jnp.copy, first))


def test_schedules_count_updates_not_batches(job):
    """A skipped step moves neither the learning rate, nor its logged value, nor the inner rate."""

    def run(bad):
        state, rows = job.fresh(), []
        for i in range(4 + len(bad)):
            state, metrics = job.step(state, batch(np.nan) if i in bad else batch())
            rows += [] if i in bad else [{name: float(value) for name, value in metrics.items()}]
        return rows

    quiet, disturbed = run(()), run((1, 3, 4))
    rates = [job.config.optimizer.lr * i / 8 for i in range(4)]
    assert [row["learning_rate"] for row in quiet] == pytest.approx(rates)
    ratios = [row["ttt/layer_00/state_ratio"] for row in quiet]
    assert ratios[0] == 0 < ratios[1] < ratios[2] < ratios[3], "the inner rate rises from zero"
    for name in quiet[0].keys() - {"skipped_steps"}:
        assert [row[name] for row in disturbed] == [row[name] for row in quiet], name


def test_the_closing_evaluation_knows_on_from_off(job):
    """Row by row what `hidden` says with the inner rate as it is, and with TTT switched off.

    The last batch is filled up.
    """
    mesh, model = make_mesh(job.config.mesh), job.fresh().model
    rows = {name: np.asarray(x)[:5] for name, x in uneven().items()}
    on, off = evaluate_by_position(make_position_nll(mesh), model, rows, mesh, batch_size=2)

    @jax.jit
    def expected(model, scale):
        packed = {name: rows[name] for name in ("segment_ids", "positions")}
        h, _, _ = model.hidden(rows["ids"], **packed, ttt_scale=scale)
        return token_nll(h, model.output_weight, rows["targets"])

    real = rows["weights"] > 0
    want_on, want_off = (np.asarray(expected(model, jnp.float32(scale))) for scale in (1.0, 0.0))
    np.testing.assert_allclose(on[real], want_on[real], rtol=1e-5)
    np.testing.assert_allclose(off[real], want_off[real], rtol=1e-5)
    late = real & (np.arange(16) >= 8)[None]  # the first chunk reads nothing
    assert (np.abs(want_on - want_off)[late] > 1e-3).mean() > 0.9
    assert not np.abs(want_on - want_off)[:, :8].any()


def test_batches_of_padding_alone_and_gradients_that_overflow(job):
    """No token counts: a loss of zero, not 0 / 0. A finite loss whose gradient's norm is not finite
    changes nothing."""
    state, metrics = job.step(job.fresh(), batch(0.0))
    assert [float(metrics[name]) for name in ("loss", "grad_norm", "skipped")] == [0, 0, 0]
    before = bits(state[:2])
    huge = jnp.where(jnp.arange(16) % 2 == 0, 1e20, -1e20).astype(jnp.float32)
    state, metrics = job.step(state, batch() | {"weights": jnp.broadcast_to(huge, (8, 16))})
    assert np.isfinite(float(metrics["loss"]))
    assert float(metrics["skipped"]) == 1
    assert bits(state[:2]) == before


def written(path, leaf):
    """A target that writes, however it is initialised: the token itself."""
    name = jax.tree_util.keystr(path)
    if "conv" in name:
        return jnp.zeros_like(leaf).at[..., 2].set(1.0)
    if "target" in name and "proj" in name:
        return jnp.broadcast_to(jnp.eye(leaf.shape[-1], dtype=leaf.dtype), leaf.shape)
    return leaf
