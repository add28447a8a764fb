"""A token counter on the terminal for work that takes more than two seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_DELAY = 2.0  # seconds before anything is shown


class TokenProgress:
    """`with TokenProgress("Tokenising") as progress: progress.add(tokens)`; silent when stderr is
    no terminal.
    """

    def __init__(self, title: str) -> None:
        self._title, self._tokens = title, 0
        self._begin = self._shown = time.monotonic()
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._visible = False

    def add(self, tokens: int) -> None:
        self._tokens += tokens
        now = time.monotonic()
        if self._terminal and now - self._begin > _DELAY and now - self._shown > 0.5:
            rate = self._tokens / (now - self._begin)
            line = f"{self._title}: {self._tokens / 1e6:,.1f}M tokens, {rate / 1e6:.2f}M/s"
            print(f"\r{line:<60}", end="", file=sys.stderr, flush=True)
            self._shown, self._visible = now, True

    def __enter__(self) -> TokenProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._visible:
            print(file=sys.stderr)
