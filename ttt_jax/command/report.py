"""`ttt-jax report`."""

from __future__ import annotations

from pathlib import Path

import click

from ttt_jax.command.options import EXISTING, Command, examples
from ttt_jax.terminal import printable


@click.command(
    cls=Command,
    epilog=examples("ttt-jax report runs/books", "ttt-jax report runs/books --out books.html"),
)
@click.argument("run", type=EXISTING, metavar="RUN")
@click.option(
    "--out", type=click.Path(path_type=Path), help="The page.  [default: RUN/report.html]"
)
def report(run: Path, out: Path | None) -> None:
    """One HTML page of a training run, finished or not: curves, warnings, quarantined records,
    configuration, environment.
    """
    from ttt_jax.run.page import write_page

    print(printable(f"report: {write_page(run, out)}"))
