"""What a reader sees of a book when its memory alone is left: its names, in new text.

    python benchmarks/book_names.py MODEL books_heldout.jsonl.xz --out names.jsonl

Of each novel `--read` tokens are read (TTT on) and dropped, keys and values included. With the
frozen memory (times a factor), with another book's and with none, the model then

    writes      goes on from `PROMPTS`, the same seeds: which names come
    answers     `QUESTIONS`, as turns of its chat template, the same seeds
    names       gives the book's ten main names a probability behind the prompts that ask for one
    next        scores the tokens that follow what was read, from a fresh context

A name is a capitalised word that no book here has in small letters. A book's own names stand there
three times or more in what was read, and in no other of the books' readings. The next book in the
list is the other one. One line of JSON a book, with all that was written; tables on stdout. Books
that are in the file already are not done again. Intervals: 95 %, bootstrap over books.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.book_names_tables import gained_words, rows_of, tables
from benchmarks.memory_books import records
from ttt_jax import Memory, Session, score
from ttt_jax.inference.chat_template import template_of
from ttt_jax.inference.conversation import render_plain
from ttt_jax.inference.memory_reading import Text, read_texts
from ttt_jax.inference.sampling import Sampling
from ttt_jax.model.transformer import Transformer
from ttt_jax.pretrained.load import load_model
from ttt_jax.run.provenance import provenance

NAMED = ('"My name is', '"I do not believe it," said', '"Come here," said', "The letter was from")
PROMPTS = (*NAMED, "Then the door opened, and", "That evening, as they sat together,")
QUESTIONS = (
    "Who opened the door?",
    "What is his name?",
    "Who is she in love with?",
    "Where do they live?",
    "Who wrote the letter?",
    "Tell me about the people of this story.",
)
WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
FRONT = 5_000  # characters of title pages


class Book(NamedTuple):
    """A novel: token ids that are read, those behind them, and its own names, most frequent
    first."""

    title: str
    read_T: np.ndarray
    next_K1: np.ndarray
    names: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder with TTT")
    parser.add_argument("books", type=Path, help="JSON lines of title and text, .xz or not")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--memories", type=Path, help="folder that keeps what was read")
    parser.add_argument("--first", type=int, default=0, help="number of the first book")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--read", type=int, default=8192, help="tokens")
    parser.add_argument("--context", type=int, default=2048, help="of attention while reading")
    parser.add_argument("--next", type=int, default=1024, help="tokens scored behind them")
    parser.add_argument("--factors", default="1,2", help="of the memories")
    parser.add_argument("--kinds", default="own,other,rest", help="rest: own less the others' mean")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    model = load_model(args.model, args.dtype, decodes=True)
    (books, small), begin = load_books(model, args), time.perf_counter()
    memories = read(model, books, args)
    print(f"{len(books)} books read: {time.perf_counter() - begin:.0f} s", flush=True)
    done = {row["title"] for row in rows_of(args.out)}
    template = template_of(args.model)
    render = render_plain if template is None else template.render
    turns = [render([{"role": "user", "content": question}], True) for question in QUESTIONS]
    for i, book in enumerate(books):
        if book.title in done:
            continue
        row: dict[str, Any] = {"title": book.title, "names": book.names, "ways": {}}
        for way, memory in ways_of(memories, i, args).items():
            row["ways"][way] = measure(model, book, memory, args.seeds, small, turns)
        losses = {way: found.pop("losses") for way, found in row["ways"].items()}
        row["words"] = gained_words(model, book, losses)
        row |= {"args": {k: str(v) for k, v in vars(args).items()}, "at": provenance()}
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{book.title}: {time.perf_counter() - begin:.0f} s", flush=True)
    print(tables(rows_of(args.out)))


# ------------------------------------------------------------------------------------------- books


def load_books(model: Transformer, args) -> tuple[list[Book], set[str]]:
    """The books, and every word that one of the file's books has in small letters."""
    assert model.tokenizer is not None
    found, counts, novels = [], [], list(records(args.books))
    small = {word for r in novels for word in WORD.findall(r["text"]) if word[0].islower()}
    for record in novels[args.first : args.first + args.count]:
        text = re.sub(r"[ \t\r]+\n", "\n", record["text"][FRONT:])
        ids = np.asarray(model.tokenizer.encode(text[: 8 * (args.read + args.next)]), np.int32)
        if len(ids) <= args.read + args.next:
            sys.exit(f"{record['title']}: shorter than --read and --next")
        found.append((record["title"], ids))
        counts.append(Counter(names_in(model.tokenizer.decode(ids[: args.read].tolist()), small)))
    books, total = [], Counter(name for count in counts for name in count)
    for (title, ids), count in zip(found, counts, strict=True):
        own = [name for name, n in count.most_common() if n >= 3 and total[name] == 1]
        end = args.read + args.next + 1
        books.append(Book(title, ids[: args.read], ids[args.read : end], own))
    return books, small


