"""What memories hold: books read to a point, later parts of them scored with nothing but W + dW.

    python benchmarks/memory_study.py runs/books books_heldout.jsonl.xz --out memory_study

Each book's first tokens are read with TTT on. Then keys, values and positions are dropped, and
tokens further on in the same book are scored with the frozen memory (the mode "strict" of
docs/evaluation.md, with a gap). Everything is compared on the same tokens with no memory and with
the next book's:

    amount      by how much was read
    scale       the longest reading's memory times a factor; the best one is kept from here on
    sums        the sum of n books' memories, the scored book's among them, by factor
    rank        the best factors of a rank: gain kept, size
    tokens      where the gain is: repeated 4-grams, the book's own words, the rest

Intervals: 95 %, bootstrap over books, paired by book. Writes results.json, tables.md and rank.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.eval.documents import open_documents
from ttt_jax.eval.reader import Reader, score_frozen_piece
from ttt_jax.eval.statistics import mean_with_interval
from ttt_jax.inference.prefill import check_ids, needs_capacity
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
    parser.add_argument("--read", default="8192,16384,32768,65536", help="tokens read, ascending")
    parser.add_argument("--gap", type=int, default=2048, help="tokens between read and scored")
    parser.add_argument("--score", type=int, default=4096, help="tokens scored")
    parser.add_argument("--ranks", default="1,4,16,64,256")
    parser.add_argument("--piece", type=int, default=4096, help="tokens of a row read at a time")
    parser.add_argument("--batch-size", type=int, default=20, help="books read side by side")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    begin = time.perf_counter()
    amounts = [int(n) for n in args.read.split(",")]
    model = load_model(args.model, args.dtype)
    C = model.config.ttt.chunk_size
    if sorted(set(amounts)) != amounts or any(n % C for n in amounts):
        sys.exit(f"--read {args.read}: give ascending multiples of the chunk, {C}")
    ids_BT, chosen = load_books(model, args, amounts[-1] + args.gap + args.score + 1)
    study = Study(model, ids_BT, amounts, args)
    results: dict[str, Any] = {
        "arguments": {k: str(v) for k, v in vars(args).items()},
        "books": chosen,
        "sizes": study.sizes(),
        "amount": study.by_amount(),
        "scale": study.by_scale(),
        "factor": study.factor,
        "sums": study.by_sum(),
        "rank": study.by_rank([int(r) for r in args.ranks.split(",")]),
        "tokens": study.by_token(),
        "seconds": time.perf_counter() - begin,
        **provenance(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = tables(results)
    (args.out / "tables.md").write_text(text)
    chart(results, args.out / "rank.png")
    print(text)
    print(f"{results['seconds']:.0f} s: {args.out}")


def load_books(model: Transformer, args, tokens: int) -> tuple[np.ndarray, list[int]]:
    """The first tokens of the first books that are long enough."""
    corpus = open_documents(model, args.books, "books")
    long = [int(i) for i in np.flatnonzero(corpus.length_N >= tokens)][: args.count]
    if len(long) < 2:
        sys.exit(f"{args.books}: fewer than two documents have {tokens} tokens; lower --read")
    rows = [np.asarray(corpus.tokens(i, 0, tokens)) for i in long]
    print(f"{len(long)} books of {tokens} tokens and more", flush=True)
    return np.stack(check_ids(rows, model.config.vocab_size)), long


RANK_HEADS = ["rank", "MB", "squared norm", "gain", "own over another's", "gain kept"]
FACTORS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5)
Fast = list[Any]  # S of every run that adapts, [R, N, B, D, F], in the order of the layers' states


class Study:
    """The memories of all books after every amount, and losses with memories made of them."""

    def __init__(self, model: Transformer, ids_BT: np.ndarray, amounts: list[int], args) -> None:
        self.model, self.ids, self.amounts, self.args = model, ids_BT, amounts, args
        self.reader = Reader(model, args.piece)
        self.first = amounts[-1] + args.gap  # the first input of the scored tokens
        self.session_bytes = 0
        B = len(ids_BT)
        parts = [ids_BT[start : start + args.batch_size] for start in range(0, B, args.batch_size)]
        marks = [self._read(part) for part in parts]  # [part][amount]
        self.memories: list[Fast] = [
            [jnp.concatenate(runs, axis=2) for runs in zip(*(m[n] for m in marks), strict=True)]
            for n in range(len(amounts))
        ]
        self.whole, self.factor = self.memories[-1], 1.0
        self.none_BK = self.losses([jnp.zeros_like(S) for S in self.whole])
        self.own_BK = self.other_BK = self.none_BK  # of the whole memories, by `by_scale`

    def _read(self, ids_BT: np.ndarray) -> list[Fast]:
        """S after every amount."""
        state, found, start = None, [], 0
        for stop in self.amounts:
            state = self.reader.read(ids_BT, start, stop, state, self.amounts[-1], ttt=True)
            assert state is not None
            found.append([jnp.copy(S) for S in fast_of(state)])
            start = stop
        self.session_bytes = sum(x.nbytes for x in jax.tree.leaves(state)) // len(ids_BT)
        self.reader.watch.check("book")
        return found

    def losses(self, fast: Fast) -> np.ndarray:
        """Losses [B, K] of the later tokens with frozen fast weights, a book's own in each row."""
        found, size = [], self.args.batch_size
        for start in range(0, len(self.ids), size):
            rows = self.ids[start : start + size, self.first :]
            found.append(self._losses(rows, [S[:, :, start : start + size] for S in fast]))
        return np.concatenate(found)

    def _losses(self, ids_BK1: np.ndarray, fast: Fast) -> np.ndarray:
        B, K = len(ids_BK1), ids_BK1.shape[1] - 1
        state, found = with_fast(self.model, fast, B, K), []
        for first in range(0, K, self.reader.size):
            last = min(first + self.reader.size, K)
            lengths_B = np.full(B, last - first, np.int32)
            targets = ids_BK1[:, first + 1 : last + 1]
            state, logprobs_BP, _ = score_frozen_piece(
                self.reader.frozen, state, ids_BK1[:, first:last], targets, lengths_B
            )
            found.append(-np.asarray(logprobs_BP))
        return np.concatenate(found, axis=1)

    def gain(self, losses_BK: np.ndarray) -> dict[str, Any]:
        """No memory minus this, with an interval over books."""
        losses = losses_BK.mean(axis=1, dtype=np.float64)
        none = self.none_BK.mean(axis=1, dtype=np.float64)
        return {"loss": float(losses.mean()), "gain": mean_with_interval(none - losses)}

    # ------------------------------------------------------------------------------------ questions

    def sizes(self) -> dict[str, Any]:
        cfg = self.model.config
        full = 4 * len(cfg.ttt.layers) * cfg.d_model * cfg.d_ff
        ratios = [np.asarray(ratio(self.model, S, at)) for at, S in enumerate(self.whole)]
        return {
            "memory_mb": full / 1e6,
            "session_mb": self.session_bytes / 1e6,
            "largest_ratio": float(max(r.max() for r in ratios)),
        }

    def by_amount(self) -> list[dict[str, Any]]:
        rows = []
        for tokens, fast in zip(self.amounts, self.memories, strict=True):
            own, other = self.losses(fast), self.losses(rolled(fast))
            rows.append(
                {
                    "tokens": tokens,
                    "none": float(self.none_BK.mean(dtype=np.float64)),
                    "own": self.gain(own),
                    "other": self.gain(other),
                    "own_over_other": mean_with_interval(book_means(other) - book_means(own)),
                }
            )
        return rows

    def by_scale(self) -> list[dict[str, Any]]:
        rows = []
        for factor in FACTORS:
            own = self.losses([factor * S for S in self.whole])
            rows.append({"factor": factor, "own": self.gain(own)})
        self.factor = max(rows, key=lambda row: row["own"]["gain"]["mean"])["factor"]
        self.whole = [self.factor * S for S in self.whole]
        self.own_BK, self.other_BK = self.losses(self.whole), self.losses(rolled(self.whole))
        return rows

    def by_sum(self) -> list[dict[str, Any]]:
        """n books' memories in one, the scored book's among them, times a factor."""
        rows, B = [], len(self.ids)
        for n in sorted({n for n in (2, 4, 8, B) if n <= B}):
            total = [sum(jnp.roll(S, -i, axis=2) for i in range(n)) for S in self.whole]
            for factor in (1.0, n**-0.5, 1 / n):
                got = self.losses([factor * S for S in total])
                lost = mean_with_interval(book_means(got) - book_means(self.own_BK))
                rows.append({"books": n, "factor": factor, "own": self.gain(got), "lost": lost})
        return rows

    def by_rank(self, ranks: list[int]) -> list[dict[str, Any]]:
        cfg = self.model.config
        layers, full = len(cfg.ttt.layers), min(cfg.d_model, cfg.d_ff)
        bases = [bases_of(S) for S in self.whole]
        own, rows = self.gain(self.own_BK), []
        for rank in [r for r in ranks if r < full]:
            both = list(zip(self.whole, bases, strict=True))
            short = [truncated(S, basis, rank) for S, basis in both]
            energy = [
                jnp.sum(jnp.square(x)) / jnp.sum(jnp.square(S))
                for x, (S, _) in zip(short, both, strict=True)
            ]
            losses = self.losses(short)
            found = self.gain(losses)
            rows.append(
                {
                    "rank": rank,
                    "mb": 4 * layers * rank * (cfg.d_model + cfg.d_ff) / 1e6,
                    "energy": float(np.mean([float(e) for e in energy])),
                    "own": found,
                    "own_over_other": mean_with_interval(
                        book_means(self.losses(rolled(short))) - book_means(losses)
                    ),
                    "kept": found["gain"]["mean"] / own["gain"]["mean"],
                }
            )
        whole = {"rank": full, "mb": 4 * layers * cfg.d_model * cfg.d_ff / 1e6, "energy": 1.0}
        over = mean_with_interval(book_means(self.other_BK) - book_means(self.own_BK))
        return [*rows, whole | {"own": own, "own_over_other": over, "kept": 1.0}]

    def by_token(self) -> list[dict[str, Any]]:
        """Gain and gain over the other book's memory on classes of scored tokens."""
        read, target = self.ids[:, : self.amounts[-1]], self.ids[:, self.first + 1 :]
        repeated = np.stack(
            [completes(row, self.ids[b, self.first :]) for b, row in enumerate(read)]
        )
        own_word = own_words(read, self.model.config.vocab_size)
        own_word = np.stack([own_word[b][target[b]] for b in range(len(read))]) & ~repeated
        classes = {"repeated 4-grams": repeated, "the book's own words": own_word}
        classes["the rest"] = ~repeated & ~own_word
        rows = []
        for name, chosen in classes.items():
            kept = [b for b in range(len(read)) if chosen[b].any()]
            mean = lambda x, kept=kept, chosen=chosen: np.array(
                [x[b][chosen[b]].mean(dtype=np.float64) for b in kept]
            )
            none, own, other = (mean(x) for x in (self.none_BK, self.own_BK, self.other_BK))
            rows.append(
                {
                    "class": name,
                    "share": float(chosen.mean()),
                    "none": float(none.mean()) if kept else None,
                    "gain": mean_with_interval(none - own),
                    "own_over_other": mean_with_interval(other - own),
                }
            )
        return rows


