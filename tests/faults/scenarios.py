"""The faults, one function each: `scenario(folder, trials) -> what was seen`. A broken promise is
an AssertionError.

After every fault the same command is run again, and the curve has to be the undisturbed one bit for
bit, with every document in its step, none lost and none twice (`Job.assert_same`).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
from faults.instants import (
    assert_quiet,
    handles,
    interrupted_twice,
    lost_terminal,
    signals_anywhere,
    two_jobs,
)
from faults.job import DRIVER, Job, end, fill, kill, small_disk
from faults.several import disk_full_of_two, one_of_two, shared_cache, sigterm_of_two

__all__ = [
    "corrupt",
    "disk_full",
    "disk_full_of_two",
    "interrupted_twice",
    "kill_9",
    "lost_terminal",
    "not_finite",
    "one_of_two",
    "shared_cache",
    "signals_anywhere",
    "sigterm",
    "sigterm_of_two",
    "truncated_data",
    "two_jobs",
]


def kill_9(folder: Path, trials: int, seed: int = 0) -> str:
    """kill -9: a third anywhere (start included), a third after a random step, a third while a save
    is being written.
    """
    rng, job = random.Random(seed), Job(folder, steps=90)
    job.finish("whole")
    inside = anywhere = done = runs = 0
    starts = 0
    while done < trials:
        name, newest = f"killed{runs}", 0
        while done < trials:
            begin, (process,) = time.monotonic(), job.start(name)
            starts += 1
            how, alive = done % 3, True
            at = job.logged(name) + rng.randint(1, 6)
            if how == 0:
                instant = begin + rng.uniform(0.5, 12)
                alive = job.wait(process, lambda instant=instant: time.monotonic() > instant)
            else:
                alive = job.wait(process, lambda name=name, at=at: job.logged(name) >= at)
                if alive and how == 2:
                    alive = job.wait(process, lambda name=name: job.saving(name), pause=0.0002)
                if alive:
                    time.sleep(rng.uniform(0, 0.05))
            if not alive or process.poll() is not None:
                end([process])
                break  # it was faster; the next run goes on
            kill([process])
            done += 1
            inside += job.saving(name)
            anywhere += how == 0
            assert job.newest(name) >= newest, "a complete checkpoint was lost"
            newest = job.newest(name)
        job.finish(name)
        job.assert_same(name, "whole")
        runs += 1
    return (
        f"{done} kills in {runs} runs ({starts} starts): {inside} with a save in flight, "
        f"{anywhere} at a random time"
    )


def sigterm(folder: Path, trials: int, seed: int = 1) -> str:
    """SIGTERM and SIGINT: exit code 0, and the last finished step is saved."""
    rng, job = random.Random(seed), Job(folder, steps=90)
    job.finish_whole()
    sent = runs = starting = 0
    slowest = {True: 0.0, False: 0.0}  # while it starts, while it trains
    while sent < trials:
        name = f"stopped{runs}"
        while sent < trials:
            (process,) = job.start(name, FAULTS='{"sleep": 0.02}', script=DRIVER)
            found = job.logged(name)
            at = found + rng.randint(1, 9)
            if sent % 5 == 4:  # while it starts: nothing to save, and nothing to lose
                job.wait(process, lambda process=process: handles(process.pid))
                time.sleep(rng.uniform(0, 4))
            elif not job.wait(process, lambda name=name, at=at: job.logged(name) >= at):
                end([process])
                break
            else:
                time.sleep(rng.uniform(0, 0.1))
            if process.poll() is not None:
                end([process])
                break
            before, begin = job.logged(name), time.monotonic()
            process.send_signal(signal.SIGINT if sent % 3 == 1 else signal.SIGTERM)
            end([process])
            early = before <= found  # no step since this start
            slowest[early] = max(slowest[early], time.monotonic() - begin)
            sent += 1
            starting += early
            if job.logged(name) > before or before:
                assert job.newest(name) >= job.curve(name)[-1]["step"], (
                    "a finished step was not saved"
                )
        job.finish(name)
        job.assert_same(name, "whole")
        runs += 1
    return (
        f"{sent} signals in {runs} runs ({starting} while starting), all exit 0; the slowest took "
        f"{slowest[False]:.1f} s while training, {slowest[True]:.1f} s while starting"
    )


def disk_full(folder: Path, trials: int = 2) -> str:
    """A tmpfs of 12 MB that a ballast file fills: space returns in time; and too late."""
    mount, seen = small_disk(folder / "small"), []
    try:
        job = Job(folder, steps=150)
        small = Job(
            folder,
            steps=150,
            runs_dir=mount,
            words=["--checkpoint.keep=1", "--log.tensorboard=true"],
        )
        job.finish("whole150")
        for trial in range(trials):
            returns = trial % 2 == 0
            name, extra = f"full{trial}", [f"--checkpoint.wait_for_space={60 if returns else 1}"]
            faults = {"script": DRIVER, "FAULTS": '{"sleep": 0.05}'}
            (process,) = small.start(name, *extra, **faults)
            assert small.wait(process, lambda name=name: small.logged(name) >= 20)
            fill(mount / "ballast")
            at = small.logged(name)
            # The run's own lines wait in memory now, so what it does is read from its output at the
            # end.
            time.sleep(2.5)
            assert process.poll() is None, "a full disk stopped the run: " + end([process], None)[0]
            if returns:
                (mount / "ballast").unlink()
                output = end([process])[0]
                assert "could not be written" in output
                assert "saving works again" in output
                assert_quiet(output)
            else:
                output = end([process], code=1)[0]
                assert_quiet(output)
                errors = [line for line in output.splitlines() if line.startswith("error: ")]
                assert len(errors) == 1, output
                assert "is lost; free space" in errors[0], errors
                (mount / "ballast").unlink()
                assert 0 < small.newest(name) < 150
                small.finish(name, *extra)
            assert small.curve(name) == job.curve("whole150")
            assert small.documents(name) == job.documents("whole150")
            assert small.newest(name) == 150
            last = [event["text"] for event in small.events(name, "saved_again")]
            seen.append(
                f"full from step {at}, "
                + (f"then '{last[0][:60]}'" if returns else "to the end: exit 1, then finished")
            )
            shutil.rmtree(mount / name)
        seen.append(log_on_a_full_disk(job, small, mount))
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)
    return "; ".join(seen)


def log_on_a_full_disk(job: Job, small: Job, mount: Path) -> str:
    """The run's own output is on the disk that is full."""
    log = mount / "log"
    (process,) = small.start(
        "logged", "--checkpoint.wait_for_space=60", script=DRIVER, FAULTS='{"sleep": 0.1}', log=log
    )
    assert small.wait(process, lambda: small.logged("logged") >= 20)
    fill(mount / "ballast")
    size = -1
    while size != (size := log.stat().st_size):  # its last block has room for some lines
        time.sleep(2.5)
    assert process.poll() is None, "a log on a full disk ended the run: " + log.read_text()[-2000:]
    (mount / "ballast").unlink()
    assert process.wait(300) == 0, log.read_text()[-2000:]
    text = log.read_text()
    assert "lines may be missing above" in text, text
    assert "report: " in text, text
    assert_quiet(text)
    assert small.curve("logged") == job.curve("whole150")
    return "the log on the full disk as well: trained on, the gap is said in it"


