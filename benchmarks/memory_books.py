"""Books of `memory_study.py`: two places where a chapter begins, classes of tokens, the file."""

from __future__ import annotations

import json
import lzma
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.eval.documents import open_documents
from ttt_jax.inference.prefill import check_ids
from ttt_jax.model.transformer import Transformer

CHAPTER = r"^[ \t]*((CHAPTER|Chapter|BOOK|PART|LETTER|STAVE)\b.*|[IVXLC]+\.?[ \t]*)$"


class Book(NamedTuple):
    """A book and two of its chapters.

    Fields:
      number: of the document.
      author: None when the file does not say.
      near, far: tokens before the chapters.
      read_T: the tokens before the first.
      near_K1, far_K1: the chapters' first tokens, and a target behind them.
    """

    number: int
    author: str | None
    near: int
    far: int
    read_T: np.ndarray
    near_K1: np.ndarray
    far_K1: np.ndarray


def load_books(model: Transformer, args, read: int) -> list[Book]:
    """The first books that are long enough and have chapters where they are needed."""
    corpus = open_documents(model, args.books, "books")
    authors, found = authors_of(args.books), []
    for i, length in enumerate(corpus.length_N.tolist()):
        tokens = lambda start, count, i=i: np.asarray(corpus.tokens(i, start, count))
        next_chapter = lambda start, tokens=tokens, length=length: chapter_after(
            model, tokens(start, min(args.search, length - start)), args.chapter
        )
        places = []
        for start in (read, args.far):
            start += places[-1] if places else 0
            step = next_chapter(start) if length > start else None
            places += [] if step is None else [start + step]
        if len(places) < 2 or places[1] + args.score + 1 > length:
            continue
        rows = [tokens(places[0] - read, read), *(tokens(p, args.score + 1) for p in places)]
        author = authors[i] if len(authors) == len(corpus) else None
        found.append(Book(i, author, *places, *check_ids(rows, model.config.vocab_size)))
        if len(found) == args.count:
            break
    if len(found) < 2:
        sys.exit(f"{args.books}: fewer than two books are long enough; lower --read and --far")
    print(f"{len(found)} books", flush=True)
    return found


def chapter_after(model: Transformer, ids_T: np.ndarray, pattern: str) -> int | None:
    """How many of these tokens stand before the first line of a chapter; None: there is none."""
    assert model.tokenizer is not None
    decode = lambda n: model.tokenizer.decode(ids_T[:n].tolist())
    # The first line may be the rest of one.
    heading = re.search(r"\n+" + pattern, decode(len(ids_T)), re.MULTILINE)
    if heading is None:
        return None
    low, high = 0, len(ids_T)  # decode(low) ends before the heading's first character
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(decode(middle)) <= heading.start() else (low, middle)
    return low


def authors_of(path: Path) -> list[str | None]:
    """The field `author` of the records of a JSON-lines file; empty for other files."""
    if ".jsonl" not in path.name or path.suffix not in (".jsonl", ".xz"):
        return []
    return [record.get("author") for record in records(path)]


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a JSON-lines file, packed by xz or not."""
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def completes(read_T: np.ndarray, later_K1: np.ndarray, n: int = 4) -> np.ndarray:
    """Whether each predicted token ends an n-gram of what was read, bool [K]."""
    row = read_T.tolist()
    seen = {tuple(row[i : i + n]) for i in range(len(row) - n + 1)}
    later = later_K1.tolist()
    ends = (tuple(later[max(k + 1 - n, 0) : k + 1]) for k in range(1, len(later)))
    return np.array([gram in seen for gram in ends])


def own_words(read_BT: np.ndarray, vocab_size: int) -> np.ndarray:
    """Tokens that a book used at least 5 times, and 10 times as often as the others on average: its
    names and subjects. Bool [B, V].
    """
    counts = np.stack([np.bincount(row, minlength=vocab_size) for row in read_BT])
    others = (counts.sum(axis=0) - counts) / max(len(counts) - 1, 1)
    return (counts >= 5) & (counts > 10 * others)
