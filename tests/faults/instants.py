"""Signals at random instants of a run's whole life, imports and exit included; two jobs at a time;
a terminal that is lost.
"""

from __future__ import annotations

import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from faults.job import DRIVER, ROOT, Job, end
from support.compilation import CHEAP

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
NOISE = (
    "Traceback",
    "Exception ignored",
    "Error in",
    "Fatal Python",
    "terminate called",
    "core dumped",
    "Stopped",
)


def mask(pid: int, field: str) -> int:
    """A mask of signals of a process, such as SigCgt: those for which it has a handler."""
    line = next(
        line
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1], 16)


def handles(pid: int, number: int = signal.SIGTERM) -> bool:
    """Whether the process has a handler of its own, or has come to ignore signals because it is
    done.
    """
    return bool((mask(pid, "SigCgt") | mask(pid, "SigIgn")) >> (number - 1) & 1)


def assert_quiet(output: str) -> None:
    """No traceback, and no line twice."""
    assert not [word for word in NOISE if word in output], output
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith("step ")]
    assert not [line for line, times in Counter(lines).items() if times > 1], output


def signals_anywhere(folder: Path, trials: int, seed: int = 6) -> str:
    """Exit code 0 and one line whenever Python has got to train.py; then the same command again,
    and the same curve.
    """
    rng, job = random.Random(seed), Job(folder / "anywhere", steps=12)
    begin = time.monotonic()
    job.finish("warm")  # compiles
    begin = time.monotonic()
    job.finish("whole")
    life = time.monotonic() - begin
    expected = json.loads((job.runs / "whole" / "report.json").read_text())["heldout"]
    seen, sent, runs, slowest = Counter(), 0, 0, 0.0
    while sent < trials:
        name = f"anywhere{runs}"
        for _ in range(6):  # several signals in one run, as far as it goes
            if sent == trials or (job.runs / name / "report.json").exists():
                break
            number = SIGNALS[sent % 3]
            begin, (process,) = time.monotonic(), job.start(name)
            time.sleep(rng.uniform(0, life))
            ended, ours = process.poll() is not None, False
            if not ended:
                ours, begin = handles(process.pid), time.monotonic()
                process.send_signal(number)
            (output,) = end([process], None)
            slowest = max(slowest, time.monotonic() - begin) if ours else slowest
            sent += 1
            if ended or ours:
                assert process.returncode == 0, f"{number.name}: {process.returncode}\n{output}"
                assert_quiet(output)
                stopped = output.count("stopped by ")
                assert stopped <= 1, output
                assert stopped or "report: " in output, output
                seen[
                    "after its end" if ended else "stopped" if stopped else "finished all the same"
                ] += 1
            elif not process.returncode:  # it had ended, and was not reaped yet
                assert_quiet(output)
                seen["in its last moments"] += 1
            else:  # the interpreter's own start, about 15 ms: it ends as Python does
                assert process.returncode in (-number, 1), (
                    f"{number.name}: {process.returncode}\n{output}"
                )
                seen["before Python got to train.py"] += 1
        job.finish(name)
        job.assert_same(name, "whole")
        assert json.loads((job.runs / name / "report.json").read_text())["heldout"] == expected
        assert not (job.runs / name / ".lock").exists(), "the lock is given back"
        runs += 1
    counts = ", ".join(f"{count} {what}" for what, count in seen.most_common())
    return (
        f"{sent} signals (TERM, INT, HUP in turn) over {life:.1f} s of {runs} runs: {counts}; "
        f"the slowest took {slowest:.1f} s"
    )


def interrupted_twice(folder: Path, trials: int = 6, seed: int = 7) -> str:
    """A second Ctrl-C: one line, exit code 1, and the same curve later."""
    rng, job = random.Random(seed), Job(folder / "anywhere", steps=12)
    job.finish_whole()
    lines = 0
    for trial in range(trials):
        name = f"twice{trial}"
        # so that the first one has to wait
        (process,) = job.start(name, script=DRIVER, FAULTS='{"sleep": 2.0}')
        assert job.wait(process, lambda name=name: job.logged(name) >= 1), end([process], None)
        time.sleep(rng.uniform(0, 1))
        process.send_signal(signal.SIGINT)
        time.sleep(0.6)
        process.send_signal(signal.SIGINT)
        (output,) = end([process], None)
        assert_quiet(output)
        assert process.returncode in (0, 1), output
        if process.returncode:
            assert (
                output.count(
                    "error: interrupted by a second SIGINT: what was learnt since the last "
                    "checkpoint is lost"
                )
                == 1
            )
            lines += 1
        job.finish(name)
        job.assert_same(name, "whole")
    assert lines, "no second interrupt came in time"
    return (
        f"{trials} times two SIGINT: {lines} ended at once in one line, {trials - lines} had "
        "saved by then; same curve"
    )


