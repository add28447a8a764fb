"""Ctrl-C in every command: `python tests/faults/commands.py [--signals 20] [--only NAME ...]`.

Each command runs undisturbed once, then again and again with SIGINT at a random instant between its
start and its end. It may finish, or end with 130 and one line; nothing half-written may stay
behind, and the same command afterwards gives what the undisturbed one gave. Prints a table
(Markdown).
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# A traceback is Python's own before our code runs: with nothing imported but `site`, at most.
STARTING = 0.08


def prepare(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Name -> (words, what the command writes) of every command, on a small model."""
    from support.hf_folders import make_folder

    ttt = {"ttt_layers": [1], "ttt_mode": True, "ttt_proj": True, "ttt_lr": 0.01, "ttt_chunk": 4}
    model = folder / "model"
    more = {"ttt_target": "hidden_states", "num_hidden_layers": 2, "max_position_embeddings": 8192}
    make_folder(model, {"model_type": "qwen3", "head_dim": 16, "vocab_size": 128} | more | ttt)
    rng = np.random.default_rng(0)
    np.save(folder / "ids.npy", rng.integers(0, 97, 4096))
    np.save(folder / "rows.npy", rng.integers(0, 97, (12, 40)))
    run = folder / "run"
    run.mkdir()
    from ttt_jax.config import Config, dump_yaml

    (run / "config.yaml").write_text(dump_yaml(Config()))
    lines = (f'{{"step": {n}, "loss": 2.0, "probe/ttt_on": 2.0}}\n' for n in range(1, 50))
    (run / "metrics.jsonl").write_text("".join(lines))
    at = lambda name: str(folder / name)
    reads = ["--model", str(model), "--ids", at("ids.npy"), "--piece", "64"]
    data = ["--model", str(model), "--perplexity", at("rows.npy")]
    preset = str(ROOT / "configs" / "qwen3_0p6b.yaml")
    return {
        "convert": (["convert", str(model), at("orbax"), "--to", "orbax", "--verify"], "orbax"),
        "score": (["score", *reads, "--out", at("s.npz")], "s.npz"),
        "generate": (
            ["generate", *reads, "--ignore-eos", "--session", at("s.safetensors")],
            "s.safetensors",
        ),
        "eval": (
            ["eval", *data, "--lengths", "16,32", "--batch-size", "2", "--out", at("out")],
            "out",
        ),
        "plan": (["plan", "--config", preset, "--topology", "h100:8", "--json"], ""),
        "report": (["report", str(run), "--out", at("page.html")], "page.html"),
    }  # fmt: skip


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "ttt_jax", *words], env=environment, cwd=folder, **pipes
    )


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def left_behind(folder: Path, known: set[str], written: str) -> list[str]:
    """Names beside the ones that belong there."""
    return sorted({path.name for path in folder.iterdir()} - known - {written})


def attack(
    name: str, words: list[str], written: str, folder: Path, signals: int
) -> tuple[str, bool]:
    """Returns (what was seen, whether it held)."""
    known, rng = {path.name for path in folder.iterdir()}, random.Random(name)
    begin = time.monotonic()
    job = start(words, folder)
    _, error = job.communicate()
    seconds = time.monotonic() - begin
    if job.returncode:
        raise RuntimeError(f"{name} undisturbed: exit {job.returncode}: {error}")
    seen, wrong = collections.Counter(), []
    for _ in range(signals):
        if written:
            remove(folder / written)
        after = rng.uniform(0, seconds)
        job = start(words, folder)
        time.sleep(after)
        job.send_signal(signal.SIGINT)
        try:
            _, error = job.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            job.kill()
            wrong.append(f"at {after:.2f} s: did not end")
            continue
        code = job.returncode
        lines = [
            line for line in error.splitlines() if not line.startswith(("warning: ", "going on: "))
        ]
        if code == 130 and len(lines) == 1 and lines[0].startswith("error: interrupted"):
            seen["130, one line" + (", session saved" if "saved (" in lines[0] else "")] += 1
        elif code == 0 and not lines:
            seen["finished"] += 1
        elif code == -signal.SIGINT and not lines:
            seen["ended by the signal, silently"] += 1
        elif after < STARTING:
            seen["before our code"] += 1
        else:
            wrong.append(f"at {after:.2f} of {seconds:.2f} s: exit {code}: {error[-600:]!r}")
        if left := left_behind(folder, known, written):
            wrong.append(f"at {after:.2f} s: left {left}")
            for path in left:
                remove(folder / path)
    if name == "generate" and (folder / written).exists():
        remove(folder / written)  # its rerun would read the prompt twice
    if name in ("convert", "report", "score"):
        remove(folder / written)
    job = start(words, folder)
    _, error = job.communicate()
    if job.returncode and not (name == "eval" and "exists already" in error):
        wrong.append(f"the rerun: exit {job.returncode}: {error!r}")
    text = ", ".join(f"{count} {what}" for what, count in sorted(seen.items()))
    return f"{signals} signals: {text}" + ("; " + " / ".join(wrong) if wrong else ""), not wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--signals", type=int, default=20)
    parser.add_argument("--only", nargs="+")
    args = parser.parse_args()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # jobs in the background of a shell ignore it
    folder = Path(tempfile.mkdtemp(prefix="commands-"))
    held = True
    print("| command | seen | promise | time |\n|---|---|---|---:|")
    try:
        for name, (words, written) in prepare(folder).items():
            if args.only and name not in args.only:
                continue
            begin = time.monotonic()
            seen, good = attack(name, words, written, folder, args.signals)
            held &= good
            took = f"{time.monotonic() - begin:.0f} s"
            print(f"| `{name}` | {seen} | {'held' if good else 'BROKEN'} | {took} |", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())
