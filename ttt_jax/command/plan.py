"""`ttt-jax plan`."""

from __future__ import annotations

import dataclasses
import json

import click

from ttt_jax.command.options import EXISTING, Command, examples
from ttt_jax.terminal import printable


@click.command(
    cls=Command,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog=examples(
        "ttt-jax plan --config qwen3_8b_longct --topology v5p:4x4x4",
        "ttt-jax plan --config qwen3_4b_longct_32k --topology v6e:16x16 --mesh.context 4 --json",
        "ttt-jax plan --config qwen3_4b_longct_128k --topology v5e:4x4 --prefill 131072",
        "ttt-jax plan --config qwen3_8b_longct --topology v5e:2x4 --decode 32768 "
        "--mesh.context 1 --mesh.tensor 8",
        "ttt-jax plan --config qwen3_0p6b --topology h100:8 --optimizer.accumulate 4",
    ),
)
@click.option(
    "--config", "path", required=True, type=EXISTING, help="A preset's name or a YAML file."
)
@click.option(
    "--topology", required=True, help="TPU grid (v4 v5e v5p v6e), or a number of GPUs (h100 h200)."
)
@click.option(
    "--prefill",
    type=click.IntRange(2),
    metavar="TOKENS",
    help="Plan reading so many tokens, not a train step.",
)
@click.option(
    "--decode",
    type=click.IntRange(2),
    metavar="TOKENS",
    help="Plan a step that writes one token of streams this long.",
)
@click.option(
    "--rows", type=click.IntRange(1), help="Of --prefill or --decode.  [default: data x fsdp]"
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[--FIELD VALUE ...]")
def plan(path, topology, prefill, decode, rows, as_json, overrides) -> int:
    """Does a config fit a topology? Memory, FLOPs and traffic of one step, without a device.

    TPU programs are compiled ahead of time (minutes for a large model); GPUs get an estimate.
    Dotted overrides as for train.py. Exit code: 0 it fits, 1 it does not.
    """
    if prefill is not None and decode is not None:
        raise click.UsageError("--prefill and --decode are two programs; give one of them")
    if rows is not None and prefill is None and decode is None:
        raise click.UsageError("--rows is of --prefill or --decode; a train step has the config's")
    from ttt_jax.plan.make import describe, make_plan
    from ttt_jax.plan.topology import parse_topology
    from ttt_jax.plan.tpu import prepare_environment
    from ttt_jax.plan.work import Work
    from ttt_jax.pretrained.start_config import load_start_config

    prepare_environment()  # before jax looks for devices
    config, target = load_start_config(path, overrides), parse_topology(topology)
    result = make_plan(config, target, Work(prefill, decode, rows))
    print(json.dumps(dataclasses.asdict(result)) if as_json else printable(describe(result), "\n"))
    return 0 if result.fits else 1
