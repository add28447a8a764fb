"""The command line: `ttt-jax COMMAND`, same as `python -m ttt_jax COMMAND`.

Every command checks its arguments and reads its files' headers before jax compiles anything. Exit
codes are in command.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from ttt_jax import __version__
from ttt_jax.command.io import (
    encode,
    load_model,
    print_completions,
    read_ids,
    read_text,
    saved_early,
)
from ttt_jax.command.running import run as run_command
from ttt_jax.errors import NotFiniteError, UserError
from ttt_jax.process.interrupts import HeldBack
from ttt_jax.process.output_lock import one_writer
from ttt_jax.terminal import for_stream, printable


class _Epilog(click.Command):
    """A command whose help keeps the line breaks of its examples."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.strip().splitlines():
                    formatter.write(f"  {line.strip()}\n")


class _Group(click.Group):
    command_class = _Epilog


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="ttt-jax")
def cli() -> None:
    """In-Place Test-Time Training: convert checkpoints, score, generate, evaluate, plan, report."""


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
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Of every tensor.  [default: as in SRC]",
)
@click.option(
    "--shard-gb",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    show_default=True,
    help="Of --to hf.",
)
@click.option(
    "--ttt.layers", "layers", metavar="0,6,12", help="Give a plain model TTT on these layers."
)
@click.option("--ttt.chunk_size", "chunk_size", type=int, help="Tokens between two updates.")
@click.option("--ttt.lr", "lr", type=float, help="Inner learning rate.")
@click.option(
    "--ttt.target",
    "target",
    type=click.Choice(["hidden_states", "input_embed"]),
    help="Source of the target.",
)
@click.option(
    "--ttt.proj", "proj", type=bool, metavar="true|false", help="Multiply the target by W_target."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the TTT parameters' initialisation."
)
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
    options = {"ttt": given, "seed": seed, "verify": verify, "overwrite": overwrite}
    report = run(
        source, output, to=to, dtype=dtype, max_shard_bytes=max(1, round(shard_gb * 1e9)), **options
    )
    size = f"{report.tensors} tensors, {report.nbytes / 1e6:,.1f} MB"
    names = printable(f"{source} -> {output}")
    print(
        f"{names}: {size} in {report.seconds:.1f} s"
        + f", {report.fresh} of them new" * (report.fresh > 0)
    )
    if report.relative_rms is not None:
        print(
            f"verify: relative RMS of the logits {report.relative_rms:.1e} (limit for an "
            f"unchanged dtype: {VERIFY_LIMIT:g})"
        )
    return 0


# ---------------------------------------------------------------------------------- score, generate

_EXISTING = click.Path(path_type=Path)
_MODEL = click.option(
    "--model",
    "folder",
    required=True,
    type=_EXISTING,
    help="Hugging Face folder, converted checkpoint or run folder.",
)
_DTYPE = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Parameters and compute.  [default: float32 on CPUs]",
)
_NO_TTT = click.option("--no-ttt", is_flag=True, help="Switch the adaptation off.")
_PIECE = click.option(
    "--piece", type=click.IntRange(1), help="Tokens read at a time, rounded to chunks."
)


