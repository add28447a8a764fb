"""Schedules against closed forms, AdamW against a float64 one in numpy, groups, masks and
shardings.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ttt_jax.config import OptimizerConfig, ParamGroup
from ttt_jax.errors import ConfigError
from ttt_jax.model.param_path import param_path
from ttt_jax.training.optimizer import (
    gradient_norm,
    learning_rate,
    make_optimizer,
    state_shardings,
    ttt_lr_scale,
)

L, D, F = 3, 4, 6


def draw(shape, dtype=jnp.float32, seed=0):
    # numpy: nothing to compile
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


class Target(nnx.Module):
    def __init__(self, dtype):
        self.conv = nnx.Param(draw((L, D, 5), dtype), axes=("embed", None))
        self.proj = nnx.Param(draw((L, D, D), dtype), axes=("embed", None))


class Layers(nnx.Module):
    """Stacked layers: every leaf has a leading axis that its `axes` do not name."""

    def __init__(self, dtype):
        self.norm = nnx.Param(draw((L, D), dtype), axes=("embed",))
        self.down = nnx.Param(draw((L, D, F), dtype), axes=("embed", "mlp"))
        self.target = Target(dtype)


class Model(nnx.Module):
    def __init__(self, dtype=jnp.float32):
        self.embed = nnx.Param(draw((7, D), dtype), axes=("vocab", "embed"))
        self.groups = nnx.List([Layers(dtype)])
        self.norm = nnx.Param(draw((D,), dtype), axes=("embed",))


PATHS = [
    "embed",
    "groups.0.down",
    "groups.0.norm",
    "groups.0.target.conv",
    "groups.0.target.proj",
    "norm",
]
MATRICES = {"embed", "groups.0.down", "groups.0.target.conv", "groups.0.target.proj"}


def by_path(tree):
    return {
        param_path(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def random_like(model, step, scale=1.0):
    leaves, treedef = jax.tree.flatten(model)
    draws = [scale * draw(x.shape, np.float32, seed=1000 * step + i) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(
        treedef, [x.astype(leaf.dtype) for x, leaf in zip(draws, leaves, strict=True)]
    )


def train(config, model, grads, steps=100):
    tx = make_optimizer(config, steps, model)

    @jax.jit
    def step(model, state, grad):
        updates, state = tx.update(grad, state, model)
        return optax.apply_updates(model, updates), state

    state = jax.jit(tx.init)(model)
    for grad in grads:
        model, state = step(model, state, grad)
    return model, state


def relative(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


# -------------------------------------------------------------------------------------------- paths


def test_paths_are_dotted_names_without_value():
    assert sorted(by_path(Model())) == PATHS
    # only nnx's own `.value` is dropped
    assert list(by_path({"a": [1, {"value": 2}]})) == ["a.0", "a.1.value"]


# ---------------------------------------------------------------------------------------- schedules


def closed_form(config, steps, step):
    warmup = config.warmup(steps)
    if step < warmup:
        return config.lr * step / warmup
    r, progress = config.final_lr_ratio, min((step - warmup) / (steps - warmup), 1)
    if config.schedule == "cosine":
        return config.lr * (r + (1 - r) * (1 + math.cos(math.pi * progress)) / 2)
    decay = round(config.decay_ratio * steps)
    if config.schedule == "wsd" and step > steps - decay:
        return config.lr * (1 - (1 - r) * min((step - (steps - decay)) / decay, 1))
    return config.lr


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize(
    "extra", [{}, {"warmup_steps": 0}, {"warmup_steps": 25, "final_lr_ratio": 0.0}]
)
def test_schedule(schedule, extra):
    config = OptimizerConfig(lr=2e-3, schedule=schedule, **extra)
    actual = jax.vmap(learning_rate(config, 200))(jnp.arange(220))
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(
        actual, [closed_form(config, 200, t) for t in range(220)], rtol=2e-6, atol=1e-9
    )


def test_schedule_landmarks():
    schedule = learning_rate(
        OptimizerConfig(lr=1.0, schedule="wsd", warmup_steps=10, decay_ratio=0.2), 100
    )
    for step, value in ((0, 0.0), (5, 0.5), (10, 1.0), (80, 1.0), (90, 0.55), (100, 0.1)):
        assert float(schedule(step)) == pytest.approx(value, abs=1e-6)
    # nothing left to decay over, one step
    for warmup_ratio, schedule in ((1.0, "cosine"), (0.0, "wsd")):
        assert np.isfinite(
            learning_rate(OptimizerConfig(warmup_ratio=warmup_ratio, schedule=schedule), 1)(1)
        )


def test_wsd_that_does_not_fit():
    with pytest.raises(
        ConfigError, match=r"optimizer\.decay_ratio = 0\.9: 90 decay and 20 warm-up steps exceed"
    ) as error:
        learning_rate(OptimizerConfig(schedule="wsd", warmup_steps=20, decay_ratio=0.9), 100)
    assert "\n" not in str(error.value)


def test_ttt_lr_scale():
    config = OptimizerConfig(ttt_lr_warmup_steps=4)
    scale = jax.jit(lambda step: ttt_lr_scale(config, step))
    assert [float(scale(jnp.int32(step))) for step in range(7)] == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert float(ttt_lr_scale(OptimizerConfig(), 0)) == 1.0


# -------------------------------------------------------------------------------------------- AdamW


def numpy_adamw(config, steps, params, grads, decayed, multiplier=lambda path: 1.0):
    params = {path: value.astype(np.float64) for path, value in params.items()}
    mu = {path: np.zeros_like(value) for path, value in params.items()}
    nu = {path: np.zeros_like(value) for path, value in params.items()}
    for count, tree in enumerate(grads):
        grad = {path: value.astype(np.float64) for path, value in by_path(tree).items()}
        norm = math.sqrt(sum((g**2).sum() for g in grad.values()))
        factor = min(1.0, (config.clip_norm or math.inf) / norm)
        for path in params:
            g = grad[path] * factor
            mu[path] = config.b1 * mu[path] + (1 - config.b1) * g
            nu[path] = config.b2 * nu[path] + (1 - config.b2) * g**2
            mu_hat = mu[path] / (1 - config.b1 ** (count + 1))
            nu_hat = nu[path] / (1 - config.b2 ** (count + 1))
            update = (
                mu_hat / (np.sqrt(nu_hat) + config.eps)
                + config.weight_decay * decayed(path) * params[path]
            )
            params[path] = (
                params[path] - closed_form(config, steps, count) * multiplier(path) * update
            )
    return params


@pytest.mark.parametrize("clip_norm", [None, 1.0, 1e6])
def test_adamw_against_numpy(clip_norm):
    config = OptimizerConfig(lr=1e-2, weight_decay=0.3, warmup_steps=3, clip_norm=clip_norm)
    model = Model()
    # The gradients change size, so that a clip that came after the moments, or not at all, would
    # show.
    grads = [random_like(model, step, scale=[0.01, 3.0, 0.1][step % 3]) for step in range(12)]
    actual, _ = train(config, model, grads, steps=20)
    expected = numpy_adamw(config, 20, by_path(model), grads, decayed=lambda path: path in MATRICES)
    for path, value in by_path(actual).items():
        assert relative(value, expected[path]) < 1e-6, path


def test_decay_reaches_matrices_only_and_groups_override_it():
    zero = jax.tree.map(jnp.zeros_like, Model())

    def shrunk(*groups):
        config = OptimizerConfig(
            lr=0.1, weight_decay=0.5, schedule="constant", warmup_steps=0, groups=groups
        )
        before, after = by_path(Model()), by_path(train(config, Model(), [zero])[0])
        assert all(
            np.array_equal(after[p], before[p]) or relative(after[p], 0.95 * before[p]) < 1e-6
            for p in PATHS
        )
        return {path for path in PATHS if not np.array_equal(after[path], before[path])}

    assert shrunk() == MATRICES
    assert shrunk(ParamGroup(r"\.target\.conv$", weight_decay=False)) == MATRICES - {
        "groups.0.target.conv"
    }
    assert shrunk(ParamGroup("^norm", weight_decay=True)) == MATRICES | {"norm"}


def test_multipliers_first_match_counts():
    config = OptimizerConfig(
        lr=1e-2,
        clip_norm=None,
        groups=(
            ParamGroup(r"target\.proj", lr_multiplier=0.25),
            ParamGroup("target", lr_multiplier=4),
        ),
    )
    factor = {"groups.0.target.proj": 0.25, "groups.0.target.conv": 4.0}
    model = Model()
    grads = [random_like(model, step) for step in range(6)]
    actual = by_path(train(config, model, grads)[0])
    expected = numpy_adamw(
        config, 100, by_path(model), grads, lambda p: p in MATRICES, lambda p: factor.get(p, 1.0)
    )
    assert all(relative(actual[path], expected[path]) < 1e-6 for path in PATHS)


def test_frozen_parameters_have_no_moments_no_update_and_no_norm():
    config = OptimizerConfig(
        lr=1e-2, groups=(ParamGroup(r"\.target\."), ParamGroup(".", frozen=True))
    )
    model = Model()
    grads = [random_like(model, step) for step in range(4)]
    trained, state = train(config, model, grads)
    before, after = by_path(model), by_path(trained)
    moving = {"groups.0.target.conv", "groups.0.target.proj"}
    assert {path for path in PATHS if not np.array_equal(before[path], after[path])} == moving
    moments = {
        path.partition(".adam.")[2]
        for path in by_path(state)
        if ".adam.m" in path or ".adam.n" in path
    }
    assert moments == {f"{moment}.{path}" for moment in ("mu", "nu") for path in moving}
    # The clip sees the trained gradients alone: huge frozen ones change nothing.
    grow = lambda path, g: g if param_path(path) in moving else 1e6 * g
    loud, _ = train(config, model, [jax.tree_util.tree_map_with_path(grow, grad) for grad in grads])
    assert all(np.array_equal(by_path(loud)[path], after[path]) for path in PATHS)
    expected = math.sqrt(
        sum((by_path(grads[0])[path].astype(np.float64) ** 2).sum() for path in moving)
    )
    assert float(gradient_norm(config, grads[0])) == pytest.approx(expected, rel=1e-6)


def test_gradients_of_frozen_parameters_are_not_computed():
    model, x = Model(), jnp.ones((16, D))

    def matmuls(*groups):
        config = OptimizerConfig(groups=groups)
        tx = make_optimizer(config, 10, model)

        def step(model, state):
            loss = lambda m: jnp.square(x @ m.groups[0].target.proj[0] @ m.groups[0].down[0]).sum()
            grads = jax.grad(loss)(model)
            updates, state = tx.update(grads, state, model)
            return optax.apply_updates(model, updates), state, gradient_norm(config, grads)

        text = jax.jit(step).lower(model, tx.init(model)).compile().as_text()
        return text.count(" dot(")

    assert matmuls(ParamGroup("down", frozen=True)) == matmuls() - 1


def test_bfloat16_parameters_keep_float32_moments():
    model = Model(dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # optax.apply_updates adds float32 to bfloat16
        trained, state = train(
            OptimizerConfig(), model, [random_like(model, step) for step in range(2)]
        )
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("bfloat16")}


def test_update_makes_no_copy_of_the_parameters():
    class Big(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((1024, 512)), axes=("embed", "mlp"))
            self.v = nnx.Param(jnp.ones((1024, 512)), axes=("embed", "mlp"))

    model = jax.eval_shape(Big)
    config = OptimizerConfig(groups=(ParamGroup("v", lr_multiplier=0.5),))
    tx = make_optimizer(config, 10, model)

    def step(model, state, grads):
        updates, state = tx.update(grads, state, model)
        return optax.apply_updates(model, updates), state

    compiled = (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(model, jax.eval_shape(tx.init, model), model)
        .compile()
    )
    memory = compiled.memory_analysis()
    parameters = 2 * 4 * 1024 * 512
    assert memory.temp_size_in_bytes < parameters / 100
    # the parameters and both moments are updated in place
    assert memory.alias_size_in_bytes >= 3 * parameters


# -------------------------------------------------------------------------------- errors, shardings


def test_pattern_without_a_match():
    config = OptimizerConfig(groups=(ParamGroup("ttt_proj", frozen=True),))
    message = (
        "config field optimizer.groups pattern 'ttt_proj': matches no parameter; "
        "paths look like embed, groups.0.target.conv, norm"
    )
    with pytest.raises(ConfigError) as error:
        make_optimizer(config, 10, jax.eval_shape(Model))
    assert str(error.value) == message


def first_update(tx, grads, params):
    return jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])(
        grads, params
    )


def test_a_group_of_a_preset_may_match_nothing():
    """As for TTT layers that a user has switched off; with some, the group counts."""
    group = ParamGroup("ttt_proj", frozen=True, optional=True)
    plain, optional = OptimizerConfig(), OptimizerConfig(groups=(group,))
    params = Model()
    grads = jax.tree.map(jnp.ones_like, params)
    updates = []
    for config in (plain, optional):
        updates.append(first_update(make_optimizer(config, 10, params), grads, params))
    jax.tree.map(np.testing.assert_array_equal, *updates)
    frozen = OptimizerConfig(groups=(ParamGroup("target", frozen=True, optional=True),))
    update = first_update(make_optimizer(frozen, 10, params), grads, params)
    assert not np.asarray(jax.tree.leaves(update.groups[0].target)[0]).any()


def test_everything_frozen():
    with pytest.raises(ConfigError, match=r"optimizer\.groups: freezes all 6 parameters"):
        make_optimizer(OptimizerConfig(groups=(ParamGroup(".", frozen=True),)), 10, Model())


def test_state_lies_where_the_parameters_lie():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    place = lambda path, leaf: NamedSharding(
        mesh, PartitionSpec("x") if leaf.shape[0] % 2 == 0 else PartitionSpec()
    )
    model = Model()
    shardings = jax.tree_util.tree_map_with_path(place, model)
    tx = make_optimizer(OptimizerConfig(groups=(ParamGroup("embed", frozen=True),)), 10, model)
    state = jax.eval_shape(tx.init, model)
    placed = state_shardings(state, shardings, NamedSharding(mesh, PartitionSpec()))
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    made = jax.jit(tx.init, out_shardings=placed)(jax.device_put(model, shardings))
    assert made["adamw"].inner_state["adam"].nu.norm[...].sharding.spec == PartitionSpec("x")
    assert made["adamw"].inner_state["adam"].mu.groups[0].down[...].sharding.spec == PartitionSpec()
