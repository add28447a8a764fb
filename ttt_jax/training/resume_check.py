"""Compares a run's config and data with its last start: refuses before anything is written, or
says once what has changed.

`config/resume_fields.py` says which config fields may change; `run/environment.py` compares the
machine and its switches.
"""

from __future__ import annotations

import numpy as np

from ttt_jax.checkpoint.checksums import CHECKPOINT_FOLDER, finished_steps
from ttt_jax.checkpoint.trees import DamagedError, read_json
from ttt_jax.config import Config, to_dict
from ttt_jax.config.resume_fields import MEASURED, ROUNDING, on_resume
from ttt_jax.data import Loader
from ttt_jax.errors import CheckpointError
from ttt_jax.process.multihost import on_first_process
from ttt_jax.run.environment import brief
from ttt_jax.run.folder import check_same_curve, flatten, read_run_config
from ttt_jax.training.optimizer import learning_rate


def check_resume(config: Config, loader: Loader) -> list[str]:
    """Compare `config` and the data with what `config.run_dir` was started with. Writes nothing.

    Call it before `prepare_run_dir`, on all processes. What that refuses is left to it.

    Returns: lines for the user about settings that have changed and are accepted.

    Raises:
      DataError: one line: the newest checkpoint was made with other data.
    """
    return on_first_process(lambda: _check_resume(config, loader))


def _check_resume(config: Config, loader: Loader) -> list[str]:
    try:
        before = read_run_config(config.run_dir)
        check_same_curve(config.run_dir, config)
    except CheckpointError:  # no run yet, or one that `prepare_run_dir` refuses
        return []
    steps = []
    try:
        steps = finished_steps(config.run_dir / CHECKPOINT_FOLDER)
        if steps:
            newest = config.run_dir / CHECKPOINT_FOLDER / str(max(steps))
            loader.check_state(read_json(newest, "data_state"))
    except (DamagedError, OSError):  # the restore takes another one, and says so
        pass
    return raised_steps(before, config, max(steps, default=0)) + changed_fields(before, config)


def raised_steps(before: Config, now: Config, step: int) -> list[str]:
    """Say what more steps do to the learning rate of a run that goes on after `step` steps: from
    there on it is that of a run that was started with so many.
    """
    if now.steps <= before.steps:
        return []
    was, will = (
        float(np.asarray(learning_rate(config.optimizer, config.steps)(step)))
        for config in (before, now)
    )
    rate = (
        f"the learning rate goes on with {will:.3g}"
        if was == will
        else f"from step {step} on the learning rate is that of a run of {now.steps} steps "
        f"({now.optimizer.schedule}), {will:.3g} where it would be {was:.3g}"
    )
    return [f"steps {before.steps} -> {now.steps}: {rate}"]


def changed_fields(before: Config, now: Config) -> list[str]:
    """Describe changed fields that are accepted, a line each for the user: one for rounding, one
    for what is measured.
    """
    old, new = flatten(to_dict(before)), flatten(to_dict(now))
    lines = []
    for kind, consequence in (
        (ROUNDING, "the curve goes on equal to rounding, not bit for bit"),
        (MEASURED, "held-out losses before and after are not of the same tokens"),
    ):
        changed = [
            f"{name} {brief(old.get(name))} -> {brief(value)}"
            for name, value in new.items()
            if on_resume(name) == kind and old.get(name) != value
        ]
        if changed:
            lines.append(f"changed since the last start: {', '.join(changed)}; {consequence}")
    return lines
