"""The command line: `ttt-jax COMMAND`, same as `python -m ttt_jax COMMAND`.

Every command checks its arguments and reads its files' headers before jax compiles anything. Exit code: 0 done, 1 failed,
2 wrong arguments, config, data or checkpoint; each with one line on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

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


@cli.command(
    epilog="""
    ttt-jax convert Qwen3-4B Qwen3-4B-orbax --to orbax --verify
    ttt-jax convert Qwen3-4B Qwen3-4B-ttt --to hf --ttt.layers 0,6,12,18,24,30 --ttt.chunk_size 1024
    ttt-jax convert runs/qwen3 out --to hf --dtype bfloat16 --shard-gb 4
    """
)
@click.argument("source", type=click.Path(path_type=Path), metavar="SRC")
@click.argument("output", type=click.Path(path_type=Path), metavar="DST")
@click.option("--to", type=click.Choice(["orbax", "hf"]), required=True, help="Format of DST.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of every tensor.  [default: as in SRC]")
@click.option("--shard-gb", type=click.FloatRange(min=0, min_open=True), default=5.0, show_default=True, help="Of --to hf.")
@click.option("--ttt.layers", "layers", metavar="0,6,12", help="Give a plain model TTT on these layers.")
@click.option("--ttt.chunk_size", "chunk_size", type=int, help="Tokens between two updates.")
@click.option("--ttt.lr", "lr", type=float, help="Inner learning rate.")
@click.option("--ttt.target", "target", type=click.Choice(["hidden_states", "input_embed"]), help="Source of the target.")
@click.option("--ttt.proj", "proj", type=bool, metavar="true|false", help="Multiply the target by W_target.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the TTT parameters' initialisation.")
@click.option("--verify", is_flag=True, help="Compare the logits of both sides in float32; exit 1 when they differ.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it is a model folder.")
def convert(source: Path, output: Path, to: str, dtype: str | None, shard_gb: float, seed: int, verify: bool, overwrite: bool,
            **ttt: object) -> int:  # fmt: skip
    """Convert a model between Hugging Face folders and Orbax.

    SRC is a Hugging Face folder, a converted folder, or a run folder of train.py. Tensors are streamed: the peak of host
    memory is a part of the largest shard (--verify loads the model). DST appears complete or not at all.
    """
    from ttt_jax.convert import VERIFY_LIMIT
    from ttt_jax.convert import convert as run
    from ttt_jax.errors import VerificationError

    given = {name: value for name, value in ttt.items() if value is not None}
    options = {"ttt": given, "seed": seed, "verify": verify, "overwrite": overwrite}
    try:
        report = run(source, output, to=to, dtype=dtype, max_shard_bytes=max(1, round(shard_gb * 1e9)), **options)
    except VerificationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = f"{report.tensors} tensors, {report.nbytes / 1e6:,.1f} MB"
    print(f"{source} -> {output}: {size} in {report.seconds:.1f} s" + f", {report.fresh} of them new" * (report.fresh > 0))
    if report.relative_rms is not None:
        print(f"verify: relative RMS of the logits {report.relative_rms:.1e} (limit for an unchanged dtype: {VERIFY_LIMIT:g})")
    return 0


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
