"""Checkpoints with Orbax: asynchronous, atomic, verified, restorable onto any mesh.

    checkpoints/STEP/model           every parameter under its dotted path (OCDBT)
    checkpoints/STEP/opt_state       every moment and counter under its dotted path
    checkpoints/STEP/data_state      JSON: where the data iterator stands
    checkpoints/STEP/extra           JSON: anything else
    checkpoints/STEP/checksums.json  SHA-256 of every file

A step folder gets its final name only when all of it is on disk, so a kill during a save costs that save alone. Trees
are stored as flat dictionaries, so what is in a checkpoint does not depend on Python classes, and there is no pickle.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from ttt_jax.checkpoint_files import (
    find_damage,
    finished_steps,
    has_checksums,
    is_finished,
    prune,
    remove_leftovers,
    set_aside,
    write_checksums,
)
from ttt_jax.config import CheckpointConfig
from ttt_jax.distributed import any_process, from_first_process
from ttt_jax.errors import CheckpointError
from ttt_jax.paths import param_path
from ttt_jax.run_dir import CHECKPOINT_FOLDER, atomic_write_text, prepare_run_dir, read_run_config

__all__ = [
    "Checkpointer",
    "Restored",
    "atomic_write_text",
    "load_model_params",
    "prepare_run_dir",
    "read_run_config",
    "save_model_params",
]

_MODEL, _OPT_STATE, _DATA_STATE, _EXTRA = "model", "opt_state", "data_state", "extra"
_CHUNK_BYTES = 32 << 20
_FIX_MODEL = "use the model section of the config it was trained with, or start another run"
_FIX_OPT_STATE = "use the optimizer.groups it was trained with, or start another run with init_from"
_IO_ERRORS = (OSError, ValueError, RuntimeError)  # ValueError: tensorstore's, for instance when the disk is full


class Restored(NamedTuple):
    """What `Checkpointer.restore` returns; `model` and `opt_state` have the structures that were passed in."""

    model: Any
    opt_state: Any
    data_state: dict[str, Any]
    extra: dict[str, Any]


class DamagedError(CheckpointError):
    """A checkpoint's files are not those that were written."""


