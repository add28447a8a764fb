"""`ttt-jax memory merge`, `base` and `lora`: memories into other engines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ttt_jax.command.options import EXISTING, Command, examples
from ttt_jax.process.output_lock import one_writer
from ttt_jax.terminal import printable

if TYPE_CHECKING:
    from ttt_jax.pretrained.source import Source

_DST = click.argument("output", metavar="DST", type=EXISTING)
_DTYPE = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    help="Of every tensor that is written.",
)
_SHARD = click.option(
    "--shard-gb", type=click.FloatRange(min=0, min_open=True), default=5.0, help="Of a file."
)
_BEST = (  # docs/lab/2026-12-01-engines-without-a-cap.md
    "half a memory was then best with a read_cap of 0.06 (ttt-jax memory scale M 1/2), a whole one "
    "with 0.2: docs/memory-engines.md"
)
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank, vLLM 0.32


@click.command(
    cls=Command,
    epilog=examples(
        "ttt-jax memory merge runs/books book.memory books-with-book",
        "ttt-jax memory merge checkpoints/qwen3 a.memory out --dtype bfloat16",
    ),
)
@click.argument("folder", metavar="MODEL", type=EXISTING)
@click.argument("path", metavar="M", type=EXISTING)
@_DST
@_DTYPE
@_SHARD
def merge(folder: Path, path: Path, output: Path, dtype: str, shard_gb: float) -> None:
    """Write MODEL's base architecture with W + dW: a plain Hugging Face folder without TTT."""
    from ttt_jax.display.tables import Table, print_tables
    from ttt_jax.memory.memory import Memory
    from ttt_jax.memory.merge import merge as run
    from ttt_jax.pretrained.source import open_source

    click.get_current_context().with_resource(one_writer(output, "DST"))
    source, shard = open_source(folder), max(1, round(shard_gb * 1e9))
    merged = run(source, Memory.load(path), output, dtype=dtype, max_shard_bytes=shard)
    rows = [[str(m.layer), f"{m.ratio:.3g}", f"{m.lost:.2e}"] for m in merged]
    note = f"lost: ||stored - (W + dW)|| / ||dW||, the error of rounding to {dtype}"
    print_tables([Table("Merged layers", note, ["layer", "||dW||/||W||", "lost"], rows)])
    _say_uncapped(source)
    print(printable(f"{output}"))


@click.command(
    cls=Command,
    epilog=examples(
        "ttt-jax memory base runs/books books-base --dtype bfloat16",
        "ttt-jax memory lora book.memory book-adapter --rank 32 --base books-base",
    ),
)
@click.argument("folder", metavar="MODEL", type=EXISTING)
@_DST
@_DTYPE
@_SHARD
def base(folder: Path, output: Path, dtype: str, shard_gb: float) -> None:
    """Write MODEL's base architecture without TTT and without a memory: what adapters go on."""
    from ttt_jax.memory.merge import merge as run
    from ttt_jax.pretrained.source import open_source

    click.get_current_context().with_resource(one_writer(output, "DST"))
    source, shard = open_source(folder), max(1, round(shard_gb * 1e9))
    run(source, None, output, dtype=dtype, max_shard_bytes=shard)
    _say_uncapped(source)
    print(printable(f"{output}"))


@click.command(
    cls=Command, epilog=examples("ttt-jax memory lora book.memory book-adapter --rank 32")
)
@click.argument("path", metavar="M", type=EXISTING)
@_DST
@click.option("--rank", required=True, type=int, help="Of the adapter, up to min(D, F).")
@_DTYPE
@click.option("--base", help="Base model that the adapter names: a folder or a hub's name.")
def lora(path: Path, output: Path, rank: int, dtype: str, base: str | None) -> None:
    """Write a PEFT adapter for down_proj of the TTT layers: peft, vLLM and SGLang load it."""
    from ttt_jax.display.tables import Table, print_tables
    from ttt_jax.memory.lora import write_lora
    from ttt_jax.memory.memory import Memory

    click.get_current_context().with_resource(one_writer(output, "DST"))
    kept = write_lora(Memory.load(path), output, rank=rank, dtype=dtype, base=base)
    rows = [[str(k.layer), f"{k.error:.3g}"] for k in kept]
    note = f"error: ||B A - dW|| / ||dW|| at rank {rank}, as stored"
    print_tables([Table("Adapted layers", note, ["layer", "error"], rows)])
    print(_vllm(rank))
    print(
        "engines apply it without model.ttt.read_cap, if the model that read it has one; in "
        f"SmolLM2 {_BEST}"
    )
    print(printable(f"{output}"))


def _say_uncapped(source: Source) -> None:
    """Print what other engines do not do with a memory of this model."""
    cap = source.model.ttt.read_cap
    if cap is not None:
        print(
            f"read_cap {cap:g} of {printable(str(source.folder))} is not part of the base "
            f"architecture: engines apply memories without it; in SmolLM2 {_BEST}"
        )


def _vllm(rank: int) -> str:
    """What vLLM has to be told to take an adapter of this rank."""
    fits = [most for most in _VLLM_RANKS if most >= rank]
    return (
        f"vLLM: --enable-lora --max-lora-rank {fits[0]}"
        if fits
        else f"vLLM: refuses ranks above {_VLLM_RANKS[-1]}; give a smaller --rank, or merge"
    )
