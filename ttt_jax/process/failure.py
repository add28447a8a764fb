"""One line for what a run dies of without being a bug: memory, the system, arithmetic, a device."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from ttt_jax.errors import TrainingError

TRACEBACK_FILE = "traceback.txt"
_LESS = (
    "lower data.batch_size or data.seq_len, raise optimizer.accumulate, or split the model "
    "over more devices"
)


@contextlib.contextmanager
def failures_in_one_line(folder: Path | None) -> Iterator[None]:
    """Turn such an exception into a TrainingError of one line.

    Args:
      folder: gets `traceback.txt`, for a report of the problem; None: no such file. A traceback
        that can be written nowhere is lost.

    Other exceptions are bugs, and pass.
    """
    try:
        yield
    except Exception as error:
        line = describe(error)
        if line is None:
            raise
        if folder is not None:
            with contextlib.suppress(OSError):
                (folder / TRACEBACK_FILE).write_text(
                    "".join(traceback.format_exception(error)), encoding="utf-8"
                )
                line += f" (details: {folder / TRACEBACK_FILE})"
        raise TrainingError(line) from None


def describe(error: Exception) -> str | None:
    """Describe an error in one line; None for a bug or what is one line already."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:297] + "..."
    if isinstance(error, MemoryError) or (_is_jax(error) and "RESOURCE_EXHAUSTED" in text):
        return f"out of memory{f': {text}' if text else ''}; {_LESS}"
    if isinstance(error, OSError):
        where = f" {error.filename}" if error.filename else ""
        return (
            f"the system failed:{where}: {error.strerror or text}; mend that and run the same "
            "command again"
        )
    if _is_jax(error):
        return (
            f"the device, or another process of the job, failed: {text}; run the same command again"
        )
    if isinstance(error, RecursionError | ArithmeticError):
        frames = traceback.extract_tb(error.__traceback__)
        where = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
        return (
            f"{type(error).__name__}{where}: {text}; this is a fault of the program: please "
            "report it"
        )
    return None


def _is_jax(error: Exception) -> bool:
    """Recognise jax's runtime error, without importing jax."""
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
