"""What an evaluation has computed so far: `unfinished.jsonl` in its --out folder, until the results
are there.

The first line says which command, model and code wrote it; each other line is one finished piece of
work (a batch of documents, a synthetic task, a harness length) under its key. The same command goes
on behind them after an interruption; another one is refused. A last line that a kill cut short is
dropped. JSON keeps every float exactly, so the results are those of an undisturbed run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ttt_jax.errors import CheckpointError, UserError
from ttt_jax.files.text import one_line

UNFINISHED = "unfinished.jsonl"
_FORMAT = "ttt_jax evaluation 1"
_MAX_BYTES = 256 << 20


class Unfinished:
    """The finished pieces of one evaluation.

    Args:
      folder: --out; None keeps nothing. It is created when there is something to keep.
      about: what has to be equal for another start to go on: name -> plain JSON values.
      overwrite: drop the pieces of another command instead of refusing.

    Raises: UserError when the folder holds the pieces of another command, CheckpointError when they
      are damaged.
    """

    def __init__(self, folder: Path | None, about: dict[str, Any], overwrite: bool = False) -> None:
        self._path = None if folder is None else folder / UNFINISHED
        self._about = {"format": _FORMAT} | about
        self._known: dict[str, Any] = {}
        self._begun = False
        if self._path is None or not self._path.is_file():
            return
        try:
            header, self._known, whole = _read(self._path)
        except CheckpointError:
            if not overwrite:
                raise
            return
        wrong = [name for name, value in self._about.items() if header.get(name) != value]
        if wrong and not overwrite:
            name = wrong[0]
            difference = f"{name}: {header.get(name)!r:.80} there, {self._about[name]!r:.80} here"
            raise UserError(
                f"--out {folder}: holds an unfinished evaluation of another command "
                f"({difference}); give the same command, another folder, or --overwrite to drop it"
            )
        if wrong:
            self._known = {}
        self._begun = not wrong
        if self._begun and whole < self._path.stat().st_size:
            os.truncate(self._path, whole)

    def __len__(self) -> int:
        return len(self._known)

    def piece(self, key: Sequence[Any], compute: Callable[[], Any]) -> Any:
        """Return what is kept under the key; else what `compute` returns, which is then kept.

        Raises: UserError when it cannot be written, before more time is lost.
        """
        name = json.dumps(list(key))
        if name in self._known:
            return self._known[name]
        value = compute()
        if self._path is None:
            return value
        line = json.dumps({"key": name, "value": value}, allow_nan=False) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if not self._begun:
                self._path.write_text(
                    json.dumps(self._about, allow_nan=False) + "\n", encoding="utf-8"
                )
                self._begun = True
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            where = f"--out {self._path.parent}: {self._path.name}"
            raise UserError(f"{where} could not be written ({error}); free space") from None
        self._known[name] = value
        return value


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return (first line, key -> value, bytes of the whole lines)."""
    fix = "delete it, or pass --overwrite"
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path}: has more than {_MAX_BYTES} bytes; {fix}")
        lines = path.read_bytes().splitlines(keepends=True)
        lines = [line for line in lines if line.endswith(b"\n")]
        header, known = {}, {}
        for n, line in enumerate(lines):
            found = json.loads(line.decode("utf-8"))
            if n == 0:
                header = dict(found)
            else:
                known[str(found["key"])] = found["value"]
    except CheckpointError:
        raise
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = one_line(error, end="")
        raise CheckpointError(
            f"{path}: damaged ({type(error).__name__}: {reason}); {fix}"
        ) from None
    return header, known, sum(map(len, lines))
