"""AdamW with warm-up schedules, a decay mask, and parameter groups chosen by path.

Everything is optax on the model as a plain pytree. A parameter is addressed by its dotted path, for
instance `groups.0.blocks.1.mlp.down`; a group's pattern is searched in that path. Frozen parameters
have no moments, get no update and do not count in the gradient norm, so that XLA can drop the
computation of their gradients.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ttt_jax.config import OptimizerConfig, ParamGroup
from ttt_jax.errors import ConfigError
from ttt_jax.model.param_path import param_path

_DEFAULT_GROUP = ParamGroup(pattern="")


# -------------------------------------------------------------------------------------------- paths


def _true_ranks(model: Any) -> dict[str, int]:
    """Map each path to its number of logical axes. The stack axis of scanned layers does not count:
    it is not in `axes`.
    """
    variables = jax.tree_util.tree_flatten_with_path(
        model, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )[0]
    ranks = {}
    for keypath, variable in variables:
        axes = variable.get_metadata().get("axes") if isinstance(variable, nnx.Variable) else None
        for leaf in jax.tree.leaves(variable):
            ranks[param_path(keypath)] = leaf.ndim if axes is None else len(axes)
    return ranks


def _group_of(path: str, groups: tuple[ParamGroup, ...]) -> ParamGroup:
    return next((group for group in groups if re.search(group.pattern, path)), _DEFAULT_GROUP)


def _check_groups(groups: tuple[ParamGroup, ...], paths: list[str]) -> None:
    for group in groups:
        if not group.optional and not any(re.search(group.pattern, path) for path in paths):
            spread = [paths[i] for i in sorted({0, len(paths) // 2, len(paths) - 1})]
            raise ConfigError(
                f"config field optimizer.groups pattern {group.pattern!r}: matches no parameter; "
                f"paths look like {', '.join(spread)}"
            )
    if all(_group_of(path, groups).frozen for path in paths):
        raise ConfigError(
            f"config field optimizer.groups: freezes all {len(paths)} parameters; leave at least "
            "one to be trained"
        )


# ---------------------------------------------------------------------------------------- schedules


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Make the schedule: the learning rate at a step (0-based count of finished updates) as a
    float32 scalar; traceable.

    Warm-up rises linearly from 0 to `lr`. Then, with r = final_lr_ratio: `constant` stays; `cosine`
    falls to r * lr at `steps`; `wsd` stays and falls linearly to r * lr over the last decay_ratio *
    steps steps.

    Raises:
      ConfigError: the wsd decay is longer than what the warm-up leaves.
    """
    warmup = config.warmup(steps)
    decay = round(config.decay_ratio * steps)
    if config.schedule == "wsd" and warmup + decay > steps:
        raise ConfigError(
            f"config field optimizer.decay_ratio = {config.decay_ratio:g}: {decay} decay and "
            f"{warmup} warm-up steps "
            f"exceed steps = {steps}; lower one of them"
        )
    final = config.final_lr_ratio

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        if config.schedule == "constant":
            scale = jnp.ones_like(step)
        elif config.schedule == "cosine":
            progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
            scale = final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(math.pi * progress))
        else:
            progress = jnp.clip((step - (steps - decay)) / max(decay, 1), 0.0, 1.0)
            scale = 1.0 - (1.0 - final) * progress
        return config.lr * jnp.where(step < warmup, step / max(warmup, 1), scale)

    return schedule


def ttt_lr_scale(config: OptimizerConfig, step: jax.typing.ArrayLike) -> jax.Array:
    """Compute the factor on the inner learning rate: linear from 0 at step 0 to 1 at
    `ttt_lr_warmup_steps`. float32 scalar.
    """
    if config.ttt_lr_warmup_steps == 0:
        return jnp.ones((), jnp.float32)
    return jnp.minimum(jnp.asarray(step, jnp.float32) / config.ttt_lr_warmup_steps, 1.0)


# ---------------------------------------------------------------------------------------- optimizer


