"""A folder that appears complete or not at all."""

import contextlib
import threading
import time

import pytest

from ttt_jax.files.new_folder import new_folder


def test_writes_that_come_late_leave_nothing(tmp_path):
    """Threads of a library go on for a moment behind the write that has failed."""
    first = threading.Event()

    def write(parts):
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            with contextlib.suppress(FileNotFoundError):  # it is being removed
                (parts / "array").mkdir(parents=True, exist_ok=True)
            first.set()
            time.sleep(0.01)

    def fail():
        with new_folder(tmp_path / "out") as parts:
            threads.append(threading.Thread(target=write, args=(parts,)))
            threads[0].start()
            assert first.wait(10)
            raise OSError("full")

    threads = []
    with pytest.raises(OSError, match="full"):
        fail()
    threads[0].join()
    assert not list(tmp_path.iterdir())
