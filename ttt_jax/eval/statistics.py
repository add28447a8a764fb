"""Means with bootstrap confidence intervals; the unit that is drawn is a document (or an example).

N documents, R resamples.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ttt_jax.errors import NotFiniteError

RESAMPLES = 2000
_BLOCK = 1 << 22  # draws held at a time


def mean_with_interval(
    value_N: np.ndarray, *, seed: int = 0, level: float = 0.95
) -> dict[str, Any]:
    """Compute the mean over documents and its percentile-bootstrap interval.

    Tokens of a document are not independent, so documents are drawn, not tokens; each counts the
    same. For a difference of two settings pass the differences per document: what the documents
    share then cancels.

    Returns: {"mean", "low", "high"}; low and high are None for fewer than two documents, everything
    for none. Raises: NotFiniteError for values that are not finite: a mean without them would be
    one of other documents.
    """
    value_N = np.asarray(value_N, np.float64)
    if not np.isfinite(value_N).all():
        bad = int(np.flatnonzero(~np.isfinite(value_N))[0])
        raise NotFiniteError(
            f"results: value {bad} of {len(value_N)} is not finite; evaluate again"
        )
    N = len(value_N)
    if N == 0:
        return {"mean": None, "low": None, "high": None}
    mean = float(value_N.mean())
    if N == 1:
        return {"mean": mean, "low": None, "high": None}
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // N)
    means_R = np.concatenate(
        [
            value_N[rng.integers(0, N, (min(rows, RESAMPLES - done), N))].mean(axis=1)
            for done in range(0, RESAMPLES, rows)
        ]
    )
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(means_R, [tail, 100 - tail])
    return {"mean": mean, "low": float(low), "high": float(high)}
