"""A lost terminal or a full disk below the log never ends a run, and libraries' tracebacks stay off
the terminal.
"""

import errno
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from ttt_jax.process.lost_terminal import Unbreakable, quiet_background, unbreakable_output

ROOT = Path(__file__).parents[2]
PRINTS = """
import sys
from ttt_jax.process.lost_terminal import unbreakable_output
with unbreakable_output():
    for i in range(3000):
        print("a line of a log", i, flush=True)
        print("and a warning", file=sys.stderr)
    assert sys.stdout.isatty() in (True, False)
    open(sys.argv[1], "w").write("done")
"""


@pytest.mark.parametrize(
    "command",
    [
        "python CODE > /dev/full 2> /dev/full",
        "python CODE | head -1",
        "python CODE 2>&1 | head -1",
        "python CODE >&- 2>&-",
    ],
)
def test_a_job_outlives_its_terminal(command, tmp_path):
    """Exit code 0 (Python's own is 120 when the last flush fails), and nothing on stderr but what
    belongs there.
    """
    done = tmp_path / "done"
    (tmp_path / "code.py").write_text(PRINTS)
    command = command.replace("python CODE", f"{sys.executable} {tmp_path / 'code.py'} {done}")
    script = f"set -o pipefail; {command}"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    assert done.read_text() == "done"
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr


class Disk:
    """A stream on a disk that is full for a while."""

    def __init__(self):
        self.full, self.text = False, ""

    def write(self, text):
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.text += text

    def flush(self):
        self.write("")


def test_what_a_full_disk_swallows_is_said():
    disk = Disk()
    stream = Unbreakable(disk)
    stream.write("one\n")
    disk.full = True
    for _ in range(3):
        assert stream.write("lost\n") == 5
    disk.full = False
    stream.write("two\n")
    assert (
        disk.text
        == "one\n(this output could not be written for a while: lines may be missing above)\ntwo\n"
    )


def test_the_streams_are_put_back():
    before = sys.stdout, sys.stderr
    with unbreakable_output():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before


def test_failures_that_are_reported_elsewhere_say_nothing(capsys):
    unraisable, thread_failed = [], []
    hooks = sys.unraisablehook, threading.excepthook
    sys.unraisablehook, threading.excepthook = unraisable.append, thread_failed.append
    log = logging.getLogger("asyncio")
    try:
        with quiet_background():
            for text in ("Event loop is closed", "something else"):
                sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
            assert [str(found.exc_value) for found in unraisable] == ["something else"]
            writer = type(
                "Writer", (threading.Thread,), {"__module__": "tensorboardX.event_file_writer"}
            )()
            full = OSError(errno.ENOSPC, "No space left on device")
            for thread in (writer, threading.Thread(), threading.Thread()):
                threading.excepthook(SimpleNamespace(exc_value=full, thread=thread))
            threading.excepthook(
                SimpleNamespace(exc_value=ValueError("a bug"), thread=threading.Thread())
            )
            assert [str(found.exc_value) for found in thread_failed] == ["a bug"]
            said = capsys.readouterr().err
            assert (
                said == "warning: a thread of threading ended: [Errno 28] No space left on device\n"
            )
            kept = lambda text, error: log.filter(
                log.makeRecord("asyncio", 40, "", 0, text, (), (type(error), error, None))
            )
            assert not kept("Future exception was never retrieved", full)
            assert kept("Future exception was never retrieved", TypeError("a bug"))
            assert kept("something else", full)
        assert kept("Future exception was never retrieved", full)
        assert sys.unraisablehook == unraisable.append
    finally:
        sys.unraisablehook, threading.excepthook = hooks


FUTURE = """
import asyncio, errno, sys
from ttt_jax import train
from ttt_jax.process.signals import StopSignal, end_process

def command(argv, stop):
    future = asyncio.Future(loop=asyncio.new_event_loop())
    future.set_exception(OSError(errno.ENOSPC, "No space left on device"))
    future.add_done_callback(lambda _, me=[future]: kept)  # a cycle: it goes with the interpreter
    return 3

kept, train._command = [], command
end_process(train.main([], StopSignal(last=True)))
"""


def test_a_future_that_ends_with_the_process_says_nothing():
    command = [sys.executable, "-c", FUTURE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")