def book_means(losses_BK: np.ndarray) -> np.ndarray:
    return losses_BK.mean(axis=1, dtype=np.float64)


# ------------------------------------------------------------------------------------- fast weights


def fast_of(state: State) -> Fast:
    return [x.ttt.S_BDF for runs in state.layers for x in runs if x.ttt is not None]


def with_fast(model: Transformer, fast: Fast, batch: int, tokens: int) -> State:
    """A fresh state with copies of these fast weights (programs take the arrays over)."""
    capacity = tokens if needs_capacity(model) else None
    fresh, left = model.init_state(batch, capacity or 1), iter(fast)

    def put(x):
        if x.ttt is None:
            return x
        return x._replace(ttt=x.ttt._replace(S_BDF=jnp.copy(next(left))))

    layers = tuple(tuple(put(x) for x in runs) for runs in fresh.layers)
    return State(fresh.position_B, layers, capacity)


def rolled(fast: Fast) -> Fast:
    """The next book's memory for each."""
    return [jnp.roll(S, -1, axis=2) for S in fast]


def ratio(model: Transformer, S_RNBDF, at: int):
    """||dW|| / ||W|| of run number `at` of those that adapt."""
    runs = [b for g in model.groups for r, b in zip(g.pattern, g.blocks, strict=True) if r.kind.ttt]
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(-2, -1)))
    return norm(S_RNBDF) / norm(runs[at].mlp.down[...])[:, :, None]