def corrupt(folder: Path, trials: int = 3, seed: int = 2) -> str:
    """Each file of the newest checkpoint: a byte flipped, cut in half, deleted. `trials` of them by
    a whole run again.
    """
    from faults import corrupted

    rng, job = random.Random(seed), Job(folder, steps=90)
    job.finish_whole()
    job.finish("half", "--steps=45")
    half = job.runs / "half"
    seen = corrupted.every_file(job, half, folder / "corrupt")
    folder_of = half / "checkpoints" / "45"
    files = sorted(
        p.relative_to(folder_of)
        for p in folder_of.rglob("*")
        if p.is_file() and p.stat().st_size > 200
    )
    for trial in range(trials):
        name, damage = f"corrupt{trial}", corrupted.DAMAGES[trial % 3]
        shutil.copytree(half, job.runs / name)
        wrong = rng.choice(files)
        corrupted.damage(job.checkpoints(name) / "45" / wrong, damage)
        output = job.finish(name)
        assert f"damaged ({wrong.as_posix()}: " in output, output
        assert "continuing" in output
        assert "from step 42" in output
        assert (job.checkpoints(name) / "45.damaged").is_dir(), "the damaged one is kept"
        job.assert_same(name, "whole")
    return f"{seen}; {trials} continued by train.py from the step before, same curve"