class _ReportedElsewhere(logging.Filter):
    """Orbax logs stack traces of every failure, of which `Checkpointer` makes one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in Path(record.pathname).parts


logging.getLogger("absl").addFilter(_ReportedElsewhere())


class _WithChecksums(ocp.CompositeCheckpointHandler):
    """Orbax calls `finalize` when all items are on disk, on one process, before the folder gets its name."""

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        write_checksums(Path(directory))


@ocp.args.register_with_handler(_WithChecksums, for_save=True, for_restore=True)
class _Items(ocp.args.Composite):
    """Orbax finds the handler by the class of its arguments."""


class Checkpointer:
    """The checkpoints of one run. With several processes, each one calls every method in the same order."""

    def __init__(self, directory: str | Path, config: CheckpointConfig, warn: Callable[[str], None] = warnings.warn) -> None:
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
            raise CheckpointError(f"checkpoint folder {directory}: {error.strerror}; choose another runs_dir") from None
        self._writer = ocp.AsyncCheckpointer(_WithChecksums())
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._pending_step = 0

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if kind is None:
                raise
            self._warn(str(failure))  # the first error is the one to report

    def save(
        self, step: int, *, model: Any, opt_state: Any, data_state: dict[str, Any], extra: dict[str, Any] | None = None
    ) -> None:
        """Save a step; with `async_save`, return as soon as the arrays are copied, so that they may be donated.

        Args:
          step: finished steps. A step that is saved already (or being saved) is left as it is.
          model, opt_state: trees of float32, bfloat16 or integer `jax.Array`s, global ones with several processes.
          data_state, extra: what JSON can hold; process 0's are stored.

        Raises:
          CheckpointError: this save, or an earlier asynchronous one, could not be written. What it had written is removed.
        """
        self.wait()
        path = self.directory / str(step)
        if from_first_process(path.exists()):
            return
        items = _Items(
            **{
                _MODEL: _save_args(_flat(model)),
                _OPT_STATE: ocp.args.PyTreeSave(_flat(opt_state)),
                _DATA_STATE: ocp.args.JsonSave(data_state),
                _EXTRA: ocp.args.JsonSave(extra or {}),
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
            prune(self.directory, self._config.keep)

    def saving(self) -> bool:
        """Whether a save is in flight on this process."""
        return self._pending is not None and not self._pending.done()

    def latest_step(self) -> int | None:
        """The newest step that is completely on disk; None when there is none."""
        return max(finished_steps(self.directory), default=None)

    def restore(self, step: int, *, model: Any, opt_state: Any) -> Restored:
        """Read a step back, bit for bit, after comparing its files with their checksums.

        Args:
          step: a step of this folder, see `latest_step`.
          model, opt_state: trees of `jax.ShapeDtypeStruct` (or arrays) of the wanted shapes and dtypes; each leaf is
            placed by its `sharding`, which need not be the one it was saved with. Abstract leaves save memory.

        Raises:
          CheckpointError: the step is missing or damaged, or a parameter's name, shape or dtype differs.
        """
        self.wait()
        path = self.directory / str(step)
        if not is_finished(path):
            raise CheckpointError(f"checkpoint {path}: no such step; the newest one is {self.latest_step()}")
        if wrong := from_first_process(find_damage(path)):
            raise DamagedError(f"checkpoint {path}: damaged ({wrong}); delete that folder to use an older one")
        return self._read(path, model, opt_state)

    def restore_newest(self, *, model: Any, opt_state: Any, before: int | None = None) -> tuple[int, Restored] | None:
        """The newest step whose files are what was written, and its number; None when there is no checkpoint at all.

        A damaged one is named in a warning and set aside as `STEP.damaged`, once an older one is found intact. All
        processes restore the same step: the first one decides.

        Args: as of `restore`; `before`: only steps below it.

        Raises:
          CheckpointError: every one is damaged (nothing is renamed then), or a parameter's name, shape or dtype differs.
        """
        self.wait()
        damaged: list[tuple[int, str]] = []
        while (step := from_first_process(self._newest_intact(damaged, before))) is not None:
            path, failure, restored = self.directory / str(step), None, None
            try:
                restored = self._read(path, model, opt_state)
            except DamagedError as error:  # only files without checksums, or a disk that changes its mind
                failure = str(error)
            if not any_process(restored is None):
                assert restored is not None
                self._set_aside(damaged, step)
                if from_first_process(not has_checksums(path)):
                    self._warn(f"checkpoint {path}: has no checksums (an older version's); restored unverified")
                return step, restored
            damaged.append((step, failure or "another process could not read it"))
        if damaged := from_first_process(damaged):
            step, wrong = damaged[0]
            raise DamagedError(
                f"checkpoint {self.directory / str(step)}: damaged ({wrong}), and no older one is intact; restore its "
                f"files from a copy, or delete {self.directory} to start anew"
            )
        return None

    def _newest_intact(self, damaged: list[tuple[int, str]], before: int | None) -> int | None:
        """Adds those that it passes over to `damaged`. The first process looks, for the others too."""
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
                self._warn(f"checkpoint {path}: damaged ({wrong}); step {used} is used instead ({where})")

    def extra(self, step: int) -> dict[str, Any]:
        """What a step was saved with as `extra`, as the first process reads it; {} when it cannot be read."""
        try:
            answer = _read_json(self.directory / str(step), _EXTRA) if jax.process_index() == 0 else {}
        except DamagedError:
            answer = {}
        return from_first_process(answer)

    def steps(self) -> list[int]:
        """The complete steps, ascending, as the first process sees them."""
        return from_first_process(finished_steps(self.directory))

    def _read(self, path: Path, model: Any, opt_state: Any) -> Restored:
        model = _restore_tree(path / _MODEL, model, "parameter", _FIX_MODEL)
        opt_state = _restore_tree(path / _OPT_STATE, opt_state, "optimizer state", _FIX_OPT_STATE)
        return Restored(model, opt_state, _read_json(path, _DATA_STATE), _read_json(path, _EXTRA))

    def wait(self) -> None:
        """Return when no save is in flight. Raises `CheckpointError` when one has failed; each failure is raised once."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except _IO_ERRORS as error:
            raise self._not_written(self._pending_step, error) from None

    def close(self) -> None:
        """Finish what is in flight and release the threads. Raises `CheckpointError` when a save has failed."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            with contextlib.suppress(*_IO_ERRORS):  # of saves that failed, and were reported, before
                self._writer.close()

    def _not_written(self, step: int, error: Exception) -> CheckpointError:
        if jax.process_index() == 0:
            remove_leftovers(self.directory)  # its bytes may be what fills the disk
        return CheckpointError(
            f"checkpoint folder {self.directory}: step {step} could not be written ({_one_line(error)}); "
            "free space or make it writable"
        )


# ------------------------------------------------------------------------------------------------- parameters alone


def save_model_params(path: str | Path, model: Any) -> None:
    """Write `path/model`, which `load_model_params` reads: a checkpoint of the parameters alone.

    Raises:
      CheckpointError: `path/model` exists, or cannot be written.
    """
    target = Path(path).absolute() / _MODEL
    if target.exists():
        raise CheckpointError(f"checkpoint {target}: exists already; choose another folder")
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
            writer.save(target, args=_save_args(_flat(model)))
    except OSError as error:
        raise CheckpointError(f"checkpoint {target}: could not be written ({_one_line(error)})") from None


def load_model_params(run_dir_or_checkpoint: str | Path, abstract_model: Any) -> Any:
    """Restore only the parameters: for `init_from`, evaluation and inference.

    Args:
      run_dir_or_checkpoint: a run folder or its `checkpoints` (the newest step is taken), or one step's folder.
      abstract_model: tree of `jax.ShapeDtypeStruct` (or arrays); each leaf gives the dtype and sharding.

    Returns:
      The same structure with `jax.Array` leaves.

    Raises:
      CheckpointError: nothing to read there, or a parameter's name or shape differs.
    """
    path = find_checkpoint(run_dir_or_checkpoint)
    return _restore_tree(path / _MODEL, abstract_model, "parameter", _FIX_MODEL, cast=True)


def find_checkpoint(run_dir_or_checkpoint: str | Path) -> Path:
    """The folder that holds `model`: the given one, or the newest finished step below it.

    Raises:
      CheckpointError: there is none, or the files below `model` do not match their checksums. No older step is taken
        silently here: what is evaluated or converted should be what was asked for.
    """
    path = _find(Path(run_dir_or_checkpoint).absolute(), run_dir_or_checkpoint)
    if wrong := find_damage(path, f"{_MODEL}/"):
        raise DamagedError(f"checkpoint {path}: damaged ({wrong}); name an older step's folder, or restore the file")
    return path


def _find(given: Path, named: str | Path) -> Path:
    if (given / _MODEL).is_dir() and ocp.utils.is_checkpoint_finalized(given):
        return given
    for folder in (given / CHECKPOINT_FOLDER, given):
        if steps := finished_steps(folder):
            return folder / str(steps[-1])
    if not given.exists():
        raise CheckpointError(f"checkpoint {named}: no such folder; check the path")
    raise CheckpointError(
        f"checkpoint {named}: holds no finished checkpoint; give a run folder or one of its {CHECKPOINT_FOLDER}/STEP folders"
    )


# ----------------------------------------------------------------------------------------------------------- trees


def _flat(tree: Any) -> dict[str, Any]:
    """Dotted path -> leaf. Two leaves with one path would be a bug in the model, not the user's."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    flat = {param_path(keypath): leaf for keypath, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves of the tree have the same dotted path")
    return flat


