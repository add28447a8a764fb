"""Checkpoints with Orbax: asynchronous, atomic, verified, restorable onto any mesh.

    checkpoints/STEP/model           every parameter under its dotted path (OCDBT)
    checkpoints/STEP/opt_state       every moment and counter under its dotted path
    checkpoints/STEP/data_state      JSON: where the data iterator stands
    checkpoints/STEP/extra           JSON: the step's number, that there are checksums, notes
    checkpoints/STEP/checksums.json  SHA-256 of every file

A step folder gets its final name only when all of it is on disk, so a kill during a save costs that
save alone. Trees are stored as flat dictionaries, so what is in a checkpoint does not depend on
Python classes, and there is no pickle.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from ttt_jax.checkpoint.checksums import (
    FORMAT,
    find_damage,
    finished_steps,
    format_note,
    has_checksums,
    is_finished,
    prune,
    remove_leftovers,
    set_aside,
    write_checksums,
)
from ttt_jax.checkpoint.parameters import FIX_MODEL, MODEL
from ttt_jax.checkpoint.trees import DamagedError, flat, read_json, restore_tree, save_args
from ttt_jax.config import CheckpointConfig
from ttt_jax.errors import CheckpointError
from ttt_jax.files.text import one_line, sync, sync_tree
from ttt_jax.process.multihost import any_process, from_first_process

_OPT_STATE, _DATA_STATE, _EXTRA = "opt_state", "data_state", "extra"
_FIX_OPT_STATE = "use the optimizer.groups it was trained with, or start another run with init_from"
# ValueError: tensorstore's, for instance when the disk is full
_IO_ERRORS = (OSError, ValueError, RuntimeError)


class Restored(NamedTuple):
    """What `Checkpointer.restore` returns; `model` and `opt_state` have the structures that were
    passed in.
    """

    model: Any
    opt_state: Any
    data_state: dict[str, Any]
    extra: dict[str, Any]


class _WithChecksums(ocp.CompositeCheckpointHandler):
    """Orbax calls `finalize` when all items are on disk, on one process, before the folder gets its
    name.
    """

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        write_checksums(Path(directory))
        # Orbax and tensorstore see to the arrays; the JSON beside them is needed as much
        sync_tree(Path(directory))


@ocp.args.register_with_handler(_WithChecksums, for_save=True, for_restore=True)
class _Items(ocp.args.Composite):
    """Orbax finds the handler by the class of its arguments."""


class Checkpointer:
    """The checkpoints of one run. With several processes, each one calls every method in the same
    order.
    """

    def __init__(
        self,
        directory: str | Path,
        config: CheckpointConfig,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        """Open `directory` (created if missing) and remove what an interrupted save has left there.

        Args:
          warn: gets one line about each checkpoint that could not be used.

        Raises:
          CheckpointError: the folder cannot be created or read.
        """
        self.directory = Path(directory).absolute()
        self._config, self._warn = config, warn
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                remove_leftovers(self.directory)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint folder {directory}: {error.strerror}; choose another runs_dir"
            ) from None
        self._writer = ocp.AsyncCheckpointer(_WithChecksums())
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._pending_step = 0

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if kind is None:
                raise
            self._warn(str(failure))  # the first error is the one to report

    def save(
        self,
        step: int,
        *,
        model: Any,
        opt_state: Any,
        data_state: dict[str, Any],
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Save a step; with `async_save`, return as soon as the arrays are copied, so that they may
        be donated.

        Args:
          step: finished steps. A step that is saved already (or being saved) is left as it is.
          model, opt_state: trees of float32, bfloat16 or integer `jax.Array`s, global ones with
            several processes.
          data_state, extra: what JSON can hold; process 0's are stored.

        Raises:
          CheckpointError: this save, or an earlier asynchronous one, could not be written. What it
            had written is removed.
        """
        self.wait()
        path = self.directory / str(step)
        if from_first_process(path.exists()):
            return
        items = _Items(
            **{
                MODEL: save_args(flat(model)),
                _OPT_STATE: ocp.args.PyTreeSave(flat(opt_state)),
                _DATA_STATE: ocp.args.JsonSave(data_state),
                _EXTRA: ocp.args.JsonSave((extra or {}) | {FORMAT: format_note(step)}),
            }
        )
        try:
            self._writer.save(path, args=items)
        except _IO_ERRORS as error:
            raise self._not_written(step, error) from None
        self._pending, self._pending_step = self._thread.submit(self._finish), step
        if not self._config.async_save:
            self.wait()

    def _finish(self) -> None:
        self._writer.wait_until_finished()
        if jax.process_index() == 0:
            sync(self.directory)  # the new name, before older ones are removed
            prune(self.directory, self._config.keep)

    def saving(self) -> bool:
        """Say whether a save is in flight on this process."""
        return self._pending is not None and not self._pending.done()

    def latest_step(self) -> int | None:
        """Find the newest step that is completely on disk; None when there is none."""
        return max(finished_steps(self.directory), default=None)

    def restore(self, step: int, *, model: Any, opt_state: Any) -> Restored:
        """Read a step back, bit for bit, after comparing its files with their checksums.

        Args:
          step: a step of this folder, see `latest_step`.
          model, opt_state: trees of `jax.ShapeDtypeStruct` (or arrays) of the wanted shapes and
            dtypes; each leaf is placed by its `sharding`, which need not be the one it was saved
            with. Abstract leaves save memory.

        Raises:
          CheckpointError: the step is missing or damaged, or a parameter's name, shape or dtype
            differs.
        """
        self.wait()
        path = self.directory / str(step)
        if not is_finished(path):
            raise CheckpointError(
                f"checkpoint {path}: no such step; the newest one is {self.latest_step()}"
            )
        if wrong := from_first_process(find_damage(path)):
            raise DamagedError(
                f"checkpoint {path}: damaged ({wrong}); delete that folder to use an older one"
            )
        return self._read(path, model, opt_state)

    def restore_newest(
        self, *, model: Any, opt_state: Any, before: int | None = None
    ) -> tuple[int, Restored] | None:
        """Restore the newest step whose files are what was written, and its number; None when there
        is no checkpoint at all.

        A damaged one is named in a warning and set aside as `STEP.damaged`, once an older one is
        found intact. All processes restore the same step: the first one decides.

        Args: as of `restore`; `before`: only steps below it.

        Raises:
          CheckpointError: every one is damaged (nothing is renamed then), or a parameter's name,
            shape or dtype differs.
        """
        self.wait()
        damaged: list[tuple[int, str]] = []
        while (step := from_first_process(self._newest_intact(damaged, before))) is not None:
            path, failure, restored = self.directory / str(step), None, None
            try:
                restored = self._read(path, model, opt_state)
            # only files without checksums, or a disk that changes its mind
            except DamagedError as error:
                failure = str(error)
            if not any_process(restored is None):
                assert restored is not None
                self._set_aside(damaged, step)
                if from_first_process(not has_checksums(path)):
                    self._warn(
                        f"checkpoint {path}: has no checksums (an older version's); restored "
                        "unverified"
                    )
                return step, restored
            damaged.append((step, failure or "another process could not read it"))
        if damaged := from_first_process(damaged):
            step, wrong = damaged[0]
            raise DamagedError(
                f"checkpoint {self.directory / str(step)}: damaged ({wrong}), and no older one is "
                "intact; restore its "
                f"files from a copy, or delete {self.directory} to start anew"
            )
        return None

    def _newest_intact(self, damaged: list[tuple[int, str]], before: int | None) -> int | None:
        """Find it, and add those that are passed over to `damaged`. The first process looks, for
        the others too.
        """
        if jax.process_index() != 0:
            return None
        known = {step for step, _ in damaged}
        for step in reversed(finished_steps(self.directory)):
            if step in known or (before is not None and step >= before):
                continue
            wrong = find_damage(self.directory / str(step))
            if wrong is None:
                return step
            damaged.append((step, wrong))
        return None

    def _set_aside(self, damaged: list[tuple[int, str]], used: int) -> None:
        if jax.process_index() == 0:
            for step, wrong in damaged:
                path = self.directory / str(step)
                try:
                    where = f"kept as {set_aside(path).name}"
                except OSError as error:
                    where = f"could not be set aside: {error.strerror}"
                self._warn(
                    f"checkpoint {path}: damaged ({wrong}); step {used} is used instead ({where})"
                )

    def extra(self, step: int) -> dict[str, Any]:
        """Read what a step was saved with as `extra`, as the first process reads it; {} when it
        cannot be read.
        """
        try:
            answer = _read_extra(self.directory / str(step)) if jax.process_index() == 0 else {}
        except DamagedError:
            answer = {}
        return from_first_process(answer)

    def steps(self) -> list[int]:
        """List the complete steps, ascending, as the first process sees them."""
        return from_first_process(finished_steps(self.directory))

    def _read(self, path: Path, model: Any, opt_state: Any) -> Restored:
        model = restore_tree(path / MODEL, model, "parameter", FIX_MODEL)
        opt_state = restore_tree(path / _OPT_STATE, opt_state, "optimizer state", _FIX_OPT_STATE)
        return Restored(model, opt_state, read_json(path, _DATA_STATE), _read_extra(path))

    def wait(self) -> None:
        """Return when no save is in flight. Raises `CheckpointError` when one has failed; each
        failure is raised once.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except _IO_ERRORS as error:
            raise self._not_written(self._pending_step, error) from None

    def close(self) -> None:
        """Finish what is in flight and release the threads. Raises `CheckpointError` when a save
        has failed.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            # of saves that failed, and were reported, before
            with contextlib.suppress(*_IO_ERRORS):
                self._writer.close()

    def _not_written(self, step: int, error: Exception) -> CheckpointError:
        if jax.process_index() == 0:
            remove_leftovers(self.directory)  # its bytes may be what fills the disk
        return CheckpointError(
            f"checkpoint folder {self.directory}: step {step} could not be written "
            f"({one_line(error)}); "
            "free space or make it writable"
        )


def _read_extra(path: Path) -> dict[str, Any]:
    """Read what `save` was given, without what it added. Raises DamagedError."""
    return {name: value for name, value in read_json(path, _EXTRA).items() if name != FORMAT}
