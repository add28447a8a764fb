"""Files of JSON lines in the run folder that survive kills and full disks: metrics, events, documents.

metrics.jsonl     the training curve; a resumed run drops the lines after the step it goes on from
events.jsonl      what went wrong and what was done about it, with the time; only ever grows
documents.jsonl   with log.documents: what each step held (documents.I.jsonl for process I > 0)
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ttt_jax.errors import CheckpointError
from ttt_jax.run.folder import atomic_write_text
from ttt_jax.terminal import printable

EVENTS_FILE = "events.jsonl"
DOCUMENTS_FILE = "documents.jsonl"


class LineFile:
    """Appends whole lines. While they cannot be written (a full disk), they wait in memory, and training goes on."""

    def __init__(self, path: Path) -> None:
        self._path, self._waiting, self._lost = path, [], False
        self._open()

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._size = os.fstat(self._file).st_size

    def append(self, record: dict[str, Any]) -> bool:
        """Add one line; whether everything so far is in the file. Numbers that JSON does not have become text."""
        self._waiting.append((json.dumps(_finite(record), allow_nan=False) + "\n").encode())
        return self.flush()

    def flush(self) -> bool:
        """Write the lines that wait; whether all are in the file. One that was removed is begun anew."""
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
                with contextlib.suppress(OSError):  # of a file that cannot be written at all any more
                    os.ftruncate(self._file, self._size)  # no half lines
                return False
            self._size += len(line)
            del self._waiting[0]
        return True

    def lost_now(self) -> bool:
        """Whether the file was removed, and begun anew, since this was asked last."""
        lost, self._lost = self._lost, False
        return lost

    def close(self) -> None:
        """Close the file; lines that still cannot be written are lost, and a full disk is no reason to fail here."""
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


class EventLog:
    """Warnings of a run: a line on the terminal, and one in `events.jsonl` with what it is about.

    Args:
      enabled: False on every process but the first: then nothing is written and nothing is printed.
      show: prints a line.
    """

    def __init__(self, run_dir: Path, show: Callable[[str], None], enabled: bool = True) -> None:
        self._show, self._enabled = show, enabled
        self._file: LineFile | None = None
        self._path = run_dir / EVENTS_FILE
        self.step = 0  # finished steps, for events that do not name their own

    def __call__(self, text: str, kind: str = "warning", step: int | None = None, **details: Any) -> None:
        """Record an event. `details`: what JSON can hold."""
        if not self._enabled:
            return
        self._show(printable(f"warning: {text}"))
        now = datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")
        step = self.step if step is None else step
        try:
            self._file = self._file or LineFile(self._path)
        except OSError:  # the line is on the terminal at least
            return
        self._file.append({"time": now, "step": step, "kind": kind, "text": text, **details})

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; a line that is no JSON object, such as one cut short by a kill, is left out."""
    path = Path(run_dir) / EVENTS_FILE
    events = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            event = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


class DocumentLog:
    """Which documents each step held: one line a step, [file, index in the file, first token, tokens] per piece."""

    def __init__(self, run_dir: Path, start_step: int, process: int = 0, enabled: bool = True) -> None:
        self.enabled, self._file = enabled, None
        if enabled:
            path = run_dir / (DOCUMENTS_FILE if process == 0 else f"documents.{process}.jsonl")
            truncate_metrics(path, start_step)
            self._file = LineFile(path)

    def __enter__(self) -> DocumentLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, step: int, pieces: list[Any]) -> None:
        """Record a step's `Loader.documents`."""
        assert self._file is not None
        self._file.append({"step": step, "documents": [[p.file, p.document, p.start, p.tokens] for p in pieces]})


def truncate_metrics(path: Path, start_step: int) -> None:
    """Atomically drop the lines of `metrics.jsonl` after `start_step` (all for 0), and a line cut short by a kill.

    Raises:
      CheckpointError: a line other than the last is not a JSON object with a step.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines()
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8")
            step = json.loads(text)["step"]
            if not isinstance(step, int):
                raise ValueError("not a number of steps")
        except (ValueError, KeyError, TypeError, RecursionError):
            if number == len(lines):
                break
            raise CheckpointError(
                f"metrics {path}, line {number}: not a JSON object with a step; repair or delete it"
            ) from None
        if start_step > 0 and step <= start_step:
            kept.append(text + "\n")
    if len(kept) != len(lines) or not path.read_bytes().endswith(b"\n"):
        atomic_write_text(path, "".join(kept))