@jax.jit
def bases_of(S_RNBDF):
    """Left singular vectors of every S, the strongest first, on the smaller side D."""

    def one(S_DF):
        S_DF = S_DF / jnp.maximum(jnp.linalg.norm(S_DF), 1e-30)
        gram = jnp.einsum("df,ef->de", S_DF, S_DF, precision="highest")
        return jnp.linalg.eigh(gram)[1][:, ::-1]

    flat = S_RNBDF.reshape(-1, *S_RNBDF.shape[3:])
    return jax.lax.map(one, flat).reshape(*S_RNBDF.shape[:3], S_RNBDF.shape[3], -1)


def truncated(S_RNBDF, basis_RNBDD, rank: int):
    U = basis_RNBDD[..., :rank]
    product = lambda s, x, y: jnp.einsum(s, x, y, precision="highest")
    return product("rnbdk,rnbkf->rnbdf", U, product("rnbdk,rnbdf->rnbkf", U, S_RNBDF))


# ------------------------------------------------------------------------------------ token classes


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


# ------------------------------------------------------------------------------------------- output


def interval(entry: dict[str, Any]) -> str:
    if entry["mean"] is None:
        return "-"
    low = "" if entry["low"] is None else f" [{entry['low']:+.4f}, {entry['high']:+.4f}]"
    return f"{entry['mean']:+.4f}{low}"


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---:"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def tables(results: dict[str, Any]) -> str:
    sizes = results["sizes"]
    text = [
        f"{len(results['books'])} books. A memory: {sizes['memory_mb']:.1f} MB, its session: "
        f"{sizes['session_mb']:.1f} MB; largest ||dW||/||W|| {sizes['largest_ratio']:.3f}.\n"
    ]
    rows = []
    for r in results["amount"]:
        gains = (r["own"]["gain"], r["other"]["gain"], r["own_over_other"])
        rows.append([str(r["tokens"]), f"{r['none']:.4f}", *map(interval, gains)])
    heads = ["tokens read", "no memory", "gain, own", "gain, another's", "own over another's"]
    text.append(table(heads, rows))
    rows = [[f"{r['factor']:g}", interval(r["own"]["gain"])] for r in results["scale"]]
    text.append(table(["own memory times", "gain"], rows))
    text.append(f"From here on memories are multiplied by {results['factor']:g}.\n")
    rows = [
        [str(r["books"]), f"{r['factor']:.3f}", interval(r["own"]["gain"]), interval(r["lost"])]
        for r in results["sums"]
    ]
    text.append(table(["books in the sum", "factor", "gain", "loss over own alone"], rows))
    rows = []
    for r in results["rank"]:
        size = [str(r["rank"]), f"{r['mb']:.2f}", f"{r['energy']:.3f}"]
        gains = (r["own"]["gain"], r["own_over_other"])
        rows.append([*size, *map(interval, gains), f"{r['kept']:.3f}"])
    text.append(table(RANK_HEADS, rows))
    rows = []
    for r in results["tokens"]:
        none = "-" if r["none"] is None else f"{r['none']:.4f}"
        gains = (r["gain"], r["own_over_other"])
        rows.append([r["class"], f"{r['share']:.3f}", none, *map(interval, gains)])
    heads = ["tokens", "share", "no memory", "gain, own", "own over another's"]
    return "\n".join([*text, table(heads, rows)])


def chart(results: dict[str, Any], path: Path) -> None:
    from ttt_jax.display.html_page import figure_of, tidy

    figure = figure_of(6, 3.5)
    axes = figure.subplots()
    rows = results["rank"]
    x = [r["rank"] for r in rows]
    axes.plot(x, [r["kept"] for r in rows], marker="o", label="gain on the same book")
    axes.plot(x, [r["energy"] for r in rows], marker="s", label="squared norm")
    axes.set_xscale("log")
    axes.set(xlabel="rank", ylabel="share kept", title="What a memory's best factors keep")
    axes.legend(frameon=False)
    tidy(axes)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
