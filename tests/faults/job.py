"""A training job of seconds for fault trials: a corpus, its start and end, its curve and its
documents.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from support.compilation import CHEAP
from support.jobs import SMALL, one_of_several

from ttt_jax.checkpoint.checksums import find_damage, finished_steps, has_checksums
from ttt_jax.run.logs import read_events

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300
DRIVER = "tests/faults/driver.py"
WORDS = [
    *SMALL,
    "--optimizer.schedule=constant",
    "--eval.rows=2",
    "--eval.buckets=2",
    "--log.documents=true",
    "--checkpoint.every=3",
]


class Job:
    """Runs of one config in `folder`, started as a user starts them. They share a compilation
    cache.

    Args:
      steps: of each run; the corpus is larger than what they read, so no document may come twice.
      runs_dir: where the runs lie, `folder/runs` by default.
    """

    def __init__(
        self, folder: Path, steps: int, runs_dir: Path | None = None, words: list[str] | None = None
    ) -> None:
        self.folder, self.steps, self.runs = folder, steps, runs_dir or folder / "runs"
        self.corpus = folder / "corpus"
        if not self.corpus.exists():
            self.corpus.mkdir(parents=True)
            rng = np.random.default_rng(0)
            for i in range(steps * 8):
                text = " ".join(
                    rng.choice(
                        ["fast", "weight", "chunk", "update", "apply", f"{i:04d}"],
                        rng.integers(2, 12),
                    )
                )
                (self.corpus / f"{i:04d}.txt").write_text(text)
        self.words = [*WORDS, f"--steps={steps}", f"--data.train={self.corpus}", *(words or [])]

    def start(
        self,
        name: str,
        *extra: str,
        processes: int = 1,
        script: str = "train.py",
        log: Path | None = None,
        **environment: str,
    ):
        """The run `name`, as so many processes; a list of them. What they print goes to `log`, or
        is what `end` returns.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        started = []
        for index in range(processes):
            env = {k: v for k, v in os.environ.items() if not k.startswith(("TTT_JAX_", "SLURM_"))}
            env |= {
                "JAX_PLATFORMS": "cpu",
                "PYTHONPATH": str(ROOT),
                "XLA_FLAGS": CHEAP
                + (" --xla_force_host_platform_device_count=2" if processes > 1 else ""),
                "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }
            if processes > 1:
                env |= one_of_several(index, processes, port)
            words = [*self.words, f"--runs_dir={self.runs}", f"--name={name}", *extra]
            out = subprocess.PIPE if log is None else log.open("w")
            pipes = {"stdout": out, "stderr": subprocess.STDOUT, "text": True}
            started.append(
                subprocess.Popen(
                    [sys.executable, script, *words], cwd=ROOT, env=env | environment, **pipes
                )
            )
        return started

    def finish(self, name: str, *extra: str, code: int = 0, **options) -> str:
        """Run to its end; its output."""
        return end(self.start(name, *extra, **options), code)[0]

    def finish_whole(self) -> None:
        """The run without faults, to compare with: made once, whichever scenario comes first."""
        if not (self.runs / "whole" / "report.json").exists():
            self.finish("whole")

    def curve(self, name: str) -> list[dict]:
        """What must not depend on faults: every logged number but times, speed and memory."""
        lines = (self.runs / name / "metrics.jsonl").read_text().splitlines()
        varies = ("tokens_per_second", "time/", "host_memory_bytes")
        rows = [
            {k: v for k, v in json.loads(line).items() if not k.startswith(varies)}
            for line in lines
        ]
        # a save has a row of its own, with its time alone
        return [row for row in rows if row.keys() > {"step"}]

    def logged(self, name: str) -> int:
        """Steps in the curve so far."""
        path = self.runs / name / "metrics.jsonl"
        return path.read_bytes().count(b'"loss":') if path.exists() else 0

    def documents(self, name: str) -> list[list]:
        """What each step held. Every step has exactly one line, and no piece of a document comes
        twice.
        """
        lines = [
            json.loads(line)
            for line in (self.runs / name / "documents.jsonl").read_text().splitlines()
        ]
        assert [line["step"] for line in lines] == list(range(1, self.steps + 1)), (
            "a step is missing or repeated"
        )
        pieces = [tuple(piece) for line in lines for piece in line["documents"]]
        assert pieces, "no documents at all"
        assert len(set(pieces)) == len(pieces), "a document was seen twice"
        return [line["documents"] for line in lines]

    def assert_same(self, name: str, expected: str) -> None:
        """Bit for bit one curve, and the same documents in the same steps."""
        assert self.curve(name) == self.curve(expected), f"{name}: another curve than {expected}"
        assert self.documents(name) == self.documents(expected), (
            f"{name}: other documents than {expected}"
        )

    def checkpoints(self, name: str) -> Path:
        return self.runs / name / "checkpoints"

    def newest(self, name: str) -> int:
        """The newest complete checkpoint, whose files must be what was written; 0 when there is
        none.
        """
        steps = finished_steps(self.checkpoints(name))
        for step in steps:
            folder = self.checkpoints(name) / str(step)
            assert has_checksums(folder), f"step {step} has no checksums"
            assert find_damage(folder) is None, f"step {step}: {find_damage(folder)}"
        return max(steps, default=0)

    def saving(self, name: str) -> bool:
        """Whether a save is in flight, seen from outside."""
        try:
            return any(
                ".orbax-checkpoint-tmp" in entry.name for entry in self.checkpoints(name).iterdir()
            )
        except FileNotFoundError:
            return False

    def events(self, name: str, kind: str | None = None) -> list[dict]:
        return [event for event in read_events(self.runs / name) if kind in (None, event["kind"])]

    def wait(self, process, done, seconds: float = 120, pause: float = 0.002) -> bool:
        """Wait for `done()`; False when the process ended before."""
        deadline = time.monotonic() + seconds
        while not done():
            if process.poll() is not None:
                return False
            assert time.monotonic() < deadline, "the job does not advance"
            time.sleep(pause)
        return True


def end(processes, code: int | None = 0) -> list[str]:
    """Wait for processes to end, all with `code`; their outputs."""
    try:
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if code is not None:
        assert [process.returncode for process in processes] == [code] * len(processes), (
            "\n-----\n".join(outputs)
        )
    return outputs


def kill(processes) -> list[str]:
    """kill -9."""
    for process in processes:
        process.send_signal(signal.SIGKILL)
    return end(processes, code=None)


def small_disk(mount: Path, size: str = "12m") -> Path:
    """A tmpfs, to be unmounted by the caller."""
    mount.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)], check=True)
    return mount


def fill(path: Path) -> None:
    """Write until there is no byte left."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
        try:
            while True:
                file.write(b"0")
        except OSError:
            pass
