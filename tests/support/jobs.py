"""`python train.py` in a process of its own: its corpus, its start, and what it has logged."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.compilation import CHEAP

ROOT = Path(__file__).resolve().parents[2]
# A model and rows that take milliseconds a step.
SMALL = [
    "--model.d_model=16",
    "--model.num_layers=2",
    "--model.num_heads=2",
    "--model.num_kv_heads=1",
    "--model.head_dim=8",
    "--model.d_ff=24",
    "--model.sliding_window=8",
    "--model.ttt.layers=0",
    "--model.ttt.chunk_size=8",
    "--data.seq_len=32",
    "--data.batch_size=2",
    "--optimizer.warmup_steps=2",
    "--log.tensorboard=false",
    "--log.every=1",
]
TINY = [
    *SMALL,
    "--eval.rows=3",
    "--eval.buckets=2",
    "--steps=16",
    "--checkpoint.every=4",
]


def write_corpus(folder):
    """Forty short files of few words, which a model of two layers learns in a few steps."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        text = " ".join(rng.choice(["fast", "weight", "chunk", "update", "apply", str(i)], 40))
        (folder / f"{i:02d}.txt").write_text(text)
    return folder


def one_device():
    """One device, as most people's jobs see."""
    return few_devices(1)


@contextlib.contextmanager
def few_devices(count):
    """Let jobs of this process see so many devices: programs for the eight fake ones take three
    times as long to compile.
    """
    import jax

    with pytest.MonkeyPatch.context() as patch:
        first = jax.devices()[:count]
        for name in ("devices", "local_devices"):
            patch.setattr(jax, name, lambda *_, **__: first)
        for name in ("device_count", "local_device_count"):
            patch.setattr(jax, name, lambda *_, **__: count)
        yield


def one_of_several(index, processes, port):
    """The environment variables of one process of a job of several on this machine."""
    return {
        "TTT_JAX_COORDINATOR": f"127.0.0.1:{port}",
        "TTT_JAX_NUM_PROCESSES": str(processes),
        "TTT_JAX_PROCESS_ID": str(index),
        "TTT_JAX_TIMEOUT": "60",
    }


def start(words, sleep=0.0):
    """`python train.py` in a process of its own. `sleep`: seconds more for every step, so that a
    signal comes before the job is done.
    """
    env = {**os.environ, "XLA_FLAGS": CHEAP, "JAX_PLATFORMS": "cpu"}
    script = "tests/faults/driver.py" if sleep else "train.py"
    env |= {"FAULTS": json.dumps({"sleep": sleep})} if sleep else {}
    return subprocess.Popen(
        [sys.executable, script, *words],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def curve(run_dir):
    """What must not depend on interruptions: every logged number but times and memory."""
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    kept = [
        {
            k: v
            for k, v in row.items()
            if not k.startswith(("tokens_per_second", "time/", "host_memory"))
        }
        for row in rows
    ]
    return [row for row in kept if row.keys() > {"step"}]


def wait_for_step(run_dir, step, process):
    path = run_dir / "metrics.jsonl"
    for _ in range(15_000):  # five minutes: machines are shared
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError("the job does not advance")
