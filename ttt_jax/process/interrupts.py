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

    Fields:
      ready: it raises once, and then not before this is set again: more of them mean the same, and
        do not disturb what puts things in order.
    """

    interrupts = waits = True

    def __init__(self) -> None:
        self.ready = True

    def __call__(self, number: int, frame: Any) -> None:
        if self.ready:
            self.ready = False
            raise KeyboardInterrupt


class HeldBack:
    """A context manager that holds the first signal back until its block is left, and hands it on
    then.

    The block looks at `requested` where it can stop, and stops. A second signal is handed on at
    once, in the middle of a step, unless its handler has an attribute `waits`. Only handlers that
    raise KeyboardInterrupt are replaced: Python's own, and those with an attribute `interrupts`.
    All others stay as they are, and so does everything outside the main thread.

    Blocks may be nested. What came in the outer one is requested in the inner one from its
    beginning, and is handed on at its end: the outer block is told by the KeyboardInterrupt, and
    may put its things in order, undisturbed, while that passes through.
    """

    def __init__(self) -> None:
        self.requested = False
        self._number = 0
        self._before: dict[int, Any] = {}
        self._outer: HeldBack | None = None

    def __enter__(self) -> HeldBack:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler is signal.default_int_handler or getattr(handler, "interrupts", False):
                    self._outer = _owner(handler) or self._outer
                    self._before[number] = handler
                    signal.signal(number, self._handle)
        if (outer := self._outer) is not None and outer.requested:
            self.requested, self._number, outer.requested = True, outer._number, False
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # Ctrl-C that comes while Ctrl-C passes through is the same; SIGTERM is not.
        more = isinstance(error, KeyboardInterrupt) and self._number != signal.SIGINT
        if self.requested and (error is None or more):
            self._hand_on(self._number)

    def _handle(self, number: int, frame: Any) -> None:
        again, self.requested, self._number = self.requested, True, number
        if again and not self._waits(number):
            self._hand_on(number)

    _handle.interrupts = True  # pyright: ignore[reportFunctionMemberAccess]  (for an inner block)

    def _waits(self, number: int) -> bool:
        handler = self._before[number]
        outer = _owner(handler)
        return getattr(handler, "waits", False) if outer is None else outer._waits(number)

    def _hand_on(self, number: int) -> None:
        handler = self._before[number]
        outer = _owner(handler)
        if outer is None:
            handler(number, None)
        else:
            outer._hand_on(number)


def _owner(handler: Any) -> HeldBack | None:
    """Return the block whose handler this is, if it is one's."""
    owner = getattr(handler, "__self__", None)
    return owner if isinstance(owner, HeldBack) else None
