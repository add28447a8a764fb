"""Files of JSON lines in the run folder that survive kills and full disks: metrics, events,
samples, documents.

metrics.jsonl     the training curve; a resumed run drops the lines after the step it goes on from
events.jsonl      what went wrong and what was done about it, with the time; only ever grows
samples.jsonl     with sample.every: what the model wrote while it trained
documents.jsonl   with log.documents: what each step held (documents.I.jsonl for process I > 0)
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ttt_jax.errors import CheckpointError
from ttt_jax.files.text import LineFile, atomic_write_text
from ttt_jax.terminal import printable

EVENTS_FILE = "events.jsonl"
SAMPLES_FILE = "samples.jsonl"
DOCUMENTS_FILE = "documents.jsonl"


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

    def __call__(
        self, text: str, kind: str = "warning", step: int | None = None, **details: Any
    ) -> None:
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
    """Read the events of a run, oldest first; a line that is no JSON object, such as one cut short
    by a kill, is left out.
    """
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
    """Which documents each step held: one line a step, [file, index in the file, first token,
    tokens] per piece.
    """

    def __init__(
        self, run_dir: Path, start_step: int, process: int = 0, enabled: bool = True
    ) -> None:
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
        self._file.append(
            {"step": step, "documents": [[p.file, p.document, p.start, p.tokens] for p in pieces]}
        )


class SampleLog:
    """What the model wrote while it trained: a line for each text, see inference/samples.py."""

    def __init__(self, run_dir: Path, start_step: int, enabled: bool = True) -> None:
        self._file = None
        if enabled:
            truncate_metrics(run_dir / SAMPLES_FILE, start_step)
            self._file = LineFile(run_dir / SAMPLES_FILE)

    def __enter__(self) -> SampleLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, sample: dict[str, Any]) -> None:
        """Record one text; nothing on a process that does not write."""
        if self._file is not None:
            self._file.append(sample)


def truncate_metrics(path: Path, start_step: int) -> None:
    """Atomically drop the lines of `metrics.jsonl` after `start_step` (all for 0), and a line cut
    short by a kill.

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