def names_in(text: str, small: set[str]) -> list[str]:
    """Capitalised words that are never written small; "Syme's" counts as "Syme"."""
    words = (word.partition("'")[0] for word in WORD.findall(text))
    return [w for w in words if len(w) > 1 and w.istitle() and w.lower() not in small]


def read(model: Transformer, books: list[Book], args) -> list[Memory]:
    """What each book taught; kept in the folder `--memories`."""
    texts = [Text(book.title, book.read_T) for book in books]
    if args.memories is None:
        return [m for _, m in sorted(read_texts(model, texts, context=args.context))]
    args.memories.mkdir(parents=True, exist_ok=True)
    files = [args.memories / f"{book.title}.memory" for book in books]
    for file, text in zip(files, texts, strict=True):
        if not file.exists():
            [(_, memory)] = read_texts(model, [text], context=args.context)
            memory.save(file)
            print(f"{file}", flush=True)
    return [Memory.load(file) for file in files]


# ---------------------------------------------------------------------------------------- measures


def ways_of(memories: list[Memory], i: int, args) -> dict[str, Memory | None]:
    """What book i is measured with."""
    others = [m for j, m in enumerate(memories) if j != i]
    mean = Fraction(1, len(others)) * sum(others[1:], others[0])
    of = {
        "own": memories[i],
        "other": memories[(i + 1) % len(memories)],
        "rest": (memories[i] - mean).collapse(),
    }
    pairs = [(kind, factor) for factor in args.factors.split(",") for kind in args.kinds.split(",")]
    return {"none": None} | {f"{kind} x {x}": float(x) * of[kind] for kind, x in pairs}


def measure(
    model: Transformer,
    book: Book,
    memory: Memory | None,
    seeds: int,
    small: set[str],
    turns: list[str],
) -> dict[str, Any]:
    """What the model writes and answers, how likely names are, and what the next tokens cost."""
    options: dict[str, Any] = {"ttt": False, "memory": memory}

    def written(prompts, **ends) -> list[str]:
        session = Session(model, len(prompts) * seeds, **options)
        session.extend([prompt for prompt in prompts for _ in range(seeds)])
        seed_B = list(range(seeds)) * len(prompts)
        found = session.generate(40, Sampling(0.8, top_p=0.95), seed=seed_B, **ends)
        return [done.text or "" for done in found]

    texts, answers = written(PROMPTS, eos_ids=()), written(turns)
    names, answered = ([names_in(text, small) for text in of] for of in (texts, answers))
    own, own_answered = (
        [[name for name in found if name in book.names] for found in of] for of in (names, answered)
    )
    words = [WORD.findall(text) for text in texts]
    encode, ten = model.tokenizer.encode, book.names[:10]
    rows = [(encode(prompt), encode(" " + name)) for prompt in NAMED for name in ten]
    # As many rows for every book: other shapes are other programs.
    padded = (rows or [(encode(NAMED[0]), encode(" he"))]) * (10 * len(NAMED))
    padded = [start + end for start, end in padded[: 10 * len(NAMED)]]
    pairs = zip(score(model, padded, **options).logprobs_BT, rows, strict=False)
    whole = [float(x[len(a) - 1 : len(a) + len(b) - 1].sum()) for x, (a, b) in pairs]
    return {
        "texts": texts,
        "answers": answers,
        "with a name": float(np.mean([bool(found) for found in own])),
        "answers with one": float(np.mean([bool(found) for found in own_answered])),
        "names": sum(map(len, names)),
        "own names": sum(map(len, own)),
        "different words": sum(len(set(w)) for w in words) / max(sum(map(len, words)), 1),
        "log p of names": float(np.mean(whole)) if whole else None,
        "p of ten names": float(np.exp(whole).sum() / len(NAMED)),
        "losses": -score(model, [book.next_K1], **options).logprobs_BT[0],
    }


if __name__ == "__main__":
    main()
