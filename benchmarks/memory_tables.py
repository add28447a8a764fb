"""Tables and the chart of `memory_study.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COMPARED = ["no memory", "gain, own", "gain, another's", "own over another's"]


def of_all(results: dict[str, Any]) -> str:
    """All parts that are done, as Markdown."""
    text = "\n".join(of_part(name, results) for name in _PARTS if name in results)
    return f"{len(results['books'])} books. {_sizes(results['sizes'])}\n\n{text}"


def of_part(name: str, results: dict[str, Any]) -> str:
    return _PARTS[name](results[name], results)


def _sizes(sizes: dict[str, float]) -> str:
    return (
        f"A memory: {sizes['memory_mb']:.2f} MB, a session of the same stream: "
        f"{sizes['session_mb']:.2f} MB. Read at {sizes['read_tokens_per_second']:,.0f} tokens/s."
    )


def _interval(entry: dict[str, Any]) -> str:
    if entry["mean"] is None:
        return "-"
    low = "" if entry["low"] is None else f" [{entry['low']:+.4f}, {entry['high']:+.4f}]"
    return f"{entry['mean']:+.4f}{low}"


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---:"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _compared(row: dict[str, Any]) -> list[str]:
    gains = (row["own"], row["other"], row["own_over_other"])
    return [f"{row['none']:.4f}", *map(_interval, gains)]


def _amount(rows: list[dict[str, Any]], results: dict[str, Any]) -> str:
    heads = ["tokens read", "dW/W mean, max", "chapter", *_COMPARED]
    start = lambda r: [str(r["tokens"]), f"{r['ratio']:.3f}, {r['max']:.3f}", r["place"]]
    return _table(heads, [[*start(r), *_compared(r)] for r in rows])


def _context(rows: list[dict[str, Any]], results: dict[str, Any]) -> str:
    heads = ["tokens that attention sees", "chapter", *_COMPARED]
    return _table(heads, [[str(r["context"]), r["place"], *_compared(r)] for r in rows])


def _scale(rows: list[dict[str, Any]], results: dict[str, Any]) -> str:
    heads = ["memory times", "chapter", *_COMPARED]
    return _table(heads, [[f"{r['factor']:g}", r["place"], *_compared(r)] for r in rows])


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


_PARTS = {
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
}


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
