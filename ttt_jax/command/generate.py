"""`ttt-jax generate`."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ttt_jax.command.io import (
    check_learns,
    check_memory,
    check_rows,
    encode,
    load_memories,
    open_session,
    print_completions,
    read_document,
    read_ids,
    read_text,
    saved_early,
)
from ttt_jax.command.options import (
    CONTEXT,
    DTYPE,
    EXISTING,
    IDS,
    MEMORY,
    MODEL,
    NO_TTT,
    PIECE,
    READ,
    Command,
    examples,
    mesh_options,
    sampling_of,
    sampling_options,
)
from ttt_jax.errors import NotFiniteError, UserError
from ttt_jax.process.interrupts import HeldBack
from ttt_jax.process.output_lock import one_writer
from ttt_jax.terminal import for_stream, printable

if TYPE_CHECKING:
    from ttt_jax.inference.generation import Session
    from ttt_jax.inference.sampling import Sampling
    from ttt_jax.inference.writing import Completion
    from ttt_jax.memory.memory import Memory
    from ttt_jax.model.transformer import Transformer


@click.command(
    cls=Command,
    epilog=examples(
        "ttt-jax generate --model checkpoints/qwen3 --prompt 'Once upon a time' "
        "--max-new-tokens 64",
        "ttt-jax generate --model checkpoints/qwen3 --prompt-file book.txt "
        "--session book.safetensors --max-new-tokens 1",
        "ttt-jax generate --model checkpoints/qwen3 --prompt 'Who was the captain?' "
        "--session book.safetensors --keep-session",
        "ttt-jax generate --model smollm2-read --read book.txt --context 512 "
        "--prompt 'Who was the captain?'",
        "ttt-jax generate --model checkpoints/qwen3 --ids prompts.npy "
        "--temperature 0.8 --top-p 0.95 --json",
    ),
)
@MODEL
@click.option("--prompt", multiple=True, help="Text; several make a batch.")
@click.option(
    "--prompt-file",
    multiple=True,
    type=EXISTING,
    help="UTF-8 text file, - for standard input; several make a batch.",
)
@click.option(
    "--chat",
    is_flag=True,
    help="Put each prompt into the model's chat template, as a user's turn.",
)
@IDS
@READ
@CONTEXT
@click.option("--max-new-tokens", type=click.IntRange(1), default=128)
@sampling_options
@click.option("--stop", multiple=True, help="Text that ends a completion.")
@click.option("--ignore-eos", is_flag=True, help="Write on after an end token.")
@click.option("--seed", type=int, default=0, help="Row i of a batch draws with seed + i.")
@click.option(
    "--session",
    type=EXISTING,
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
@NO_TTT
@MEMORY
@DTYPE
@PIECE
@mesh_options
def generate(
    folder,
    prompt,
    prompt_file,
    chat,
    ids,
    documents,
    context,
    session,
    keep_session,
    as_json,
    no_ttt,
    memory,
    dtype,
    piece,
    mesh,
    **options,
) -> None:
    """Continue prompts, adapting while reading and writing.

    Each prompt follows what --read names. With --context a single stream reads it, and becomes as
    many as there are prompts.
    """
    sampling = sampling_of(options)
    _check_prompts(prompt, prompt_file, ids, session, keep_session)
    if chat and not (prompt or prompt_file):
        raise click.UsageError("--chat needs --prompt TEXT or --prompt-file FILE")
    check_learns(context, no_ttt)
    if context is not None and not documents:
        raise click.UsageError("--context: is for the texts of --read FILE; add it")
    check_memory(session, memory)
    saved_to = None if keep_session else session
    if saved_to is not None:
        click.get_current_context().with_resource(one_writer(saved_to, "--session"))
    texts = [read_text(path, "--prompt-file", stdin=True) for path in prompt_file] or list(prompt)
    if chat:
        texts = _as_turns(folder, texts)
    rows = read_ids(ids, "--ids") if ids else None
    check_rows(len(rows or texts), mesh, "prompts")
    _check_one_stream(context, len(rows or texts), saved_to)
    first = [(path, read_text(path, "--read")) for path in documents]
    start = load_memories(memory)

    from ttt_jax.inference.watch import one_warning
    from ttt_jax.pretrained.load import load_model

    model = load_model(folder, dtype, decodes=True, mesh=mesh)
    rows = rows or [
        encode(model, text, "--prompt-file" if prompt_file else "--prompt") for text in texts
    ]
    read = [(path, encode(model, text, "--read")) for path, text in first]
    if read and context is None:
        before = [i for _, ids in read for i in ids]
        rows = [[*before, *map(int, row)] for row in rows or [[]]]
    with one_warning():
        stream = _open_stream(
            model, rows, session, not no_ttt, piece, start, keep_session, read, context
        )
        if rows:
            stream.extend(rows)
        shown = not as_json and stream.batch_size == 1 and model.tokenizer is not None
        completions, failure = _continue(stream, sampling, options, shown, saved_to)
    if saved_to is not None and failure is None:
        with HeldBack():  # a Ctrl-C would lose what was read
            stream.save(saved_to)
    print_completions(completions, dataclasses.asdict(stream.timings), as_json, shown)
    if failure is not None:
        kept = "" if saved_to is None else f"; {saved_to} is not written"
        raise NotFiniteError(f"{failure}{kept}")


def _as_turns(folder: Path, texts: list[str]) -> list[str]:
    """Each text in the model's chat template. Raises UserError when it has none, or it fails."""
    from ttt_jax.inference.chat_template import template_of

    template = template_of(folder)
    if template is None:
        raise UserError(f"--chat: {folder} has no chat template; drop --chat")
    try:
        # As in a chat: the line end of a file, or of a pipe, is no part of what is said.
        turns = [[{"role": "user", "content": text.strip()}] for text in texts]
        return [template.render(turn, True) for turn in turns]
    finally:
        template.close()


