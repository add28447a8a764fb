"""Keys of documents: 64-bit hashes of their identity, which can be traced back."""

from __future__ import annotations

import hashlib

import numpy as np

from ttt_jax.data.source_files import SourceFile

_STEP, _MIX1, _MIX2 = (
    np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def _seed(file: SourceFile) -> np.uint64:
    name = file.name.encode("utf-8", "surrogateescape")
    return np.uint64(int.from_bytes(hashlib.sha256(name).digest()[:8], "little"))


def document_keys(file: SourceFile, index_N: np.ndarray) -> np.ndarray:
    """Make uint64 hashes of (file name, index of the record in it), uniform over 64 bits."""
    # The finaliser of splitmix64: every bit of the result depends on every bit of the index; uint64
    # wraps around.
    x = _seed(file) + (index_N.astype(np.uint64) + np.uint64(1)) * _STEP
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


def find_documents(files: list[SourceFile], key_K: np.ndarray) -> list[tuple[str, int]]:
    """Find (file name, index of the record in it) of documents by their keys.

    The inverse of `document_keys`, so that nothing is stored. A file that is gone since gives
    ("unknown file (key ...)", -1).
    """
    mixed_K = _unshift(key_K, 31) * _inverse(_MIX2)
    mixed_K = _unshift(mixed_K, 27) * _inverse(_MIX1)
    mixed_K = _unshift(mixed_K, 30)
    seed_F = np.array([_seed(file) for file in files], np.uint64)
    found = []
    for key, mixed in zip(key_K, mixed_K, strict=True):
        # For the other files this is a random 64-bit number.
        index_F = (mixed - seed_F) * _inverse(_STEP) - np.uint64(1)
        best = int(np.argmin(index_F))
        index = int(index_F[best])
        found.append(
            (files[best].name, index)
            if index < 1 << 40
            else (f"unknown file (key {int(key):016x})", -1)
        )
    return found


def _unshift(x: np.ndarray, bits: int) -> np.ndarray:
    """Return the y with y ^ (y >> bits) == x."""
    y = x
    for _ in range(64 // bits):
        y = x ^ (y >> np.uint64(bits))
    return y


def _inverse(factor: np.uint64) -> np.uint64:
    return np.uint64(pow(int(factor), -1, 1 << 64))
