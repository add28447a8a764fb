"""Tables of text, shown in the same way in the terminal and in HTML pages (html_page.py)."""

from __future__ import annotations

import io
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from ttt_jax.terminal import printable

_WIDTH = 150  # columns when the output is a file


class Table(NamedTuple):
    title: str
    note: str
    headings: list[str]
    rows: list[list[str]]


def number(value: float | None, form: str = ".4f", digits: int = 6) -> str:
    """Write a number rounded to `digits`, without a sign when it is then zero; "-" for None."""
    return "-" if value is None else format(round(value, digits) + 0.0, form)


def print_tables(
    tables: list[Table], console: Console | None = None, first: Literal["left", "right"] = "left"
) -> None:
    """Print tables; their texts may be anybody's.

    Args:
      first: how the first column is justified; the others are justified to the right.
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=_WIDTH)
    for table in tables:
        rich = RichTable()
        for n, heading in enumerate(table.headings):
            justify = first if n == 0 else "right"
            rich.add_column(_plain(heading), justify=justify, no_wrap=n == 0)
        for row in table.rows:
            rich.add_row(*map(_plain, row))
        # Not as the table's own title and caption, which are wrapped to its width.
        console.print(_plain(table.title), style="bold")
        console.print(rich)
        if table.note:
            console.print(_plain(table.note), style="table.caption")


def table_text(table: Table, first: Literal["left", "right"] = "left") -> str:
    """Lay a table out as lines, for a place that takes text only."""
    file = io.StringIO()
    print_tables([table], Console(file=file, width=_WIDTH), first)
    return file.getvalue().rstrip()


def _plain(text: str) -> Text:
    """Take a text as it is: no markup, and nothing that a terminal obeys."""
    return Text(printable(text))
