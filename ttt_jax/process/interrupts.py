"""Ctrl-C, SIGTERM and SIGHUP while a stream is read or written: not in the middle of a step, which
would lose its state."""

from __future__ import annotations

import signal
import threading
from types import TracebackType
from typing import Any

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Interrupt:
    """A handler for Ctrl-C of a program that goes on afterwards: it raises KeyboardInterrupt, and
    never in the middle of a step, however often it comes.
    """

    interrupts = waits = True

    def __call__(self, number: int, frame: Any) -> None:
        raise KeyboardInterrupt


class HeldBack:
    """A context manager that holds the first signal back until its block is left, and hands it on
    then.

    The block looks at `requested` where it can stop, and stops. A second signal is handed on at
    once, in the middle of a step, unless its handler has an attribute `waits`. Only handlers that
    raise KeyboardInterrupt are replaced: Python's own, and those with an attribute `interrupts`.
    All others stay as they are, and so does everything outside the main thread.
    """

    def __init__(self) -> None:
        self.requested = False
        self._number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> HeldBack:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler is signal.default_int_handler or getattr(handler, "interrupts", False):
                    self._before[number] = handler
                    signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.requested and error is None:
            self._before[self._number](self._number, None)

    def _handle(self, number: int, frame: Any) -> None:
        again, self.requested, self._number = self.requested, True, number
        if again and not getattr(self._before[number], "waits", False):
            self._before[number](number, frame)
