"""Texts for one-line messages, and text files that are written whole or line by line."""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import math
import os
from pathlib import Path
from typing import Any


def without_mark(file: bytes) -> bytes:
    """A text file's bytes behind its UTF-8 byte order mark, which some editors write there: it is
    no text.
    """
    return file.removeprefix(codecs.BOM_UTF8)


def one_line(text: object, limit: int = 200, end: str = "...") -> str:
    """Return `str(text)` with every run of white space as one space, shortened to `limit`."""
    return shorten(" ".join(str(text).split()), limit, end)


def shorten(text: str, limit: int, end: str = "...") -> str:
    """Return the text, or as much of it as `limit` characters hold together with `end`."""
    return text if len(text) <= limit else text[: limit - len(end)] + end


def reason_of(error: BaseException, limit: int = 200) -> str:
    """Say what went wrong: the error's message on one line, cut, or its type when it has none."""
    return one_line(error, limit, end="") or type(error).__name__


def cache_folder() -> Path:
    """Return the folder where large tokenised corpora are kept: `TTT_JAX_CACHE`, else
    `~/.cache/ttt_jax`.
    """
    return Path(os.environ.get("TTT_JAX_CACHE") or Path.home() / ".cache" / "ttt_jax")


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file so that a reader, or a crash, finds the old content or the new one, never
    a part.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)  # the name, too


def sync(path: str | Path) -> None:
    """Bring a file, or the names in a folder, to the disk: after a power cut they are there. Raises
    OSError.

    A file system that has no such call is left alone.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Call `sync` for everything in a folder, links left out, and the folder. Raises OSError."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not os.path.islink(path := os.path.join(root, name)):
                sync(path)
        sync(root)


class LineFile:
    """Appends whole lines. While they cannot be written (a full disk), they wait in memory, and
    training goes on.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._waiting, self._lost = path, [], False
        self._open()

    def _open(self) -> None:
        self._file = os.open(
            self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
        )
        self._size = os.fstat(self._file).st_size

    def append(self, record: dict[str, Any]) -> bool:
        """Add one line; whether everything so far is in the file. Numbers that JSON does not have
        become text.
        """
        self._waiting.append((json.dumps(_finite(record), allow_nan=False) + "\n").encode())
        return self.flush()

    def flush(self) -> bool:
        """Write the lines that wait; whether all are in the file. One that was removed is begun
        anew.
        """
        while self._waiting:
            line = self._waiting[0]
            try:
                if not self._path.exists():
                    removed = self._file
                    self._open()
                    os.close(removed)
                    self._lost = True
                if os.write(self._file, line) != len(line):
                    raise OSError("only a part was written")
            except OSError:
                # The file may be one that cannot be written at all any more.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._size)  # no half lines
                return False
            self._size += len(line)
            del self._waiting[0]
        return True

    def lost_now(self) -> bool:
        """Tell whether the file was removed, and begun anew, since this was asked last."""
        lost, self._lost = self._lost, False
        return lost

    def close(self) -> None:
        """Close the file; lines that still cannot be written are lost, and a full disk is no reason
        to fail here.
        """
        self.flush()
        with contextlib.suppress(OSError):
            os.close(self._file)


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: "inf", "-inf", "nan"."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
