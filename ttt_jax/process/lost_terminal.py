"""A terminal that may be lost: what is printed never ends a run, and what libraries print about a
failure is said once.

Imports only the standard library.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

# A disk may have room again; a reader that has gone does not come back.
_MAY_RETURN = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.EINTR, errno.EIO)


class Unbreakable:
    """A text stream whose `write` and `flush` never raise.

    While the sink takes nothing (a full disk), lines wait in its buffer, and are dropped when that
    is full; the first one that is taken again says so. When its reader is gone for good (a closed
    pipe), all later output goes to the null device.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self._gap = stream, False

    def write(self, text: str) -> int:
        try:
            if self._gap and text:
                self._stream.flush()
                self._gap = False
                self._stream.write(
                    "(this output could not be written for a while: lines may be missing above)\n"
                )
            self._stream.write(text)
        except (OSError, ValueError) as error:
            self._failed(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._failed(error)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _failed(self, error: Exception) -> None:
        self._gap = True
        if getattr(error, "errno", None) not in _MAY_RETURN:
            _to_null(self._stream)


@contextlib.contextmanager
def unbreakable_output() -> Iterator[None]:
    """Make `sys.stdout` and `sys.stderr` unbreakable; on leaving, what they cannot take is thrown
    away, not an exit code.
    """
    _open_closed()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Unbreakable(stream or io.StringIO()) for stream in before)
    mine = sys.stdout, sys.stderr
    try:
        yield
    finally:
        for stream in mine:
            try:
                stream._stream.flush()
            except (OSError, ValueError):
                _to_null(stream._stream)
        sys.stdout, sys.stderr = before


def _open_closed() -> None:
    """Open what was closed: a file that the run opens must not get the number of a closed standard
    stream: libraries print there.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _to_null(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        number = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, number)
        finally:
            os.close(null)
        stream.flush()


# ------------------------------------------------------------------- what libraries say of failures


@contextlib.contextmanager
def quiet_background(last: bool = False) -> Iterator[None]:
    """Keep tracebacks of background threads off the terminal for failures that are reported in one
    line elsewhere.

    A save that fails leaves, in Orbax and tensorstore, futures that nobody asks and callbacks into
    a closed event loop; `Saver` has reported it by then. A full disk kills TensorBoard's
    writer, which `MetricsLogger` reports. Another thread that the system fails is one line, once
    for each text.

    Args:
      last: what comes after the block is the end of the process, where Python collects such
        futures: it stays quiet.
    """
    said: set[str] = set()
    old_unraisable, old_thread = sys.unraisablehook, threading.excepthook
    asyncio_log, never_retrieved = logging.getLogger("asyncio"), _NeverRetrieved()

    def unraisable(found: Any) -> None:
        if not (
            isinstance(found.exc_value, RuntimeError)
            and str(found.exc_value) == "Event loop is closed"
        ):
            old_unraisable(found)

    def thread_failed(found: Any) -> None:
        if not isinstance(found.exc_value, OSError):
            old_thread(found)
            return
        module = getattr(type(found.thread), "__module__", "")
        text = f"warning: a thread of {module} ended: {found.exc_value}"
        if not module.startswith("tensorboardX") and text not in said:
            said.add(text)
            print(text, file=sys.stderr, flush=True)

    sys.unraisablehook, threading.excepthook = unraisable, thread_failed
    asyncio_log.addFilter(never_retrieved)
    try:
        yield
    finally:
        if not last:
            sys.unraisablehook, threading.excepthook = old_unraisable, old_thread
            asyncio_log.removeFilter(never_retrieved)


class _NeverRetrieved(logging.Filter):
    """Futures whose exception nobody asked for: the first one that failed was reported."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (
            "never retrieved" in record.getMessage()
            and isinstance(error, OSError | ValueError | RuntimeError)
        )
