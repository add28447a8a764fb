"""`ttt-jax convert`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ttt_jax.command.io import keep_inputs, read_text
from ttt_jax.command.options import EXISTING, Command, examples
from ttt_jax.errors import UserError
from ttt_jax.process.output_lock import one_writer
from ttt_jax.terminal import printable

if TYPE_CHECKING:
    from ttt_jax.pretrained.convert import Conversion


@click.command(
    cls=Command,
    epilog=examples(
        "ttt-jax convert Qwen3-4B Qwen3-4B-orbax --to orbax --verify",
        "ttt-jax convert Qwen3-4B Qwen3-4B-ttt --to hf --ttt.layers 0,6,12,18,24,30 "
        "--ttt.chunk_size 1024",
        "ttt-jax convert smollm2 smollm2-ttt --to hf --ttt.calibrate book.txt",
        "ttt-jax convert runs/qwen3 out --to hf --dtype bfloat16 --shard-gb 4",
    ),
)
@click.argument("source", type=click.Path(path_type=Path), metavar="SRC")
@click.argument("output", type=click.Path(path_type=Path), metavar="DST")
@click.option("--to", type=click.Choice(["orbax", "hf"]), required=True, help="Format of DST.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Of every tensor.  [default: as in SRC]",
)
@click.option(
    "--shard-gb", type=click.FloatRange(min=0, min_open=True), default=5.0, help="Of --to hf."
)
@click.option(
    "--ttt.layers", "layers", metavar="0,6,12", help="Give a plain model TTT on these layers."
)
@click.option("--ttt.chunk_size", "chunk_size", type=int, help="Tokens between two updates.")
@click.option("--ttt.lr", "lr", type=float, help="Inner learning rate.")
@click.option(
    "--ttt.target",
    "target",
    type=click.Choice(["hidden_states", "input_embed", "prediction_error"]),
    help="Source of the target.",
)
@click.option(
    "--ttt.proj", "proj", type=bool, metavar="true|false", help="Multiply the target by W_target."
)
@click.option(
    "--ttt.read_cap",
    "read_cap",
    metavar="FLOAT|null",
    help="Limit of what a token reads from S, relative to its layer's output; null: none.",
)
@click.option(
    "--ttt.calibrate",
    "calibrate",
    metavar="TEXT",
    type=EXISTING,
    help="TTT in the last layer that gains without training, found on a text file.",
)
@click.option("--seed", type=int, default=0, help="Of the TTT parameters' initialisation.")
@click.option(
    "--verify",
    is_flag=True,
    help="Compare the logits of both sides in float32; exit 1 when they differ.",
)
@click.option("--overwrite", is_flag=True, help="Replace DST if it is a model folder.")
def convert(
    source: Path,
    output: Path,
    to: str,
    dtype: str | None,
    shard_gb: float,
    calibrate: Path | None,
    read_cap: str | None,
    seed: int,
    verify: bool,
    overwrite: bool,
    **ttt: object,
) -> int:
    """Convert a model between Hugging Face folders and Orbax.

    SRC is a Hugging Face folder, a converted folder, or a run folder of train.py. Tensors are
    streamed: the peak of host memory is a part of the largest shard (--verify loads the model). DST
    appears complete or not at all.
    """
    from ttt_jax.pretrained.convert import VERIFY_LIMIT
    from ttt_jax.pretrained.convert import convert as run

    click.get_current_context().with_resource(one_writer(output, "output"))
    given = {name: value for name, value in ttt.items() if value is not None}
    if read_cap is not None:
        given["read_cap"] = _number_or_null("--ttt.read_cap", read_cap)
    keep_inputs(output, "output", calibrate if overwrite else None)
    text = None if calibrate is None else _calibration_text(calibrate)
    options = {"ttt": given, "seed": seed, "verify": verify, "overwrite": overwrite, "text": text}
    report = run(
        source, output, to=to, dtype=dtype, max_shard_bytes=max(1, round(shard_gb * 1e9)), **options
    )
    size = f"{report.tensors} tensors, {report.nbytes / 1e6:,.1f} MB"
    names = printable(f"{source} -> {output}")
    print(
        f"{names}: {size} in {report.seconds:.1f} s"
        + f", {report.fresh} of them new" * (report.fresh > 0)
    )
    for name, value in report.left.items():
        told = f"ttt.{name} = {value} of {source}, which has no TTT layers, is not taken over"
        print(printable(f"note: {told}; it is {getattr(report.ttt, name)}"), file=sys.stderr)
    if report.calibration is not None:
        _print_calibration(report)
    if report.relative_rms is not None:
        print(
            f"verify: relative RMS of the logits {report.relative_rms:.1e} (limit for an "
            f"unchanged dtype: {VERIFY_LIMIT:g})"
        )
    return 0


def _number_or_null(option: str, text: str) -> float | None:
    if text in ("null", "none"):
        return None
    try:
        return float(text)
    except ValueError:
        raise click.UsageError(
            f"{option} {text[:60]}: must be a number, or null for none"
        ) from None


def _calibration_text(path: Path) -> str:
    """Read the text. Raises UserError for what `train` and `eval` read as records."""
    if path.suffix in (".json", ".jsonl", ".ndjson"):
        raise UserError(
            f"--ttt.calibrate {path}: is JSON, whose names and quotes are no text; write the texts "
            "of its records into a file"
        )
    return read_text(path, "--ttt.calibrate")


def _print_calibration(report: Conversion) -> None:
    """Print what was set, and the gain of every scale."""
    from ttt_jax.pretrained.calibration import CHOICE, STATISTICS

    found, ttt = report.calibration, report.ttt
    assert found is not None
    print(
        f"ttt: layers {list(ttt.layers)}, target {ttt.target}, write {ttt.write}, decay "
        f"{ttt.decay:g}, normalize_source {str(ttt.normalize_source).lower()}, chunk_size "
        f"{ttt.chunk_size}, read_cap {ttt.read_cap}, lr {ttt.lr:g}"
    )
    rows, chunks = found.choice // found.row, found.choice // ttt.chunk_size
    print(
        f"W_target from the text's first {found.statistics:,} tokens; gain in nats a token on "
        f"{found.choice:,} of its end, {rows} row{'s' * (rows > 1)} of {found.row:,} (loss "
        f"{found.loss:.4f} without), and one standard error over their {chunks} chunks:"
    )
    print("  s    gain")
    for s, gain in found.gains.items():
        print(f"  {s:<4g} {gain:+.4f} +- {found.errors[s]:.4f}" + "  taken" * (s == found.s))
    if found.tokens < (most := STATISTICS + CHOICE):
        print(
            f"note: the text has {found.tokens:,} tokens, and up to {most:,} are used; with a "
            "longer one W_target and the scale are more certain"
        )
