"""Evaluate finished `books` runs: is it this book's S that helps, and does S recall a passage?

    python benchmarks/books_eval.py /tmp/books/gpu0/*-[0-9] --data books_heldout.jsonl.xz --out OUT

30 held-out books, each run: loss by position and at 8k and 16k with TTT on, off and with another
book's fast weights; strict mode; a passage of 512 tokens read again beyond the reach of attention,
on and off. It is `ttt-jax eval` with options for which few programs are compiled (everything is
read a chunk at a time, all books at once), and for all runs in one process: runs that differ by
their seed alone share the programs. $JAX_COMPILATION_CACHE_DIR keeps them for the next call.

OUT/RUN/ gets results.json and report.html of a run; a run that is there already is not repeated,
and none starts after `--seconds`. OUT/results.jsonl gets one line a run, for docs/results/ and
benchmarks/books_tables.py. Run folders are named ARM-SEED, as benchmarks/study.py does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "/tmp/books/programs")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from ttt_jax.errors import UserError  # noqa: E402
from ttt_jax.eval import output, run  # noqa: E402
from ttt_jax.eval.tables import interval, tokens  # noqa: E402

KEPT = ("perplexity", "recall", "commit", "date", "versions", "hardware", "dtype", "seconds")


def options(folder: Path, args: argparse.Namespace) -> run.Options:
    """Choose what one run can be asked: a model without TTT layers knows no fast weights."""
    written = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    ttt = bool(written["model"]["ttt"]["layers"])
    return run.Options(
        model=folder,
        perplexity=args.data,
        recall=args.data if ttt else None,
        lengths=run.parse_lengths(args.lengths),
        block=args.block,
        documents=args.documents,
        passage=args.chunk,
        ttt="both" if ttt else "off",
        strict=ttt,
        batch_size=args.documents,
        piece=args.chunk,
    )


def line(name: str, results: dict) -> dict:
    """Keep what tables and charts need, every document's losses included."""
    arm, _, seed = name.rpartition("-")
    about = {"arm": arm, "seed": int(seed), "ttt": results["config"]["ttt"]}
    return about | {key: results[key] for key in KEPT if key in results}


def summary(kept: dict) -> list[str]:
    """Say what was asked in a few lines: the last tokens, every position, and recall."""
    part, name = kept["perplexity"], f"{kept['arm']}-{kept['seed']}"
    last = part["positions"][-1]
    losses = "  ".join(f"{mode} {last[mode]['mean']:.4f}" for mode in part["modes"] if mode in last)
    lines = [f"{name}  last {part['block']}: {losses}"]
    for key in ("gain", "gain_shuffled"):
        if key in last:
            cells = " ".join(f"{entry[key]['mean']:+.4f}" for entry in part["positions"])
            lines.append(f"  {key} by position: {cells}; last {interval(last[key], '+.4f')}")
    for entry in part["lengths"]:
        if "gain_strict" in entry:
            found = interval(entry["gain_strict"], "+.4f")
            lines.append(f"  strict at {tokens(entry['length'])}: cold - strict {found}")
    for entry in kept.get("recall", {"lengths": []})["lengths"]:
        found = "  ".join(f"{m} {interval(entry[m]['recall'], '+.5f')}" for m in ("on", "off"))
        lines.append(f"  recall at {tokens(entry['length'])}: {found}")
    return lines


def adapts(kept: dict) -> bool:
    """Whether TTT changed any loss at all; a model without TTT layers cannot be asked."""
    part = kept["perplexity"]
    if "on" not in part["modes"]:
        return True
    books = [entry["per_document"] for entry in part["positions"]]
    return any(entry["on"] != entry["off"] for entry in books)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, ARM-SEED")
    parser.add_argument("--data", required=True, help="held-out books")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", default="8k,16k")
    parser.add_argument("--block", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=512, help="of a piece, and the passage")
    parser.add_argument("--documents", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=1e9, help="no run starts later than this")
    args = parser.parse_args()
    started, said, failed = time.time(), [], 0
    for folder in args.runs:
        out = args.out / folder.name
        if not (folder / "report.json").is_file():
            print(f"{folder.name}: not a finished run", flush=True)
            continue
        if not (out / output.RESULTS).is_file():
            if time.time() - started > args.seconds:
                print(f"{folder.name}: not started, the time is up", flush=True)
                continue
            try:
                results, _ = run.evaluate(options(folder, args))
            except UserError as error:
                print(f"{folder.name}: {error}", flush=True)
                failed += 1
                continue
            args.out.mkdir(parents=True, exist_ok=True)
            output.write_folder(out, output.files_of(results), overwrite=False)
            print(f"{folder.name}: {time.time() - started:.0f} s", flush=True)
        said.append(line(folder.name, output.read_results(out)))
    if said:
        text = "".join(json.dumps(kept) + "\n" for kept in said)
        (args.out / "results.jsonl").write_text(text)
        print("\n".join(text for kept in said for text in summary(kept)))
    for kept in said:
        if not adapts(kept):
            failed += 1
            print(
                f"{kept['arm']}-{kept['seed']}: on equals off to the last bit: S was never written"
            )
    return 1 if failed or not said else 0


if __name__ == "__main__":
    sys.exit(main())
