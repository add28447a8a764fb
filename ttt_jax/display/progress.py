"""A progress bar on the terminal for work that takes more than two seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_DELAY = 2.0  # seconds before anything is shown


@contextlib.contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yields `advance_to(done)`. The bar is transient, on stderr, and absent when that is not a
    terminal.
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
    task, begin, shown = bar.add_task(title, total=total), time.monotonic(), False

    def advance_to(done: int) -> None:
        nonlocal shown
        bar.update(task, completed=done)
        if not shown and time.monotonic() - begin > _DELAY:
            bar.start()
            shown = True
        if shown and done >= total:  # what follows may print
            bar.stop()

    try:
        yield advance_to
    finally:
        if shown:
            bar.stop()
