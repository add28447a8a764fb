"""One writer for an output that appears as a whole (a file or a folder), and none of its
half-written parts left behind.

Imports no jax.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ttt_jax.errors import UserError
from ttt_jax.process.lock import Lock


@contextlib.contextmanager
def one_writer(path: Path, what: str) -> Iterator[Lock]:
    """Hold the lock of an output (a file or folder that appears as a whole), and remove what
    unfinished writes have left.

    Args:
      path: the output. what: how the command names it, such as "--out"; begins every message.

    Raises: UserError, one line, when another process writes it or its folder cannot be written.
    """
    path = path.absolute()
    path = path.parent.resolve() / path.name  # one lock by whatever way it is reached
    with Lock(path.with_name(f".{path.name}.lock"), f"{what} {path}", "choose another one") as lock:
        try:
            try:
                _restore(path)
            except OSError as error:
                raise UserError(
                    f"{what} {path}: cannot be written ({error.strerror}); choose another one"
                ) from None
            yield lock
        finally:
            _tidy(path)


def _leftovers(path: Path, kind: str) -> list[Path]:
    """List `.NAME.tmp`, `.NAME.tmp.npz`, `.NAME.tmp-PID`, as this package's writers do."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{kind}(\.npz|-\d+)?")
    with contextlib.suppress(OSError):
        return [path.with_name(name) for name in os.listdir(path.parent) if pattern.fullmatch(name)]
    return []


def _restore(path: Path) -> None:
    """Bring back an output that was moved out of the way and never replaced; remove others of
    before.
    """
    for old in _leftovers(path, "old"):
        if os.path.lexists(path):
            _remove(old)
        else:
            old.rename(path)
    _tidy(path)


def _tidy(path: Path) -> None:
    for part in _leftovers(path, "tmp"):
        _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
