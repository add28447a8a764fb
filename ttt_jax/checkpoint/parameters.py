"""The parameters of a checkpoint alone: for `init_from`, evaluation, inference and conversion."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from ttt_jax.checkpoint.checksums import (
    CHECKPOINT_FOLDER,
    find_damage,
    finished_steps,
    has_checksums,
)
from ttt_jax.checkpoint.trees import DamagedError, restore_tree
from ttt_jax.errors import CheckpointError

MODEL = "model"
FIX_MODEL = "use the model section of the config it was trained with, or start another run"


def load_model_params(run_dir_or_checkpoint: str | Path, abstract_model: Any) -> Any:
    """Restore only the parameters: for `init_from`, evaluation and inference.

    Args:
      run_dir_or_checkpoint: a run folder or its `checkpoints` (the newest step is taken), or one
        step's folder.
      abstract_model: tree of `jax.ShapeDtypeStruct` (or arrays); each leaf gives the dtype and
        sharding.

    Returns:
      The same structure with `jax.Array` leaves.

    Raises:
      CheckpointError: nothing to read there, or a parameter's name or shape differs.
    """
    path = find_checkpoint(run_dir_or_checkpoint)
    return restore_tree(path / MODEL, abstract_model, "parameter", FIX_MODEL, cast=True)


def find_checkpoint(run_dir_or_checkpoint: str | Path) -> Path:
    """Find the folder that holds `model`: the given one, or the newest finished step below it.

    Raises:
      CheckpointError: there is none, or the files below `model` do not match their checksums. No
        older step is taken silently here: what is evaluated or converted should be what was asked
        for.
    """
    path = _find(Path(run_dir_or_checkpoint).absolute(), run_dir_or_checkpoint)
    if wrong := find_damage(path, f"{MODEL}/"):
        raise DamagedError(
            f"checkpoint {path}: damaged ({wrong}); restore the file, or use an older step or the "
            "original"
        )
    if not has_checksums(path):
        warnings.warn(
            f"checkpoint {path}: has no checksums (an older version's); read unverified",
            stacklevel=3,
        )
    return path


def _find(given: Path, named: str | Path) -> Path:
    if (given / MODEL).is_dir() and ocp.utils.is_checkpoint_finalized(given):
        return given
    for folder in (given / CHECKPOINT_FOLDER, given):
        if steps := finished_steps(folder):
            return folder / str(steps[-1])
    if not given.exists():
        raise CheckpointError(f"checkpoint {named}: no such folder; check the path")
    raise CheckpointError(
        f"checkpoint {named}: holds no finished checkpoint; give a run folder or one of its "
        f"{CHECKPOINT_FOLDER}/STEP folders"
    )