@cli.command(
    epilog="""
    ttt-jax score --model checkpoints/qwen3 --ids tokens.npy --out scores.npz
    ttt-jax score --model checkpoints/qwen3 --text book.txt --no-ttt --out off.npz
    """
)
@_MODEL
@click.option("--ids", type=_EXISTING, help="Token ids: an integer array [T] or [B, T] in .npy.")
@click.option("--text", type=_EXISTING, help="UTF-8 text, tokenised with the model's tokenizer.")
@click.option(
    "--out",
    required=True,
    type=_EXISTING,
    help="Result: logprobs [B, T-1] float32, log p(token t+1 | 0..t).",
)
@click.option("--logits", is_flag=True, help="Also write logits [B, T, V] float32.")
@click.option("--overwrite", is_flag=True, help="Replace an existing result.")
@_NO_TTT
@_DTYPE
@_PIECE
def score(folder, ids, text, out, logits, overwrite, no_ttt, dtype, piece) -> None:
    """Log-probabilities of given tokens, any length, adapting while reading."""
    if (ids is None) == (text is None):
        raise click.UsageError("give the input by --ids FILE.npy or by --text FILE, one of them")
    click.get_current_context().with_resource(one_writer(out, "--out"))
    if out.exists() and not overwrite:
        raise UserError(f"--out {out}: exists already; choose another file or pass --overwrite")
    rows = None if ids is None else read_ids(ids, "--ids")
    document = None if text is None else read_text(text, "--text")
    model = load_model(folder, dtype)

    import numpy as np

    from ttt_jax.inference.scoring import score as score_rows
    from ttt_jax.progress import progress

    if document is not None:
        rows = [encode(model, document, "--text")]
    assert rows is not None
    failure = None
    try:
        with progress("scoring", max(len(row) for row in rows), "tokens") as advance_to:
            result = score_rows(
                model, rows, ttt=not no_ttt, logits=logits, piece=piece, on_progress=advance_to
            )
    except NotFiniteError as error:
        failure, result = error, error.partial
    arrays = {"logprobs": result.logprobs_BT} | ({"logits": result.logits_BTV} if logits else {})
    part = out.with_name(f".{out.name}.tmp.npz")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        np.savez(part, **arrays)  # pyright: ignore[reportArgumentType]
        part.rename(out)
    except BaseException as error:  # Ctrl-C, too: nothing half-written stays behind
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"--out {out}: could not be written ({error}); free space or choose another file"
        ) from None
    if failure is not None:
        raise NotFiniteError(f"{failure}; {out} holds what was computed")
    tokens = sum(len(row) for row in rows)
    shape = printable(f"{len(rows)} x {tokens // len(rows)} tokens")
    if result.logprobs_BT.size:  # the rows of a file are equally long
        nats = -float(result.logprobs_BT.mean(dtype=np.float64))
        shape += f", mean loss {nats:.4f} nats, perplexity {np.exp(nats):.3f}"
    print(printable(f"{shape}: {out}"))


