"""What memories hold: chapters of held-out books are read, later ones scored with W + dW alone.

    python benchmarks/memory_study.py runs/books books_heldout.jsonl.xz --out memory_study

Of each book the last tokens before a chapter are read with TTT on. Then keys, values and positions
are dropped, and two places are scored from a fresh context with the frozen memory: the chapter that
begins there ("near"), and one that begins at least `--far` tokens later. Everything is compared on
the same tokens with no memory and with the next book's:

    amount      by how much was read
    context     the longest reading with attention to fewer tokens (`--contexts`)
    scale       the longest reading's memory times a factor
    sums        the sum of n books' memories, the scored one's among them, and its own, by factor
    common      the mean of all other books' memories, and what is left of a book's own without it
    rank        the best factors of a rank: gain kept, size
    tokens      where the gain is: repeated 4-grams, the book's own words, the rest
    author      another book's memory by the same author (`author` of the JSON records)
    parts       the longest reading in pieces that are read apart and added up
    no_decay    amount and scale, read with `decay: 1` instead of the model's
    cap         scale, by rank, with the model's `read_cap` and without, as other engines do it

With `--context N` attention and positions start anew every N tokens that are read, as in `memory
read`, and the fast weights go on: for models with full attention, which know few positions.

Two programs are compiled, reading and scoring, and one each for those without decay and without a
cap. Intervals: 95 %, bootstrap over books, paired by book. Every part is printed and written
(results.json, tables.md) when done.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import memory_tables
from benchmarks.memory_books import CHAPTER, Book, completes, load_books, own_words
from benchmarks.memory_fast import (
    Fast,
    bases_of,
    ratio,
    rolled,
    runs_of,
    truncated,
    with_fast,
    with_ttt,
)
from ttt_jax.eval.reader import Reader, score_frozen_piece
from ttt_jax.eval.statistics import mean_with_interval
from ttt_jax.inference.prefill import Frozen, needs_capacity
from ttt_jax.memory.fast_weights import only_fast_weights
from ttt_jax.model.transformer import State, Transformer
from ttt_jax.pretrained.load import load_model
from ttt_jax.run.provenance import provenance


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="run, converted or Hugging Face folder")
    parser.add_argument("books", type=Path, help="long documents, anything that train.py reads")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--count", type=int, default=20, help="books")
    parser.add_argument("--read", default="4096,8192,16384,32768", help="tokens read, ascending")
    parser.add_argument("--context", type=int, help="read with attention anew every N tokens")
    parser.add_argument("--contexts", default="", help="shorter ones, compared with it")
    parser.add_argument("--far", type=int, default=16384, help="tokens to the later chapter")
    parser.add_argument("--score", type=int, default=4096, help="tokens scored of a chapter")
    parser.add_argument("--factors", default="0.1,0.25,0.5,0.75,1,1.5,2,3")
    parser.add_argument("--ranks", default="1,2,4,8,16,32,64,128,256,512")
    parser.add_argument("--parts", default="all", help="of the table above, in its order")
    parser.add_argument("--search", type=int, default=16384, help="tokens to the next chapter")
    parser.add_argument("--chapter", default=CHAPTER, help="what a chapter's first line looks like")
    parser.add_argument("--piece", type=int, default=4096, help="tokens of a row read at a time")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    begin = time.perf_counter()
    amounts = [int(n) for n in args.read.split(",")]
    model = load_model(args.model, args.dtype)
    C = model.config.ttt.chunk_size
    if sorted(set(amounts)) != amounts or any(n % C for n in amounts):
        sys.exit(f"--read {args.read}: give ascending multiples of the chunk, {C}")
    contexts = [int(n) for n in args.contexts.split(",") if n]
    for n in [*contexts, args.context or C]:
        if n < C or n % C:
            sys.exit(f"--context, --contexts: {n} is no multiple of the chunk, {C}")
    wanted = list(memory_tables.PARTS) if args.parts == "all" else args.parts.split(",")
    if unknown := set(wanted) - set(memory_tables.PARTS):
        sys.exit(f"--parts: no {', '.join(unknown)}; there are {', '.join(memory_tables.PARTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    books = load_books(model, args, amounts[-1])
    study = Study(model, books, amounts, args)
    results: dict[str, Any] = {
        "arguments": {k: str(v) for k, v in vars(args).items()},
        "books": [dict(zip(book._fields[:4], book[:4], strict=True)) for book in books],
        **provenance(),
    }
    ranks = [int(r) for r in args.ranks.split(",") if r]
    parts = {
        "amount": study.by_amount,
        "context": lambda: study.by_context(contexts),
        "scale": study.by_scale,
        "sums": study.by_sum,
        "common": study.by_origin,
        "rank": lambda: study.by_rank(ranks),
        "tokens": study.by_token,
        "author": study.by_author,
        "parts": study.by_parts,
        "no_decay": study.without_decay,
        "cap": lambda: study.by_cap(ranks),
    }
    for name, part in parts.items():
        if name not in wanted:
            continue
        results[name] = part()
        results |= {"sizes": study.sizes, "factor": study.factor, "context_read": study.context}
        results["seconds"] = time.perf_counter() - begin
        (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.out / "tables.md").write_text(memory_tables.of_all(results))
        if name == "rank":
            memory_tables.chart(results["rank"], args.out / "rank.png")
        text = memory_tables.of_part(name, results)
        print(f"{text}\n{results['seconds']:.0f} s after {name}\n", flush=True)


# ------------------------------------------------------------------------------------------- study


class Study:
    """The memories of all books after every amount, and losses with memories made of them.

    Fields:
      whole: the memories of the longest reading.
      context: attention starts anew every so many tokens; the best one of `by_context`.
      factor: the best one of `by_scale`; what follows is about `whole` times it.
    """

    def __init__(self, model: Transformer, books: list[Book], amounts: list[int], args) -> None:
        self.model, self.books, self.amounts, self.args = model, books, amounts, args
        self.ids_BT = np.stack([book.read_T for book in books])
        self.places = {
            "near": np.stack([book.near_K1 for book in books]),
            "far": np.stack([book.far_K1 for book in books]),
        }
        self.last = [self.ids_BT[:, -n:] for n in amounts]
        self.reader, self.sizes, self.factor = Reader(model, args.piece), {}, 1.0
        self.most = min(args.context or self.ids_BT.shape[1], self.ids_BT.shape[1])
        self.context = self.most
        self.memories = self.read(self.reader, self.last)
        self.whole = self.memories[-1]
        if not any(bool(jnp.any(S)) for S in self.whole):
            sys.exit("every memory is zero: reading wrote nothing, and there is nothing to measure")
        nothing = [jnp.zeros_like(S) for S in self.whole]
        self.none = {place: self.losses(nothing, place) for place in self.places}
        self.factors = [float(x) for x in args.factors.split(",")]

    def read(self, reader: Reader, texts: list[np.ndarray]) -> list[Fast]:
        """S after each text of every book [B, tokens], from a fresh state."""
        B, step = len(self.books), self.context
        capacity = self.most if needs_capacity(self.model) else None
        found = []
        for ids_BP in texts:
            state: State | None = None
            start = time.perf_counter()
            for part_BP in np.split(ids_BP, range(step, ids_BP.shape[1], step), axis=1):
                # Never None, so that all first pieces run one program.
                state = only_fast_weights(self.model, state, B, capacity)
                state = reader.read(part_BP, 0, part_BP.shape[1], state, self.most, ttt=True)
            assert state is not None
            found.append([x.ttt.S_BDF for x in runs_of(state)])
            jax.block_until_ready(found[-1])
            seconds = time.perf_counter() - start
        reader.watch.check("book")
        cfg = self.model.config
        self.sizes = {
            "memory_mb": 4 * len(cfg.ttt.layers) * cfg.d_model * cfg.d_ff / 1e6,
            "session_mb": sum(x.nbytes for x in jax.tree.leaves(state)) / B / 1e6,
            "read_tokens_per_second": texts[-1].size / seconds,
        }
        return found

    def losses(self, fast: Fast, place: str = "near", frozen: Frozen | None = None) -> np.ndarray:
        """Losses [B, K] of a place's tokens with frozen fast weights, a book's own in each row.

        `frozen`: the model that applies them, of the same parameters; None: the one that read.
        """
        ids_BK1 = self.places[place]
        B, K = len(ids_BK1), ids_BK1.shape[1] - 1
        state, found = with_fast(self.model, fast, B, K), []
        for first in range(0, K, self.reader.size):
            last = min(first + self.reader.size, K)
            state, logprobs_BP, _ = score_frozen_piece(
                frozen or self.reader.frozen,
                state,
                ids_BK1[:, first:last],
                ids_BK1[:, first + 1 : last + 1],
                np.full(B, last - first, np.int32),
            )
            found.append(-np.asarray(logprobs_BP))
        return np.concatenate(found, axis=1)

    def compared(
        self, fast: Fast, place: str = "near", frozen: Frozen | None = None
    ) -> dict[str, Any]:
        """A book's own memory and the next one's, against none and against each other."""
        own, other = (book_means(self.losses(x, place, frozen)) for x in (fast, rolled(fast)))
        none = book_means(self.none[place])
        return {
            "none": float(none.mean()),
            "own": mean_with_interval(none - own),
            "other": mean_with_interval(none - other),
            "own_over_other": mean_with_interval(other - own),
            "gains": (none - own).tolist(),
        }

    def by_amount(self, memories: list[Fast] | None = None) -> list[dict[str, Any]]:
        rows = []
        for tokens, fast in zip(self.amounts, memories or self.memories, strict=True):
            ratios_RNB = [ratio(self.model, S, at) for at, S in enumerate(fast)]
            ratio_LB = np.concatenate([np.asarray(r).reshape(-1, r.shape[-1]) for r in ratios_RNB])
            row = {"tokens": tokens, "ratio": float(ratio_LB.mean()), "max": float(ratio_LB.max())}
            rows += [row | {"place": at} | self.compared(fast, at) for at in self.places]
        return rows

    def by_context(self, contexts: list[int]) -> list[dict[str, Any]]:
        """The longest reading with attention to fewer tokens. What follows is about the best."""
        rows, found = [], {self.context: self.whole}
        for self.context in (n for n in contexts if n < self.most):
            (found[self.context],) = self.read(self.reader, self.last[-1:])
        for n, fast in sorted(found.items()):
            rows += [{"context": n, "place": at} | self.compared(fast, at) for at in self.places]
        near = [row for row in rows if row["place"] == "near"]
        self.context = max(near, key=lambda row: row["own"]["mean"])["context"]
        self.whole = found[self.context]
        return rows

    def by_scale(self, whole: Fast | None = None) -> list[dict[str, Any]]:
        rows = []
        for factor in self.factors:
            fast = [factor * S for S in whole or self.whole]
            rows += [{"factor": factor, "place": p} | self.compared(fast, p) for p in self.places]
        if whole is None:
            near = [row for row in rows if row["place"] == "near"]
            self.factor = max(near, key=lambda row: row["own"]["mean"])["factor"]
        return rows

    def by_cap(self, ranks: list[int]) -> list[dict[str, Any]]:
        """With the model's read cap and without: W + dW, which is what other engines compute."""
        cap = self.model.config.ttt.read_cap
        if cap is None:
            return []
        models = {cap: self.reader.frozen, None: Frozen(with_ttt(self.model, read_cap=None))}
        rows = []
        for rank, short in self.shortened(self.whole, ranks):
            for factor, place in itertools.product(self.factors, self.places):
                start = {"rank": rank, "factor": factor, "place": place}
                fast = [factor * S for S in short]
                pair = [
                    start | {"cap": limit} | self.compared(fast, place, frozen)
                    for limit, frozen in models.items()
                ]
                gains_2B = np.array([row["gains"] for row in pair])
                rows += [pair[0], pair[1] | {"lost": mean_with_interval(gains_2B[0] - gains_2B[1])}]
        return rows

    def shortened(self, whole: Fast, ranks: list[int]) -> Iterator[tuple[int, Fast]]:
        """The best factors of each rank, and at last the whole, with its full rank."""
        full = min(self.model.config.d_model, self.model.config.d_ff)
        bases = [bases_of(S) for S in whole]
        for rank in (r for r in ranks if r < full):
            pairs = zip(whole, bases, strict=True)
            yield rank, [truncated(S, U, rank) for S, U in pairs]
        yield full, whole

    def best(self) -> Fast:
        return [self.factor * S for S in self.whole]

    def by_sum(self) -> list[dict[str, Any]]:
        """n books' memories in one, the scored book's among them, times a factor. A book stands at
        every place in the sums, because they go round.
        """
        rows, B = [], len(self.books)
        own = functools.cache(lambda f: book_means(self.losses([f * S for S in self.whole])))
        none = book_means(self.none["near"])
        for n in sorted({n for n in (2, 4, B) if n <= B}):
            total = [sum(jnp.roll(S, -i, axis=2) for i in range(n)) for S in self.whole]
            factors = self.factors if n == 2 else (1 / n, n**-0.5, 1.0)
            for factor in factors:
                got = book_means(self.losses([factor * S for S in total]))
                row = {"books": n, "factor": factor, "gain": mean_with_interval(none - got)}
                row["alone"] = mean_with_interval(none - own(factor))
                rows.append(row | {"lost": mean_with_interval(got - own(factor))})
        return rows

    def by_origin(self) -> list[dict[str, Any]]:
        """What every book writes, and what only this one does."""
        whole, B = self.best(), len(self.books)
        mean = [(jnp.sum(S, axis=2, keepdims=True) - S) / (B - 1) for S in whole]
        rest = [S - m for S, m in zip(whole, mean, strict=True)]
        parts = {"own": whole, "mean of the others": mean, "own without that mean": rest}
        return [{"memory": name} | self.compared(fast) for name, fast in parts.items()]

    def by_parts(self) -> list[dict[str, Any]]:
        """The longest reading in pieces, each from a fresh state, and the pieces' memories added
        up: nothing is forgotten by decay, and every piece can be taken out again.
        """
        rows, T = [], self.ids_BT.shape[1]
        for n in (2, 4, 8):
            if T % (n * self.model.config.ttt.chunk_size):
                continue
            parts = self.read(self.reader, np.split(self.ids_BT, n, axis=1))
            for factor in (1 / n, n**-0.5, 1.0):
                total = [factor * sum(Ss) for Ss in zip(*parts, strict=True)]
                row = {"parts": n, "factor": factor}
                rows += [row | {"place": p} | self.compared(total, p) for p in self.places]
        return rows

    def by_rank(self, ranks: list[int]) -> list[dict[str, Any]]:
        cfg, whole = self.model.config, self.best()
        layers, full = len(cfg.ttt.layers), min(cfg.d_model, cfg.d_ff)
        rows = []
        for rank, short in self.shortened(whole, ranks):
            energy = [jnp.sum(x**2) / jnp.sum(S**2) for x, S in zip(short, whole, strict=True)]
            numbers = rank * (cfg.d_model + cfg.d_ff) if rank < full else cfg.d_model * cfg.d_ff
            row = {"rank": rank, "mb": 4 * layers * numbers / 1e6}
            row["energy"] = float(np.mean([float(e) for e in energy]))
            rows.append(row | self.compared(short))
        return [row | {"kept": row["own"]["mean"] / rows[-1]["own"]["mean"]} for row in rows]

    def by_token(self) -> list[dict[str, Any]]:
        """Gain and gain over the other book's memory on classes of scored tokens."""
        later_BK1 = self.places["near"]
        repeated = np.stack([completes(*x) for x in zip(self.ids_BT, later_BK1, strict=True)])
        own_BV = own_words(self.ids_BT, self.model.config.vocab_size)
        own_word = np.take_along_axis(own_BV, later_BK1[:, 1:].astype(int), axis=1) & ~repeated
        classes = {"repeated 4-grams": repeated, "the book's own words": own_word}
        classes["the rest"] = ~repeated & ~own_word
        whole = self.best()
        losses = (self.none["near"], self.losses(whole), self.losses(rolled(whole)))
        rows = []
        for name, chosen in classes.items():
            kept = [b for b in range(len(self.books)) if chosen[b].any()]
            none, own, other = (
                np.array([x[b][chosen[b]].mean(dtype=np.float64) for b in kept]) for x in losses
            )
            row = {"class": name, "share": float(chosen.mean())}
            row["none"] = float(none.mean()) if kept else None
            over = mean_with_interval(other - own)
            rows.append(row | {"own": mean_with_interval(none - own), "own_over_other": over})
        return rows

    def by_author(self) -> dict[str, Any]:
        """For books with another by their author: the gain of its memory, and of a stranger's."""
        mates = [
            next((j for j, x in enumerate(self.books) if j != i and x.author == book.author), None)
            for i, book in enumerate(self.books)
        ]
        kept = [i for i, j in enumerate(mates) if j is not None and self.books[i].author]
        if not kept:
            return {"books": 0}
        order = np.array([i if j is None else j for i, j in enumerate(mates)])
        far = np.roll(np.arange(len(order)), -3)
        far = np.where(far == order, np.roll(far, -1), far)  # of another author
        none, whole = book_means(self.none["near"]), self.best()
        gain = lambda at: none - book_means(self.losses([jnp.take(S, at, axis=2) for S in whole]))
        same, other = gain(order)[kept], gain(far)[kept]
        return {
            "books": len(kept),
            "same": mean_with_interval(same),
            "stranger": mean_with_interval(other),
            "same_over_stranger": mean_with_interval(same - other),
        }

    def without_decay(self) -> dict[str, Any]:
        """Amount and scale for memories that the same weights read with `decay: 1`."""
        if self.model.config.ttt.decay == 1:
            return {}
        memories = self.read(Reader(with_ttt(self.model, decay=1.0), self.args.piece), self.last)
        return {"amount": self.by_amount(memories), "scale": self.by_scale(memories[-1])}


def book_means(losses_BK: np.ndarray) -> np.ndarray:
    return losses_BK.mean(axis=1, dtype=np.float64)


if __name__ == "__main__":
    main()
