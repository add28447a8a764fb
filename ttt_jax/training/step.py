"""The training step and its initial state. No data loading, no files.

B rows, T tokens. A batch is a dict of [B, T] arrays: ids, targets, segment_ids, positions (int32),
weights (float32).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ttt_jax.config import OPEN_REMAT, Config, validate_context
from ttt_jax.model.loss import cross_entropy
from ttt_jax.model.stack import Runtime
from ttt_jax.model.transformer import Transformer
from ttt_jax.parallel.mesh import Batch, model_shardings, replicated
from ttt_jax.parallel.one_device import ONE_DEVICE
from ttt_jax.parallel.shard_mapped import make_parallel
from ttt_jax.training.optimizer import (
    gradient_norm,
    learning_rate,
    make_optimizer,
    state_shardings,
    ttt_lr_scale,
    updates_done,
)


class TrainState(NamedTuple):
    """Everything that training changes. `step` counts batches (int32), skipped ones too; the
    optimizer counts its updates.
    """

    model: Any  # Transformer; its abstract twin in `abstract_state`
    opt_state: Any
    step: Any


def runtime_of(config: Config, mesh: Mesh | None = None) -> Runtime:
    """Say how `config` computes; without a mesh, on one device."""
    if config.remat_save == OPEN_REMAT:
        raise ValueError("remat_save is open: settle it first (training/step_memory.py)")
    parallel = ONE_DEVICE if mesh is None else make_parallel(mesh)
    return Runtime(
        dtype=config.compute_dtype,
        remat_save=config.remat_save,
        unroll_layers=config.unroll_layers,
        parallel=parallel,
    )


def abstract_state(config: Config, mesh: Mesh) -> tuple[TrainState, optax.GradientTransformation]:
    """Describe shapes, dtypes and shardings of the state, without allocating anything; and the
    optimizer.

    Raises: ConfigError when the mesh's context axis does not fit the rows (an axis of -1 is known
    only here).
    """
    validate_context(config, make_parallel(mesh).shards)
    runtime = runtime_of(config, mesh)
    model = jax.eval_shape(
        lambda: Transformer(config.model, runtime, key=jax.random.key(config.seed))
    )
    tx = make_optimizer(config.optimizer, config.steps, model)
    opt_state = jax.eval_shape(tx.init, model)
    placed = model_shardings(model, mesh)
    with_sharding = lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
    )
    opt_placed = state_shardings(opt_state, placed, replicated(mesh))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    state = TrainState(
        jax.tree.map(with_sharding, model, placed),
        jax.tree.map(with_sharding, opt_state, opt_placed),
        step,
    )
    return state, tx


def init_state(
    config: Config,
    abstract: TrainState,
    tx: optax.GradientTransformation,
    model: Transformer | None = None,
) -> TrainState:
    """Materialise the state sharded: nothing is ever whole on one device. `model` overrides the
    random parameters.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if model is None:
        runtime = abstract.model.runtime
        make = lambda: Transformer(config.model, runtime, key=jax.random.key(config.seed))
        model = jax.jit(make, out_shardings=shardings.model)()
    opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(model)
    return TrainState(model, opt_state, jax.device_put(jnp.zeros((), jnp.int32), shardings.step))


def make_train_step(
    config: Config, tx: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Make a jitted `(state, batch) -> (state, metrics)`; the state is donated.

    A step whose loss or gradient norm is not finite is skipped: parameters and optimizer state, its
    counts included, stay.

    Metrics are float32 scalars: loss (mean over real tokens), grad_norm, learning_rate, skipped (1
    or 0: this step), skipped_steps (all of them so far), and for each TTT layer the mean over rows
    of ||S||/||W|| after the row and of the norm of the last update, both 0 in a step that
    `optimizer.ttt_drop` trains with TTT off.
    """
    schedule, optimizer = learning_rate(config.optimizer, config.steps), config.optimizer
    gradients = functools.partial(_gradients, optimizer.accumulate)

    def without_ttt(model: Transformer, batch: Batch):
        loss, _, grads = gradients(model, batch, 0.0)
        _, stats, _ = jax.eval_shape(functools.partial(gradients, scale=1.0), model, batch)
        # nothing was written
        return loss, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stats), grads

    def train_step(state: TrainState, batch: Batch):
        updates_before = updates_done(state.opt_state)
        scale = (
            1.0 if not optimizer.ttt_lr_warmup_steps else ttt_lr_scale(optimizer, updates_before)
        )
        if optimizer.ttt_drop:
            loss, stats, grads = jax.lax.cond(
                jax.random.bernoulli(
                    jax.random.fold_in(jax.random.key(config.seed), state.step), optimizer.ttt_drop
                ),
                without_ttt,
                functools.partial(gradients, scale=scale),
                state.model,
                batch,
            )
        else:
            loss, stats, grads = gradients(state.model, batch, scale)
        norm = gradient_norm(optimizer, grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        model, opt_state = _update(tx, state, grads, finite)
        step = state.step + 1
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": schedule(updates_before),
            "skipped": (~finite).astype(jnp.float32),
            "skipped_steps": (step - updates_done(opt_state)).astype(jnp.float32),
        }
        for layer, stat in stats.items():
            metrics[f"ttt/layer_{layer:02d}/state_ratio"] = stat["state_ratio_B"].mean()
            metrics[f"ttt/layer_{layer:02d}/update_norm"] = stat["update_norm_B"].mean()
        return TrainState(model, opt_state, step), metrics

    return jax.jit(train_step, donate_argnums=0)


def _loss(model: Transformer, batch: Batch, total: jax.Array, scale: Any) -> tuple[jax.Array, Any]:
    """Sum the batch's weighted losses over `total`, so that micro-batches simply add up."""
    h_BTD, _, stats = model.hidden(
        batch["ids"],
        segment_ids=batch.get("segment_ids"),
        positions=batch.get("positions"),
        ttt_scale=scale,
    )
    weights_BT = batch["weights"] / total
    tokens = (h_BTD, model.output_weight, batch["targets"], weights_BT)
    return model.runtime.parallel.over_tokens(cross_entropy, *tokens), stats


def _gradients(
    accumulate: int, model: Transformer, batch: Batch, scale: Any
) -> tuple[jax.Array, Any, Any]:
    """Differentiate the mean loss over real tokens, in `accumulate` micro-batches.

    Returns: loss, what the TTT layers tell of themselves, gradients.
    """
    total = jnp.maximum(batch["weights"].sum(), 1.0)
    differentiate = jax.value_and_grad(_loss, has_aux=True)
    if accumulate == 1:
        (loss, stats), grads = differentiate(model, batch, total, scale)
        return loss, stats, grads
    # Interleaved rows, so that every micro-batch is spread over all devices.
    micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, x.shape[1]), 1, 0), batch)

    def add(carry, piece):
        (loss, stats), grads = differentiate(model, piece, total, scale)
        return jax.tree.map(jnp.add, carry, (loss, grads)), stats

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, model))
    (loss, grads), stats = jax.lax.scan(add, zero, micro)
    return loss, stats, grads


def _update(
    tx: optax.GradientTransformation, state: TrainState, grads: Any, finite: jax.Array
) -> tuple[Any, Any]:
    """Apply the gradients where they are `finite`; else keep parameters and optimizer state."""
    with jax.named_scope("optimizer"):
        updates, opt_state = tx.update(grads, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        return jax.tree.map(
            lambda new, old: jnp.where(jnp.broadcast_to(finite, new.shape), new, old),
            (model, opt_state),
            (state.model, state.opt_state),
        )