@cli.command(
    epilog="""
    ttt-jax generate --model checkpoints/qwen3 --prompt 'Once upon a time' --max-new-tokens 64
    ttt-jax generate --model checkpoints/qwen3 --prompt-file book.txt --session book.safetensors --max-new-tokens 1
    ttt-jax generate --model checkpoints/qwen3 --prompt 'Who was the captain?' --session book.safetensors --keep-session
    ttt-jax generate --model checkpoints/qwen3 --ids prompts.npy --temperature 0.8 --top-p 0.95 --json
    """
)
@_MODEL
@click.option("--prompt", multiple=True, help="Text; several make a batch.")
@click.option(
    "--prompt-file", multiple=True, type=_EXISTING, help="UTF-8 text file; several make a batch."
)
@click.option("--ids", type=_EXISTING, help="Token ids: an integer array [T] or [B, T] in .npy.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, help="Keep the k most likely tokens.")
@click.option("--top-p", type=float, help="Keep the smallest set of tokens with this probability.")
@click.option("--min-p", type=float, help="Keep tokens at least this much as likely as the best.")
@click.option("--stop", multiple=True, help="Text that ends a completion.")
@click.option("--ignore-eos", is_flag=True, help="Write on after an end token.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Row i of a batch draws with seed + i."
)
@click.option(
    "--session",
    type=_EXISTING,
    help="Continue the stream in this file (if it exists) and save it there again.",
)
@click.option(
    "--keep-session",
    is_flag=True,
    help="Do not save the session: ask, and leave the file as it is.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="One JSON object per sequence: token_ids, text, timings.",
)
@_NO_TTT
@_DTYPE
@_PIECE
def generate(
    folder,
    prompt,
    prompt_file,
    ids,
    session,
    keep_session,
    as_json,
    no_ttt,
    dtype,
    piece,
    **options,
) -> None:
    """Continue prompts, adapting while reading and writing."""
    from ttt_jax.inference.sampling import Sampling

    sampling = Sampling(*(options[name] for name in ("temperature", "top_k", "top_p", "min_p")))
    if bool(prompt) + bool(prompt_file) + bool(ids) > 1:
        raise click.UsageError(
            "give prompts by --prompt, by --prompt-file or by --ids, one of them"
        )
    if keep_session and session is None:
        raise click.UsageError("--keep-session needs --session FILE")
    if not (prompt or prompt_file or ids) and not (session and session.exists()):
        raise click.UsageError(
            "no prompt: give --prompt TEXT, --prompt-file FILE or --ids FILE.npy"
        )
    if session is not None and not keep_session:
        click.get_current_context().with_resource(one_writer(session, "--session"))
    texts = [read_text(path, "--prompt-file") for path in prompt_file] or list(prompt)
    rows = read_ids(ids, "--ids") if ids else None
    model = load_model(folder, dtype, for_decoding=True)

    from ttt_jax.inference.generation import Session
    from ttt_jax.progress import progress

    rows = rows or [
        encode(model, text, "--prompt-file" if prompt_file else "--prompt") for text in texts
    ]
    if session is not None and session.exists():
        stream = Session.load(session, model, piece=piece)
        if no_ttt == stream.ttt:
            wrong, fix = ("off", "drop --no-ttt") if no_ttt else ("on", "pass --no-ttt")
            raise UserError(
                f"--session {session}: was not read with TTT {wrong}; {fix}, or use another file"
            )
        if len(rows) > 1 and stream.batch_size == 1 and keep_session:
            stream = stream.branch(len(rows))  # several questions about one document
    else:
        stream = Session(model, len(rows), ttt=not no_ttt, piece=piece)
    if rows:
        stream.extend(rows)
    show = not as_json and stream.batch_size == 1 and model.tokenizer is not None
    write = lambda _, text: print(for_stream(text, sys.stdout), end="", flush=True)
    waiting, failure = max((len(ids) for ids in stream.unread), default=0), None
    try:
        with progress("reading", waiting, "tokens") as stream.on_read:
            completions = stream.generate(
                options["max_new_tokens"],
                sampling,
                stop=options["stop"],
                eos_ids=() if options["ignore_eos"] else None,
                seed=options["seed"],
                on_text=write if show else None,
            )
    except NotFiniteError as error:
        completions, failure = error.partial or [], error
    except (KeyboardInterrupt, BrokenPipeError) as error:
        if session is None or keep_session:
            raise
        with HeldBack():
            stream.save(session)
        told = saved_early(stream, session)
        if isinstance(error, KeyboardInterrupt):
            raise type(error)(told) from None
        print(f"output closed; {told}", file=sys.stderr)
        raise
    if session is not None and not keep_session and failure is None:
        with HeldBack():  # a Ctrl-C would lose what was read
            stream.save(session)
    print_completions(completions, dataclasses.asdict(stream.timings), as_json, show)
    if failure is not None:
        kept = "" if session is None or keep_session else f"; {session} is not written"
        raise NotFiniteError(f"{failure}{kept}")


# ----------------------------------------------------------------------------------------- evaluate


@cli.command(
    name="eval",
    epilog="""
    ttt-jax eval --model runs/books --perplexity heldout.jsonl.xz --lengths 2k,4k,8k,16k --out results/books
    ttt-jax eval --model runs/books --perplexity book.txt --lengths 4k --diagnostics --html --out results/book
    ttt-jax eval --model checkpoints/qwen3 --tasks synthetic --lengths 1k,4k --form text --out results/recall
    ttt-jax eval --model checkpoints/qwen3 --tasks niah_single_1,hellaswag --lengths 4k --limit 100 --out results/tasks
    ttt-jax eval --compare results/before results/after --out results/comparison
    """,
)
@click.option(
    "--model",
    "folder",
    type=_EXISTING,
    help="Hugging Face folder, converted checkpoint or run folder.",
)
@click.option(
    "--perplexity",
    metavar="DATA",
    help='Loss by context length and position: a file, a folder or "stdlib".',
)
@click.option(
    "--tasks",
    default="",
    metavar="A,B",
    help='"synthetic", and tasks of lm-evaluation-harness (extra "eval").',
)
@click.option(
    "--lengths",
    default="2k,4k",
    show_default=True,
    help="Context lengths in tokens; k = 1024, m = 1024 k.",
)
@click.option("--ttt", type=click.Choice(["on", "off", "both"]), default="both", show_default=True)
@click.option(
    "--shuffled/--no-shuffled",
    default=None,
    help="Control: S of another document.  [default: if possible]",
)
@click.option(
    "--block",
    type=click.IntRange(1),
    help="Final tokens that are scored.  [default: half the shortest length]",
)
@click.option(
    "--documents",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Of DATA, at most; the first ones.",
)
@click.option(
    "--diagnostics",
    is_flag=True,
    help="Norm, rank and share of the fast weights; gain on repeated n-grams.",
)
@click.option(
    "--html", is_flag=True, help="text.html: the first document coloured by the gain of each token."
)
@click.option(
    "--html-tokens",
    type=click.IntRange(2),
    default=8192,
    show_default=True,
    help="Of --diagnostics and --html.",
)
@click.option(
    "--form",
    type=click.Choice(["ids", "text"]),
    default="ids",
    show_default=True,
    help="Of the synthetic words.",
)
@click.option(
    "--examples",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Per synthetic task and length.",
)
@click.option("--limit", type=click.IntRange(1), help="Samples per harness task.  [default: all]")
@click.option(
    "--fewshot", type=click.IntRange(0), help="Of harness tasks.  [default: the task's own]"
)
@click.option(
    "--chat",
    is_flag=True,
    help="Put harness prompts into the chat template of tokenizer_config.json.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Documents or samples read at once.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of the bootstrap and the synthetic tasks.",
)
@click.option(
    "--compare",
    nargs=2,
    type=_EXISTING,
    metavar="A B",
    help="Two result folders, or two models to evaluate.",
)
@click.option("--out", type=_EXISTING, help="Folder for results.json and report.html.")
@click.option("--overwrite", is_flag=True, help="Replace --out if it is a result folder.")
@_DTYPE
@_PIECE
def evaluate(folder, perplexity, tasks, lengths, compare, out, overwrite, html, **options) -> None:
    """What TTT gives on the same weights: perplexity by context and position, recall, harness
    tasks.
    """
    from ttt_jax.eval import output, run

    if (folder is None) == (not compare):
        raise click.UsageError("give --model DIR or --compare A B, one of them")
    if not compare and out is None:
        raise click.UsageError("--out DIR is missing: where the results go")
    if out is not None:
        click.get_current_context().with_resource(one_writer(out, "--out"))
        output.check_out(out, overwrite)
    chosen = run.Options(
        model=folder or compare[0],
        perplexity=perplexity,
        tasks=tuple(task for task in tasks.replace(" ", "").split(",") if task),
        lengths=run.parse_lengths(lengths),
        text_page=html,
        **options,
    )
    if compare:
        first, second = compare
        output.print_tables(run.compare(first, second, chosen, out, overwrite))
    elif out is not None:
        results, text_html = run.evaluate(chosen, out, overwrite)
        output.write_folder(out, output.files_of(results, text_html), overwrite)
        output.print_results(results)
    if out is not None:
        print(printable(f"results: {out}"))


# --------------------------------------------------------------------------------------------- plan


@cli.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog="""
    ttt-jax plan --config configs/qwen3_8b_longct.yaml --topology v5p:4x4x4
    ttt-jax plan --config configs/qwen3_4b_longct_32k.yaml --topology v6e:16x16 --mesh.context 4 --json
    ttt-jax plan --config configs/qwen3_4b_longct_128k.yaml --topology v5e:4x4 --prefill 131072
    ttt-jax plan --config configs/qwen3_0p6b.yaml --topology h100:8 --optimizer.accumulate 4
    """,
)
@click.option("--config", "path", required=True, type=_EXISTING, help="A preset, as for train.py.")
@click.option(
    "--topology", required=True, help="TPU grid (v4 v5e v5p v6e), or a number of GPUs (h100 h200)."
)
@click.option(
    "--prefill",
    type=click.IntRange(2),
    metavar="TOKENS",
    help="Plan reading so many tokens, not a train step.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[--FIELD VALUE ...]")
