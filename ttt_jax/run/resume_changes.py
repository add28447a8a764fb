"""What has changed since a run's last start: refused before anything is written, or said once.

`resume_fields.py` says which config fields may change. The environment counts, too: versions,
devices, and the switches of jax and XLA that change rounding. `environment.json` describes the
newest start, `environments.jsonl` each of them, a line each.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ttt_jax.checkpoint.checksums import finished_steps
from ttt_jax.checkpoint.trees import DamagedError, read_json
from ttt_jax.config import Config, to_dict
from ttt_jax.config.resume_fields import MEASURED, ROUNDING, on_resume
from ttt_jax.data import Loader
from ttt_jax.errors import CheckpointError
from ttt_jax.files.text import one_line
from ttt_jax.process.multihost import on_first_process
from ttt_jax.run.folder import (
    CHECKPOINT_FOLDER,
    ENVIRONMENT_FILE,
    check_same_curve,
    flatten,
    read_run_config,
)

HISTORY_FILE = "environments.jsonl"
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
_SWITCHES = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)
_MAX_BYTES = 1 << 20  # of an environment file that is read back


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
    try:
        steps = finished_steps(config.run_dir / CHECKPOINT_FOLDER)
        if steps:
            newest = config.run_dir / CHECKPOINT_FOLDER / str(max(steps))
            loader.check_state(read_json(newest, "data_state"))
    except (DamagedError, OSError):  # the restore takes another one, and says so
        pass
    return changed_fields(before, config)


def changed_fields(before: Config, now: Config) -> list[str]:
    """Lines for the user about changed fields that are accepted: one for rounding, one for what is
    measured.
    """
    old, new = flatten(to_dict(before)), flatten(to_dict(now))
    lines = []
    for kind, consequence in (
        (ROUNDING, "the curve goes on equal to rounding, not bit for bit"),
        (MEASURED, "held-out losses before and after are not of the same tokens"),
    ):
        changed = [
            f"{name} {_short(old.get(name))} -> {_short(value)}"
            for name, value in new.items()
            if on_resume(name) == kind and old.get(name) != value
        ]
        if changed:
            lines.append(f"changed since the last start: {', '.join(changed)}; {consequence}")
    return lines


# -------------------------------------------------------------------------------------- environment


def numeric_settings() -> dict[str, Any]:
    """Switches outside the config that change rounding: environment variables, and jax's own as
    they are in effect.
    """
    import jax

    found: dict[str, Any] = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    for name in _SWITCHES:
        value = getattr(jax.config, name, None)
        found[name] = (
            value if isinstance(value, bool | int | str) else None if value is None else str(value)
        )
    return found


def changed_environment(
    run_dir: str | Path, before: dict[str, Any] | None, now: dict[str, Any]
) -> list[str]:
    """A line for the user when versions, devices or switches are not those of the last start; else
    none.

    Args:
      before, now: as `environment.json` has them; before: None at the first start.
    """
    if before is None:
        return []
    old, new = flatten(before), flatten(now)
    changed = []
    for name in sorted(old.keys() | new.keys()):
        group, _, short = name.partition(".")
        if group not in ("hardware", "versions", "settings", "commit") or group not in before:
            continue
        if short == "cpus" and new.get("hardware.platform") != "cpu":
            continue
        if old.get(name) != new.get(name):
            changed.append(f"{short or name} {_short(old.get(name))} -> {_short(new.get(name))}")
    if not changed:
        return []
    return [
        f"changed since the last start: {', '.join(changed)}; the curve goes on equal to rounding "
        "at "
        f"best, not bit for bit (all starts: {Path(run_dir) / HISTORY_FILE})"
    ]


def read_environment(run_dir: str | Path) -> dict[str, Any] | None:
    """What `environment.json` says of the last start; None when it says nothing."""
    path = Path(run_dir) / ENVIRONMENT_FILE
    try:
        if path.stat().st_size > _MAX_BYTES:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def append_environment(
    run_dir: str | Path, before: dict[str, Any] | None, now: dict[str, Any]
) -> None:
    """Add a start to `environments.jsonl`; `before`, the last one, goes first where there is no
    such file yet.

    Raises: OSError.
    """
    path = Path(run_dir) / HISTORY_FILE
    lines = [now] if path.exists() or before is None else [before, now]
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":  # cut short by a kill
                text = b"\n" + text
        file.write(text)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return one_line(text, 80) or "''"