def truncated_data(folder: Path, trials: int = 1) -> str:
    """A data file is cut while a run reads: refused at the next start, by name, until the file is
    back.
    """
    job = Job(folder / "data", steps=40)
    job.finish("whole")
    (process,) = job.start("cut", script=DRIVER, FAULTS='{"sleep": 0.05}')
    assert job.wait(process, lambda: job.logged("cut") >= 8)
    victim = job.corpus / "0007.txt"
    text = victim.read_bytes()
    victim.write_bytes(text[: len(text) // 2])
    assert job.wait(process, lambda: job.logged("cut") >= 14), (
        "the running job keeps what it has read"
    )
    kill([process])
    newest = job.newest("cut")
    output = job.finish("cut", code=2)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert job.newest("cut") == newest
    victim.write_bytes(text)
    job.finish("cut")
    job.assert_same("cut", "whole")
    refused = (
        f"text: the run went on, the next start was refused ('{errors[0][:66]}...'); with "
        "the file back it continued"
    )

    tokens = np.random.default_rng(0).integers(0, 250, (4000, 33)).astype(np.int32)
    paths = [folder / "data" / name for name in ("train.npy", "heldout.npy")]
    for path, part in zip(paths, (tokens[:3900], tokens[3900:]), strict=True):
        np.save(path, part)
    mapped = Job(folder / "data", steps=40, runs_dir=folder / "data" / "mapped")
    mapped.words += [f"--data.train={paths[0]}", f"--data.heldout={paths[1]}"]
    mapped.finish("whole")
    (process,) = mapped.start("cut", script=DRIVER, FAULTS='{"sleep": 0.05}')
    assert mapped.wait(process, lambda: mapped.logged("cut") >= 8)
    os.truncate(paths[0], 20_000)
    for output in (end([process], code=2)[0], mapped.finish("cut", code=2)):
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, output
        assert "train.npy" in errors[0], errors
    np.save(paths[0], tokens[:3900])
    mapped.finish("cut")
    mapped.assert_same("cut", "whole")
    return (
        f"{refused}; mapped .npy: the run stopped and named the file, as the next start did; "
        "same curve with it back"
    )


def not_finite(folder: Path, trials: int = 2, seed: int = 3) -> str:
    """NaN in losses and in gradients, alone and in a row; with kill -9 in between, the same curve
    as without.
    """
    rng, job = random.Random(seed), Job(folder / "nan", steps=60)
    limits = ["--guard.skips=3", "--guard.rollbacks=1"]
    faults = {"nan_loss": [7, 20, 21, 22], "nan_gradient": [11], "sleep": 0.0}
    run = {"script": DRIVER, "FAULTS": json.dumps(faults)}
    output = job.finish("whole", *limits, **run)
    skipped = [event["step"] for event in job.events("whole", "step_skipped")]
    assert skipped == [7, 11, 20, 21, 22], skipped
    documents = job.documents("whole")
    for event in job.events("whole", "step_skipped"):
        named = sorted(piece[1:] for piece in event["documents"])
        assert named == sorted(documents[event["step"] - 1]), "the documents of the batch are named"
    (went_back,) = job.events("whole", "rolled_back")
    assert (went_back["step"], went_back["restored"]) == (22, 18), went_back
    assert job.curve("whole")[-1]["loss"] is not None
    slow = {"script": DRIVER, "FAULTS": json.dumps({**faults, "sleep": 0.03})}
    kills = 0
    for trial in range(trials):
        name = f"killed{trial}"
        for at in (rng.randint(6, 12), rng.randint(18, 26)):
            (process,) = job.start(name, *limits, **slow)
            if job.wait(process, lambda name=name, at=at: job.logged(name) >= at):
                kill([process])
                kills += 1
        job.finish(name, *limits, **slow)
        job.assert_same(name, "whole")
    # Again and again: it stops, says why, and what it has saved is finite.
    faults["nan_gradient"] = list(range(30, 60))
    output = job.finish("hopeless", *limits, code=1, script=DRIVER, FAULTS=json.dumps(faults))
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert "after 1 rollback" in errors[0], errors
    report = (job.runs / "hopeless" / "failure.md").read_text()
    assert "## Rollbacks" in report
    assert job.newest("hopeless") == 27
    return (
        f"5 steps skipped, 1 rollback (at 22 to the weights of 18), {kills} kills around them: "
        "same curve; NaN without end: "
        "exit 1 and a report"
    )
