"""Faults of jobs of two gloo processes, and of jobs that share a folder of compiled programs. As
scenarios.py.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

from faults.job import DRIVER, Job, end, fill, small_disk

TWO = ["--data.batch_size=4", "--mesh.fsdp=4"]
SLOW = {"processes": 2, "script": DRIVER, "FAULTS": '{"sleep": 0.05}'}


def undisturbed(folder: Path) -> Job:
    """A job of two processes whose run "whole" is what the others are compared with."""
    job = Job(folder / "two", steps=36, words=TWO)
    if not (job.runs / "whole" / "report.json").exists():
        end(job.start("whole", processes=2))
    return job


def one_of_two(folder: Path, trials: int = 2, seed: int = 4) -> str:
    """kill -9 of one of two gloo processes: the other one ends, and both continue together."""
    rng, job, lasted = random.Random(seed), undisturbed(folder), []
    for trial in range(trials):
        name = f"killed{trial}"
        jobs = job.start(name, **SLOW)
        at = rng.randint(5, 15)
        assert job.wait(jobs[0], lambda name=name, at=at: job.logged(name) >= at), end(jobs, None)
        victim, other = jobs[trial % 2], jobs[1 - trial % 2]
        victim.send_signal(signal.SIGKILL)
        begin = time.monotonic()
        end([other], code=None)
        lasted.append(time.monotonic() - begin)
        end([victim], code=None)
        assert other.returncode != 0, "half a job cannot succeed"
        assert job.newest(name) >= at // 3 * 3 - 6
        end(job.start(name, processes=2))
        same_on_both(job, name)
    return (
        f"{trials} kills (process 0 and 1 in turn); the other one ended after "
        f"{max(lasted):.0f} s at most; same curve"
    )


def same_on_both(job: Job, name: str) -> None:
    job.assert_same(name, "whole")
    second = "documents.1.jsonl"
    assert (job.runs / name / second).read_text() == (job.runs / "whole" / second).read_text()


def sigterm_of_two(folder: Path, trials: int = 4, seed: int = 5) -> str:
    """SIGTERM to one of two processes: both save the same step and exit 0."""
    rng, job, lasted = random.Random(seed), undisturbed(folder), []
    name = "stopped"
    for trial in range(trials):
        jobs = job.start(name, **SLOW)
        at = job.logged(name) + rng.randint(2, 6)
        assert job.wait(jobs[0], lambda at=at: job.logged(name) >= at), end(jobs, None)
        time.sleep(rng.uniform(0, 0.1))
        begin = time.monotonic()
        jobs[trial % 2].send_signal(signal.SIGTERM)
        outputs = end(jobs)
        lasted.append(time.monotonic() - begin)
        assert "stopped by " + ("another process", "SIGTERM")[trial % 2 == 0] in outputs[0], (
            outputs[0]
        )
        assert job.newest(name) == job.curve(name)[-1]["step"] >= at
    end(job.start(name, processes=2))
    same_on_both(job, name)
    return (
        f"{trials} SIGTERM (process 0 and 1 in turn): both exit 0, after {max(lasted):.1f} s "
        "at most; same curve"
    )


def disk_full_of_two(folder: Path, trials: int = 2) -> str:
    """As disk_full, with two processes: space returns in time; and too late."""
    job = undisturbed(folder)
    mount, seen = small_disk(folder / "small_two"), []
    try:
        small = Job(folder / "two", steps=36, runs_dir=mount, words=[*TWO, "--checkpoint.keep=1"])
        for trial in range(trials):
            returns, name = trial % 2 == 0, f"full{trial}"
            extra = [f"--checkpoint.wait_for_space={60 if returns else 1}"]
            jobs = small.start(name, *extra, **SLOW)
            # Between two saves: what a disk does that fills during one is in docs/robustness.md.
            filled = lambda name=name: (
                small.logged(name) % 3 == 1 and small.logged(name) > 12 and not small.saving(name)
            )
            assert small.wait(jobs[0], filled), end(jobs, None)
            fill(mount / "ballast")
            at = small.logged(name)
            if returns:
                time.sleep(2.5)
                assert [process.poll() for process in jobs] == [None, None], (
                    "a full disk stopped the job"
                )
                (mount / "ballast").unlink()
                output = end(jobs)[0]
                assert "no space for step" in output, output
                assert "saving works again" in output, output
            else:
                outputs = end(jobs, code=1)
                errors = [line for line in outputs[0].splitlines() if line.startswith("error: ")]
                assert len(errors) == 1, outputs[0]
                assert "is lost; free space" in errors[0], errors
                (mount / "ballast").unlink()
                assert 0 < small.newest(name) < 36
                end(small.start(name, *extra, processes=2))
            assert small.newest(name) == 36
            assert small.curve(name) == job.curve("whole")
            assert small.documents(name) == job.documents("whole")
            seen.append(
                f"full from step {at}, "
                + ("space returned" if returns else "to the end: exit 1, then finished")
            )
        name, blind = "inside", SLOW | {"FAULTS": '{"sleep": 0.05, "blind": true}'}
        jobs = small.start(name, "--checkpoint.wait_for_space=1", **blind)
        assert small.wait(jobs[0], lambda: small.logged(name) > 12), end(jobs, None)
        fill(mount / "ballast")
        begin = time.monotonic()
        outputs = end(jobs, code=None)
        lasted = time.monotonic() - begin
        assert 0 not in [process.returncode for process in jobs], "\n".join(outputs)
        assert "failed half-way on process" in "".join(outputs), "\n".join(outputs)
        (mount / "ballast").unlink()
        end(small.start(name, processes=2))
        assert small.curve(name) == job.curve("whole")
        assert small.documents(name) == job.documents("whole")
        seen.append(
            f"a write that failed inside a save: both ended after {lasted:.0f} s, then finished"
        )
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)
    return "; ".join(seen) + "; same curve"


def shared_cache(folder: Path, trials: int = 2) -> str:
    """A job of two processes and two jobs at a time share a folder of compiled programs, a damaged
    entry in it too.
    """
    job, cache = undisturbed(folder), folder / "programs"
    words = ["--steps=6", f"--compile_cache={cache}"]
    own = {"JAX_COMPILATION_CACHE_DIR": ""}  # not the harness's
    to_first = lambda name: next(
        row["time/to_first_step"] for row in rows(job, name) if "time/to_first_step" in row
    )
    curve = job.curve("whole")[:6]
    outputs = end(job.start("cold", *words, processes=2, **own))
    assert "compile_cache" not in outputs[0], outputs[0]
    entries = {path.name: path.read_bytes() for path in cache.rglob("*-cache")}
    assert entries
    end(job.start("warm", *words, processes=2, **own))
    assert {path.name for path in cache.rglob("*-cache")} == entries.keys(), (
        "the second start compiled something"
    )
    victim = next(
        path for path in cache.rglob("*-cache") if "train_step" in path.name or "step" in path.name
    )
    victim.write_bytes(entries[victim.name][:-1])
    outputs = end(job.start("damaged", *words, processes=2, **own))
    assert "1 entries without a valid seal were removed" in outputs[0], outputs[0]
    assert victim.read_bytes()[:1], "compiled again"
    for trial in range(trials):  # together: each may remove what the other one has not sealed yet
        for path in list(cache.rglob("*-cache"))[trial::2]:
            path.unlink()
        pairs = [job.start(f"pair{trial}{side}", *words, processes=2, **own) for side in "ab"]
        for jobs in pairs:
            end(jobs)
    outputs = end(job.start("last", *words, processes=2, **own))
    for name in [
        "cold",
        "warm",
        "damaged",
        "last",
        *[f"pair{trial}{side}" for trial in range(trials) for side in "ab"],
    ]:
        assert job.curve(name) == curve, f"{name}: another curve"
    return (
        f"two processes, {len(entries)} programs: {to_first('cold'):.1f} s to the first step, "
        f"then {to_first('warm'):.1f} s; a "
        f"damaged one was removed and compiled again; {trials} x 2 jobs at a time: all exit 0; "
        "same curve"
    )


def rows(job: Job, name: str) -> list[dict]:
    from ttt_jax.run.metrics import read_metrics

    return read_metrics(job.runs / name / "metrics.jsonl")
