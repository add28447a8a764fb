"""Singular values of a layer's dW, and its best factors of a rank.

D model width, F MLP width, R rank. Everything runs in float64 on the Gram matrix of the smaller
side, and is exact to float32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Factors(NamedTuple):
    """dW = B A.

    Fields:
      B_DR, A_RF: float32.
    """

    B_DR: np.ndarray
    A_RF: np.ndarray


Delta = np.ndarray | Factors  # dW of a layer, float32 [D, F], or its factors


def dense(delta: Delta) -> np.ndarray:
    """Return dW, float64 [D, F]."""
    if isinstance(delta, Factors):
        return delta.B_DR.astype(np.float64) @ delta.A_RF.astype(np.float64)
    return delta.astype(np.float64)


def best_factors(dW_DF: np.ndarray, rank: int) -> Factors:
    """Find the factors of rank R nearest to dW in the Frobenius norm. Both have columns and rows of
    equal norms, the square roots of the singular values.

    Args:
      rank: R, from 1 to min(D, F).
    """
    dW_DF = dW_DF.astype(np.float64)
    D, F = dW_DF.shape
    if D > F:
        flipped = best_factors(dW_DF.T, rank)
        return Factors(np.ascontiguousarray(flipped.A_RF.T), np.ascontiguousarray(flipped.B_DR.T))
    _, vectors_DD = np.linalg.eigh(dW_DF @ dW_DF.T)
    U_DR = vectors_DD[:, ::-1][:, :rank]
    A_RF = U_DR.T @ dW_DF  # a projection: what eigh gets wrong does not multiply
    root_R = np.sqrt(np.linalg.norm(A_RF, axis=1))
    A_RF = A_RF / np.where(root_R > 0, root_R, 1)[:, None]
    return Factors((U_DR * root_R).astype(np.float32), A_RF.astype(np.float32))


def energies(dW_DF: np.ndarray) -> np.ndarray:
    """Return the squared singular values of dW, float64, the largest first; they add up to its
    squared Frobenius norm.
    """
    dW_DF = dW_DF.astype(np.float64)
    gram = dW_DF @ dW_DF.T if dW_DF.shape[0] <= dW_DF.shape[1] else dW_DF.T @ dW_DF
    return np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)


def effective_rank(energy_R: np.ndarray) -> float:
    """Compute exp(entropy) of the squared singular values, scaled to sum 1; 0 for a dW of zeros."""
    total = energy_R.sum()
    if not total:
        return 0.0
    p = energy_R[energy_R > 0] / total
    return float(np.exp(-np.sum(p * np.log(p))))


def rank_of_share(energy_R: np.ndarray, share: float) -> int:
    """Find the smallest rank that keeps `share` of the squared norm."""
    total = energy_R.sum()
    if not total:
        return 0
    return int(np.searchsorted(np.cumsum(energy_R), share * total * (1 - 1e-12)) + 1)
