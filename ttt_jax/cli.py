"""The command line: `ttt-jax COMMAND`, same as `python -m ttt_jax COMMAND`.

Every command checks its arguments and reads its files' headers before jax compiles anything. Exit code: 0 done, 1 failed,
2 wrong arguments, config, data or checkpoint; each with one line on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from ttt_jax import __version__
from ttt_jax.errors import TrainingError, UserError


class _Epilog(click.Command):
    """A command whose help keeps the line breaks of its examples."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.strip().splitlines():
                    formatter.write(f"  {line.strip()}\n")


class _Group(click.Group):
    command_class = _Epilog


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="ttt-jax")
def cli() -> None:
    """In-Place Test-Time Training: convert checkpoints, score, generate, evaluate, plan."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    try:
        code = cli.main(args=None if argv is None else list(argv), prog_name="ttt-jax", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 0
    except click.ClickException as error:
        where = f"{error.ctx.command_path}: " if isinstance(error, click.UsageError) and error.ctx else ""
        print(f"error: {where}{' '.join(error.format_message().split())}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, TrainingError) else 2
    except (click.Abort, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
        return 1
