"""Three or more results in one table: floors, ceilings and what stands between them."""

from __future__ import annotations

import string
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.display.tables import Table, number
from ttt_jax.errors import UserError
from ttt_jax.eval.statistics import mean_with_interval
from ttt_jax.eval.tables import interval, tokens

LETTERS = string.ascii_uppercase[:8]


class Measure(NamedTuple):
    """One figure of one result.

    Fields:
      value_N: of each document; None where the results hold none.
      documents: which these are; only figures of the same documents are paired.
    """

    mean: float
    value_N: np.ndarray | None = None
    documents: tuple[str, ...] = ()


# What was measured, as the table says it, and the settings that have to agree.
What = tuple[str, tuple[Any, ...]]


def side_by_side(results: list[dict[str, Any]]) -> tuple[dict[str, Any], list[Table]]:
    """Put what at least two of the results measured side by side, each against the first of them.

    The reference is the first result's "on", or its "off" where it has no TTT.

    Returns: the content of comparison.json, and the table.
    Raises: UserError when no two results have a figure in common.
    """
    found = [_measures(result) for result in results]
    rows = []
    for what in dict.fromkeys(what for measures in found for what in measures):
        holders = [n for n, measures in enumerate(found) if what in measures]
        if len(holders) < 2:
            continue
        modes = found[holders[0]][what]
        at = (holders[0], "on" if "on" in modes else next(iter(modes)))
        reference = modes[at[1]]
        for n in holders:
            for mode, measure in found[n][what].items():
                against = None if (n, mode) == at else _difference(measure, reference)
                rows.append(
                    {
                        "what": what[0],
                        "run": LETTERS[n],
                        "mode": mode,
                        "mean": measure.mean,
                        "reference": f"{LETTERS[at[0]]} {at[1]}",
                        "difference": against,
                    }
                )
    if not rows:
        raise UserError(
            "--compare: no two of the results have an entry in common; evaluate all with the same "
            "options"
        )
    names = {LETTERS[n]: result["model"] for n, result in enumerate(results)}
    told = ", ".join(f"{letter}: {name}" for letter, name in names.items())
    note = (
        f"{told}. Losses in nats (lower is better), recall in nats, accuracies and task scores "
        "(higher is better). 95 % bootstrap intervals where the documents are the same, paired by "
        "document."
    )
    cells = [
        [
            row["what"],
            row["run"],
            row["mode"],
            number(row["mean"]),
            row["reference"] if row["difference"] else "-",
            interval(row["difference"], "+.4f"),
        ]
        for row in rows
    ]
    headings = ["what", "run", "TTT", "mean", "against", "difference"]
    return {"runs": names, "rows": rows}, [Table("Side by side", note, headings, cells)]


def scored_tokens(perplexity: dict[str, Any]) -> tuple[int, int]:
    """Say which tokens of a document have their loss taken: the last so many of so many, whatever
    context they are read with.
    """
    return perplexity["block"], max(entry["length"] for entry in perplexity["lengths"])


def _difference(measure: Measure, reference: Measure) -> dict[str, Any]:
    value_N, other_N = measure.value_N, reference.value_N
    if value_N is not None and other_N is not None and measure.documents == reference.documents:
        return mean_with_interval(value_N - other_N)
    return {"mean": measure.mean - reference.mean, "low": None, "high": None}


def _measures(results: dict[str, Any]) -> dict[What, dict[str, Measure]]:
    """Collect the figures: what was measured -> mode -> figure."""
    found: dict[What, dict[str, Measure]] = {}
    if part := results.get("perplexity"):
        documents = tuple(part["documents"])
        for entry in part["lengths"]:
            settings = ("perplexity", *scored_tokens(part))
            what = (f"loss at {tokens(entry['length'])}", settings)
            found[what] = {
                mode: Measure(entry[mode]["mean"], np.array(entry["per_document"][mode]), documents)
                for mode in part["modes"]
            }
    if part := results.get("recall"):
        documents = tuple(part["documents"])
        for entry in part["lengths"]:
            what = (f"recall at {tokens(entry['length'])}", ("recall", part["passage"]))
            found[what] = {}
            for mode in part["modes"]:
                losses = entry[mode]["per_document"]
                value_N = np.subtract(losses["control"], losses["second"])
                found[what][mode] = Measure(entry[mode]["recall"]["mean"], value_N, documents)
    if part := results.get("synthetic"):
        settings = ("synthetic", *(part[key] for key in ("examples", "form", "seed")))
        for entry in part["entries"]:
            where = "" if entry["distance"] is None else f" at distance {entry['distance']}"
            what = (f"{entry['task']} at {tokens(entry['length'])}{where}", settings)
            found[what] = {mode: Measure(entry[mode]["accuracy"]["mean"]) for mode in part["modes"]}
    if part := results.get("tasks"):
        settings = ("tasks", *(part[key] for key in ("limit", "fewshot", "chat")))
        for entry in part["entries"]:
            what = (f"{entry['task']} {entry['metric']}", settings)
            found[what] = {mode: Measure(entry[mode]["value"]) for mode in part["modes"]}
    return found