def plan(path, topology, prefill, as_json, overrides) -> int:
    """Does a config fit a topology? Memory, FLOPs and traffic of one step, without a device.

    TPU programs are compiled ahead of time (minutes for a large model); GPUs get an estimate.
    Dotted overrides as for train.py. Exit code: 0 it fits, 1 it does not.
    """
    from ttt_jax.config import load_config
    from ttt_jax.plan.common import parse_topology
    from ttt_jax.plan.make import describe, make_plan
    from ttt_jax.plan.tpu import prepare_environment

    config, target = load_config(path, overrides), parse_topology(topology)
    prepare_environment()  # before jax is imported
    result = make_plan(config, target, prefill)
    print(json.dumps(dataclasses.asdict(result)) if as_json else printable(describe(result), "\n"))
    return 0 if result.fits else 1


# ------------------------------------------------------------------------------------------- report


@cli.command(
    epilog="""
    ttt-jax report runs/books
    ttt-jax report runs/books --out books.html
    """
)
@click.argument("run", type=_EXISTING, metavar="RUN")
@click.option(
    "--out", type=click.Path(path_type=Path), help="The page.  [default: RUN/report.html]"
)
def report(run: Path, out: Path | None) -> None:
    """One HTML page of a training run, finished or not: curves, warnings, quarantined records,
    configuration, environment.
    """
    from ttt_jax.run.page import write_page

    print(printable(f"report: {write_page(run, out)}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code (command.py)."""
    return run_command(cli, "ttt-jax", argv)
