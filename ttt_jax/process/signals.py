"""SIGTERM, SIGINT and SIGHUP: leave at once while there is nothing to lose, else after a
checkpoint.

Nothing is raised from a handler: it may run inside an import or below C++ code, where an exception
ends as another error or as an abort. While there is nothing to lose the handler itself ends the
process; later it leaves a note.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn

# seconds within which a second SIGINT is the same one: a terminal and a launcher may both send it
_SAME = 0.5


class Stopped(BaseException):
    """Raised between pieces of work, never by a handler: no `except Exception` catches it."""


class StopSignal:
    """A context manager that takes over SIGTERM, SIGINT and SIGHUP (unless `nohup` has it ignored)
    and puts them back.

    Until `defer`, a signal ends the process with exit code 0 and one line, after calling what is in
    `before_leaving`. From then on it sets `requested`, which the training loop reads after each
    step; only a second SIGINT ends the process at once, with exit code 1 and one line.

    Args:
      last: what comes after the block is the end of the process, and signals are ignored there.
    """

    def __init__(self, last: bool = False) -> None:
        self.requested, self.name = False, ""
        self.before_leaving: list[Callable[[], object]] = []
        self._deferred, self.last = False, last
        self._before: dict[int, Any] = {}
        self._interrupted: float | None = None  # when the first SIGINT came

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.last else handler)

    def defer(self) -> None:
        """Let signals wait: from here on there is something to save."""
        self._deferred = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name, again = signal.Signals(number).name, False
        self.requested, self.name = True, self.name or name
        if number == signal.SIGINT:
            now = time.monotonic()
            again = self._interrupted is not None and now - self._interrupted > _SAME
            self._interrupted = self._interrupted or now
        if not self._deferred:
            self._leave(0, 1, f"stopped by {name}; run the same command again to continue")
        if again:
            text = (
                f"error: interrupted by a second {name}: what was learnt since the last "
                "checkpoint is lost; "
            )
            self._leave(1, 2, text + "run the same command again to continue from there")

    def _leave(self, code: int, descriptor: int, line: str) -> None:
        for call in self.before_leaving:
            with contextlib.suppress(Exception):
                call()
        with contextlib.suppress(Exception):
            if os.isatty(1):
                os.write(1, b"\x1b[?25h\n")  # a progress display hides the cursor
        with contextlib.suppress(Exception):
            os.write(descriptor, f"{line}\n".encode())
        os._exit(code)


def end_process(code: int, seconds: float = 60.0) -> NoReturn:
    """End the interpreter with this exit code, at the latest after `seconds`. Signals change
    nothing any more.

    Threads and exit handlers of libraries that have nothing to do may wait for one another for
    good.
    """
    import threading

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    def end() -> None:
        time.sleep(seconds)
        os._exit(code)

    threading.Thread(target=end, name="end", daemon=True).start()
    sys.exit(code)
