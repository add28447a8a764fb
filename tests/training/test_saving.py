"""Full disks, signals, and files of lines: what is promised while nothing can be written."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax.numpy as jnp
import pytest

from ttt_jax.errors import CheckpointError, TrainingError
from ttt_jax.files.text import LineFile
from ttt_jax.process.signals import StopSignal
from ttt_jax.run.logs import EventLog, read_events, truncate_metrics
from ttt_jax.training.saver import Saver
from ttt_jax.training.step import TrainState

ROOT = Path(__file__).parents[2]
STATE = TrainState({"w": jnp.zeros((8,))}, {"m": jnp.zeros((8,))}, jnp.int32(0))


class Disk:
    """A checkpointer on a disk that may be full: at once, or when an asynchronous save is waited
    for.
    """

    def __init__(self, directory):
        self.directory, self.saved, self.full, self.late = directory, [], False, False
        self._doomed = False

    def saving(self):
        return False

    def latest_step(self):
        return max(self.saved, default=None)

    def save(self, step, **items):
        if self.full and not self.late:
            raise CheckpointError(f"step {step} could not be written (no space)")
        self._doomed = self.full
        if not self.full:
            self.saved.append(step)

    def wait(self):
        if self._doomed:
            self._doomed = False
            raise CheckpointError("the last save could not be written (no space)")


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    fake = types.SimpleNamespace(
        monotonic=lambda: clock.now, sleep=lambda s: setattr(clock, "now", clock.now + s)
    )
    monkeypatch.setattr("ttt_jax.training.saver.time", fake)
    return clock


@pytest.mark.parametrize("late", [False, True])
def test_training_goes_on_and_saves_when_space_returns(late, tmp_path, clock):
    disk, shown = Disk(tmp_path), []
    events = EventLog(tmp_path, shown.append)
    saver = Saver(disk, 5, events)
    assert [step for step in range(1, 12) if saver.due(step)] == [5, 10]
    save = lambda step: saver.save(step, STATE, {}, {})
    save(5)
    assert not saver.retry_due()
    disk.full, disk.late = True, late
    save(10)
    assert [event["kind"] for event in read_events(tmp_path)] == ["save_failed"]
    assert "training goes on unsaved since step 5" in shown[0]
    assert not saver.retry_due(), "not at once again"
    clock.now += 2
    assert saver.retry_due()
    save(11)
    disk.full = False
    clock.now += 2
    assert saver.retry_due()
    save(12)
    assert disk.saved == [5, 12]
    assert [event["kind"] for event in read_events(tmp_path)] == [
        "save_failed",
        "save_failed",
        "saved_again",
    ]
    clock.now += 2
    assert not saver.retry_due()


def test_no_attempt_without_room(tmp_path, clock, monkeypatch):
    disk = Disk(tmp_path)
    saver = Saver(disk, 5, lambda *args, **details: None)
    disk.full = True
    saver.save(5, STATE, {}, {})
    disk.full, clock.now = False, 10.0
    monkeypatch.setattr(
        "ttt_jax.training.saver.shutil.disk_usage", lambda path: types.SimpleNamespace(free=10)
    )
    assert not saver.retry_due()
    saver.save(10, STATE, {}, {})
    assert disk.saved == []


def test_several_processes_look_before_they_save(tmp_path, clock, monkeypatch):
    """One that fails inside a save would leave the others waiting in Orbax."""
    disk, shown, free = Disk(tmp_path), [], 10
    monkeypatch.setattr("ttt_jax.training.saver.jax.process_count", lambda: 2)
    monkeypatch.setattr("ttt_jax.training.saver.any_process", lambda flag: flag)
    monkeypatch.setattr(
        "ttt_jax.training.saver.shutil.disk_usage", lambda path: types.SimpleNamespace(free=free)
    )
    saver = Saver(disk, 5, lambda text, **details: shown.append((details["kind"], text)))
    saver.save(5, STATE, {}, {})
    saver.save(10, STATE, {}, {})
    assert disk.saved == []
    ((kind, text),) = shown
    assert kind == "save_failed"
    assert "no space for step 5; training goes on unsaved since step 0" in text
    free, clock.now = 10**8, 2.0
    assert saver.retry_due()
    saver.save(11, STATE, {}, {})
    assert disk.saved == [11]
    assert shown[1][0] == "saved_again"


def test_the_last_save_is_waited_for_and_then_is_an_error(tmp_path, clock):
    disk = Disk(tmp_path)
    saver = Saver(disk, 5, lambda *args, **details: None)
    disk.full = True
    with pytest.raises(TrainingError, match="after step 0 is lost") as error:
        saver.save_surely(9, STATE, {}, {}, patience=60, give_up=lambda: False)
    assert "\n" not in str(error.value)
    assert 60 <= clock.now < 65
    with pytest.raises(TrainingError):  # a signal ends the wait
        saver.save_surely(9, STATE, {}, {}, patience=600, give_up=lambda: clock.now > 70)
    assert clock.now < 80
    disk.full = False
    saver.save_surely(9, STATE, {}, {}, patience=0, give_up=lambda: False)
    assert disk.saved == [9]


def test_lines_wait_while_the_disk_is_full(tmp_path, monkeypatch):
    path, write, room = tmp_path / "lines.jsonl", os.write, 15
    file = LineFile(path)
    assert file.append({"step": 1})

    def short(fd, data):
        """A disk with `room` bytes left."""
        nonlocal room
        part = data[:room]
        if not part:
            raise OSError(errno.ENOSPC, "No space left on device")
        room -= len(part)
        return write(fd, part)

    monkeypatch.setattr(os, "write", short)
    assert file.append({"step": 2})
    room = 5
    for step in (3, 4, 5):
        assert not file.append({"step": step})
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2], (
            "no half lines"
        )
    monkeypatch.undo()
    assert file.append({"step": 6})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    file.close()
    with path.open("a") as cut:
        cut.write('{"step": 7')
    truncate_metrics(path, 4)
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4))


STARTING = """
import sys, time
from ttt_jax.process.signals import StopSignal, end_process
with StopSignal() as stop:
    stop.before_leaving += [lambda: 1 / 0, lambda: print("left", flush=True)]
    if "defer" in sys.argv:
        stop.defer()
    print("ready", flush=True)
    try:
        time.sleep(60)
        while True:
            time.sleep(0.01)
    except BaseException as error:
        print("raised", error)
