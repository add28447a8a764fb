"""What a memory is made of. D model width, F MLP width."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from ttt_jax.memory.sources import Source
from ttt_jax.memory.spectrum import Delta, Factors


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """What was written in one go.

    Fields:
      deltas: layer index -> dW of the layer, float32 [D, F], or its factors. Not to be changed.
      sources: what was read, with weights inside of this term.
      weight: of the term in its memory.
    """

    deltas: Mapping[int, Delta]
    sources: tuple[Source, ...]
    weight: Fraction = Fraction(1)

    @functools.cached_property
    def key(self) -> str:
        """A hash of the arrays' bits and of the sources but for their names: terms of one key are
        the same.
        """
        found = hashlib.sha256()
        for layer, delta in sorted(self.deltas.items()):
            for name, x in arrays(delta).items():
                found.update(f"{layer} {name} {x.shape};".encode())
                found.update(np.ascontiguousarray(x).data)
        for source in self.sources:
            kept = (source.tokens, source.written, source.ids, source.context, source.weight)
            found.update(f"{kept}".encode())
        return found.hexdigest()

    @property
    def rank(self) -> int | None:
        """The rank of its factors; None when it holds dW itself."""
        delta = next(iter(self.deltas.values()))
        return delta.A_RF.shape[0] if isinstance(delta, Factors) else None

    def scaled(self, weight: Fraction) -> Term:
        new = dataclasses.replace(self, weight=weight)
        new.__dict__["key"] = self.key  # the arrays are the same
        return new


@dataclasses.dataclass(frozen=True, eq=False)
class Terms:
    """What a memory holds, and a file of one.

    Fields:
      model: `weights_fingerprint` of the model that read.
      D, F: shape of dW.
      slow_norms: TTT layer -> ||W||_F of its slow weight.
      terms: what was read on its own, in the order of their keys.
    """

    model: str
    D: int
    F: int
    slow_norms: Mapping[int, float]
    terms: tuple[Term, ...]


def arrays(delta: Delta) -> dict[str, np.ndarray]:
    """Name the arrays of a layer as a file does: dW, or B and A."""
    if isinstance(delta, Factors):
        return {"B": delta.B_DR, "A": delta.A_RF}
    return {"dW": delta}
