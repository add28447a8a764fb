"""Trees of a checkpoint as flat dictionaries of Orbax: how they are laid out, compared with what is
wanted, and read.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from ttt_jax.errors import CheckpointError
from ttt_jax.files.reading import read_json_object
from ttt_jax.files.text import one_line
from ttt_jax.model.param_path import param_path

_CHUNK_BYTES = 32 << 20
MAX_STATE_BYTES = 256 << 20  # of data_state and extra


class _ReportedElsewhere(logging.Filter):
    """Orbax logs stack traces of every failure, of which this room makes one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in Path(record.pathname).parts


logging.getLogger("absl").addFilter(_ReportedElsewhere())


class DamagedError(CheckpointError):
    """A checkpoint's files are not those that were written."""


def flat(tree: Any) -> dict[str, Any]:
    """Map dotted paths to leaves. Two leaves with one path would be a bug in the model, not the
    user's.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {param_path(keypath): leaf for keypath, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same dotted path")
    return named


def save_args(leaves: dict[str, Any]) -> ocp.args.PyTreeSave:
    """Choose how parameters lie on disk: a chunk holds one layer and `_CHUNK_BYTES` at most, so
    that `ttt-jax convert` can read layer by layer. By default a chunk is a device's whole shard of
    a whole stack of layers.
    """

    def args(name: str, leaf: Any) -> ocp.SaveArgs:
        stacked = name.startswith("groups.") and leaf.ndim > 2
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0, 1) if stacked else ())

    return ocp.args.PyTreeSave(
        leaves, save_args={name: args(name, leaf) for name, leaf in leaves.items()}
    )


def restore_tree(path: Path, tree: Any, noun: str, fix: str, cast: bool = False) -> Any:
    """Read the flat dictionary at `path` into the structure of `tree`. With `cast`, dtypes are
    `tree`'s.
    """
    wanted = flat(tree)
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as reader:
        try:
            stored = handler.metadata(epath.Path(path)).tree
            check_chunks(stored)
        except Exception as error:  # damaged JSON surfaces in many ways
            raise _damaged(path.parent, error) from None
        _check_match(path.parent, stored, wanted, noun, fix, cast)
        item = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in wanted.items()}
        # Placed explicitly: by default Orbax would ask for the devices that the checkpoint was
        # saved from.
        restore_args = {
            name: ocp.ArrayRestoreArgs(
                sharding=_sharding(leaf), global_shape=leaf.shape, dtype=leaf.dtype
            )
            for name, leaf in wanted.items()
        }
        try:
            restored = reader.restore(
                path, args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args)
            )
        except Exception as error:  # Orbax raises a bare Exception when a chunk cannot be read
            raise _damaged(path.parent, error) from None
    return jax.tree.unflatten(jax.tree.structure(tree), [restored[name] for name in wanted])


def check_chunks(stored: dict[str, Any]) -> None:
    """Check that no chunk is larger than its array, as a damaged header might claim: reading one
    would allocate it.

    Raises: ValueError.
    """
    for name, array in stored.items():
        chunk = (array.storage.chunk_shape if array.storage is not None else None) or array.shape
        if any(
            part is None or part > max(size, 1)
            for part, size in zip(chunk, array.shape, strict=True)
        ):
            raise ValueError(
                f"{name} of shape {list(array.shape)} has chunks of shape {list(chunk)}"
            )


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    sharding = getattr(leaf, "sharding", None)
    return (
        jax.sharding.SingleDeviceSharding(jax.local_devices()[0]) if sharding is None else sharding
    )


def _check_match(
    path: Path, stored: dict[str, Any], wanted: dict[str, Any], noun: str, fix: str, cast: bool
) -> None:
    """Raise a CheckpointError for the first difference between stored and wanted leaves."""
    for name, leaf in wanted.items():
        if name not in stored:
            raise CheckpointError(
                f"checkpoint {path}: has no {noun} {name}, which this model needs; {fix}"
            )
        if tuple(stored[name].shape) != tuple(leaf.shape):
            raise CheckpointError(
                f"checkpoint {path}: {noun} {name} has shape {list(stored[name].shape)} there and "
                f"{list(leaf.shape)} in this model; {fix}"
            )
        if not cast and stored[name].dtype != leaf.dtype:
            raise CheckpointError(
                f"checkpoint {path}: {noun} {name} is {stored[name].dtype} there and {leaf.dtype} "
                f"in this model; {fix}"
            )
    for name in stored:
        if name not in wanted:
            raise CheckpointError(
                f"checkpoint {path}: has a {noun} {name}, which this model lacks; {fix}"
            )


# ------------------------------------------------------------------------------------------- errors


def read_json(path: Path, item: str) -> dict[str, Any]:
    """Read the JSON object of Orbax's `JsonSave`. Raises DamagedError when it is not one."""
    try:
        return read_json_object(path / item / "metadata", CheckpointError, MAX_STATE_BYTES)
    except CheckpointError as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DamagedError:
    return DamagedError(
        f"checkpoint {path}: incomplete or damaged ({one_line(error)}); delete that folder to use "
        "an older one"
    )
