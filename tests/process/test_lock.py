"""One writer a folder: who is refused, who may take over, and what is left behind."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ttt_jax.errors import TrainingError, UserError
from ttt_jax.process import lock as module
from ttt_jax.process.lock import Lock, RunLock, read_holder
from ttt_jax.process.output_lock import one_writer

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from ttt_jax.process.lock import Lock
with Lock(Path(sys.argv[1]), "folder x", "choose another name"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / ".lock"


@pytest.fixture
def other(path):
    """Another process that holds the lock."""
    command, env = [sys.executable, "-c", HOLD, str(path)], os.environ | {"PYTHONPATH": "."}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def lock_of(path, **options):
    return Lock(path, "folder x", "choose another name", **options)


def refusal(path, **options):
    with pytest.raises(UserError) as error, lock_of(path, **options):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_second_writer_is_refused_by_the_first_ones_name(path, other):
    before = path.read_bytes()
    message = refusal(path)
    assert message.startswith(f"folder x: process {other.pid} on {os.uname().nodename} (python")
    assert message.endswith("is writing it; wait for it, stop it, or choose another name")
    assert path.read_bytes() == before, "a refusal writes nothing"
    assert os.listdir(path.parent) == [".lock"]


def test_one_that_was_killed_is_taken_over_at_once(path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert read_holder(path)["pid"] == other.pid
    with lock_of(path) as lock:
        assert read_holder(path)["pid"] == os.getpid()
        assert lock.lost() is None
    assert not path.exists()


def test_a_number_that_another_process_got_later_is_not_the_holder(path, other):
    """The file names a process that runs, but that has started at another time."""
    holder = read_holder(path)
    other.kill()
    other.wait()
    alive = subprocess.Popen(["sleep", "60"])
    try:
        path.write_text(json.dumps(holder | {"pid": alive.pid}))
        with lock_of(path):
            pass
        path.write_text(
            json.dumps(holder | {"pid": alive.pid, "started": module._started(alive.pid)})
        )
        assert f"process {alive.pid} on" in refusal(path)
    finally:
        alive.kill()
        alive.wait()


def no_flock(monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_file_system_without_locks_goes_by_the_content(path, other, monkeypatch):
    no_flock(monkeypatch)
    assert f"process {other.pid} on" in refusal(path)
    other.kill()
    other.wait()
    with lock_of(path):
        assert read_holder(path)["pid"] == os.getpid()
    assert not path.exists()


@pytest.mark.parametrize("alive", [True, False])
def test_a_holder_on_another_machine_is_watched(path, monkeypatch, alive):
    """Its clock says nothing: the date in the file is of the future, the time of the file of the
    past.
    """
    monkeypatch.setattr(module, "WATCH", 0.6)
    holder = module._describe_me() | {
        "host": "far",
        "machine": "another boot",
        "date": "2199-01-01T00:00:00+00:00",
    }
    path.write_text(json.dumps(holder))
    os.utime(path, (1, 1))
    said, end = [], threading.Event()

    def beat():
        while alive and not end.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        if alive:
            assert "on far" in refusal(path, tell=said.append)
            assert read_holder(path) == holder
        else:
            with lock_of(path, tell=said.append):
                assert read_holder(path)["host"] == os.uname().nodename
            assert said[1].endswith("is gone; its lock is taken over")
    finally:
        end.set()
        thread.join()
    assert "on far" in said[0]
    assert "looking for 0.6 s whether it is alive" in said[0]


def test_a_holder_touches_its_file_so_that_other_machines_see_it(path, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.02)
    with lock_of(path):
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 10
        while os.stat(path).st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_what_is_in_the_file_does_not_matter_to_the_one_who_gets_it(path):
    for content in (b"", b"\xff{", b"[1]", b'{"pid": "x"}', b"[" * 60_000):
        path.write_bytes(content)
        with lock_of(path) as lock:
            assert lock.lost() is None
            assert read_holder(path)["pid"] == os.getpid()


def test_nothing_in_the_file_reaches_the_terminal_raw(path, other):
    path.write_text(
        json.dumps(read_holder(path) | {"command": "\x1b]0;x\x07", "host": "a\nb" * 1000})
    )
    message = refusal(path)
    assert "\x1b" not in message
    assert len(message) < 600


def test_a_link_is_not_followed(path, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path.symlink_to(victim)
    assert "cannot be written" in refusal(path)
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in refusal(path)
    assert victim.read_text() == "precious"


def test_folders_that_were_made_for_the_lock_go_again(tmp_path):
    with lock_of(tmp_path / "a" / "b" / ".lock"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert not (tmp_path / "a").exists()
    with lock_of(tmp_path / "a" / "b" / ".lock"):
        (tmp_path / "a" / "kept").write_text("")
    assert os.listdir(tmp_path / "a") == ["kept"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "cannot be written (Not a directory" in refusal(tmp_path / "file" / "x" / ".lock")
    real = os.open

    def read_only(name, flags, *mode):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(name, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    message = refusal(tmp_path / ".lock")
    assert message == (
        f"folder x: cannot be written (Read-only file system: {tmp_path}/.lock); make it writable "
        "or choose another name"
    )


def test_a_full_disk_keeps_nobody_from_starting(path, monkeypatch):
    """The file cannot be filled; the system's lock holds all the same."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with lock_of(path) as lock:
        assert lock.lost() is None
        assert "another process is writing it" in refusal(path)
    assert not path.exists()


