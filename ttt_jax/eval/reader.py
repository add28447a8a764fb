"""Reads batches of equally long rows piece by piece, and takes losses where they are asked for.

B documents of a batch, L tokens read, K tokens of the scored block, P tokens of a piece.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.inference.prefill import (
    Adapts,
    Frozen,
    needs_capacity,
    piece_size,
    program,
    read_piece,
    score_piece,
    warn_past_positions,
)
from ttt_jax.inference.watch import Watch, not_finite, state_ratios
from ttt_jax.memory.fast_weights import only_fast_weights, start_with
from ttt_jax.memory.memory import Memory
from ttt_jax.model.loss import token_nll
from ttt_jax.model.transformer import State, Transformer

_READ_THROUGH = ("off", "memory", "on", "shuffled")
_READINGS: dict[str, Adapts] = {"off": False, "memory": "frozen", "on": True}
_IN_FLIGHT = 4  # pieces that the host dispatches before it fetches the first one's losses


class Reader:
    """Reads batches of equally long rows of a model, piece by piece.

    Args:
      memory: fast weights of the mode "memory", of this model.
    """

    def __init__(
        self, model: Transformer, piece: int | None = None, memory: Memory | None = None
    ) -> None:
        self.model, self.frozen, self.memory = model, Frozen(model), memory
        self.size = piece_size(model, piece)
        self.chunk = model.config.ttt.chunk_size
        self.watch = Watch(model)
        # Called with the number of tokens (per row) that were read.
        self.on_tokens: Callable[[int], None] = lambda tokens: None

    def block_losses(
        self, ids_BL1: np.ndarray, block: int, modes: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Compute losses float32 [B, K] of the last K predictions of each row, per mode. `ids_BL1`:
        L inputs and the last target.
        """
        return self._losses(ids_BL1, ids_BL1.shape[1] - 1 - block, modes)

    def position_losses(self, ids_BL1: np.ndarray, modes: Sequence[str]) -> dict[str, np.ndarray]:
        """Compute losses float32 [B, L] of all predictions of each row, per mode."""
        return self._losses(ids_BL1, 0, modes)

    def _losses(
        self, ids_BL1: np.ndarray, begin: int, modes: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Compute the losses of the predictions from position `begin` on; what comes before is only
        read.
        """
        L = ids_BL1.shape[1] - 1
        losses: dict[str, list[Any]] = {mode: [] for mode in _READ_THROUGH}
        # With the control, every mode is read in the same pieces, or modes that ought to be equal
        # would differ by the rounding of other matrix shapes.
        inner = (
            range(-(-(begin + 1) // self.chunk) * self.chunk, L, self.chunk)
            if "shuffled" in modes
            else ()
        )
        edges = [begin, *inner, L]
        for reading, ttt in _READINGS.items():  # one state at a time: it may be large
            if not set(modes) & ({"on", "shuffled"} if reading == "on" else {reading}):
                continue
            first = self._with_memory(len(ids_BL1), L) if reading == "memory" else None
            state = self.read(ids_BL1, 0, begin, first, L, ttt=ttt)
            for start, stop in itertools.pairwise(edges):
                if reading == "on" and "shuffled" in modes:
                    other = exchanged(state) if state is not None else None
                    losses["shuffled"] += self.score(ids_BL1, start, stop, other, L, ttt=True)[1]
                state, scored = self.score(ids_BL1, start, stop, state, L, ttt=ttt)
                losses[reading] += scored
        return {mode: _join(losses[mode]) for mode in modes}

    def strict_losses(self, ids_BL1: np.ndarray, block: int) -> np.ndarray:
        """Compute losses float32 [B, K] of the last K predictions when the tokens before them are
        read with TTT on, and then all is dropped but the fast weights S.

        Keys, values and the pending chunk (what follows the last whole one) are gone, positions
        start at 0, and S stays as it is: scoring writes nothing.
        """
        begin = ids_BL1.shape[1] - 1 - block
        state = self.read(ids_BL1, 0, begin, None, begin, ttt=True)
        return self._score_frozen(ids_BL1[:, begin:], state)

    def cold_losses(self, ids_BL1: np.ndarray, block: int) -> np.ndarray:
        """Compute losses float32 [B, K] of the last K predictions from a fresh state, TTT off, by
        the program of `strict_losses`, so that the two differ by S alone.
        """
        return self._score_frozen(ids_BL1[:, -block - 1 :], None)

    def _score_frozen(self, ids_BK1: np.ndarray, before: State | None) -> np.ndarray:
        B, K = len(ids_BK1), ids_BK1.shape[1] - 1
        state = only_fast_weights(self.model, before, B, -(-K // self.size) * self.size)
        losses = []
        for first, last in self._cuts(0, K):
            state, logprobs_BP, ratio_LB = score_frozen_piece(
                self.frozen,
                state,
                ids_BK1[:, first:last],
                ids_BK1[:, first + 1 : last + 1],
                np.full(B, last - first, np.int32),
            )
            self.watch.note(ratio_LB)
            losses.append(np.asarray(logprobs_BP))
            self.on_tokens(last - first)
        return _join(losses)

    def means(self, losses_BX: np.ndarray, names: Sequence[int], mode: str) -> list[float]:
        """Compute the mean loss of each document of a batch, the first `len(names)` rows.

        Raises: NotFiniteError, naming the document.
        """
        mean_B = losses_BX[: len(names)].mean(axis=1, dtype=np.float64)
        if not np.isfinite(mean_B).all():
            name = names[int(np.flatnonzero(~np.isfinite(mean_B))[0])]
            why = next(iter(self.watch.lost.values()), "")
            raise not_finite(f"document {name} with TTT {mode}", why)
        return mean_B.tolist()

    def check(self, names: Sequence[int], rows: int) -> None:
        """Raise NotFiniteError when a row's fast weights are lost; rows repeat the documents."""
        self.watch.check("document", [names[i % len(names)] for i in range(rows)])

    def _with_memory(self, batch: int, L: int) -> State:
        assert self.memory is not None
        return start_with(self.model, self.memory, batch, self._capacity(L))

    def _cuts(self, start: int, stop: int):
        for first in range(start, stop, self.size):
            yield first, min(first + self.size, stop)

    def _arguments(self, L: int, first: int, last: int, ttt: Adapts) -> dict[str, Any]:
        warn_past_positions(self.model, L)
        at_start = first % self.chunk == 0
        return {"capacity": self._capacity(L), "at_chunk_start": at_start, "ttt": ttt}

    def _capacity(self, L: int) -> int | None:
        """One for all lengths of about this size: fewer programs to compile."""
        return -(-L // self.size) * self.size if needs_capacity(self.model) else None

    def read(
        self, ids_BL1, start: int, stop: int, state: State | None, L: int, *, ttt: Adapts
    ) -> State | None:
        B = len(ids_BL1)
        logits_BV = jnp.zeros((B, self.model.config.vocab_size), jnp.float32)
        for first, last in self._cuts(start, stop):
            lengths_B = np.full(B, last - first, np.int32)
            options = self._arguments(L, first, last, ttt)
            ids_BP = ids_BL1[:, first:last]
            state, logits_BV, ratio_LB = read_piece(
                self.frozen, state, logits_BV, ids_BP, lengths_B, **options
            )
            self.watch.note(ratio_LB)
            self.on_tokens(last - first)
        return state

    def score(self, ids_BL1, start: int, stop: int, state: State | None, L: int, *, ttt: Adapts):
        """Return (state, list of losses [B, piece], the newest of them still on the device)."""
        B, losses = len(ids_BL1), []
        for first, last in self._cuts(start, stop):
            lengths_B = np.full(B, last - first, np.int32)
            targets_BP = ids_BL1[:, first + 1 : last + 1]
            options = self._arguments(L, first, last, ttt) | {"with_logits": False}
            ids_BP = ids_BL1[:, first:last]
            state, logprobs_BP, _, ratio_LB = score_piece(
                self.frozen, state, ids_BP, targets_BP, lengths_B, **options
            )
            self.watch.note(ratio_LB)
            losses.append(logprobs_BP)
            # The host follows a few pieces behind, so that the device never waits for it.
            if len(losses) > _IN_FLIGHT:
                losses[-_IN_FLIGHT - 1] = np.asarray(losses[-_IN_FLIGHT - 1])
            self.on_tokens(last - first)
        return state, losses


def _join(logprobs: list[Any]) -> np.ndarray:
    return -np.concatenate([np.asarray(x) for x in logprobs], axis=1)


def exchanged(state: State | None) -> State:
    """Make a copy of the state in which every document has the fast weights of the next document of
    the batch.
    """
    assert state is not None

    def swap(layer):
        if layer.ttt is None:
            return layer
        return layer._replace(ttt=layer.ttt._replace(S_BDF=jnp.roll(layer.ttt.S_BDF, -1, axis=2)))

    layers = tuple(tuple(swap(layer) for layer in runs) for runs in state.layers)
    # Copies, because the programs take over (donate) the arrays of the state that they are given.
    return jax.tree.map(jnp.copy, State(state.position_B, layers, state.capacity))


@program(())
def score_frozen_piece(model, state: State, ids_BP, targets_BP, lengths_B):
    """Read a piece from a chunk's start, applying S and writing nothing to it.

    Returns: (state, log-probabilities of the targets float32 [B, P], ||S||/||W|| [L, B] or None).
    """
    h_BPD, state, stats = model.hidden(
        ids_BP,
        state,
        keep_state=True,
        lengths=lengths_B,
        # An array: the number 0.0 would leave S out, too.
        ttt_scale=jnp.zeros((), jnp.float32),
        at_chunk_start=True,
    )
    devices, weight_VD = model.runtime.parallel, model.output_weight
    nll_BP = devices.over_vocabulary(token_nll, h_BPD, weight_VD, targets_BP)
    return state, -nll_BP.astype(jnp.float32), state_ratios(stats)
