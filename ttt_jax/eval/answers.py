"""Judging given tokens: the loss of each, and whether greedy decoding would write it.

B rows of a batch, T tokens, P tokens of a piece. Every row starts from a fresh state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ttt_jax.inference.prefill import (
    Frozen,
    check_ids,
    hidden_of_piece,
    needs_capacity,
    piece_size,
    pieces,
    program,
    warn_past_positions,
)
from ttt_jax.inference.watch import Watch, not_finite
from ttt_jax.model.loss import token_nll_and_hit
from ttt_jax.model.transformer import State, Transformer


class Judgement(NamedTuple):
    """For token t + 1 of a row given tokens 0..t: log p in nats, and whether it is the most likely
    one. Both [T - 1].
    """

    logprobs_T: np.ndarray
    greedy_T: np.ndarray


class Judge:
    """Judges rows of token ids of one model in batches.

    Args:
      ttt: False switches the adaptation off.
      batch_size: rows read at once.
      piece: tokens read at a time, rounded to chunks; None: 8192, on CPUs 2048.
      watch: of the fast weights; None makes one.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        ttt: bool = True,
        batch_size: int = 8,
        piece: int | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.watch = watch or Watch(model)
        self.model, self.ttt, self.batch_size = model, ttt, batch_size
        self.frozen, self.size = Frozen(model), piece_size(model, piece)

    def __call__(
        self, rows: Sequence[Sequence[int]], on_row: Callable[[int], None] | None = None
    ) -> list[Judgement]:
        """Return one judgement per row, in the order given. `on_row` is called with the number of
        rows done.

        Raises: UserError for rows that are not token ids of the model; NotFiniteError.
        """
        ids = check_ids(rows, self.model.config.vocab_size)
        # Equal lengths come together: little padding, few shapes.
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        result: list[Judgement | None] = [None] * len(ids)
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            # Filled up with one-token rows, so that the last batch is no program of its own.
            padded = [ids[i] for i in part] + [ids[part[0]][:1]] * (
                self.batch_size - len(part) if start else 0
            )
            judged = self._batch(padded)
            for at, (i, judgement) in enumerate(zip(part, judged, strict=False)):
                why = self.watch.lost.get(at, "")
                if why or not np.isfinite(judgement.logprobs_T).all():
                    raise not_finite(f"sequence {i} of {len(ids)} ({len(ids[i])} tokens)", why)
                result[i] = judgement
            if on_row is not None:
                on_row(start + len(part))
        return [judgement for judgement in result if judgement is not None]

    def _batch(self, ids: list[np.ndarray]) -> list[Judgement]:
        B, T, C = len(ids), max(len(row) for row in ids), self.model.config.ttt.chunk_size
        warn_past_positions(self.model, T)
        capacity = _capacity(T, self.size) if needs_capacity(self.model) else None
        logprobs_BT, greedy_BT = np.zeros((B, T), np.float32), np.zeros((B, T), bool)
        state = None
        for part in pieces(ids, np.zeros(B, np.int64), self.size, C):
            targets_BP = np.zeros_like(part.ids_BP)
            for targets_P, row, n in zip(targets_BP, ids, part.lengths_B, strict=True):
                following = row[part.start + 1 : part.start + 1 + n]
                targets_P[: len(following)] = following
            static = {"capacity": capacity, "at_chunk_start": part.at_chunk_start, "ttt": self.ttt}
            state, nll_BP, hit_BP, ratio_LB = judge_piece(
                self.frozen, state, part.ids_BP, targets_BP, part.lengths_B, **static
            )
            self.watch.note(ratio_LB)
            width = min(part.ids_BP.shape[1], T - part.start)
            logprobs_BT[:, part.start : part.start + width] = -np.asarray(nll_BP)[:, :width]
            greedy_BT[:, part.start : part.start + width] = np.asarray(hit_BP)[:, :width]
        self.watch.settle()
        return [
            Judgement(logprobs_BT[b, : len(row) - 1], greedy_BT[b, : len(row) - 1])
            for b, row in enumerate(ids)
        ]


def _capacity(tokens: int, piece: int) -> int:
    """KV slots for a batch: few different ones (programs), and enough for the padded last piece."""
    whole, rest = divmod(tokens, piece)
    return whole * piece + (max(16, 1 << (rest - 1).bit_length()) if rest else 0)


@program(("capacity", "at_chunk_start", "ttt"))
def judge_piece(
    model, state: State | None, ids_BP, targets_BP, lengths_B, *, capacity, at_chunk_start, ttt
):
    """Read a piece.

    Returns: (state, -log p(target) float32 [B, P], target is the most likely token, bool [B, P],
    ||S||/||W|| [L, B] or None).
    """
    h_BPD, state, ratio_LB = hidden_of_piece(
        model, state, ids_BP, lengths_B, capacity, at_chunk_start, ttt
    )
    devices, weight_VD = model.runtime.parallel, model.output_weight
    nll_BP, hit_BP = devices.over_vocabulary(token_nll_and_hit, h_BPD, weight_VD, targets_BP)
    return state, nll_BP.astype(jnp.float32), hit_BP, ratio_LB
