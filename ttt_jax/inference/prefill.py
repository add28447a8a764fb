"""Reading long inputs in pieces of fixed shapes: the loop behind scoring and generation.

B batch, P tokens in a piece, V vocabulary, C chunk size. Rows are padded at the right; `lengths`
says how many tokens of each are real. Every program is compiled for one of a few shapes: whole
pieces, and powers of two for the rest.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.errors import UserError
from ttt_jax.inference.watch import state_ratios
from ttt_jax.model.loss import token_nll
from ttt_jax.model.transformer import State, Transformer
from ttt_jax.ops.attention import cached as kv_cache

# Whether streams adapt; "frozen": their fast weights are applied, and stay as they are.
Adapts = bool | Literal["frozen"]
_SMALLEST = 16  # tokens in the smallest piece; single tokens are the decode step's


class Piece(NamedTuple):
    """Some of the tokens that each row still has to read.

    Fields:
      ids_BP: int32, zeros behind each row's end.
      lengths_B: int32, real tokens per row.
      start: offset of the piece in the rows.
      at_chunk_start: every row that reads stands at the start of a chunk.
    """

    ids_BP: np.ndarray
    lengths_B: np.ndarray
    start: int
    at_chunk_start: bool


def piece_size(model: Transformer, tokens: int | None) -> int:
    """Tokens per piece: about `tokens` (None: 8192 on accelerators, 2048 on CPUs), a multiple of
    the chunk, on each device that shares a row's tokens. Raises UserError for less than one.
    """
    if tokens is not None and tokens < 1:
        raise UserError(f"piece = {tokens}: must be at least 1 token")
    wanted = tokens or (2048 if jax.default_backend() == "cpu" else 8192)
    C = model.config.ttt.chunk_size if model.config.ttt.layers else 1
    C *= model.runtime.parallel.shards
    return max(wanted // C, 1) * C


def pieces(rows: Sequence[np.ndarray], position_B: np.ndarray, size: int, chunk_size: int):
    """Cut ragged rows into pieces.

    Args:
      rows: ids still to be read by each row, any lengths.
      position_B: tokens that each row has read.
      size: tokens in a whole piece, a multiple of the chunk.
    """
    total_B = np.array([len(row) for row in rows])
    longest, start = int(total_B.max(initial=0)), 0
    while start < longest:
        width = piece_width(longest - start, size)
        ids_BP, lengths_B = (
            np.zeros((len(rows), width), np.int32),
            np.clip(total_B - start, 0, width).astype(np.int32),
        )
        for ids_P, row, n in zip(ids_BP, rows, lengths_B, strict=True):
            ids_P[:n] = row[start : start + n]
        at_start = (position_B + start) % chunk_size == 0
        yield Piece(ids_BP, lengths_B, start, bool(at_start[lengths_B > 0].all()))
        start += width


def piece_width(tokens: int, size: int) -> int:
    """Tokens of the piece that so many are read in, padding included; at most `size`."""
    return min(size, max(_SMALLEST, 1 << (tokens - 1).bit_length()))


def capacity_for(model: Transformer, tokens: int, size: int) -> int | None:
    """Slots of full-attention caches for rows of so many tokens that are read in pieces of `size`;
    None when no layer has one. Few different numbers, because each is another program.
    """
    if not needs_capacity(model):
        return None
    if tokens < size and model.runtime.parallel.shards == 1:
        return piece_width(max(tokens, 1), size)
    return -(-tokens // size) * size


def check_ids(rows: Sequence[Any], vocab_size: int, what: str = "ids") -> list[np.ndarray]:
    """Rows as int32 arrays. Raises UserError for an empty row, another shape or dtype, and ids
    outside the vocabulary.
    """
    checked = []
    for i, row in enumerate(rows):
        try:
            ids = np.asarray(row)
        except ValueError:
            raise UserError(
                f"{what}: row {i} is not a list of token ids but nested unevenly; each must be flat"
            ) from None
        if ids.ndim != 1 or ids.size == 0:
            raise UserError(
                f"{what}: row {i} has shape {ids.shape}; each must be a non-empty list of token ids"
            )
        if not np.issubdtype(ids.dtype, np.integer):
            raise UserError(
                f"{what}: row {i} has dtype {ids.dtype}; token ids are integers: cast them"
            )
        if ids.min() < 0 or ids.max() >= vocab_size:
            bad = ids[(ids < 0) | (ids >= vocab_size)][0]
            raise UserError(
                f"{what}: row {i} holds id {bad}; the model's vocabulary has ids 0 to "
                f"{vocab_size - 1}"
            )
        checked.append(ids.astype(np.int32))
    return checked


def warn_past_positions(model: Transformer, tokens: int) -> None:
    """Warn, once, when a stream of so many tokens has positions that the model's config does not
    know.

    RoPE tells layers with a window only distances, which stay within it: they are not warned of.
    """
    if tokens > model.config.known_positions and needs_capacity(model):
        _say_past_positions(model.config.known_positions)


@functools.cache
def _say_past_positions(known: int) -> None:
    warnings.warn(
        f"input past position {known}, the last that the model's config knows "
        "(model.max_positions, model.rope): RoPE "
        "extrapolates; expect worse results, or shorten the input",
        stacklevel=4,
    )


# ----------------------------------------------------------------------------------------- capacity


def needs_capacity(model: Transformer) -> bool:
    """Whether some layer keeps all keys. Without, memory does not depend on the length of the
    stream.
    """
    cfg = model.config
    return cfg.sliding_window is None or bool(cfg.full_attention_layers)


def with_capacity(model: Transformer, state: State, capacity: int) -> State:
    """The state with caches that hold at least `capacity` tokens."""
    if state.capacity is None or state.capacity >= capacity:
        return state
    return _grow(model, state, capacity)


@functools.partial(jax.jit, static_argnames="capacity")
def _grow(model: Transformer, state: State, capacity: int) -> State:
    assert state.capacity is not None
    more = capacity - state.capacity
    groups = []
    for group, runs in zip(model.groups, state.layers, strict=True):
        grown = []
        for run, layer in zip(group.pattern, runs, strict=True):
            if run.kind.window is None:
                layer = layer._replace(cache=kv_cache.grow(layer.cache, more))
            grown.append(layer)
        groups.append(tuple(grown))
    return model.laid(State(state.position_B, tuple(groups), capacity))


# ----------------------------------------------------------------------------------------- programs


class Frozen:
    """A model ready to be called many times: flattening its modules costs milliseconds, so it is
    done once.

    Later changes to the model's parameters are not seen.
    """

    def __init__(self, model: Transformer) -> None:
        self.leaves, self.tree = jax.tree.flatten(model)


def program(static_argnames: tuple[str, ...]):
    """Compile `fn(model, state, *arrays, **static)` as a function of a `Frozen` model; the state is
    donated.
    """

    def decorate(fn):
        @functools.lru_cache(maxsize=32)
        def compiled(tree):
            call = lambda leaves, state, *arrays, **static: fn(
                jax.tree.unflatten(tree, leaves), state, *arrays, **static
            )
            return jax.jit(call, static_argnames=static_argnames, donate_argnums=1)

        @functools.wraps(fn)
        def run(frozen: Frozen, state, *arrays, **static):
            return compiled(frozen.tree)(frozen.leaves, state, *arrays, **static)

        return run

    return decorate


def ttt_scale(ttt: Adapts) -> float | jax.Array:
    """The factor on the inner learning rate. The number 0.0 leaves the fast weights out; an array
    of 0 applies them and writes nothing.
    """
    return jnp.zeros((), jnp.float32) if ttt == "frozen" else 1.0 if ttt else 0.0


@program(("capacity", "at_chunk_start", "ttt"))
def read_piece(
    model, state: State | None, logits_BV, ids_BP, lengths_B, *, capacity, at_chunk_start, ttt
):
    """Read a piece.

    Returns: (state, logits_BV after each row's last token, ||S||/||W|| [L, B] or None). The logits
      of a row that reads nothing stay.
    """
    h_BPD, state, ratio_LB = hidden_of_piece(
        model, state, ids_BP, lengths_B, capacity, at_chunk_start, ttt
    )
    last_B = jnp.maximum(lengths_B - 1, 0)
    h_B1D = jax.vmap(lambda h_PD, n: jax.lax.dynamic_slice_in_dim(h_PD, n, 1, axis=0))(
        h_BPD, last_B
    )
    new_BV = model.runtime.parallel.lay(model.logits(h_B1D)[:, 0], (None, None))
    return state, jnp.where((lengths_B > 0)[:, None], new_BV, logits_BV), ratio_LB


@program(("capacity", "at_chunk_start", "ttt", "with_logits"))
def score_piece(
    model,
    state: State | None,
    ids_BP,
    targets_BP,
    lengths_B,
    *,
    capacity,
    at_chunk_start,
    ttt,
    with_logits,
):
    """Read a piece.

    Returns: (state, log-probabilities of the targets float32 [B, P], logits float32 [B, P, V] or
      None, ||S||/||W|| [L, B] or None).
    """
    h_BPD, state, ratio_LB = hidden_of_piece(
        model, state, ids_BP, lengths_B, capacity, at_chunk_start, ttt
    )
    logits_BPV = model.logits(h_BPD).astype(jnp.float32) if with_logits else None
    devices, weight_VD = model.runtime.parallel, model.output_weight
    nll_BP = devices.over_vocabulary(token_nll, h_BPD, weight_VD, targets_BP)
    return state, -nll_BP.astype(jnp.float32), logits_BPV, ratio_LB


def hidden_of_piece(model, state, ids_BP, lengths_B, capacity, at_chunk_start, ttt):
    """Run the model on a piece.

    Returns: (h_BPD, state, ||S||/||W|| [L, B] or None).
    """
    h_BPD, state, stats = model.hidden(
        ids_BP,
        state,
        keep_state=True,
        lengths=lengths_B,
        ttt_scale=ttt_scale(ttt),
        capacity=capacity if state is None else None,
        at_chunk_start=at_chunk_start,
    )
    return h_BPD, state, state_ratios(stats)
