"""`ttt-jax chat`: a conversation with a model that learns from what it reads.

Answers go to stdout, everything else to stderr. With a terminal on both ends it is interactive
(chat_loop.py); otherwise each line of standard input is one turn.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ttt_jax.command.chat_loop import Chat
from ttt_jax.command.io import (
    check_learns,
    check_memory,
    check_rows,
    load_memories,
    read_text,
    saved_early,
)
from ttt_jax.command.options import (
    CONTEXT,
    DTYPE,
    EXISTING,
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
from ttt_jax.errors import NotFiniteError
from ttt_jax.process.interrupts import HeldBack, Interrupt
from ttt_jax.process.output_lock import one_writer

if TYPE_CHECKING:
    from ttt_jax.config import MeshConfig
    from ttt_jax.inference.conversation import Conversation
    from ttt_jax.memory.memory import Memory


@click.command(
    cls=Command,
    epilog=examples(
        "ttt-jax chat --model checkpoints/qwen3",
        "ttt-jax chat --model checkpoints/qwen3 --read book.txt --session book.safetensors",
        "echo 'Who was the captain?' | ttt-jax chat --model checkpoints/qwen3 --read book.txt",
    ),
)
@MODEL
@READ
@CONTEXT
@click.option("--system", help="System message of a new conversation.")
@click.option(
    "--session",
    type=EXISTING,
    help="Go on with the conversation in this file (if it exists) and save it there at the end.",
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=512, help="Of one answer.")
@sampling_options
@click.option("--seed", type=int, default=0)
@click.option(
    "--no-template",
    is_flag=True,
    help="Write turns as 'User:' and 'Assistant:', whatever template the model has.",
)
@NO_TTT
@MEMORY
@DTYPE
@PIECE
@mesh_options
def chat(
    folder,
    documents,
    context,
    system,
    session,
    seed,
    no_template,
    no_ttt,
    memory,
    dtype,
    piece,
    mesh,
    **options,
) -> None:
    """Talk with a model that adapts to what it reads and to what is said."""
    limit = options.pop("max_new_tokens")
    sampling = sampling_of(options)
    check_learns(context, no_ttt)
    check_rows(1, mesh, "streams of a chat")
    check_memory(session, memory)
    if session is not None:
        click.get_current_context().with_resource(one_writer(session, "--session"))
    texts = [(path, read_text(path, "--read")) for path in documents]
    start = load_memories(memory)

    from ttt_jax.inference.memory_reading import check_context
    from ttt_jax.inference.watch import one_warning

    with one_warning():
        talk = _conversation(
            folder, system, session, no_template, not no_ttt, dtype, piece, start, mesh
        )
        if context is not None:
            check_context(talk.session.model, context)
        room = Chat(talk, sampling, limit, seed, session, str(folder), context)
        # Not before: an import is not to be interrupted.
        with _ctrl_c(room.interrupt), _saved(room, session):
            for path, text in texts:
                room.read(path, text)
            room.run()


def _conversation(
    folder: Path,
    system: str | None,
    path: Path | None,
    no_template: bool,
    ttt: bool,
    dtype: str | None,
    piece: int | None,
    memory: Memory | None,
    mesh: MeshConfig | None,
) -> Conversation:
    """Load the model, and begin a conversation or go on with a saved one."""
    from ttt_jax.command.io import open_session
    from ttt_jax.inference.chat_template import template_of
    from ttt_jax.inference.conversation import Conversation, render_plain
    from ttt_jax.pretrained.load import load_model

    template = None if no_template else template_of(folder)
    model = load_model(folder, dtype, decodes=True, mesh=mesh)
    stream = open_session(model, 1, path, ttt, piece, memory)
    if template is None and not no_template:
        told = "no chat template in the model's folder: turns are written as 'User:', 'Assistant:'"
        print(f"note: {told}", file=sys.stderr, flush=True)
    render = render_plain if template is None else template.render
    return Conversation(stream, render, system)


@contextlib.contextmanager
def _saved(chat: Chat, path: Path | None) -> Iterator[None]:
    """Save the session at the end, whichever it is; not when its numbers are lost."""
    if path is None:
        yield
        return
    try:
        yield
    except NotFiniteError:
        raise
    except BaseException as error:
        _save(chat, path)
        told = saved_early(chat.talk.session, path)
        if isinstance(error, KeyboardInterrupt):
            raise type(error)(told) from None
        if isinstance(error, BrokenPipeError):
            print(f"output closed; {told}", file=sys.stderr)
        raise
    _save(chat, path)


def _save(chat: Chat, path: Path) -> None:
    with HeldBack():  # a Ctrl-C would lose what was read
        chat.save(path)


@contextlib.contextmanager
def _ctrl_c(interrupt: Interrupt) -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt here, and not end the command: it may stop an answer."""
    before = None
    if threading.current_thread() is threading.main_thread():
        found = signal.getsignal(signal.SIGINT)
        if getattr(found, "interrupts", False):
            before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
