"""`ttt-jax eval`."""

from __future__ import annotations

import click

from ttt_jax.command.options import DTYPE, EXISTING, PIECE, Command, examples, mesh_options
from ttt_jax.process.output_lock import one_writer
from ttt_jax.terminal import printable


@click.command(
    cls=Command,
    name="eval",
    epilog=examples(
        "ttt-jax eval --model runs/books --perplexity heldout.jsonl.xz "
        "--lengths 2k,4k,8k,16k --out results/books",
        "ttt-jax eval --model runs/books --perplexity book.txt --lengths 4k "
        "--diagnostics --html --out results/book",
        "ttt-jax eval --model runs/books --recall heldout.jsonl.xz "
        "--lengths 8k,16k --out results/recall",
        "ttt-jax eval --model checkpoints/qwen3 --tasks synthetic --lengths 1k,4k "
        "--form text --out results/synthetic",
        "ttt-jax eval --model checkpoints/qwen3 --tasks niah_single_1,hellaswag "
        "--lengths 4k --limit 100 --out results/tasks",
        "ttt-jax eval --compare results/before results/after --out results/comparison",
    ),
)
@click.option(
    "--model",
    "folder",
    type=EXISTING,
    help="Hugging Face folder, converted checkpoint or run folder.",
)
@click.option(
    "--perplexity",
    metavar="DATA",
    help='Loss by context length and position: a file, a folder or "stdlib".',
)
@click.option(
    "--recall",
    metavar="DATA",
    help="What a second reading of a passage gains beyond the reach of attention.",
)
@click.option(
    "--passage", type=click.IntRange(2), default=256, help="Tokens of --recall's passage."
)
@click.option(
    "--tasks",
    default="",
    show_default=False,
    metavar="A,B",
    help='"synthetic", and tasks of lm-evaluation-harness (extra "eval").',
)
@click.option("--lengths", default="2k,4k", help="Context lengths in tokens; k = 1024, m = 1024 k.")
@click.option("--ttt", type=click.Choice(["on", "off", "both"]), default="both")
@click.option(
    "--shuffled/--no-shuffled",
    default=None,
    help="Control: S of another document.  [default: if possible]",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Perplexity with only the fast weights of the text before, too.",
)
@click.option(
    "--memory",
    metavar="M[,M...]",
    help="Perplexity with these memories, too: fast weights that stay as they are.",
)
@click.option(
    "--block",
    type=click.IntRange(1),
    help="Final tokens that are scored.  [default: half the shortest length]",
)
@click.option(
    "--documents", type=click.IntRange(1), default=64, help="Of DATA, at most; the first ones."
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
    "--html-tokens", type=click.IntRange(2), default=8192, help="Of --diagnostics and --html."
)
@click.option(
    "--form", type=click.Choice(["ids", "text"]), default="ids", help="Of the synthetic words."
)
@click.option(
    "--examples", type=click.IntRange(1), default=32, help="Per synthetic task and length."
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
    "--batch-size", type=click.IntRange(1), default=8, help="Documents or samples read at once."
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, help="Of the bootstrap and the synthetic tasks."
)
@click.option(
    "--compare",
    nargs=2,
    type=EXISTING,
    metavar="A B",
    help="Two result folders, or two models to evaluate; more may follow: A B C ...",
)
@click.argument("more", nargs=-1, type=EXISTING, metavar="[C ...]")
@click.option("--out", type=EXISTING, help="Folder for results.json and report.html.")
@click.option("--overwrite", is_flag=True, help="Replace --out if it is a result folder.")
@DTYPE
@PIECE
@mesh_options
def evaluate(
    folder, perplexity, tasks, lengths, compare, more, out, overwrite, html, **options
) -> None:
    """What TTT gives on the same weights: perplexity by context and position, recall, harness
    tasks.
    """
    from ttt_jax.display.tables import print_tables
    from ttt_jax.eval import output, run
    from ttt_jax.eval.tables import tables

    if (folder is None) == (not compare):
        raise click.UsageError("give --model DIR or --compare A B, one of them")
    if more and not compare:
        raise click.UsageError(f"got unexpected extra argument ({more[0]})")
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
        print_tables(run.compare([*compare, *more], chosen, out, overwrite))
    elif out is not None:
        results, text_html = run.evaluate(chosen, out, overwrite)
        output.write_folder(out, output.files_of(results, text_html), overwrite)
        print_tables(tables(results))
    if out is not None:
        print(printable(f"results: {out}"))
