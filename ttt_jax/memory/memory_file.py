"""Memories on disk: one sealed safetensors file (files/sealed.py; docs/memory.md).

D model width, F MLP width, R rank, N number of a term, I index of a layer.

    terms.N.layers.I.dW             float32 [D, F]            a term as it was written
    terms.N.layers.I.B, .A          float32 [D, R], [R, F]    or as factors, dW = B A

The manifest says which weights read, the layers with the norm of their slow weights, and of each
term its exact weight, its rank and its sources.
"""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ttt_jax.files.sealed import SealedKind, Specs
from ttt_jax.memory.sources import Source, is_sha256, read_weight
from ttt_jax.memory.spectrum import Delta, Factors
from ttt_jax.memory.terms import Term, Terms, arrays

KIND = SealedKind("memory", "ttt_jax memory 1", "a file that `ttt-jax memory` or Memory.save wrote")
_MAX_SIZE = 2**24  # of D and F
_MAX_ELEMENTS = 2**30  # of a dW; factors of a small file could claim any


def save_terms(memory: Terms, path: Path) -> None:
    """Write a memory; a file of that name is replaced when the new one is complete.

    Raises: CheckpointError when it cannot be written.
    """
    fields = {
        "model": memory.model,
        "d_model": memory.D,
        "d_ff": memory.F,
        "slow_norms": {str(layer): norm for layer, norm in memory.slow_norms.items()},
        "terms": [
            {
                "weight": str(term.weight),
                "rank": term.rank,
                "sources": [source.to_json() for source in term.sources],
            }
            for term in memory.terms
        ],
    }
    tensors = {
        f"terms.{n}.layers.{layer}.{name}": np.ascontiguousarray(x)
        for n, term in enumerate(memory.terms)
        for layer, delta in term.deltas.items()
        for name, x in arrays(delta).items()
    }
    KIND.write(path, tensors, fields)


def load_terms(path: Path) -> Terms:
    """Read what `save_terms` wrote.

    Raises: CheckpointError, one line, when the file is missing, damaged or no memory.
    """

    def check(manifest: dict[str, Any], specs: Specs) -> None:
        try:
            expected = _expected(_described(manifest))
        except ValueError as error:
            raise KIND.damaged(path, f"its manifest: {error}") from None
        if set(specs) != set(expected):
            name = sorted(set(specs) ^ set(expected))[0]
            raise KIND.damaged(
                path, f"tensor {name} is {'missing' if name in expected else 'unknown'}"
            )
        for name, (shape, dtype) in specs.items():
            if shape != expected[name] or dtype != np.float32:
                raise KIND.damaged(
                    path,
                    f"tensor {name} is {dtype} {list(shape)}, not float32 {list(expected[name])}",
                )

    manifest, tensors = KIND.read(path, check)
    about = _described(manifest)

    def delta(n: int, layer: int) -> Delta:
        name = f"terms.{n}.layers.{layer}"
        if f"{name}.dW" in tensors:
            return tensors[f"{name}.dW"]
        return Factors(tensors[f"{name}.B"], tensors[f"{name}.A"])

    terms = [
        Term({layer: delta(n, layer) for layer in about.slow_norms}, sources, weight)
        for n, (weight, _, sources) in enumerate(about.terms)
    ]
    if len({term.key for term in terms}) != len(terms):
        raise KIND.damaged(path, "two of its terms are the same")
    in_order = tuple(sorted(terms, key=lambda term: term.key))
    return Terms(about.model, about.D, about.F, about.slow_norms, in_order)


class _Description(NamedTuple):
    """What the manifest says. `terms`: (weight, rank or None, sources) of each."""

    model: str
    D: int
    F: int
    slow_norms: dict[int, float]
    terms: list[tuple[Fraction, int | None, tuple[Source, ...]]]


def _expected(about: _Description) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the file has to hold."""
    D, F, shapes = about.D, about.F, {}
    for n, (_, rank, _) in enumerate(about.terms):
        own = {"dW": (D, F)} if rank is None else {"B": (D, rank), "A": (rank, F)}
        for layer in about.slow_norms:
            shapes |= {f"terms.{n}.layers.{layer}.{name}": shape for name, shape in own.items()}
    return shapes


def _described(manifest: dict[str, Any]) -> _Description:
    """Read the manifest's fields. Raises ValueError for what `save_terms` does not write."""
    fields = ("model", "slow_norms", "terms", "d_model", "d_ff")
    model, norms, terms, D, F = (cast(Any, manifest.get(key)) for key in fields)
    if not is_sha256(model):
        raise ValueError("model is no fingerprint")
    if not all(type(n) is int and 1 <= n <= _MAX_SIZE for n in (D, F)):
        raise ValueError("d_model and d_ff are no widths")
    if D * F > _MAX_ELEMENTS:
        raise ValueError(f"a dW of {D} x {F} is larger than any model's")
    if not isinstance(norms, dict) or not norms or not all(map(_is_layer, norms)):
        raise ValueError("slow_norms are no norms of layers")
    if not all(type(x) is float and 0 <= x < math.inf for x in norms.values()):
        raise ValueError("slow_norms are no norms of layers")
    if not isinstance(terms, list) or len(terms) * len(norms) > len(manifest["crc32"]):
        raise ValueError("terms are not those of its tensors")
    found = [_term(term, min(D, F)) for term in terms]
    return _Description(model, D, F, {int(layer): x for layer, x in norms.items()}, found)


def _is_layer(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) < 6 and str(int(name)) == name


def _term(raw: Any, full_rank: int) -> tuple[Fraction, int | None, tuple[Source, ...]]:
    if not isinstance(raw, dict) or not isinstance(raw.get("sources"), list):
        raise ValueError("a term has no sources")
    weight, rank = read_weight(raw.get("weight")), raw.get("rank")
    if not weight:
        raise ValueError("a term has the weight 0")
    if rank is not None and not (type(rank) is int and 1 <= rank <= full_rank):
        raise ValueError(f"a term's rank is not from 1 to {full_rank}")
    return weight, rank, tuple(map(Source.from_json, raw["sources"]))
