"""The folders of a run's checkpoints: which steps are complete, checksums of their files, and what is removed when.

    checkpoints/STEP/                      complete: Orbax gives the folder this name last
    checkpoints/STEP/checksums.json        SHA-256 and size of every file, written before the folder gets its name
    checkpoints/STEP.orbax-checkpoint-tmp* a save in flight, or what a kill has left of one
    checkpoints/STEP.damaged*              set aside by a restore that found a damaged file; nothing here reads it again

This module imports no jax; a checkpoint can be verified by `find_damage` on any machine.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ttt_jax.run_dir import atomic_write_text

CHECKSUMS = "checksums.json"
_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax writes these last; a restore does not read them
_MAX_BYTES = 256 << 20  # of checksums.json itself
_LEFTOVERS = (".orbax-checkpoint-tmp", ".deleting")


# ------------------------------------------------------------------------------------------------------- checksums


def write_checksums(folder: Path) -> None:
    """Record every file below `folder` in its `checksums.json`, atomically. Raises OSError."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name != CHECKSUMS and name not in _LATER]
    files = dict(zip(names, _in_parallel(lambda name: _describe(folder / name), names), strict=True))
    text = json.dumps({"version": 1, "files": files, "files_sha256": _digest(files)}, indent=0)
    atomic_write_text(folder / CHECKSUMS, text)


def find_damage(folder: Path, below: str = "") -> str | None:
    """Compare a checkpoint with its checksums: None when all is well, else what is wrong, beginning with a file's name.

    Args:
      below: only files whose path below `folder` starts with this, such as `model/`.

    A checkpoint without `checksums.json` (an older version's) cannot be compared: None; see `has_checksums`.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return None
    try:
        if path.stat().st_size > _MAX_BYTES:
            return f"{CHECKSUMS}: too large"
        record = json.loads(path.read_text(encoding="utf-8"))
        files = record["files"]
        if record["version"] != 1 or record["files_sha256"] != _digest(files):
            return f"{CHECKSUMS}: does not match itself"
        names = [name for name in files if name.startswith(below)]
        if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in names):
            return f"{CHECKSUMS}: names files outside of the checkpoint"
        wanted = [(files[name]["bytes"], files[name]["sha256"]) for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{CHECKSUMS}: not readable"

    def check(item: tuple[str, tuple[Any, Any]]) -> str | None:
        name, (size, sha256) = item
        try:
            if not (folder / name).is_file():
                return f"{name}: missing"
            if (folder / name).stat().st_size != size:
                return f"{name}: {(folder / name).stat().st_size} bytes instead of {size}"
            if _describe(folder / name)["sha256"] != sha256:
                return f"{name}: its content changed since it was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
        return None

    return next((wrong for wrong in _in_parallel(check, list(zip(names, wanted, strict=True))) if wrong), None)


def has_checksums(folder: Path) -> bool:
    return (folder / CHECKSUMS).exists()


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": sha256}


def _digest(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _in_parallel(function: Any, items: list[Any]) -> Iterator[Any]:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter lock
        yield from pool.map(function, items)


# --------------------------------------------------------------------------------------------------------- folders


def finished_steps(folder: Path) -> list[int]:
    """The complete steps, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if is_finished(entry))


def is_finished(path: Path) -> bool:
    """Whether Orbax gave the folder its name, which it does last."""
    return path.name.isdecimal() and path.is_dir()


def remove_leftovers(folder: Path) -> None:
    """Remove what killed or failed saves, and killed removals, have left. Nothing may be in flight."""
    for entry in list(folder.iterdir()):
        number, _, rest = entry.name.partition(".")
        if number.isdecimal() and f".{rest}".startswith(_LEFTOVERS):
            shutil.rmtree(entry, ignore_errors=True)


def prune(folder: Path, keep: int, protect: int | None = None) -> None:
    """Remove all but the newest `keep` steps (and `protect`). A kill in between leaves no half of a step behind."""
    for step in finished_steps(folder)[:-keep]:
        if step == protect:
            continue
        doomed = folder / f"{step}.deleting"
        shutil.rmtree(doomed, ignore_errors=True)
        (folder / str(step)).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged step so that it is neither read nor counted nor overwritten. Returns its new place."""
    target, number = path.with_name(f"{path.name}.damaged"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged{number}")
    return path.rename(target)
