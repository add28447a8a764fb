"""What the commands share: how their help looks, and options that several of them have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ttt_jax.inference.sampling import Sampling


class _Examples(click.Command):
    """Its help keeps the line breaks of its examples."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.splitlines():
                    formatter.write(f"  {line}\n")


class Command(_Examples):
    """A command with examples."""


class Group(_Examples, click.Group):
    """A group of commands with examples."""


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
READ = click.option(
    "--read", "documents", multiple=True, type=EXISTING, help="UTF-8 text file to read first."
)
CONTEXT = click.option(
    "--context",
    type=click.IntRange(1),
    help="Read texts into the fast weights alone, with attention anew every so many tokens.",
)
MEMORY = click.option(
    "--memory",
    metavar="M[,M...]",
    help="Fast weights to begin with, added up; with --no-ttt they stay as they are.",
)


_MESH = {
    "data": "Copies of the model, each on rows of its own.",
    "fsdp": "Devices that share the parameters, split by D.",
    "context": "Devices that share the tokens of a long prompt, and caches.",
    "tensor": "Devices that share heads, F and the fast weights.",
}


def mesh_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --mesh.data, --mesh.fsdp, --mesh.context and --mesh.tensor. The command gets `mesh`, a
    `MeshConfig`; None where all are 1.
    """

    @functools.wraps(command)
    def with_mesh(*args: Any, **options: Any) -> Any:
        sizes = {axis: options.pop(f"mesh_{axis}") for axis in _MESH}
        if all(size == 1 for size in sizes.values()):
            return command(*args, mesh=None, **options)
        from ttt_jax.config import MeshConfig

        return command(*args, mesh=MeshConfig(**sizes), **options)

    for axis, text in reversed(_MESH.items()):
        with_mesh = click.option(
            f"--mesh.{axis}", f"mesh_{axis}", type=click.IntRange(1), default=1, help=text
        )(with_mesh)
    return with_mesh


def sampling_options(command):
    """Add --temperature, --top-k, --top-p and --min-p, the fields of `Sampling` in order."""
    for option in reversed(
        (
            click.option("--temperature", type=float, default=0.0, help="0 is greedy."),
            click.option("--top-k", type=int, help="Keep the k most likely tokens."),
            click.option(
                "--top-p",
                type=float,
                help="Keep the smallest set of tokens with this probability.",
            ),
            click.option(
                "--min-p",
                type=float,
                help="Keep tokens at least this much as likely as the best.",
            ),
        )
    ):
        command = option(command)
    return command


def sampling_of(options: dict[str, Any]) -> Sampling:
    """Make the settings that `sampling_options` asked for. Raises UserError out of range."""
    from ttt_jax.inference.sampling import Sampling

    return Sampling(*(options[name] for name in ("temperature", "top_k", "top_p", "min_p")))
