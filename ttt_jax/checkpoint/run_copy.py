"""A copy of a run on an object store, or in another folder: it outlives the disk of the run.

    COPY_TO/NAME/checkpoints/STEP/  the newest steps; `checksums.json` of a step comes last
    COPY_TO/NAME/config.yaml  metrics.jsonl  events.jsonl  ...   what lies in the run folder itself

A store has neither locks nor renaming, so the run folder stays on a disk, and is the one that is
written to. Each finished step is copied behind the run's back. A step whose `checksums.json` is
there is complete; that file is the first to go when a step is removed. A start whose run folder has
no such step fetches the newest one, and goes on.

Orbax itself writes to gs:// only: of s3:// it says that the path is not absolute (0.12.8).
"""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

from ttt_jax.checkpoint.checksums import (
    CHECKPOINT_FOLDER,
    CHECKSUMS,
    compare_files,
    finished_steps,
)
from ttt_jax.checkpoint.run_place import Place
from ttt_jax.config import Config
from ttt_jax.errors import CheckpointError, TrainingError
from ttt_jax.files.stores import StoreError, is_url
from ttt_jax.files.text import one_line, reason_of, sync, sync_tree
from ttt_jax.process.multihost import from_first_process, on_first_process
from ttt_jax.run.folder import CONFIG_FILE, check_same_curve

_NOT_COPIED = (CHECKPOINT_FOLDER, "compile_cache", "tensorboard")
_PROBE = ".can_be_written"
_HELD = ".copy"  # of the run folder: links to the files of the step that is being copied
_AT_ONCE = 8  # files
_PAUSE = 30.0  # seconds after a failed copy
_MAX_FILE_BYTES = 1 << 30  # of a file beside the checkpoints, when it is fetched


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _is_copied(name: str) -> bool:
    """Say whether a file of the run folder, outside of its checkpoints, is part of the copy."""
    first, *rest = name.split("/")
    hidden = any(part.startswith(".") or not part for part in (first, *rest))
    return not hidden and first not in _NOT_COPIED and not name.endswith(".tmp")


# ------------------------------------------------------------------------------------------ fetch


def fetch_run(config: Config) -> list[str]:
    """Bring the run folder up to its copy, when that has a newer step, and check that the copy can
    be written. The lock of the run folder is held.

    Returns: lines for the user.

    Raises: CheckpointError, one line: the copy cannot be reached or written, is of another run, or
      none of its steps is intact.
    """
    if config.checkpoint.copy_to is None:
        return []
    return on_first_process(lambda: _fetch(config))


def _fetch(config: Config) -> list[str]:
    target = config.checkpoint.copy_to
    assert target is not None
    label = f"config field checkpoint.copy_to = {target!r}"
    if not is_url(target):
        there, here = (Path(path).expanduser().resolve() for path in (target, config.runs_dir))
        if there == here or (here / config.name) in (there, *there.parents):
            raise CheckpointError(
                f"{label}: is where the run itself lies; name another folder, or set it to null"
            )
    try:
        place = Place(target, config.name)
        place.put_bytes(b"", _PROBE)
        place.remove(_PROBE)
        names, steps = place.names(), place.steps()
        others = [name for name in names if _is_copied(name)]
        if CONFIG_FILE in others:
            _check_config(config, place, label)
        elif names:
            raise CheckpointError(
                f"{label}: {config.name} holds {names[0]!r} there but no {CONFIG_FILE}, so it is "
                "no copy of a run; choose another name or place"
            )
        return _fetch_newest(config, place, steps, others, label)
    except StoreError as error:
        raise CheckpointError(
            f"{label}: {one_line(error)}; check the place, the credentials and the network, or set "
            "it to null"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{label}: cannot be used ({reason_of(error)}); make it writable, or set it to null"
        ) from None


