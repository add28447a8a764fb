"""A progress bar on the terminal for work that takes more than two seconds."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

_DELAY = 2.0  # seconds before anything is shown


@contextlib.contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yields `advance_to(done)`. The bar is transient, on stderr, and absent when that is not a
    terminal. It comes by the clock, and not with the first advance, which may be minutes away.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    text = TextColumn(f"{{task.description}} {{task.completed:,.0f}} of {{task.total:,.0f}} {unit}")
    bar = Progress(
        text, BarColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True
    )
    task, lock = bar.add_task(title, total=total), threading.Lock()
    wanted, shown = True, False

    def show() -> None:
        nonlocal shown
        with lock:
            if wanted:
                bar.start()
                shown = True

    def end() -> None:
        nonlocal wanted, shown
        timer.cancel()
        with lock:
            wanted = False
            if shown:
                bar.stop()
            shown = False

    def advance_to(done: int) -> None:
        bar.update(task, completed=done)
        if wanted and done >= total:  # what follows may print
            end()

    timer = threading.Timer(_DELAY, show)
    timer.daemon = True
    timer.start()
    try:
        yield advance_to
    finally:
        end()