def make_optimizer(config: OptimizerConfig, steps: int, model: Any) -> optax.GradientTransformation:
    """Make AdamW for `model` (concrete or abstract; only paths, ranks and metadata are read).

    In order: clip by the global norm of the trained gradients, Adam (float32 moments), decoupled
    weight decay, the group's multiplier, the schedule. Weight decay reaches matrices: parameters of
    two or more logical axes, and the target's depthwise convolution. A group's `weight_decay`
    overrides that.

    Raises:
      ConfigError: the pattern of a group that is not `optional` matches no parameter, everything
        is frozen, or the schedule does not fit.
    """
    ranks = _true_ranks(model)
    _check_groups(config.groups, sorted(ranks))
    groups = {path: _group_of(path, config.groups) for path in ranks}

    def decayed(path: str) -> bool:
        chosen = groups[path].weight_decay
        return chosen if chosen is not None else ranks[path] >= 2 or path.endswith(".target.conv")

    # Masks look paths up, because inside `optax.masked` the trees have lost their frozen leaves.
    def mask(choose: Callable[[str], bool]) -> Callable[[Any], Any]:
        return lambda tree: jax.tree_util.tree_map_with_path(
            lambda keypath, _: choose(param_path(keypath)), tree
        )

    def multiply(updates: Any, _params: Any) -> Any:
        def scaled(keypath: tuple[Any, ...], update: jax.Array) -> jax.Array:
            factor = groups[param_path(keypath)].lr_multiplier
            return update if factor == 1.0 else update * factor

        return jax.tree_util.tree_map_with_path(scaled, updates)

    def clip(grads: Any, _params: Any) -> Any:
        if config.clip_norm is None:
            return grads
        # A scalar factor fuses into the moments; optax's clip divides elementwise, and XLA stores
        # the quotients.
        factor = jnp.minimum(1.0, config.clip_norm / _norm(jax.tree.leaves(grads)))
        return jax.tree.map(lambda grad: grad * factor, grads)

    # the names appear in the paths of the optimizer state, thus in checkpoints
    adamw = optax.named_chain(
        ("clip", optax.stateless(clip)),
        ("adam", optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32)),
        ("decay", optax.add_decayed_weights(config.weight_decay, mask=mask(decayed))),
        ("multiplier", optax.stateless(multiply)),
        ("schedule", optax.scale_by_learning_rate(learning_rate(config, steps))),
    )
    return optax.named_chain(
        ("adamw", optax.masked(_in_float32(adamw), mask(lambda path: not groups[path].frozen))),
        ("frozen", optax.masked(optax.set_to_zero(), mask(lambda path: groups[path].frozen))),
    )


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keep moments and updates in float32 even for bfloat16 parameters; nothing to do, and no copy,
    for float32 ones.
    """

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        # optax raises a float to its integer step count
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(cast(updates), state, cast(params))

    return optax.GradientTransformation(init=lambda params: inner.init(cast(params)), update=update)


def gradient_norm(config: OptimizerConfig, grads: Any) -> jax.Array:
    """Compute the global norm of the gradients that are trained: what `clip_norm` is compared with.
    float32 scalar.

    Use this rather than `optax.tree.norm`, which would keep the gradients of frozen parameters
    alive.
    """
    leaves = jax.tree_util.tree_flatten_with_path(grads)[0]
    kept = [
        leaf for keypath, leaf in leaves if not _group_of(param_path(keypath), config.groups).frozen
    ]
    return _norm(kept)


def _norm(leaves: list[jax.Array]) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves))


def updates_done(state: Any) -> Any:
    """Return the number of updates behind an optimizer state (int32 scalar): what its schedule
    counts.
    """
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return next(leaf for keypath, leaf in leaves if param_path(keypath).endswith("schedule.count"))


def state_shardings(state: Any, model: Any, scalar: jax.sharding.Sharding) -> Any:
    """Choose shardings for an optimizer state: each moment lies where its parameter lies, counters
    get `scalar`.

    Args:
      state: `jax.eval_shape(tx.init, model)` or a concrete state.
      model: model-shaped tree of shardings, or of leaves with a `.sharding`.
      scalar: sharding of the step counters (replicated).

    Returns:
      A tree of shardings with the structure of `state`, for `jax.jit(tx.init, out_shardings=...)`.
    """
    by_path = {
        param_path(keypath): getattr(leaf, "sharding", leaf)
        for keypath, leaf in jax.tree_util.tree_flatten_with_path(model)[0]
    }

    def pick(keypath: tuple[Any, ...], leaf: Any) -> jax.sharding.Sharding:
        if leaf.ndim == 0:
            return scalar
        # adamw.inner_state.adam.mu.PATH
        path = param_path(keypath).partition(".adam.")[2].partition(".")[2]
        return by_path[path]

    return jax.tree_util.tree_map_with_path(pick, state)