def _check_config(config: Config, place: Place, label: str) -> None:
    """Raise CheckpointError unless the copy is of the same training curve."""
    with tempfile.TemporaryDirectory() as folder:
        if place.size(CONFIG_FILE) > _MAX_FILE_BYTES:
            raise CheckpointError(f"{label}: {CONFIG_FILE} there is too large; choose another name")
        place.get(CONFIG_FILE, Path(folder, CONFIG_FILE))
        try:
            check_same_curve(Path(folder), config)
        except CheckpointError as error:
            there = str(error).replace(f"run folder {folder}", f"the copy in {place.root}")
            raise CheckpointError(there) from None


def _fetch_newest(
    config: Config, place: Place, steps: dict[int, list[str]], others: list[str], label: str
) -> list[str]:
    """Fetch the newest step that is intact, if it is newer than those of the run folder."""
    run_dir, remarks = config.run_dir, []
    folder = run_dir / CHECKPOINT_FOLDER
    here = max(finished_steps(folder), default=0)
    for step in sorted(steps, reverse=True):
        if step <= here:
            break
        if CHECKSUMS not in steps[step]:  # the copy, or its removal, was cut short
            continue
        partial = folder / f"{step}.orbax-checkpoint-tmp-copy"
        shutil.rmtree(partial, ignore_errors=True)
        wrong = _get_step(place, step, steps[step], partial)
        if wrong is not None:
            shutil.rmtree(partial, ignore_errors=True)
            remarks.append(f"{label}: step {step} there is damaged ({wrong}) and left out")
            continue
        for name in sorted(others, key=lambda name: name != CONFIG_FILE):
            if ".." not in name.split("/") and place.size(name) <= _MAX_FILE_BYTES:
                place.get(name, run_dir / name)
        sync_tree(partial)
        partial.rename(folder / str(step))
        sync(folder)
        return [*remarks, f"{label}: fetched step {step}, which {run_dir} did not have"]
    if remarks and not here:
        raise CheckpointError(f"{remarks[0]}; no older one is intact: choose another name")
    return remarks


def _get_step(place: Place, step: int, names: list[str], folder: Path) -> str | None:
    """Fetch a step into `folder`: None, or what is wrong with it."""
    if any(".." in name.split("/") for name in names):
        return "it names files outside of itself"
    folder.mkdir(parents=True)
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        list(
            pool.map(
                lambda name: place.get(f"{CHECKPOINT_FOLDER}/{step}/{name}", folder / name), names
            )
        )
    return compare_files(folder)


# ------------------------------------------------------------------------------------------- copy


