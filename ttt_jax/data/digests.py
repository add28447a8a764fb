"""Hashes of what documents hold: SHA-256 of their token ids, cut to 64 bits.

Text is hashed whole while it is tokenised. An `.npy` file, or the cached tokens of a large text, is
hashed whole up to its first 2^30 tokens. Of what lies behind them, 4,096 pieces of 16,384 tokens
are hashed, at equal distances, the last tokens included.
"""

from __future__ import annotations

import hashlib

import numpy as np

WHOLE = 1 << 30  # tokens of an array that are all read
PIECES, PIECE = 4096, 1 << 14  # behind them: how many pieces, of how many tokens
_AT_ONCE = 1 << 24  # tokens that are converted at once


def hashed_ranges(tokens: int) -> list[tuple[int, int]]:
    """Return the ranges `(start, stop)` of an array of so many tokens that are hashed, in order,
    without overlap.
    """
    ranges = [(0, min(tokens, WHOLE))]
    rest = tokens - WHOLE
    if rest > 0:
        last = tokens - min(PIECE, rest)
        starts = np.unique(np.linspace(WHOLE, last, PIECES).astype(np.int64)).tolist()
        for start in starts:
            start = max(start, ranges[-1][1])
            if start < min(start + PIECE, tokens):
                ranges.append((start, min(start + PIECE, tokens)))
    return ranges


def digest_tokens(ids: np.ndarray, dtype: np.dtype, eos_id: int | None = None) -> int:
    """Return 64 bits of the SHA-256 of one document, never 0.

    Args:
      ids: integers `[length]`.
      dtype: unsigned; the ids are hashed as little-endian numbers of this size.
      eos_id: an end token that does not count when it is the last one. Texts are hashed before they
        get theirs.
    """
    if eos_id is not None and len(ids) and int(ids[-1]) == eos_id:
        ids = ids[:-1]
    sha = hashlib.sha256()
    for start in range(0, len(ids), _AT_ONCE):
        _update(sha, ids[start : start + _AT_ONCE], dtype)
    return _number(sha)


def digest_rows(
    flat_N: np.ndarray, rows: int, width: int, dtype: np.dtype, eos_id: int | None = None
) -> np.ndarray:
    """Return uint64 `[rows]`: `digest_tokens` of each row of `width` tokens; of the parts that are
    hashed where that is not all.

    A row of which nothing is hashed has 0.
    """
    digest_N = np.zeros(rows, np.uint64)
    partial: dict[int, hashlib._Hash] = {}
    for start, stop in hashed_ranges(rows * width) if rows * width else ():
        for row in range(start // width, -(-stop // width)):
            begin, end = max(start, row * width), min(stop, (row + 1) * width)
            if end - begin == width:
                digest_N[row] = digest_tokens(flat_N[begin:end], dtype, eos_id)
                continue
            sha = partial.setdefault(row, hashlib.sha256(f"part of {width}".encode()))
            sha.update(f"at {begin - row * width}".encode())
            for at in range(begin, end, _AT_ONCE):
                _update(sha, flat_N[at : min(at + _AT_ONCE, end)], dtype)
    for row, sha in partial.items():
        digest_N[row] = _number(sha)
    return digest_N


def digest_array(flat_N: np.ndarray) -> int:
    """Hash an array as a whole, of the ranges that are hashed; it tells whether a cached array is
    the one written.
    """
    return int(digest_rows(flat_N, 1, len(flat_N), flat_N.dtype)[0]) if len(flat_N) else 0


def _update(sha: hashlib._Hash, ids: np.ndarray, dtype: np.dtype) -> None:
    sha.update(np.ascontiguousarray(ids, dtype.newbyteorder("<")).data)


def _number(sha: hashlib._Hash) -> int:
    return int.from_bytes(sha.digest()[:8], "little") or 1
