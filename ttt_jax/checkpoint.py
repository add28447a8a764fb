"""Checkpoints with Orbax: asynchronous, atomic, inspectable, restorable onto any mesh.

    checkpoints/STEP/model       every parameter under its dotted path (OCDBT)
    checkpoints/STEP/opt_state   every moment and counter under its dotted path
    checkpoints/STEP/data_state  JSON: where the data iterator stands
    checkpoints/STEP/extra       JSON: anything else

A step folder gets its final name only when all of it is on disk, so a kill during a save costs that save alone. Trees
are stored as flat dictionaries, so what is in a checkpoint does not depend on Python classes, and there is no pickle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from ttt_jax.config import CheckpointConfig
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


class Restored(NamedTuple):
    """What `Checkpointer.restore` returns; `model` and `opt_state` have the structures that were passed in."""

    model: Any
    opt_state: Any
    data_state: dict[str, Any]
    extra: dict[str, Any]


class Checkpointer:
    """The checkpoints of one run. With several processes, each one calls every method in the same order."""

    def __init__(self, directory: str | Path, config: CheckpointConfig) -> None:
        """Open `directory` (created if missing); what an interrupted save has left there is removed in the background.

        Raises:
          CheckpointError: the folder cannot be created or read.
        """
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep,
            enable_async_checkpointing=config.async_save,
            cleanup_tmp_directories=True,
            create=True,
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise CheckpointError(f"checkpoint folder {directory}: {error.strerror}; choose another runs_dir") from None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(
        self, step: int, *, model: Any, opt_state: Any, data_state: dict[str, Any], extra: dict[str, Any] | None = None
    ) -> None:
        """Save a step; with `async_save`, return as soon as the arrays are copied, so that they may be donated.

        Args:
          step: finished steps. A step that is saved already (or being saved) is left as it is.
          model, opt_state: trees of float32, bfloat16 or integer `jax.Array`s, global ones with several processes.
          data_state, extra: what JSON can hold; process 0's are stored.

        Raises:
          CheckpointError: this save, or an earlier asynchronous one, could not be written.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            **{
                _MODEL: _save_args(_flat(model)),
                _OPT_STATE: ocp.args.PyTreeSave(_flat(opt_state)),
                _DATA_STATE: ocp.args.JsonSave(data_state),
                _EXTRA: ocp.args.JsonSave(extra or {}),
            }
        )
        try:
            self._manager.save(step, args=items, force=True)
        except (OSError, ValueError) as error:  # ValueError: tensorstore's, for instance when the disk is full
            raise self._not_written(step, error) from None

    def latest_step(self) -> int | None:
        """The newest step that is completely on disk; None when there is none."""
        return _newest(self.directory)

    def restore(self, step: int, *, model: Any, opt_state: Any) -> Restored:
        """Read a step back, bit for bit.

        Args:
          step: a step of this folder, see `latest_step`.
          model, opt_state: trees of `jax.ShapeDtypeStruct` (or arrays) of the wanted shapes and dtypes; each leaf is
            placed by its `sharding`, which need not be the one it was saved with. Abstract leaves save memory.

        Raises:
          CheckpointError: the step is missing or damaged, or a parameter's name, shape or dtype differs.
        """
        self.wait()
        path = self.directory / str(step)
        if not _is_finished(path):
            raise CheckpointError(f"checkpoint {path}: no such step; the newest one is {self.latest_step()}")
        model = _restore_tree(path / _MODEL, model, "parameter", _FIX_MODEL)
        opt_state = _restore_tree(path / _OPT_STATE, opt_state, "optimizer state", _FIX_OPT_STATE)
        items = ocp.args.Composite(**{name: ocp.args.JsonRestore() for name in (_DATA_STATE, _EXTRA)})
        try:
            notes = self._manager.restore(step, args=items)
        except (OSError, ValueError, KeyError) as error:
            raise _damaged(path, error) from None
        return Restored(model, opt_state, notes[_DATA_STATE], notes[_EXTRA])

    def wait(self) -> None:
        """Return when no save is in flight. Raises `CheckpointError` when one has failed."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._not_written(None, error) from None

    def close(self) -> None:
        """Finish what is in flight and release the threads. Raises `CheckpointError` when a save has failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _not_written(self, step: int | None, error: Exception) -> CheckpointError:
        which = f"step {step}" if step is not None else "the last save"
        return CheckpointError(
            f"checkpoint folder {self.directory}: {which} could not be written ({_one_line(error)}); "
            "free space or make it writable, then start the run again"
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
    """The folder that holds `model`: the given one, or the newest finished step below it. Raises `CheckpointError`."""
    given = Path(run_dir_or_checkpoint).absolute()
    if (given / _MODEL).is_dir() and _is_finished(given):
        return given
    for folder in (given / CHECKPOINT_FOLDER, given):
        step = _newest(folder)
        if step is not None:
            return folder / str(step)
    if not given.exists():
        raise CheckpointError(f"checkpoint {run_dir_or_checkpoint}: no such folder; check the path")
    raise CheckpointError(
        f"checkpoint {run_dir_or_checkpoint}: holds no finished checkpoint; give a run folder or one of its "
        f"{CHECKPOINT_FOLDER}/STEP folders"
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


# --------------------------------------------------------------------------------------------------------- folders


def _is_finished(path: Path) -> bool:
    return path.is_dir() and ocp.utils.is_checkpoint_finalized(path)


def _newest(folder: Path) -> int | None:
    if not folder.is_dir():
        return None
    steps = [int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal() and _is_finished(entry)]
    return max(steps, default=None)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path}: incomplete or damaged ({_one_line(error)}); delete that folder to use an older one"
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