def _save_args(flat: dict[str, Any]) -> ocp.args.PyTreeSave:
    """How parameters lie on disk: a chunk holds one layer and `_CHUNK_BYTES` at most, so that `ttt-jax convert` can read
    layer by layer. By default a chunk is a device's whole shard of a whole stack of layers."""

    def args(name: str, leaf: Any) -> ocp.SaveArgs:
        stacked = name.startswith("groups.") and leaf.ndim > 2
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0, 1) if stacked else ())

    return ocp.args.PyTreeSave(flat, save_args={name: args(name, leaf) for name, leaf in flat.items()})


def _restore_tree(path: Path, tree: Any, noun: str, fix: str, cast: bool = False) -> Any:
    """Read the flat dictionary at `path` into the structure of `tree`. With `cast`, dtypes are `tree`'s."""
    wanted = _flat(tree)
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as reader:
        try:
            stored = handler.metadata(epath.Path(path)).tree
            check_chunks(stored)
        except Exception as error:  # damaged JSON surfaces in many ways
            raise _damaged(path.parent, error) from None
        _check_match(path.parent, stored, wanted, noun, fix, cast)
        item = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in wanted.items()}
        # Placed explicitly: by default Orbax would ask for the devices that the checkpoint was saved from.
        restore_args = {
            name: ocp.ArrayRestoreArgs(sharding=_sharding(leaf), global_shape=leaf.shape, dtype=leaf.dtype)
            for name, leaf in wanted.items()
        }
        try:
            restored = reader.restore(path, args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args))
        except Exception as error:  # Orbax raises a bare Exception when a chunk cannot be read
            raise _damaged(path.parent, error) from None
    return jax.tree.unflatten(jax.tree.structure(tree), [restored[name] for name in wanted])


