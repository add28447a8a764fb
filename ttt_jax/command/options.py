"""What the commands share: how their help looks, and options that several of them have."""

from __future__ import annotations

from pathlib import Path

import click


class Command(click.Command):
    """A command whose help keeps the line breaks of its examples."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.splitlines():
                    formatter.write(f"  {line}\n")


def examples(*lines: str) -> str:
    """Make the epilog of a command's help, one example a line."""
    return "\n".join(lines)


EXISTING = click.Path(path_type=Path)
MODEL = click.option(
    "--model",
    "folder",
    required=True,
    type=EXISTING,
    help="Hugging Face folder, converted checkpoint or run folder.",
)
DTYPE = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Parameters and compute.  [default: float32 on CPUs]",
)
NO_TTT = click.option("--no-ttt", is_flag=True, help="Switch the adaptation off.")
PIECE = click.option(
    "--piece", type=click.IntRange(1), help="Tokens read at a time, rounded to chunks."
)
IDS = click.option(
    "--ids", type=EXISTING, help="Token ids: an integer array [T] or [B, T] in .npy."
)
