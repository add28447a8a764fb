"""Log-probabilities of given tokens, any length, by streaming pieces.

B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ttt_jax.inference.prefill import (
    Frozen,
    check_ids,
    needs_capacity,
    piece_size,
    pieces,
    score_piece,
    warn_past_positions,
)
from ttt_jax.inference.watch import Watch, not_finite, warn_of_zero_targets
from ttt_jax.model.transformer import Transformer


class Scores(NamedTuple):
    """Fields:
    logprobs_BT: float32 [B, T-1], log p(token t+1 | tokens 0..t); NaN behind a row's end.
    logits_BTV: float32 [B, T, V], or None; NaN behind a row's end.
    """

    logprobs_BT: np.ndarray
    logits_BTV: np.ndarray | None


def score(
    model: Transformer,
    rows: Sequence[Sequence[int] | np.ndarray],
    *,
    ttt: bool = True,
    logits: bool = False,
    piece: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Scores:
    """Score rows of token ids.

    Memory does not grow with the length for layers with a sliding window; full-attention layers
    keep their keys and values.

    Args:
      model: from `load_pretrained`.
      rows: token ids, B rows of any lengths.
      ttt: False switches the adaptation off (S stays zero).
      logits: return all logits too (B * T * V floats in host memory).
      piece: tokens read at a time, rounded to chunks; None: 8192, on CPUs 2048.
      on_progress: called with the number of tokens per row read so far.

    Warns, once, when ||S||/||W|| leaves its range, and when TTT can do nothing (watch.py).

    Raises: UserError for rows that are not token ids of the model; NotFiniteError when one of the
    numbers is not finite: its
      `partial` holds the Scores, NaN where nothing was computed. Rows that are finite are scored to
      their end.
    """
    ids = check_ids(rows, model.config.vocab_size)
    B, T = len(ids), max(len(row) for row in ids)
    warn_past_positions(model, T)
    logprobs_BT = np.full((B, max(T - 1, 0)), np.nan, np.float32)
    logits_BTV = np.full((B, T, model.config.vocab_size), np.nan, np.float32) if logits else None
    size, frozen = piece_size(model, piece), Frozen(model)
    watch, lost = Watch(model), {}  # row -> where its numbers are not finite
    if ttt:
        warn_of_zero_targets(model)
    state, capacity = None, (-(-T // size) * size if needs_capacity(model) else None)
    for part in pieces(ids, np.zeros(B, np.int64), size, model.config.ttt.chunk_size):
        targets_BP = np.zeros_like(part.ids_BP)
        for targets_P, row, n in zip(targets_BP, ids, part.lengths_B, strict=True):
            following = row[part.start + 1 : part.start + 1 + n]
            targets_P[: len(following)] = following
        state, piece_logprobs, piece_logits, ratio_LB = score_piece(
            frozen,
            state,
            part.ids_BP,
            targets_BP,
            part.lengths_B,
            capacity=capacity,
            at_chunk_start=part.at_chunk_start,
            ttt=ttt,
            with_logits=logits,
        )
        piece_logprobs = np.asarray(piece_logprobs)
        for b, n in enumerate(part.lengths_B):
            known = min(n, len(ids[b]) - 1 - part.start)  # nothing follows a row's last token
            logprobs_BT[b, part.start : part.start + max(known, 0)] = piece_logprobs[
                b, : max(known, 0)
            ]
            if logits_BTV is not None and piece_logits is not None:
                logits_BTV[b, part.start : part.start + n] = np.asarray(piece_logits[b, :n])
            bad_P = ~np.isfinite(piece_logprobs[b, : max(known, 0)])
            if logits_BTV is not None:
                bad_P = ~np.isfinite(logits_BTV[b, part.start : part.start + n]).all(axis=1)
            if bad_P.any():
                lost.setdefault(b, f"row {b} from token {part.start + int(bad_P.argmax())} on")
        if ratio_LB is not None:
            watch.look(ratio_LB)  # of the program whose results are here
            for b in watch.lost:
                lost.setdefault(
                    b,
                    f"row {b} in tokens {part.start} to {part.start + int(part.lengths_B[b]) - 1}",
                )
        if len(lost) == B:
            break
        if on_progress is not None:
            on_progress(min(part.start + part.ids_BP.shape[1], T))
    if lost:
        error = not_finite(lost[min(lost)], watch.lost.get(min(lost), ""))
        error.partial = Scores(logprobs_BT, logits_BTV)
        raise error
    return Scores(logprobs_BT, logits_BTV)
