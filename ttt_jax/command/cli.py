"""The command line: `ttt-jax COMMAND`, same as `python -m ttt_jax COMMAND`.

Every command checks its arguments and reads its files' headers before jax compiles anything; none
imports jax before it is invoked. Exit codes are in running.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

from ttt_jax import __version__
from ttt_jax.command.chat import chat
from ttt_jax.command.convert import convert
from ttt_jax.command.evaluate import evaluate
from ttt_jax.command.generate import generate
from ttt_jax.command.memory import memory
from ttt_jax.command.plan import plan
from ttt_jax.command.report import report
from ttt_jax.command.running import run
from ttt_jax.command.score import score
from ttt_jax.command.train import train


def _show_version(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        import importlib.metadata

        click.echo(f"ttt-jax, version {__version__} (jax {importlib.metadata.version('jax')})")
        context.exit()


@click.group(
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
        "show_default": True,
    },
    commands=[train, convert, score, generate, chat, evaluate, memory, plan, report],
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    show_default=False,
    callback=_show_version,
    help="Show the versions of ttt-jax and jax.",
)
def cli() -> None:
    """In-Place TTT: train, convert, score, generate, chat, evaluate, memory, plan, report."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code (running.py)."""
    return run(cli, "ttt-jax", argv)
