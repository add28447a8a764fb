"""A million tokens through a sliding-window model: constant memory, and perplexity by position with
TTT on and off.

    # the default run: a small model of Python source
    python train.py
    python examples/one_million_tokens.py runs/default

Reads the standard library's own source as one document, byte by byte, in pieces. Layers with a
sliding window keep a ring of keys and values, and the fast weights have a fixed size, so the state
does not grow with the stream.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import numpy as np

from ttt_jax import load_pretrained, score


def resident_mib() -> float:
    """Resident memory of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a run folder of train.py, or a model folder")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--piece", type=int, default=8192, help="tokens read at a time")
    args = parser.parse_args()

    model = load_pretrained(args.model)
    tokenizer, ids = model.tokenizer, []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
        ids += tokenizer.encode(path.read_text(encoding="utf-8", errors="replace"))
        if len(ids) >= args.tokens:
            break
    stream = np.array(ids[: args.tokens], np.int32)
    edges = np.unique(np.geomspace(args.piece, len(stream), 8).astype(int))
    losses = {}
    for name, ttt in (("on", True), ("off", False)):
        memory: list[tuple[int, float]] = []
        report = lambda read, memory=memory: memory.append((read, resident_mib()))
        losses[name] = -score(
            model, [stream], ttt=ttt, piece=args.piece, on_progress=report
        ).logprobs_BT[0]
        tenth = memory[len(memory) // 10]
        print(
            f"TTT {name:3}: {tenth[1]:.0f} MiB after {tenth[0]:,} tokens, {memory[-1][1]:.0f} MiB "
            f"after {memory[-1][0]:,}"
        )
    print(f"{'tokens':>22}  perplexity on     off")
    for a, b in zip([0, *edges[:-1]], edges, strict=True):
        on, off = (float(np.exp(losses[name][a:b].mean())) for name in ("on", "off"))
        print(f"{a:10,} - {b:9,}  {on:13.4f} {off:7.4f}")


if __name__ == "__main__":
    main()