def check_chunks(stored: dict[str, Any]) -> None:
    """No chunk is larger than its array, as a damaged header might claim: reading one would allocate it.

    Raises: ValueError.
    """
    for name, array in stored.items():
        chunk = (array.storage.chunk_shape if array.storage is not None else None) or array.shape
        if any(part is None or part > max(size, 1) for part, size in zip(chunk, array.shape, strict=True)):
            raise ValueError(f"{name} of shape {list(array.shape)} has chunks of shape {list(chunk)}")


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    sharding = getattr(leaf, "sharding", None)
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0]) if sharding is None else sharding


def _check_match(path: Path, stored: dict[str, Any], wanted: dict[str, Any], noun: str, fix: str, cast: bool) -> None:
    """The first difference between what is stored and what is wanted, as a `CheckpointError`."""
    for name, leaf in wanted.items():
        if name not in stored:
            raise CheckpointError(f"checkpoint {path}: has no {noun} {name}, which this model needs; {fix}")
        if tuple(stored[name].shape) != tuple(leaf.shape):
            raise CheckpointError(
                f"checkpoint {path}: {noun} {name} has shape {list(stored[name].shape)} there and "
                f"{list(leaf.shape)} in this model; {fix}"
            )
        if not cast and stored[name].dtype != leaf.dtype:
            raise CheckpointError(
                f"checkpoint {path}: {noun} {name} is {stored[name].dtype} there and {leaf.dtype} in this model; {fix}"
            )
    for name in stored:
        if name not in wanted:
            raise CheckpointError(f"checkpoint {path}: has a {noun} {name}, which this model lacks; {fix}")


# ---------------------------------------------------------------------------------------------------------- errors


def _read_json(path: Path, item: str) -> dict[str, Any]:
    try:
        return json.loads((path / item / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DamagedError:
    return DamagedError(
        f"checkpoint {path}: incomplete or damaged ({_one_line(error)}); delete that folder to use an older one"
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
