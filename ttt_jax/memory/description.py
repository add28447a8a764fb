"""What `ttt-jax memory info` and `diff` say, as JSON values and as tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ttt_jax.display.tables import Table
from ttt_jax.memory.memory import Memory, megabytes
from ttt_jax.memory.sources import Source
from ttt_jax.memory.spectrum import effective_rank, energies, rank_of_share

SHARES = (0.5, 0.9, 0.99)  # of ||dW||^2


def describe(memory: Memory, on_layer: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
    """Look at a memory.

    Returns: "layers": [{"layer", "norm", "ratio" to ||W||, "effective_rank", "ranks": the ranks
      that keep the shares of ||dW||^2}], and "terms", "sources", sizes.
    """
    layers = []
    for done, layer in enumerate(memory.layers, start=1):
        dW_DF, slow = memory.dW(layer), memory.slow_norms[layer]
        energy_R = energies(dW_DF)
        norm = float(np.linalg.norm(dW_DF.astype(np.float64)))
        layers.append(
            {
                "layer": layer,
                "norm": norm,
                "ratio": norm / slow if slow else None,
                "effective_rank": effective_rank(energy_R),
                "ranks": {str(share): rank_of_share(energy_R, share) for share in SHARES},
            }
        )
        on_layer(done)
    return {
        "model": memory.model,
        "d_model": memory.D,
        "d_ff": memory.F,
        "megabytes": memory.nbytes / 1e6,
        "tokens": memory.tokens,
        "terms": [
            {"weight": str(t.weight), "rank": t.rank, "sources": len(t.sources), "key": t.key}
            for t in memory.terms
        ],
        "sources": [source.to_json() for source in memory.sources],
        "layers": layers,
    }


def description_tables(about: dict[str, Any], name: str) -> list[Table]:
    layers = [
        [
            str(x["layer"]),
            f"{x['norm']:.4g}",
            "-" if x["ratio"] is None else f"{x['ratio']:.3g}",
            f"{x['effective_rank']:.1f}",
            *(str(x["ranks"][str(share)]) for share in SHARES),
        ]
        for x in about["layers"]
    ]
    shape = f"D {about['d_model']}, F {about['d_ff']}, {megabytes(round(about['megabytes'] * 1e6))}"
    heads = ["layer", "||dW||", "||dW||/||W||", "effective rank"]
    heads += [f"rank of {share:.0%}" for share in SHARES]
    note = "The last columns: the rank that keeps so much of ||dW||^2."
    heads_of_terms, terms = ["term", "weight", "rank", "sources"], []
    for t in about["terms"]:
        rank = "-" if t["rank"] is None else str(t["rank"])
        terms.append([t["key"][:12], t["weight"], rank, str(t["sources"])])
    exact = "A term can be taken out bit for bit."
    if any(t["sources"] > 1 for t in about["terms"]):
        exact += " One of several sources of a term cannot."
    made = [
        Table(f"{name}: {shape}", note, heads, layers),
        Table("Terms", exact, heads_of_terms, terms),
    ]
    return [*made, _sources("Sources", [Source.from_json(raw) for raw in about["sources"]])]


def compare(a: Memory, b: Memory) -> dict[str, Any]:
    """Compare two memories of one model.

    Returns: "layers": [{"layer", "a", "b", "apart": Frobenius norms of both and of their
      difference, "cosine"}], "same": equal to the last bit, "only_a", "only_b": sources.
    Raises: UserError for memories of two models.
    """
    a.check_same_model(b)
    layers = []
    for layer in a.layers:
        x, y = (memory.dW(layer).astype(np.float64) for memory in (a, b))
        norms = [float(np.linalg.norm(z)) for z in (x, y, x - y)]
        cosine = float(np.sum(x * y) / (norms[0] * norms[1])) if norms[0] and norms[1] else None
        names = ("a", "b", "apart")
        layers.append({"layer": layer, **dict(zip(names, norms, strict=True)), "cosine": cosine})
    both = set(a.sources) & set(b.sources)
    return {
        "same": a == b,
        "layers": layers,
        "only_a": [source.to_json() for source in a.sources if source not in both],
        "only_b": [source.to_json() for source in b.sources if source not in both],
    }


def comparison_tables(about: dict[str, Any], a: str, b: str) -> list[Table]:
    rows = []
    for x in about["layers"]:
        norms = [f"{x[key]:.4g}" for key in ("a", "b", "apart")]
        cosine = "-" if x["cosine"] is None else f"{x['cosine']:.4f}"
        rows.append([str(x["layer"]), *norms, cosine])
    note = "The same, to the last bit." if about["same"] else "Frobenius norms of dW."
    made = [Table(f"{a} and {b}", note, ["layer", "first", "second", "apart", "cosine"], rows)]
    for key, name in (("only_a", a), ("only_b", b)):
        if about[key]:
            sources = [Source.from_json(raw) for raw in about[key]]
            made.append(_sources(f"Sources of {name} alone, or with this weight", sources))
    return made


def _sources(title: str, sources: list[Source]) -> Table:
    rows = [
        [
            source.name,
            str(source.weight),
            f"{source.tokens:,}",
            f"{source.written:,}",
            "-" if source.context is None else f"{source.context:,}",
            (source.file or "-")[:12],
            (source.ids or "-")[:12],
        ]
        for source in sources
    ]
    heads = ["source", "weight", "tokens", "in whole chunks", "context", "SHA-256", "of its ids"]
    return Table(title, "", heads, rows)
