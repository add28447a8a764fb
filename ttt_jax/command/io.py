"""What the commands `score`, `generate`, `chat` and `memory` read and print."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ttt_jax.errors import UserError
from ttt_jax.files.text import without_mark
from ttt_jax.terminal import for_stream, printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from fractions import Fraction

    from ttt_jax.config import MeshConfig
    from ttt_jax.inference.generation import Session
    from ttt_jax.memory.sources import Source

_NUMBER = re.compile(r"-?\d{1,30}(\.\d{1,30}|/\d{1,30})?", re.ASCII)
_REASONS = {
    "eos": "end token",
    "stop": "stop string",
    "length": "--max-new-tokens",
}


def encode(model, text: str, option: str) -> list[int]:
    """Tokenise a text. Raises UserError without a tokenizer, and for an empty text."""
    if model.tokenizer is None:
        raise UserError(
            f"{option}: text needs a tokenizer and the model's folder has no tokenizer.json; "
            "use --ids FILE.npy"
        )
    ids = model.tokenizer.encode(text)
    if not ids:
        raise UserError(f"{option}: the text is empty; give at least one token")
    return ids


def read_text(path: Path, option: str, stdin: bool = False) -> str:
    """Read the text of a file as training does: line ends as they are, without a byte order mark.
    Raises UserError when it is not readable or not UTF-8.

    Args:
      stdin: the name "-" means standard input.
    """
    try:
        if stdin and str(path) == "-":
            return without_mark(sys.stdin.buffer.read()).decode("utf-8")
        # Not `read_text`, which makes \n of \r\n: the tokens would not be those of a training file.
        return without_mark(path.read_bytes()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{option} {path}: not UTF-8 at byte {error.start}; convert it") from None
    except OSError as error:
        raise UserError(
            f"{option} {path}: {error.strerror or error}; give a readable text file"
        ) from None


def read_ids(path: Path, option: str):
    """Read rows of token ids. Never unpickles."""
    import numpy as np

    from ttt_jax.files.npy import map_npy

    try:
        array = map_npy(path)
    except ValueError as error:
        raise UserError(
            f"{option} {path}: not an integer array in .npy format ({error}); "
            "write it with numpy.save"
        ) from None
    if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer):
        raise UserError(
            f"{option} {path}: holds {array.dtype} {list(array.shape)}; "
            "it must be an integer array [T] or [B, T]"
        )
    if not array.size:
        raise UserError(f"{option} {path}: holds no tokens; give at least one")
    return list(np.atleast_2d(np.asarray(array)))


def keep_inputs(output: Path, what: str, *inputs: Path | None) -> None:
    """Raise UserError when replacing an output would delete what is read.

    Args:
      what: how the command names the output, such as "--out".
    """
    place = output.resolve()
    for path in inputs:
        if path is not None and output.exists() and path.resolve().is_relative_to(place):
            raise UserError(
                f"{what} {output}: replacing it would delete {path}, which is read; choose another "
                "one"
            )


def check_learns(context: int | None, no_ttt: bool) -> None:
    """Raise UsageError for texts that are to be learnt by a stream that learns nothing."""
    if no_ttt and context is not None:
        raise click.UsageError("--context: --no-ttt learns nothing; drop one of them")


def read_document(
    session: Session, read: Callable[[], Source | None], path: Path, tokens: int
) -> list[str]:
    """Read a text with a progress bar; returns what to say of it, in lines.

    Args:
      session: the stream that reads.
      read: reads the text, and returns what `Session.learn` does; None: it is in the stream.
      tokens: of the text.
    """
    from ttt_jax.display.progress import progress

    begin = time.perf_counter()
    with progress(f"reading {printable(path.name)}", tokens, "tokens") as session.on_read:
        try:
            source = read()
        finally:
            session.on_read = None
    seconds = max(time.perf_counter() - begin, 1e-9)
    told = [f"read {path}: {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s"]
    if source is not None:
        told.append(
            f"{source.written:,} of them in whole chunks are in the fast weights "
            f"(attention anew every {source.context:,} tokens), none in the context"
        )
    return told


def load_memories(paths: str | None):
    """Load the sum of `--memory M[,M...]`, None without. Raises as `Memory.load_sum`."""
    if paths is None:
        return None
    from ttt_jax.memory.memory import Memory

    return Memory.load_sum(paths)


def as_factor(text: str) -> Fraction:
    """Read a memory's factor, exactly. Raises UserError for what is no number."""
    from fractions import Fraction

    try:
        if _NUMBER.fullmatch(text):
            return Fraction(text)
    except ZeroDivisionError:
        pass
    raise UserError(f"FACTOR {text[:80]}: must be a number such as 0.5, -1 or 1/3")


def check_memory(session: Path | None, memory: str | None) -> None:
    """Raise UserError for a memory beside a session that has fast weights of its own."""
    if memory is not None and session is not None and session.exists():
        raise UserError(
            f"--memory {memory}: {session} has its own fast weights; begin a new session with it"
        )


def check_rows(rows: int, mesh: MeshConfig | None, what: str) -> None:
    """Raise UserError for rows that `--mesh.data` does not divide."""
    if mesh is not None:
        from ttt_jax.parallel.inference_mesh import check_rows

        check_rows(rows, mesh.data, what)


def open_session(model, streams: int, path: Path | None, ttt: bool, piece: int | None, memory=None):
    """Go on with a saved session, or begin a new one. Raises UserError when it was read otherwise.

    Args:
      streams: of a new session.
      memory: that a new session begins with.
    """
    from ttt_jax.inference.generation import Session
    from ttt_jax.parallel.inference_mesh import check_rows, mesh_of

    if path is None or not path.exists():
        return Session(model, streams, ttt=ttt, piece=piece, memory=memory)
    session = Session.load(path, model, piece=piece)
    if (mesh := mesh_of(model.runtime.parallel)) is not None:
        check_rows(session.batch_size, mesh.shape["data"], f"streams of --session {path}")
    if session.ttt != ttt:
        wrong, fix = ("on", "pass --no-ttt") if ttt else ("off", "drop --no-ttt")
        raise UserError(
            f"--session {path}: was not read with TTT {wrong}; {fix}, or use another file"
        )
    return session


def saved_early(stream, session: Path) -> str:
    """Say in one line what a session holds that was saved before its command ended."""
    read, waiting = int(stream.position_B.max()), max(len(ids) for ids in stream.unread)
    held = f"{read:,} tokens read" + (f", {waiting:,} still to be read" if waiting > 1 else "")
    return printable(
        f"session {session} saved ({held}): go on with it, without the prompt that it holds"
    )


def print_completions(completions, timings: dict[str, object], as_json: bool, shown: bool) -> None:
    """Print the results of `generate`; `shown`: the text is there already."""
    for b, completion in enumerate(completions):
        if as_json:
            print(
                json.dumps(dataclasses.asdict(completion) | {"timings": timings}, allow_nan=False)
            )
        elif shown:
            print(flush=True)
            if (why := _REASONS.get(completion.finish_reason)) is not None:
                print(f"stopped: {why}", file=sys.stderr)
        else:
            print(f"--- {b} ({completion.finish_reason}) ---")
            print(
                completion.token_ids
                if completion.text is None
                else for_stream(completion.text, sys.stdout)
            )
    sys.stdout.flush()