def _check_prompts(prompt, prompt_file, ids, session: Path | None, keep_session: bool) -> None:
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


def _check_one_stream(context: int | None, prompts: int, saved_to: Path | None) -> None:
    """Raise UserError for several prompts after a session that learns texts and is saved again."""
    if context is not None and prompts > 1 and saved_to is not None and saved_to.exists():
        raise UserError(
            f"--context: {prompts} prompts for the one stream of --session {saved_to}; give one, "
            "or add --keep-session"
        )


def _open_stream(
    model: Transformer,
    rows: list[Any],
    session: Path | None,
    ttt: bool,
    piece: int | None,
    memory: Memory | None,
    keep: bool,
    texts: list[tuple[Path, list[int]]],
    context: int | None,
) -> Session:
    """Go on with a saved session, or begin a new one. Raises UserError when it was read otherwise.

    Args:
      keep: the session is not saved again, so that one of one row may answer several rows.
      texts: with a context, a stream of one row learns them first, and then answers all rows.
    """
    streams = len(rows) if context is None else 1
    stream = open_session(model, streams, session, ttt, piece, memory)
    if context is not None:
        for path, ids in texts:
            learn = functools.partial(stream.learn, ids, context, path.name)
            told = read_document(stream, learn, path, len(ids))
            print(*map(printable, told), sep="\n", file=sys.stderr)
    if len(rows) > 1 and stream.batch_size == 1 and (keep or context is not None):
        return stream.branch(len(rows))
    return stream


def _continue(
    stream: Session, sampling: Sampling, options: dict[str, Any], shown: bool, saved_to: Path | None
) -> tuple[list[Completion], NotFiniteError | None]:
    """Read what waits and write on.

    Args:
      shown: print the text as it is written.
      saved_to: save the session there when the command is interrupted.

    Returns: (completions, what ended them early).
    """
    from ttt_jax.display.progress import progress

    write = lambda _, text: print(for_stream(text, sys.stdout), end="", flush=True)
    waiting = max((len(ids) for ids in stream.unread), default=0)
    try:
        with progress("reading", waiting, "tokens") as stream.on_read:
            completions = stream.generate(
                options["max_new_tokens"],
                sampling,
                stop=options["stop"],
                eos_ids=() if options["ignore_eos"] else None,
                seed=options["seed"],
                on_text=write if shown else None,
            )
    except NotFiniteError as error:
        return error.partial or [], error
    except (KeyboardInterrupt, BrokenPipeError) as error:
        if saved_to is None:
            raise
        with HeldBack():
            stream.save(saved_to)
        told = saved_early(stream, saved_to)
        if isinstance(error, KeyboardInterrupt):
            raise type(error)(told) from None
        print(f"output closed; {told}", file=sys.stderr)
        raise
    return completions, None
