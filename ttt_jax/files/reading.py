"""The small files beside a model's arrays (configs, tokenizer, templates), read with bounds;
nothing about them is trusted.

A file is looked at before it is opened: a pipe or a device would hang or never end. Its size is
known before memory is taken. A link may not leave the folder, so that a foreign folder cannot name
a file of the reader's machine; the `blobs` of a Hugging Face cache are its own. Messages quote a
short excerpt at most. This module imports no jax and no numpy.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttt_jax.errors import CheckpointError, UserError
from ttt_jax.files.text import one_line, shorten

MAX_JSON_BYTES = 25_000_000  # config.json, the index, tokenizer_config.json
MAX_TOKENIZER_BYTES = 512 << 20  # tokenizer.json; the largest in use have 35 MB
MAX_TEMPLATE_BYTES = 1_000_000  # a chat template; the longest in use have 20 kB
MAX_EXCERPT = 60
_BLOCK_BYTES = 1 << 20


def show(name: str) -> str:
    """Make a name from a file fit for a one-line message."""
    name = shorten(name, 200)
    return name if name.isprintable() else repr(name)


def excerpt(value: Any) -> str:
    """Return the beginning of a foreign value, on one line, for a message: `MAX_EXCERPT` characters
    at most.
    """
    if isinstance(value, list | dict) and len(value) > 20:
        return f"a {'list' if isinstance(value, list) else 'table'} of {len(value)} items"
    text = repr(value[: 2 * MAX_EXCERPT] if isinstance(value, str) else value)
    text = text if text.isprintable() else ascii(text)
    return shorten(text, MAX_EXCERPT)


def inside(folder: Path, name: str) -> Path:
    """Join `folder/name`, unless it is a link that leaves the folder. The `blobs` of a Hugging Face
    cache are its own.

    Raises: CheckpointError naming the link.
    """
    path, root = folder / name, folder.resolve()
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise CheckpointError(f"{path}: not a readable file ({error})") from None
    roots = [root]
    if root.parent.name == "snapshots":  # models--X/snapshots/REVISION/file -> ../../blobs/HASH
        roots.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in roots):
        raise CheckpointError(
            f"{path}: a link to {real}, outside the checkpoint's folder; put the file itself there"
        )
    return path


def find_companion(folder: Path, name: str) -> Path | None:
    """Find a file that a model folder may hold: `folder/name`, or None when nothing of that name is
    there.

    Raises: CheckpointError for a link that leaves the folder or leads nowhere, a folder, a pipe or
    a device.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    check_regular(inside(folder, name), CheckpointError)
    return path


def check_regular(path: Path, error: type[UserError]) -> int:
    """Look at a file without opening it, and return its size.

    Raises: `error`, one line, when it cannot be seen or is a folder, a pipe, a socket or a device.
    """
    try:
        found = path.stat()
    except OSError as problem:
        raise error(f"{path}: could not be read ({problem.strerror})") from None
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path}: not a regular file; put the file itself there, or remove it")
    return found.st_size


def read_bounded(path: Path, limit: int, error: type[UserError]) -> bytes:
    """Read a file of at most `limit` bytes.

    Raises: `error`, one line, when it is larger, not a regular file, or cannot be read.
    """
    size = check_regular(path, error)
    if size > limit:
        raise error(f"{path}: {size} bytes; such a file has at most {limit}")
    try:
        # Without waiting: the file may have become a pipe since it was looked at.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise error(f"{path}: not a regular file; put the file itself there, or remove it")
            data = bytearray()  # in blocks: one read of `limit` bytes would take them at once
            while len(data) <= limit and (
                block := file.read(min(_BLOCK_BYTES, limit + 1 - len(data)))
            ):
                data += block
    except OSError as problem:
        raise error(f"{path}: could not be read ({problem.strerror})") from None
    if len(data) > limit:  # it grew, or its size was not said (/proc)
        raise error(f"{path}: more than {limit} bytes; such a file has at most that")
    return bytes(data)


def read_text(path: Path, limit: int, error: type[UserError]) -> str:
    """Read a UTF-8 file of at most `limit` bytes. Raises `error`, one line."""
    try:
        return read_bounded(path, limit, error).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not UTF-8 (byte {problem.start}); save it as UTF-8") from None


def read_json_object(
    path: Path, error: type[UserError], limit: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """Read a JSON object from a file of bounded size. Raises `error`, one line."""
    try:
        raw = json.loads(read_bounded(path, limit, error).decode("utf-8"))
    # Bad UTF-8, bad JSON, absurd integers, absurd nesting.
    except (ValueError, RecursionError) as problem:
        if isinstance(problem, UserError):
            raise
        reason = one_line(problem, end="")
        raise error(f"{path}: not valid JSON: {reason}; restore it or delete it") from None
    if not isinstance(raw, dict):
        raise error(f"{path}: expected an object of fields, got {type(raw).__name__}")
    return raw


def companion_fields(folder: Path, name: str) -> dict[str, Any]:
    """Read the fields of an optional JSON file; none when nothing of that name is there. Raises
    CheckpointError.
    """
    path = find_companion(folder, name)
    return {} if path is None else read_json_object(path, CheckpointError)


def list_names(names: Sequence[str]) -> str:
    """Join names from a file for a one-line message, the first hundred of them."""
    shown = ", ".join(show(name) for name in names[:100])
    return shown if len(names) <= 100 else f"{shown} and {len(names) - 100} more"
