"""Tables of `book_names.py`, and which words of a book's next pages gain.

python benchmarks/book_names_tables.py names.jsonl
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from ttt_jax.eval.statistics import mean_with_interval

MEASURES = (
    "with a name",
    "answers with one",
    "of names",
    "p of ten names",
    "log p of names",
    "different words",
)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def gained_words(model, book, losses: dict[str, np.ndarray]) -> dict[str, Any]:
    """Mean loss of all tokens; gains by kind of word and the words that gain most, nats in all."""
    # A token belongs to the word that its last character is in.
    pieces = [model.tokenizer.decode([int(i)]) for i in book.next_K1]
    ends_K = np.cumsum([len(piece) for piece in pieces])[1:] - 1
    seen = set(re.findall(r"[A-Za-z]+", model.tokenizer.decode(book.read_T.tolist())))
    word_of: dict[int, str] = {}
    for match in re.finditer(r"[A-Za-z]+", "".join(pieces)):
        word_of |= dict.fromkeys(range(*match.span()), match.group())
    words = [word_of.get(int(end), "") for end in ends_K]
    kinds = np.array(
        [
            "name" if w in book.names else "seen" if w in seen else "new" if w else "mark"
            for w in words
        ]
    )
    found: dict[str, Any] = {}
    for way, loss_K in losses.items():
        gain_K = losses["none"] - loss_K
        found[way] = {"loss": float(loss_K.mean()), "gain": float(gain_K.mean())}
        for kind in ("name", "seen", "new", "mark"):
            chosen = gain_K[kinds == kind]
            found[way][kind] = float(chosen.mean()) if chosen.size else None
            found[way][f"share {kind}"] = float(np.mean(kinds == kind))
        total: dict[str, float] = {}
        for word, gain in zip(words, gain_K.tolist(), strict=True):
            if word:
                total[word] = total.get(word, 0.0) + gain
        top = sorted(total, key=lambda word: -total[word])[:10]
        found[way]["top"] = [(word, round(total[word], 2), words.count(word)) for word in top]
    return found


def tables(rows: list[dict[str, Any]]) -> str:
    """Means over books, and 95 % intervals of the differences from no memory, of what all books
    were measured with.
    """
    ways = [way for way in rows[0]["ways"] if all(way in row["ways"] for row in rows)]
    lines = [f"{len(rows)} books", ""]
    lines += [_line("memory", *MEASURES), _line(*["---"] + ["---:"] * len(MEASURES))]
    for way in ways:
        lines.append(_line(way, *(_cell(rows, "ways", way, _measure(name)) for name in MEASURES)))
    kinds = ("gain", "name", "seen", "new", "mark")
    lines += ["", _line("gain on the next tokens", *kinds), _line(*["---"] + ["---:"] * len(kinds))]
    for way in ways[1:]:
        lines.append(_line(way, *(_cell(rows, "words", way, lambda x, k=k: x[k]) for k in kinds)))
    return "\n".join(lines)


def _measure(name: str):
    if name == "of names":  # in all continuations of a book
        return lambda way: way["own names"] / max(way["names"], 1)
    return lambda way: way.get(name)  # rows of 2026-11-30 have no answers


def _cell(rows: list[dict[str, Any]], part: str, way: str, value) -> str:
    found = [(value(row[part][way]), value(row[part]["none"])) for row in rows]
    pairs = np.array([pair for pair in found if None not in pair])
    if not len(pairs):
        return "-"
    mean, over = pairs[:, 0].mean(), mean_with_interval(pairs[:, 0] - pairs[:, 1])
    if way == "none" or over["low"] is None:
        return f"{mean:.3f}"
    return f"{mean:.3f} ({over['low']:+.3f} to {over['high']:+.3f})"


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Print the tables of every reading that the files have."""
    rows = [row for path in sys.argv[1:] for row in rows_of(Path(path))]
    for context in dict.fromkeys(row["args"]["context"] for row in rows):
        print(f"read with attention over {context} tokens at most")
        print(tables([row for row in rows if row["args"]["context"] == context]), end="\n\n")


if __name__ == "__main__":
    main()
