"""Log-probabilities of given tokens, any length, by streaming pieces.

B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.inference.prefill import (
    Adapts,
    Frozen,
    Piece,
    capacity_for,
    piece_size,
    pieces,
    score_piece,
    warn_past_positions,
)
from ttt_jax.inference.prompts import token_rows
from ttt_jax.inference.watch import Watch, not_finite, warn_of_zero_targets
from ttt_jax.memory.fast_weights import check_belongs, start_with
from ttt_jax.memory.memory import Memory
from ttt_jax.model.transformer import Transformer
from ttt_jax.parallel.inference_mesh import warn_of_rows


class Scores(NamedTuple):
    """Fields:
    logprobs_BT: float32 [B, T-1], log p(token t+1 | tokens 0..t); NaN behind a row's end.
    logits_BTV: float32 [B, T, V], or None; NaN behind a row's end.
    """

    logprobs_BT: np.ndarray
    logits_BTV: np.ndarray | None


def score(
    model: Transformer,
    rows: Any,
    *,
    ttt: bool = True,
    logits: bool = False,
    piece: int | None = None,
    memory: Memory | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Scores:
    """Score texts or rows of token ids.

    Memory does not grow with the length for layers with a sliding window; full-attention layers
    keep their keys and values.

    Args:
      model: from `load_pretrained`.
      rows: B rows of any lengths, or one: texts, chat messages or token ids; see `token_rows`.
      ttt: False switches the adaptation off (S stays zero).
      logits: return all logits too (B * T * V floats in host memory).
      piece: tokens read at a time, rounded to chunks; None: 8192, on CPUs 2048.
      memory: fast weights to begin with (docs/memory.md). Without `ttt` they are applied and stay
        as they are.
      on_progress: called with the number of tokens per row read so far.

    Warns, once, when ||S||/||W|| leaves its range, and when TTT can do nothing (watch.py).

    Raises: UserError for rows as `token_rows` does, and for a memory of another model;
      NotFiniteError when one of the numbers is not finite: its `partial` holds the Scores, NaN
      where nothing was computed. Rows that are finite are scored to their end.
    """
    ids = token_rows(model, rows)
    B, T = len(ids), max(len(row) for row in ids)
    warn_past_positions(model, T)
    warn_of_rows(B, model.runtime.parallel)
    logprobs_BT = np.full((B, max(T - 1, 0)), np.nan, np.float32)
    logits_BTV = np.full((B, T, model.config.vocab_size), np.nan, np.float32) if logits else None
    scores = Scores(logprobs_BT, logits_BTV)
    size, frozen = piece_size(model, piece), Frozen(model)
    watch, lost = Watch(model), {}  # row -> where its numbers are not finite
    if ttt:
        warn_of_zero_targets(model)
    state, capacity = None, capacity_for(model, T, size)
    adapts: Adapts = ttt
    if memory is not None:
        check_belongs(memory, model)
        state, adapts = start_with(model, memory, B, capacity), ttt or "frozen"
    for part in pieces(ids, np.zeros(B, np.int64), size, model.config.ttt.chunk_size):
        state, piece_logprobs, piece_logits, ratio_LB = score_piece(
            frozen,
            state,
            part.ids_BP,
            _targets(ids, part),
            part.lengths_B,
            capacity=capacity,
            at_chunk_start=part.at_chunk_start,
            ttt=adapts,
            with_logits=logits,
        )
        _put(scores, ids, part, np.asarray(piece_logprobs), piece_logits, lost)
        if ratio_LB is not None:
            watch.look(ratio_LB)  # of the program whose results are here
            for b in watch.lost:
                last = part.start + int(part.lengths_B[b]) - 1
                lost.setdefault(b, f"row {b} in tokens {part.start} to {last}")
        if len(lost) == B:
            break
        if on_progress is not None:
            on_progress(min(part.start + part.ids_BP.shape[1], T))
    if lost:
        error = not_finite(lost[min(lost)], watch.lost.get(min(lost), ""))
        error.partial = scores
        raise error
    return scores


def _targets(ids: list[np.ndarray], part: Piece) -> np.ndarray:
    """The token behind each token of a piece, int32 [B, P]; 0 where none follows."""
    targets_BP = np.zeros_like(part.ids_BP)
    for targets_P, row, n in zip(targets_BP, ids, part.lengths_B, strict=True):
        following = row[part.start + 1 : part.start + 1 + n]
        targets_P[: len(following)] = following
    return targets_BP


def _put(
    scores: Scores,
    ids: list[np.ndarray],
    part: Piece,
    logprobs_BP,
    logits_BPV,
    lost: dict[int, str],
) -> None:
    """Write a piece's results into the scores, and note in `lost` where a row is not finite."""
    start = part.start
    for b, n in enumerate(part.lengths_B):
        known = max(min(n, len(ids[b]) - 1 - start), 0)  # nothing follows a row's last token
        scores.logprobs_BT[b, start : start + known] = logprobs_BP[b, :known]
        bad_P = ~np.isfinite(logprobs_BP[b, :known])
        if scores.logits_BTV is not None:
            row_PV = np.asarray(logits_BPV[b, :n])
            scores.logits_BTV[b, start : start + n] = row_PV
            bad_P = ~np.isfinite(row_PV).all(axis=1)
        if bad_P.any():
            lost.setdefault(b, f"row {b} from token {start + int(bad_P.argmax())} on")