def two_jobs(folder: Path, trials: int = 4, seed: int = 8) -> str:
    """A second job in the folder, at random times: refused in one line that names the first; the
    first is not disturbed.
    """
    rng, job = random.Random(seed), Job(folder / "anywhere", steps=12)
    job.finish_whole()
    took = 0.0
    for trial in range(trials):
        name = f"held{trial}"
        (first,) = job.start(name, script=DRIVER, FAULTS='{"sleep": 1.0}')
        lock = job.runs / name / ".lock"
        assert job.wait(first, lambda lock=lock: lock.exists() and lock.stat().st_size > 0), end(
            [first], None
        )
        time.sleep(rng.uniform(0, 6))
        begin, (second,) = time.monotonic(), job.start(name)
        (output,) = end([second], code=2)
        took = max(took, time.monotonic() - begin)
        assert output.startswith(f"error: run folder {job.runs / name}: process {first.pid} on "), (
            output
        )
        assert output.count("\n") == 1, output
        if trial % 2:  # killed: the next one takes the lock over at once
            first.kill()
            end([first], None)
            job.finish(name)
        else:
            assert_quiet(end([first])[0])
        job.assert_same(name, "whole")
    both = [job.start("together")[0] for _ in range(2)]  # at the same instant
    outputs = end(both, None)
    assert sorted(process.returncode for process in both) == [0, 2], "\n-----\n".join(outputs)
    job.assert_same("together", "whole")
    return (
        f"{trials} second jobs refused after {took:.1f} s at most; two started at once: one "
        "ran, one was refused; same curve"
    )


def lost_terminal(folder: Path, trials: int = 1) -> str:
    """`| head -2`, /dev/full, closed descriptors, and a terminal that is closed (its SIGHUP saves
    and stops).
    """
    job = Job(folder / "anywhere", steps=12)
    job.finish_whole()
    ways = {
        "head": "| head -2",
        "full": "> /dev/full 2>&1",
        "closed": ">&- 2>&-",
        "one": "2> /dev/full",
    }
    for name, way in ways.items():
        words = [*job.words, f"--runs_dir={job.runs}", f"--name=lost_{name}"]
        script = f"set -o pipefail; {sys.executable} train.py {' '.join(words)} {way}"
        pipes = {"capture_output": True, "text": True, "timeout": 300}
        ended = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment(job), **pipes)
        assert ended.returncode == 0, ended.stderr
        assert not ended.stderr, ended.stderr
        job.assert_same(f"lost_{name}", "whole")
    master, slave = pty.openpty()
    words = [*job.words, f"--runs_dir={job.runs}", "--name=lost_pty"]
    process = subprocess.Popen(
        [sys.executable, DRIVER, *words],
        cwd=ROOT,
        env=environment(job) | {"FAULTS": '{"sleep": 0.3}', "TERM": "xterm"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    assert job.wait(process, lambda: job.logged("lost_pty") >= 3)
    # the terminal is closed; without a session of its own the kernel sends no SIGHUP, so:
    os.close(master)
    time.sleep(1.0)
    assert process.poll() is None, "a lost terminal ended the run"
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    assert job.newest("lost_pty") == job.curve("lost_pty")[-1]["step"] >= 3
    job.finish("lost_pty")
    job.assert_same("lost_pty", "whole")
    every = ", ".join(ways.values()).replace("| ", "into ")  # a table cell
    return (
        f"{every}: exit 0, nothing on stderr; a closed pseudo-terminal: trained on, SIGHUP "
        "saved; same curve"
    )


def environment(job: Job) -> dict[str, str]:
    """As `Job.start` gives it."""
    names = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": CHEAP,
        "JAX_COMPILATION_CACHE_DIR": str(job.folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("TTT_JAX_", "SLURM_"))
    } | names
