"""Panics of a library written in Rust: one line, in the place of its stack traces on standard
error.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator

from ttt_jax.errors import DataError
from ttt_jax.files.text import one_line

_lock = threading.Lock()  # there is one standard error


@contextlib.contextmanager
def panics_as_errors(what: str, fix: str) -> Iterator[None]:
    """Raise DataError, "what (the panic's first line); fix", for a panic inside.

    A panic writes its message and a stack trace a thread to standard error before Python hears of
    it. So what is written there meanwhile is held back, and shown afterwards unless it is a
    panic's.
    """
    with _lock, _held_back() as shown:
        try:
            yield
        except BaseException as error:  # it is no Exception
            if type(error).__name__ != "PanicException":
                raise
            shown.clear()
            reason = one_line(error, end="")
            raise DataError(f"{what} ({reason}); {fix}") from None


@contextlib.contextmanager
def _held_back() -> Iterator[list[bool]]:
    """Hold back what is written to standard error; show it at the end unless the list has been
    emptied by then.
    """
    shown = [True]
    try:
        usual = os.dup(2)
    except OSError:  # closed
        yield shown
        return
    try:
        with tempfile.TemporaryFile() as held:
            os.dup2(held.fileno(), 2)
            try:
                yield shown
            finally:
                os.dup2(usual, 2)
                held.seek(0)
                if shown and (text := held.read()):
                    with contextlib.suppress(OSError):  # nobody reads it any more
                        os.write(2, text)
    finally:
        os.close(usual)
