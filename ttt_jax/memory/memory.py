"""Memories: what reading wrote into the fast weights, as a sum of terms.

D model width, F MLP width, R rank. A TTT layer's fast weight after reading is W + dW, with dW = S,
the accumulated update, inner learning rate included (arXiv 2604.06169, section 3). dW has the
shape and the orientation of the checkpoint's `mlp.down_proj.weight`.

What was read on its own is a term of its own, with an exact weight. Adding and subtracting change
weights and never the arrays, so that (a + b) - b is a bit for bit, which sums of floats are not.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ttt_jax.errors import UserError
from ttt_jax.files.sealed import is_finite
from ttt_jax.memory.memory_file import load_terms, save_terms
from ttt_jax.memory.sources import Source, as_weight, checked_weight, total_sources
from ttt_jax.memory.spectrum import best_factors, dense
from ttt_jax.memory.terms import Term, Terms, arrays


@dataclasses.dataclass(frozen=True, eq=False)
class Memory(Terms):
    """What streams of one model taught: `session.memory()`, `Memory.load(path)`.

    Sums, differences and multiples of memories are memories. Two are equal when their terms are,
    to the last bit.
    """

    @property
    def layers(self) -> list[int]:
        return sorted(self.slow_norms)

    @property
    def sources(self) -> tuple[Source, ...]:
        """All sources, with their weights in the whole."""
        return total_sources([s.scaled(term.weight) for term in self.terms for s in term.sources])

    @property
    def tokens(self) -> int:
        """Tokens read, over all sources."""
        return sum(source.tokens for source in self.sources)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        deltas = [delta for term in self.terms for delta in term.deltas.values()]
        return sum(x.nbytes for delta in deltas for x in arrays(delta).values())

    def dW(self, layer: int) -> np.ndarray:
        """Compute the dW of a layer, float32 [D, F]: the terms' sum in float64, rounded once.

        Raises: UserError for a layer that does not adapt, and for a sum that is not finite.
        """
        if layer not in self.slow_norms:
            raise UserError(f"memory: layer {layer} does not adapt; its layers are {self.layers}")
        total_DF = np.zeros((self.D, self.F))
        for term in self.terms:
            total_DF += float(term.weight) * dense(term.deltas[layer])
        total_DF = total_DF.astype(np.float32)
        if not is_finite(total_DF):
            raise UserError(f"memory: dW of layer {layer} is not finite; scale it down")
        return total_DF

    def __add__(self, other: Memory) -> Memory:
        if not isinstance(other, Memory):
            return NotImplemented
        self.check_same_model(other)
        terms: dict[str, Term] = {term.key: term for term in self.terms}
        for term in other.terms:
            before = terms[term.key].weight if term.key in terms else Fraction(0)
            terms[term.key] = term.scaled(checked_weight(before + term.weight))
        return self._of(list(terms.values()))

    def __radd__(self, other: Any) -> Memory:
        return self if type(other) is int and other == 0 else NotImplemented  # sum()

    def __sub__(self, other: Memory) -> Memory:
        return self + -1 * other if isinstance(other, Memory) else NotImplemented

    def __neg__(self) -> Memory:
        return -1 * self

    def __mul__(self, factor: float | Fraction) -> Memory:
        """Multiply by a number, which is taken as it is written: 0.1 is one tenth."""
        weight = as_weight(factor)
        return self._of([term.scaled(checked_weight(term.weight * weight)) for term in self.terms])

    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Memory):
            return NotImplemented
        same = lambda memory: {term.key: term.weight for term in memory.terms}
        return self.model == other.model and same(self) == same(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        count = lambda n, what: f"{n} {what}{'s' * (n != 1)}"
        return (
            f"Memory({self.tokens:,} tokens of {count(len(self.sources), 'source')}, "
            f"{count(len(self.terms), 'term')}, layers {self.layers}, {megabytes(self.nbytes)})"
        )

    def collapse(self) -> Memory:
        """Make one term of all. It is smaller, and nothing can be taken out of it bit for bit."""
        deltas = {layer: self.dW(layer) for layer in self.layers}
        return self._of([Term(deltas, self.sources)])

    def truncate(self, rank: int) -> Memory:
        """Keep the best factors of a rank: one term of R (D + F) numbers a layer.

        Raises: UserError for a rank below 1 or above min(D, F).
        """
        self.check_rank(rank)
        deltas = {layer: best_factors(self.dW(layer), rank) for layer in self.layers}
        return self._of([Term(deltas, self.sources)])

    def without(self, name: str) -> Memory:
        """Take out a source, by its name or the beginning of one of its hashes: bit for bit what
        the other terms are.

        Raises: UserError when no term, or not all of a term, comes from it.
        """
        found = [term for term in self.terms if any(_is_named(s, name) for s in term.sources)]
        if not found:
            known = ", ".join(source.name for source in self.sources[:20])
            raise UserError(f"source {name}: the memory does not come from it, but from {known}")
        for term in found:
            if not all(_is_named(s, name) for s in term.sources):
                others = ", ".join(s.name for s in term.sources if not _is_named(s, name))
                raise UserError(
                    f"source {name}: was read or summed together with {others}, and cannot be "
                    "taken out alone; read them apart"
                )
        return self._of([term for term in self.terms if term not in found])

    def check_rank(self, rank: int) -> None:
        if not 1 <= rank <= min(self.D, self.F):
            raise UserError(f"rank {rank}: must be from 1 to {min(self.D, self.F)}, the full rank")

    def check_same_model(self, other: Memory) -> None:
        if self.model != other.model:
            raise UserError(
                "memories of two models: they were not read by the same weights; read both texts "
                "with one model"
            )

    def _of(self, terms: list[Term]) -> Memory:
        kept = sorted((term for term in terms if term.weight), key=lambda term: term.key)
        return dataclasses.replace(self, terms=tuple(kept))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file (memory_file.py). Raises CheckpointError."""
        save_terms(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Memory:
        """Read a file that `save` wrote. Raises CheckpointError, one line."""
        return cls(**vars(load_terms(Path(path))))

    @classmethod
    def load_sum(cls, paths: str) -> Memory:
        """Read the files of `M,M,...` and add them up. Raises CheckpointError, and UserError for
        memories of two models.
        """
        names = paths.split(",")
        if not all(names):
            raise UserError(f"memory {paths}: a name is empty; give M or M,M,... without spaces")
        memories = [cls.load(path) for path in names]
        return sum(memories[1:], memories[0])


def _is_named(source: Source, name: str) -> bool:
    hashes = [h for h in (source.ids, source.file) if h is not None]
    return source.name == name or (len(name) >= 8 and any(h.startswith(name) for h in hashes))


def megabytes(nbytes: int) -> str:
    """Write a size in MB, a small one with two digits."""
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e6:.2g} MB"