"""


def signalled(word, *signals, pause=0.0):
    """Exit code, standard output and error of a process that gets signals."""
    process = subprocess.Popen(
        [sys.executable, "-c", STARTING, word],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        process.send_signal(number)
        time.sleep(pause)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_there_is_nothing_to_lose_ends_the_process(number):
    """From the handler: an exception may be raised inside an import or below C++ code."""
    line = f"stopped by {number.name}; run the same command again to continue\n"
    assert signalled("start", number) == (0, "left\n" + line, "")


def test_a_second_interrupt_is_one_line():
    code, out, err = signalled(
        "defer", signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT, pause=0.7
    )
    assert (code, out) == (1, "left\n")
    assert err.startswith(
        "error: interrupted by a second SIGINT: what was learnt since the last checkpoint is lost; "
    )
    assert err.count("\n") == 1


def test_signals_while_there_is_something_to_lose():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with StopSignal() as stop:
        stop.defer()
        assert not stop.requested
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
        # a launcher hands on what the terminal has sent as well: one interrupt
        signal.raise_signal(signal.SIGINT)
        assert (stop.requested, stop.name) == (True, "SIGHUP")
    assert [
        signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    ] == before


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_end_of_a_process_is_bounded():
    """A thread of a library that never ends, and a signal after the work is done."""
    script = (
        "import threading, signal, time\nfrom ttt_jax.process.signals import end_process\n"
        "threading.Thread(target=time.sleep, args=[60]).start()\n"
        "threading.Timer(0.2, signal.raise_signal, [signal.SIGTERM]).start()\nend_process(3, 1.0)"
    )
    begin = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "", "")
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("removed", ["file", "folder"])
def test_a_file_of_lines_that_is_removed_is_begun_anew(tmp_path, removed):
    folder = tmp_path / "run"
    folder.mkdir()
    file = LineFile(folder / "metrics.jsonl")
    assert file.append({"step": 1})
    assert not file.lost_now()
    (folder / "metrics.jsonl").unlink()
    if removed == "folder":
        folder.rmdir()
        assert not file.append({"step": 2})
        folder.mkdir()
    assert file.append({"step": 3})
    assert (file.lost_now(), file.lost_now()) == (True, False)
    steps = [
        json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == ([3] if removed == "file" else [2, 3])
    file.close()


def test_numbers_that_json_does_not_have_are_no_reason_to_fail(tmp_path):
    with EventLog(tmp_path, lambda text: None) as events:
        events("a", ratio=float("inf"), parts=[{"x": float("nan")}, (-float("inf"), 1.5)])
    (event,) = read_events(tmp_path)
    assert (event["ratio"], event["parts"]) == ("inf", [{"x": "nan"}, ["-inf", 1.5]])