def test_a_run_whose_folder_vanishes_or_becomes_anothers_stops(tmp_path):
    run = tmp_path / "run"
    with RunLock(run, main=True) as lock:
        (run / "config.yaml").write_text("")
        lock.check()
        (run / ".lock").rename(tmp_path / "away")
        with pytest.raises(
            TrainingError, match=r"run folder .*run: its lock file .* was removed; stopped"
        ):
            lock.check()
        (run / ".lock").write_text(json.dumps(module._describe_me() | {"pid": 7, "host": "far"}))
        with pytest.raises(TrainingError, match=r"process 7 on far .* has taken it over"):
            lock.check()
        run.rename(tmp_path / "moved")
        with pytest.raises(
            TrainingError, match="it has vanished; stopped, because what is learnt cannot be saved"
        ) as error:
            lock.check()
        assert "\n" not in str(error.value)
    assert (tmp_path / "moved" / ".lock").exists(), "another one's file stays"


# ------------------------------------------------------------------------------------------ outputs


def test_an_output_leaves_no_half_written_parts(tmp_path):
    """Those of killed writers go at the start, one's own at the end; other files stay."""
    out = tmp_path / "out"
    for name in (".out.tmp.npz", ".out.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / ".out.tmp-123").mkdir()
    (tmp_path / ".out.tmp-123" / "shard").write_text("")
    others = {".out.tmp.lock", ".outer.tmp", "out.tmp", ".out.tmpx", ".out.txt"}
    for name in others:
        (tmp_path / name).write_text("")

    def interrupted():
        with one_writer(out, "--out"):
            assert set(os.listdir(tmp_path)) == others | {".out.lock"}
            (tmp_path / f".out.tmp-{os.getpid()}").mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert set(os.listdir(tmp_path)) == others


def test_an_output_that_was_only_moved_out_of_the_way_comes_back(tmp_path):
    (tmp_path / ".out.old-12").mkdir()
    (tmp_path / ".out.old-12" / "weights").write_text("the only copy")
    with one_writer(tmp_path / "out", "--out"):
        assert (tmp_path / "out" / "weights").read_text() == "the only copy"
    (tmp_path / ".out.old").mkdir()
    with one_writer(tmp_path / "out", "--out"):
        assert os.listdir(tmp_path / "out") == ["weights"]
    assert os.listdir(tmp_path) == ["out"]


def test_two_writers_of_one_output(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with (
        one_writer(tmp_path / "out", "--out"),
        pytest.raises(
            UserError, match="is writing it; wait for it, stop it, or choose another one"
        ),
        one_writer(tmp_path / "link" / "out", "--out"),
    ):
        pass
