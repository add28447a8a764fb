"""Tables and the chart of `memory_study.py`, no wider than a document's line."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

_COMPARED = ["no memory", "gain, own", "gain, another's", "own over another's"]


def of_all(results: dict[str, Any]) -> str:
    """All parts that are done, as Markdown."""
    text = "\n".join(of_part(name, results) for name in PARTS if name in results)
    about = _sizes(results["sizes"], results["hardware"]["platform"] != "cpu")
    return f"{len(results['books'])} books. {about}\n\n{text}"


def of_part(name: str, results: dict[str, Any]) -> str:
    return PARTS[name](results[name], results)


def _sizes(sizes: dict[str, float], timed: bool) -> str:
    text = f"A memory: {sizes['memory_mb']:.2f} MB, a session of the same stream: "
    rate = f" Read at {sizes['read_tokens_per_second']:,.0f} tokens/s." if timed else ""
    return f"{text}{sizes['session_mb']:.2f} MB.{rate}"


def _interval(entry: dict[str, Any]) -> str:
    if entry["mean"] is None:
        return "-"
    low = "" if entry["low"] is None else f" [{_short(entry['low'])},{_short(entry['high'])}]"
    return _short(entry["mean"]) + low


def _short(value: float) -> str:
    return f"{value:+.4f}".replace("+0.", "+.").replace("-0.", "-.")


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = ["|" + "|".join(line) + "|" for line in (headings, *rows)]
    return "\n".join([lines[0], "|" + " ---: |" * len(headings), *lines[1:]]) + "\n"


def _compared(row: dict[str, Any]) -> list[str]:
    gains = (row["own"], row["other"], row["own_over_other"])
    return [f"{row['none']:.4f}", *map(_interval, gains)]


def _amount(rows: list[dict[str, Any]], results: dict[str, Any]) -> str:
    heads = ["tokens read", "dW/W mean, max", "chapter", *_COMPARED]
    start = lambda r: [str(r["tokens"]), f"{r['ratio']:.3f},{r['max']:.3f}", r["place"]]
    return _table(heads, [[*start(r), *_compared(r)] for r in rows])


def _context(rows: list[dict[str, Any]], results: dict[str, Any]) -> str:
    heads = ["tokens that attention sees", "chapter", *_COMPARED]
    return _table(heads, [[str(r["context"]), r["place"], *_compared(r)] for r in rows])


def _scale(rows: list[dict[str, Any]], results: dict[str, Any]) -> str:
    heads = ["memory times", "chapter", *_COMPARED]
    return _table(heads, [[f"{r['factor']:g}", r["place"], *_compared(r)] for r in rows])


def _cap(rows: list[dict[str, Any]], results: dict[str, Any]) -> str:
    if not rows:
        return "The model has no read cap.\n"
    heads = [
        "rank",
        "memory times",
        "cap",
        "chapter",
        *_COMPARED[1:3],
        "worst book",
        "lost without",
    ]
    cap = lambda r: "-" if r["cap"] is None else f"{r['cap']:g}"
    lost = lambda r: _interval(r["lost"]) if "lost" in r else ""
    start = lambda r: [str(r["rank"]), f"{r['factor']:g}", cap(r), r["place"]]
    gains = lambda r: [_interval(r["own"]), _interval(r["other"]), _short(min(r["gains"]))]
    return _table(heads, [[*start(r), *gains(r), lost(r)] for r in rows])


def _sums(rows: list[dict[str, Any]], results: dict[str, Any]) -> str:
    heads = ["books in the sum", "factor", "gain", "gain, own alone", "lost by the sum"]
    numbers = lambda r: map(_interval, (r["gain"], r["alone"], r["lost"]))
    return _table(heads, [[str(r["books"]), f"{r['factor']:.3f}", *numbers(r)] for r in rows])


def _common(rows: list[dict[str, Any]], results: dict[str, Any]) -> str:
    note = f"Memories times {results['factor']:g}.\n\n"
    return note + _table(["memory", *_COMPARED], [[r["memory"], *_compared(r)] for r in rows])


def _rank(rows: list[dict[str, Any]], results: dict[str, Any]) -> str:
    heads = ["rank", "MB", "squared norm", "gain kept", *_COMPARED]
    start = lambda r: [str(r["rank"]), *(f"{r[k]:.3f}" for k in ("mb", "energy", "kept"))]
    note = f"Memories times {results['factor']:g}.\n\n"
    return note + _table(heads, [[*start(r), *_compared(r)] for r in rows])


def _tokens(rows: list[dict[str, Any]], results: dict[str, Any]) -> str:
    heads = ["tokens", "share", "no memory", "gain, own", "own over another's"]
    none = lambda r: "-" if r["none"] is None else f"{r['none']:.4f}"
    start = lambda r: [r["class"], f"{r['share']:.3f}", none(r)]
    gains = lambda r: map(_interval, (r["own"], r["own_over_other"]))
    note = f"Memories times {results['factor']:g}.\n\n"
    return note + _table(heads, [[*start(r), *gains(r)] for r in rows])


def _author(found: dict[str, Any], results: dict[str, Any]) -> str:
    if not found["books"]:
        return "No two books of one author.\n"
    heads = ["books", "gain, same author's", "gain, a stranger's", "same over stranger's"]
    gains = (found["same"], found["stranger"], found["same_over_stranger"])
    return _table(heads, [[str(found["books"]), *map(_interval, gains)]])


def _parts(rows: list[dict[str, Any]], results: dict[str, Any]) -> str:
    heads = ["parts", "factor", "chapter", *_COMPARED]
    start = lambda r: [str(r["parts"]), f"{r['factor']:.3f}", r["place"]]
    return _table(heads, [[*start(r), *_compared(r)] for r in rows])


def _no_decay(found: dict[str, Any], results: dict[str, Any]) -> str:
    if not found:
        return "The model has no decay.\n"
    parts = _amount(found["amount"], results), _scale(found["scale"], results)
    return "Read with decay 1.\n\n" + "\n".join(parts)


PARTS = {
    "amount": _amount,
    "context": _context,
    "scale": _scale,
    "sums": _sums,
    "common": _common,
    "rank": _rank,
    "tokens": _tokens,
    "author": _author,
    "parts": _parts,
    "no_decay": _no_decay,
    "cap": _cap,
}


# ------------------------------------------------------------------------------------------- pages


def pages(folder: Path) -> dict[str, list[str]]:
    """Blocks of documents by name: a table of all studies of SmolLM2 in the folder of results (but
    those that settings were chosen by, "-choice"), and everything of each.
    """
    files = sorted(folder.glob("*memory-smollm2*.json"), key=lambda file: file.stem)
    found = {file.stem.partition("-memory-")[2]: json.loads(file.read_text()) for file in files}
    every = [f"{_about(name, r)}\n\n{of_all(r)}" for name, r in found.items()]
    shown = {name: r for name, r in found.items() if not name.endswith("-choice")}
    return {"memory, smollm2": _compact(shown), "memory, smollm2, all": every}


def _about(name: str, results: dict[str, Any]) -> str:
    at, where = results["arguments"], results["hardware"]
    text = (
        f"{name}: {len(results['books'])} novels, {at['read'].split(',')[-1]} tokens read of each "
        f"with attention anew every {results['context_read']}, {at['score']} scored, "
        f"{at['dtype']}, {where['device']}, {results['date'][:10]}, `{str(results['commit'])[:7]}`."
    )
    return textwrap.fill(text, 100)


def _compact(found: dict[str, dict[str, Any]]) -> list[str]:
    """One table, with intervals over books; each study's rows are at its best factor."""
    rows: list[list[str]] = []
    for name, r in found.items():
        rows.append([f"**{name}**", f"{r['sizes']['memory_mb']:.2f} MB", "", ""])
        near, far = ([x for x in r["scale"] if x["place"] == p] for p in ("near", "far"))
        at_best = lambda xs, r=r: next(x for x in xs if x["factor"] == r["factor"])
        chosen = [(f"the next chapter, times {r['factor']:g}", at_best(near))]
        chosen += [("a later chapter", at_best(far))]
        kept = [x for x in r.get("rank", []) if x["rank"] in (16, 64)]
        chosen += [(f"rank {x['rank']} ({x['mb']:.2f} MB)", x) for x in kept]
        of = lambda x: [f"{x['none']:.3f}", _range(x["own"]), _range(x["own_over_other"])]
        rows += [[what, *of(x)] for what, x in chosen]
        if pairs := [x for x in r.get("sums", []) if x["books"] == 2]:
            pair = max(pairs, key=lambda x: x["gain"]["mean"])
            rows.append([f"two books, times {pair['factor']:g}", "", _range(pair["gain"]), ""])
    heads = ["memory", "loss without", "gain", "over another book's"]
    about = "\n\n".join(_about(name, r) for name, r in found.items())
    return [_table(heads, rows).rstrip(), about] if rows else []


def _range(entry: dict[str, Any]) -> str:
    low, high = (f"{entry[k]:.3f}" for k in ("low", "high"))
    return f"{entry['mean']:.3f} ({low} to {high})"


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw by rank what is kept of the gain and of the squared norm."""
    from ttt_jax.display.html_page import figure_of, tidy

    figure = figure_of(6, 3.5)
    axes = figure.subplots()
    x = [r["rank"] for r in rows]
    axes.plot(x, [r["kept"] for r in rows], marker="o", label="gain on the same book")
    axes.plot(x, [r["energy"] for r in rows], marker="s", label="squared norm")
    axes.set_xscale("log")
    axes.set(xlabel="rank", ylabel="share kept", title="What a memory's best factors keep")
    axes.legend(frameon=False)
    tidy(axes)
    figure.savefig(path, dpi=120)
