"""SIGTERM and SIGINT: leave at once while there is nothing to lose, else after a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class Stopped(BaseException):
    """Raised by a signal while the run has nothing to save. Like KeyboardInterrupt, no `except Exception` catches it."""


class StopSignal:
    """A context manager that takes over SIGTERM and SIGINT and puts the old handlers back.

    Until `defer` and after `at_once`, a signal raises `Stopped` wherever the main thread is. In between it sets
    `requested`, which the training loop reads after each step; a second SIGINT interrupts at once all the same.
    """

    def __init__(self) -> None:
        self.requested, self.name = False, ""
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From here on there is something to save. Raises `Stopped` when a signal came before."""
        if self.requested:  # and `Stopped` was swallowed, in a destructor for instance
            raise Stopped
        self._deferred = True

    def at_once(self) -> None:
        """Everything is saved again. Raises `Stopped` when a signal came in the meantime."""
        self._deferred = False
        if self.requested:
            raise Stopped

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.requested, self.name = self.requested, True, signal.Signals(number).name
        if not self._deferred:
            raise Stopped
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
