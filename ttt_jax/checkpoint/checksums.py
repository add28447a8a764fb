"""The folders of a run's checkpoints: which steps are complete, checksums of their files, and what
is removed when.

    STEP/                       complete: Orbax gives the folder this name last
    STEP/checksums.json         SHA-256 and size of every file, written before the folder's name
    STEP.orbax-checkpoint-tmp*  a save in flight, or what a kill has left of one
    STEP.damaged*               set aside by a restore that found damage; nothing reads it again

This module imports no jax; a checkpoint can be verified by `find_damage` on any machine.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ttt_jax.errors import CheckpointError
from ttt_jax.files.reading import excerpt, read_json_object, show
from ttt_jax.files.text import atomic_write_text

CHECKPOINT_FOLDER = "checkpoints"  # of a run folder; holds the steps
CHECKSUMS = "checksums.json"
# field of `extra` that a checkpoint says about itself: its step, and that checksums were written
FORMAT = "format"
EXTRA_FILE = "extra/metadata"
_DESCRIPTION = "ttt_jax.json"  # of a converted folder, where the field `checksums` says the same
# Orbax writes these last; a restore does not read them
_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
_MAX_BYTES = 256 << 20  # of checksums.json, and of the files that say that there is one
_LEFTOVERS = (".orbax-checkpoint-tmp", ".deleting")


# ---------------------------------------------------------------------------------------- checksums


def format_note(step: int) -> dict[str, Any]:
    """Make what a checkpoint says about itself in its `extra`, under `FORMAT`."""
    return {"step": step, "checksums": True}


def write_checksums(folder: Path, names: Iterable[str] | None = None) -> None:
    """Record files below `folder` in its `checksums.json`, atomically. `sync_tree` is the caller's.

    Args:
      names: of the files, relative to `folder`; None: every file there is.

    Raises: OSError.
    """
    if names is None:
        names = (
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        )
    names = sorted(name for name in names if name != CHECKSUMS and name not in _LATER)
    files = dict(
        zip(names, _in_parallel(lambda name: _describe(folder / name), names), strict=True)
    )
    text = json.dumps({"version": 1, "files": files, "files_sha256": _digest(files)}, indent=0)
    atomic_write_text(folder / CHECKSUMS, text)


def find_damage(folder: Path, below: str = "") -> str | None:
    """Compare a checkpoint with its checksums: None when all is well, else what is wrong, beginning
    with a file's name.

    Args:
      below: only files whose path below `folder` starts with this, such as `model/` (and what the
        checkpoint says of itself).

    A missing `checksums.json` is damage where the checkpoint says that it was written. An older
    version's checkpoint does not say so, and cannot be compared: None; see `has_checksums`. A
    step's folder must have the step's number for a name.
    """
    try:
        if wrong := _irregular(folder, below):
            return wrong
        note = _own_note(folder)
    except OSError as error:
        return f"{below or folder.name}: {error.strerror}"
    if isinstance(note, str):
        return note
    if not (folder / CHECKSUMS).exists():
        return f"{CHECKSUMS}: missing" if note.get("checksums") else None
    if wrong := compare_files(folder, (below, EXTRA_FILE, _DESCRIPTION)):
        return wrong
    step = note.get("step")
    if folder.name.isdecimal() and step is not None and step != int(folder.name):
        return f"{EXTRA_FILE}: it is of step {excerpt(step)}, and the folder was renamed"
    return None


def compare_files(folder: Path, below: tuple[str, ...] = ("",)) -> str | None:
    """Compare files with `checksums.json`, which must be there: None, or what is wrong, beginning
    with a file's name.

    Args:
      below: only files whose path starts with one of these.
    """
    try:
        record = read_json_object(folder / CHECKSUMS, CheckpointError, _MAX_BYTES)
        files = record["files"]
        if record["version"] != 1 or record["files_sha256"] != _digest(files):
            return f"{CHECKSUMS}: does not match itself"
        names = [name for name in files if name.startswith(below)]
        if any(
            PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in names
        ):
            return f"{CHECKSUMS}: names files outside of the checkpoint"
        wanted = [(files[name]["bytes"], files[name]["sha256"]) for name in names]
    except (CheckpointError, KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return f"{CHECKSUMS}: not readable"

    def check(item: tuple[str, tuple[Any, Any]]) -> str | None:
        name, (size, sha256) = item
        try:
            if not (folder / name).is_file():
                return f"{name}: missing"
            if (folder / name).stat().st_size != size:
                return f"{name}: {(folder / name).stat().st_size} bytes instead of {excerpt(size)}"
            if _describe(folder / name)["sha256"] != sha256:
                return f"{name}: its content changed since it was written"
        except (OSError, ValueError) as error:
            return f"{show(name)}: {getattr(error, 'strerror', None) or error}"
        return None

    return next(
        (wrong for wrong in _in_parallel(check, list(zip(names, wanted, strict=True))) if wrong),
        None,
    )


def has_checksums(folder: Path) -> bool:
    """Say whether `find_damage` can compare the files of a checkpoint."""
    return (folder / CHECKSUMS).exists()


def _irregular(folder: Path, below: str) -> str | None:
    """Find a pipe or a device among the files, at which a reader would hang."""
    for path in (folder / below, folder / EXTRA_FILE, folder / _DESCRIPTION, folder / CHECKSUMS):
        places = (
            [path]
            if not path.is_dir()
            else (Path(root, name) for root, _, names in os.walk(path) for name in names)
        )
        for place in places:
            if os.path.lexists(place) and not (place.is_file() or place.is_dir()):
                return f"{place.relative_to(folder).as_posix()}: not a regular file"
    return None


def _own_note(folder: Path) -> dict[str, Any] | str:
    """Read what a step or a converted folder says of itself (`step`, `checksums`), or what is wrong
    with the file that says it.
    """
    for name in (EXTRA_FILE, _DESCRIPTION):
        if os.path.lexists(folder / name):
            try:
                found = read_json_object(folder / name, CheckpointError, _MAX_BYTES)
            except CheckpointError:
                return f"{name}: not readable"
            note = (
                found.get(FORMAT, {})
                if name == EXTRA_FILE
                else {"checksums": found.get("checksums")}
            )
            return note if isinstance(note, dict) else f"{name}: not readable"
    # Every version wrote `extra` into a step's folder. Without it nothing would say that checksums
    # are missing.
    return f"{EXTRA_FILE}: missing" if folder.name.isdecimal() else {}


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": sha256}


def _digest(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _in_parallel(function: Any, items: list[Any]) -> Iterator[Any]:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter lock
        yield from pool.map(function, items)


# ------------------------------------------------------------------------------------------ folders


def finished_steps(folder: Path) -> list[int]:
    """List the complete steps, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if is_finished(entry))


def is_finished(path: Path) -> bool:
    """Say whether Orbax gave the folder its name, which it does last."""
    return path.name.isdecimal() and path.is_dir()


def remove_leftovers(folder: Path) -> None:
    """Remove what killed or failed saves, and killed removals, have left. Nothing may be in
    flight.
    """
    for entry in list(folder.iterdir()):
        number, _, rest = entry.name.partition(".")
        if number.isdecimal() and f".{rest}".startswith(_LEFTOVERS):
            shutil.rmtree(entry, ignore_errors=True)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` steps. A kill in between leaves no half of a step behind."""
    for step in finished_steps(folder)[:-keep]:
        doomed = folder / f"{step}.deleting"
        shutil.rmtree(doomed, ignore_errors=True)
        (folder / str(step)).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged step so that it is neither read nor counted nor overwritten. Returns its new
    place.
    """
    target, number = path.with_name(f"{path.name}.damaged"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged{number}")
    return path.rename(target)