class RunCopy:
    """Copies finished steps while the run goes on. The first process copies; the others know of
    nothing but the outcome at the end.

    Args:
      warn: an `EventLog`.
    """

    def __init__(self, config: Config, warn: Callable[..., None]) -> None:
        self._config, self._warn = config, warn
        self._target = config.checkpoint.copy_to
        self._main = jax.process_index() == 0
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "copy")
        self._pending: concurrent.futures.Future[None] | None = None
        self._step = self._copied = 0  # being copied; copied by this start
        self._failed, self._again = False, 0.0
        if self._main:
            shutil.rmtree(config.run_dir / _HELD, ignore_errors=True)  # of a start that was killed

    def follow(self) -> None:
        """Look for a new step to copy, and at what has become of the last one. Returns at once."""
        if self._target is None or not self._main:
            return
        if self._pending is not None:
            if not self._pending.done():
                return
            self._settle()
        newest = self._newest()
        if newest and newest != self._copied and time.monotonic() >= self._again:
            self._step = newest
            self._pending = self._pool.submit(self._copy, newest, self._hold(newest))

    def finish(self) -> None:
        """Copy the newest step and wait for it. All processes together.

        Raises: TrainingError, one line: it could not be copied; it is in the run folder.
        """
        if self._target is None:
            return
        reason = None
        if self._main:
            if self._pending is not None:
                self._settle()
            newest = self._newest()
            try:
                if newest and newest != self._copied:
                    self._copy(newest, self._hold(newest))
                    self._copied = newest
            except OSError as error:
                reason = self._problem(newest, error)
        if reason := from_first_process(reason):
            raise TrainingError(f"{reason}; run the same command again to copy it")

    def files(self) -> None:
        """Copy what lies in the run folder beside its checkpoints, the report for instance; a
        failure is a warning.
        """
        if self._target is None or not self._main:
            return
        try:
            self._put_files(Place(self._target, self._config.name))
        except OSError as error:
            self._warn(
                f"config field checkpoint.copy_to = {self._target!r}: the report could not be "
                f"copied ({reason_of(error)})",
                kind="copy_failed",
            )

    def __enter__(self) -> RunCopy:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _newest(self) -> int:
        return max(finished_steps(self._config.run_dir / CHECKPOINT_FOLDER), default=0)

    def _settle(self) -> None:
        """Wait for the copy under way; its failure is a warning, once."""
        pending, self._pending = self._pending, None
        assert pending is not None
        try:
            pending.result()
        except OSError as error:
            self._again = time.monotonic() + _PAUSE
            if not self._failed:
                self._warn(
                    f"{self._problem(self._step, error)}; training goes on, and it is tried again",
                    kind="copy_failed",
                )
            self._failed = True
            return
        self._copied = self._step
        if self._failed:
            self._failed = False
            self._warn(f"step {self._step} is copied: copying works again", kind="copied")

    def _problem(self, step: int, error: OSError) -> str:
        return (
            f"config field checkpoint.copy_to = {self._target!r}: step {step} is in "
            f"{self._config.run_dir} but could not be copied ({reason_of(error)})"
        )

    def _hold(self, step: int) -> Path:
        """Keep the files of a step for the copy, by hard links: the run may remove the step before
        it is copied. Returns their folder. If that fails, there is none, and
        `_copy_held` says so.
        """
        held = self._config.run_dir / _HELD / str(step)
        shutil.rmtree(held, ignore_errors=True)
        source = self._config.run_dir / CHECKPOINT_FOLDER / str(step)
        try:
            shutil.copytree(source, held, copy_function=_link)
        except OSError:  # a part of a step must not pass for one
            shutil.rmtree(held, ignore_errors=True)
        return held

    def _copy(self, step: int, source: Path) -> None:
        """Copy a step from the folder that holds it, which is removed. Raises OSError."""
        try:
            self._copy_held(step, source)
        finally:
            shutil.rmtree(source.parent, ignore_errors=True)

    def _copy_held(self, step: int, source: Path) -> None:
        assert self._target is not None
        place = Place(self._target, self._config.name)
        there = place.steps()
        if CHECKSUMS not in there.get(step, ()):
            found = [path for path in source.rglob("*") if path.is_file()]
            names = [path.relative_to(source).as_posix() for path in found]
            if CHECKSUMS not in names:
                raise StoreError(f"it has no {CHECKSUMS}, or could not be kept for the copy")
            names.remove(CHECKSUMS)
            below = f"{CHECKPOINT_FOLDER}/{step}"
            with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(lambda name: place.put(source / name, f"{below}/{name}"), names))
            self._put_files(place)
            place.put(source / CHECKSUMS, f"{below}/{CHECKSUMS}")
        self._prune(place, there, step)

    def _put_files(self, place: Place) -> None:
        run_dir = self._config.run_dir
        for path in sorted(run_dir.rglob("*")):
            name = path.relative_to(run_dir).as_posix()
            if _is_copied(name) and path.is_file():
                place.put(path, name)

    def _prune(self, place: Place, there: dict[int, list[str]], newest: int) -> None:
        """Remove all but the newest steps, and what copies that were cut short have left."""
        complete = sorted({newest, *(s for s, names in there.items() if CHECKSUMS in names)})
        kept = complete[-self._config.checkpoint.keep :]
        for step, names in there.items():
            if step not in kept and step < newest:
                if CHECKSUMS in names:
                    place.remove(f"{CHECKPOINT_FOLDER}/{step}/{CHECKSUMS}")
                place.remove_folder(f"{CHECKPOINT_FOLDER}/{step}")
