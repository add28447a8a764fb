"""results.json as tables of text, the same for the terminal, the HTML page and the comparison of
two results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ttt_jax.display.tables import Table, number


def tables(results: dict[str, Any]) -> list[Table]:
    """Make tables of every part of the results that is there."""
    made: list[Table] = []
    if "perplexity" in results:
        made += _perplexity(results["perplexity"])
    if "recall" in results:
        made.append(_recall(results["recall"]))
    if "synthetic" in results:
        made.append(_synthetic(results["synthetic"]))
    if "tasks" in results:
        made.append(_tasks(results["tasks"]))
    if "diagnostics" in results:
        made += _diagnostics(results["diagnostics"])
    return made


def interval(entry: dict[str, Any] | None, form: str = ".4f") -> str:
    """Write `mean [low, high]`."""
    if entry is None:
        return "-"
    if entry["low"] is None:
        return number(entry["mean"], form)
    return (
        f"{number(entry['mean'], form)} [{number(entry['low'], form)}, "
        f"{number(entry['high'], form)}]"
    )


def tokens(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


_GAINS = {
    "gain_memory": "off - memory",
    "gain": "gain (off - on)",
    "gain_shuffled": "off - shuffled",
    "gain_strict": "cold - strict",
}


def _perplexity(part: dict[str, Any]) -> list[Table]:
    N = len(part["documents"])
    note = (
        f"Nats per token, {N} document{'s' * (N != 1)}; 95 % bootstrap intervals over "
        "documents, gains paired by document."
    )
    memory = " memory: off, with the fast weights that --memory gives, which stay as they are."
    strict = " strict: only the fast weights of the text before the tokens; cold: nothing of it."

    def table(
        title: str, first: str, entries: list[dict[str, Any]], name: Callable[[dict[str, Any]], str]
    ) -> Table:
        modes = [mode for mode in part["modes"] if mode in entries[0]]
        gains = [key for key in _GAINS if key in entries[0]]
        shown = [mode for mode in modes if mode in ("off", "on")]
        headings = [
            first,
            *modes,
            *(f"perplexity {mode}" for mode in shown),
            *(_GAINS[key] for key in gains),
        ]
        rows = []
        for entry in entries:
            row = [name(entry), *(number(entry[mode]["mean"]) for mode in modes)]
            row += [number(float(np.exp(entry[mode]["mean"])), ".3f") for mode in shown]
            rows.append(row + [interval(entry[key], "+.4f") for key in gains])
        return Table(
            title,
            note + memory * ("memory" in modes) + strict * ("strict" in modes),
            headings,
            rows,
        )

    by_length = f"Loss of the same final {part['block']} tokens as the context grows"
    return [
        table(by_length, "context", part["lengths"], lambda e: tokens(e["length"])),
        table(
            "Loss by position",
            "positions",
            part["positions"],
            lambda e: f"{e['start']} to {e['stop'] - 1}",
        ),
    ]


def reach_of(part: dict[str, Any]) -> str:
    """Say whether the recall probe's filler is beyond the reach of attention."""
    if part["reach"] is None:
        return (
            "Layers with full attention see the first reading: the probe measures attention as well"
        )
    return f"Attention reaches {part['reach']} tokens back, the filler is longer"


def _recall(part: dict[str, Any]) -> Table:
    rows = []
    for entry in part["lengths"]:
        for mode in part["modes"]:
            found = entry[mode]
            losses = [number(found[name]["mean"]) for name in ("first", "second", "control")]
            gains = [interval(found[name], "+.4f") for name in ("drop", "recall")]
            rows.append([tokens(entry["length"]), mode, *losses, *gains])
    note = (
        f"Nats per token of a passage of {part['passage']} tokens, {len(part['documents'])} "
        "documents; control: the same place and filler, but another document's passage was read "
        f"first. {reach_of(part)}. 95 % bootstrap intervals over documents, paired by document."
    )
    headings = ["length", "TTT", "first reading", "second reading", "control"]
    headings += ["first - second", "recall (control - second)"]
    return Table("A passage read again", note, headings, rows)


def _synthetic(part: dict[str, Any]) -> Table:
    modes, rows = part["modes"], []
    for entry in part["entries"]:
        row = [
            entry["task"],
            tokens(entry["length"]),
            "-" if entry["distance"] is None else str(entry["distance"]),
        ]
        row += [number(entry[mode]["accuracy"]["mean"], ".3f") for mode in modes]
        row += [number(entry[mode]["nll"]["mean"], ".3f") for mode in modes]
        if "gain" in entry:
            row += [interval(entry["gain"], "+.3f")]
        rows.append(row)
    headings = [
        "task",
        "length",
        "distance",
        *(f"accuracy {mode}" for mode in modes),
        *(f"nats {mode}" for mode in modes),
    ]
    headings += ["accuracy on - off"] * (len(modes) == 2)
    note = (
        f"{part['examples']} examples each ({part['form']}); accuracy: share of answers whose "
        "every token is the most likely "
        "one; nats: loss per answer token; 95 % bootstrap intervals over examples."
    )
    if part.get("left_out"):
        note += f" Too many pairs for the length or the vocabulary: {', '.join(part['left_out'])}."
    return Table("Associative recall and induction", note, headings, rows)


def _tasks(part: dict[str, Any]) -> Table:
    modes, rows = part["modes"], []
    for entry in part["entries"]:
        row = [entry["task"], entry["metric"], str(entry["samples"])]
        for mode in modes:
            error = entry[mode]["stderr"]
            row.append(
                number(entry[mode]["value"]) + (f" ± {number(error)}" if error is not None else "")
            )
        if len(modes) == 2:
            row.append(number(entry["on"]["value"] - entry["off"]["value"], "+.4f"))
        rows.append(row)
    headings = ["task", "metric", "samples", *modes, *(["on - off"] * (len(modes) == 2))]
    note = (
        f"lm-evaluation-harness {part['version']}; ± standard error as it gives it; fresh fast "
        "weights for each sample."
    )
    return Table("Harness tasks", note, headings, rows)


def _diagnostics(part: dict[str, Any]) -> list[Table]:
    rows = []
    for layer in part["layers"]:
        last = layer["chunks"][-1]
        forms = (("state_ratio", ".3e"), ("effective_rank", ".1f"), ("output_share", ".4f"))
        rows.append(
            [
                str(layer["layer"]),
                str(last["chunk"]),
                *(format(last[key], form) for key, form in forms),
            ]
        )
    made = []
    if rows:
        headings = [
            "layer",
            "after chunk",
            "||S|| / ||W||",
            "effective rank of S",
            "||z S^T|| / ||z (W + S)^T||",
        ]
        made.append(
            Table("Fast weights at the last chunk looked at", "One document.", headings, rows)
        )
    grams = part["ngrams"]
    rows = []
    for key, name in (("repeated", f"repeats a {grams['n']}-gram"), ("novel", "does not")):
        losses = [number(grams[key][mode]) for mode in ("off", "on")]
        rows.append([name, str(grams[key]["tokens"]), *losses, number(grams[key]["gain"], "+.4f")])
    note = (
        f"Loss on tokens that complete a {grams['n']}-gram which the document held before, and "
        "on others; gain: off - on."
    )
    made.append(Table("Repeated n-grams", note, ["token", "tokens", "off", "on", "gain"], rows))
    return made
