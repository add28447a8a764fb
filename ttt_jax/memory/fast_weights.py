"""Memories out of a stream's state, and into one.

B batch, D model width, F MLP width, R repeats of a pattern, N layers of a run, S accumulated update
of a fast weight (D F).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.errors import UserError
from ttt_jax.memory.memory import Memory
from ttt_jax.memory.sources import Source
from ttt_jax.memory.terms import Term
from ttt_jax.model.transformer import State, Transformer
from ttt_jax.pretrained.fingerprint import weights_fingerprint


def no_memory(model: Transformer) -> Memory:
    """Make the memory of nothing, which knows its model: it has no terms.

    Raises: UserError when the model has no TTT layers.
    """
    cfg, norms = model.config, _slow_norms(model)
    if not norms:
        raise UserError("memory: the model has no TTT layers (model.ttt.layers is empty)")
    return Memory(weights_fingerprint(model), cfg.d_model, cfg.d_ff, norms, ())


def memory_of(
    none: Memory, model: Transformer, state: State | None, row: int, sources: tuple[Source, ...]
) -> Memory:
    """Make a memory of the fast weights of one row of a state, or of zeros before there is one.

    Args:
      none: `no_memory` of the model, which takes a pass over its parameters.
    """
    if state is None:
        deltas = {layer: np.zeros((none.D, none.F), np.float32) for layer in none.layers}
    else:
        deltas = _deltas(model, state, row)
    return dataclasses.replace(none, terms=(Term(deltas, sources),))


def check_belongs(memory: Memory, model: Transformer) -> None:
    """Raise UserError for a memory that other weights have read."""
    if memory.model != weights_fingerprint(model):
        raise UserError(
            "memory: was read by another model, whose weights mean other things; read the text "
            "with this one (ttt-jax memory read)"
        )


def start_with(model: Transformer, memory: Memory, batch: int, capacity: int | None) -> State:
    """Make the state of streams that have read nothing, and whose fast weights are the memory.

    Args:
      memory: of this model (`check_belongs`).
      capacity: tokens that full-attention caches can hold; None when no layer has one.
    """
    return go_on_with(model, memory, _fresh(model, batch, capacity))


def go_on_with(model: Transformer, memory: Memory, state: State) -> State:
    """The state with a memory of this model for fast weights; keys, values and pending tokens
    stay.
    """

    def S_of(old_RNBDF, g, r, layers):
        S_RN1DF = np.stack([memory.dW(layer) for layer in layers])
        S_RN1DF = S_RN1DF.reshape(*old_RNBDF.shape[:2], 1, memory.D, memory.F)
        return np.broadcast_to(S_RN1DF.astype(old_RNBDF.dtype), old_RNBDF.shape)

    return _with_S(S_of, model, state)


def only_fast_weights(
    model: Transformer, state: State | None, batch: int, capacity: int | None
) -> State:
    """Make the state of streams that have read nothing but hold the fast weights S of `state`.

    Args:
      capacity: tokens that full-attention caches can hold; None when no layer has one.
    """

    def S_of(fresh_RNBDF, g, r, layers):
        return fresh_RNBDF if state is None else state.layers[g][r].ttt.S_BDF

    return _with_S(S_of, model, _fresh(model, batch, capacity))


def _fresh(model: Transformer, batch: int, capacity: int | None) -> State:
    return dataclasses.replace(model.init_state(batch, capacity or 1), capacity=capacity)


def _with_S(S_of, model: Transformer, state: State) -> State:
    """The state with the fast weights that `S_of` gives for (those it has, group, run, layers)."""
    groups = [list(runs) for runs in state.layers]
    for g, r, layers in model.ttt_runs():
        layer = groups[g][r]
        assert layer.ttt is not None
        S_RNBDF = S_of(layer.ttt.S_BDF, g, r, layers)
        groups[g][r] = layer._replace(ttt=layer.ttt._replace(S_BDF=S_RNBDF))
    return model.laid(dataclasses.replace(state, layers=tuple(map(tuple, groups))))


def _deltas(model: Transformer, state: State, row: int) -> dict[int, np.ndarray]:
    found: dict[int, np.ndarray] = {}
    for g, r, layers in model.ttt_runs():
        ttt = state.layers[g][r].ttt
        assert ttt is not None, "a stream that was read with TTT off has no memory"
        S_RNBDF = ttt.S_BDF
        S_LDF = S_RNBDF.reshape(-1, *S_RNBDF.shape[2:])[:, row]
        found |= dict(zip(layers, np.asarray(S_LDF).astype(np.float32), strict=True))
    return found


def _slow_norms(model: Transformer) -> Mapping[int, float]:
    """||W||_F of every TTT layer."""
    found = {}
    for g, r, layers in model.ttt_runs():
        down_RNDF = model.groups[g].blocks[r].mlp.down[...]
        norms = np.asarray(_norms(down_RNDF)).reshape(-1).astype(float)
        found |= dict(zip(layers, norms.tolist(), strict=True))
    return found


@jax.jit
def _norms(w_RNDF):
    """||W||_F of each layer of a stack."""
    acc = jnp.promote_types(w_RNDF.dtype, jnp.float32)
    return jnp.sqrt(jnp.sum(jnp.square(w_RNDF.astype(acc)), axis=(2, 3)))
