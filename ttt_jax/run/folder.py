"""The run folder: its layout, its `config.yaml`, and the rule for which runs may be continued in
it.

    runs/NAME/config.yaml  checkpoints/STEP/  metrics.jsonl  events.jsonl  tensorboard/
              report.json  report.md  *.png  report.html
              environment.json  environments.jsonl  compile_cache/
              quarantine.jsonl (if records were malformed)

A folder belongs to one training curve. Asking for another one under the same name is refused, and
nothing is written. This module imports no jax, unless several processes have to agree.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import yaml

from ttt_jax.config import Config, dump_yaml, from_dict, to_dict
from ttt_jax.config.presets import RUN_CONFIG
from ttt_jax.config.resume_fields import RAISED, REFUSED, on_resume
from ttt_jax.config.yaml_text import MAX_YAML_BYTES, parse_yaml
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.files.reading import read_bounded
from ttt_jax.files.text import atomic_write_text, shorten
from ttt_jax.process.lock import RUN_LOCK
from ttt_jax.process.multihost import on_first_process

CONFIG_FILE = RUN_CONFIG
METRICS_FILE = "metrics.jsonl"
ENVIRONMENT_FILE = "environment.json"


def prepare_run_dir(config: Config) -> bool:
    """Create `config.run_dir` with its `config.yaml`, or check that the folder continues the same
    training curve.

    With several processes, the first one looks and writes, and all get the same answer or the same
    error.

    Returns:
      True if the folder already was a run of this config (`config.yaml` then takes the new log,
      eval, ... settings).

    Raises:
      CheckpointError: one line; the folder holds another run or other files, or cannot be written.
        Nothing is changed.
    """
    return on_first_process(lambda: _prepare(config))


def check_run_dir(config: Config) -> bool:
    """Say whether `config.run_dir` is a run of this config already. Writes nothing.

    Raises:
      CheckpointError: one line; the folder holds another run or other files.
    """
    run_dir = config.run_dir
    if run_dir.exists() and not run_dir.is_dir():
        raise CheckpointError(f"run folder {run_dir}: is a file; choose another name or runs_dir")
    present = {entry.name for entry in run_dir.iterdir()} if run_dir.exists() else set()
    if CONFIG_FILE in present:
        check_same_curve(run_dir, config)
        return True
    # A run that was killed before its very first write was done leaves these.
    foreign = sorted(present - {f".{CONFIG_FILE}.tmp", RUN_LOCK})
    if foreign:
        raise CheckpointError(
            f"run folder {run_dir}: holds {foreign[0]!r} but no {CONFIG_FILE}, so it is not a run; "
            "choose another name or runs_dir"
        )
    return False


def _prepare(config: Config) -> bool:
    run_dir = config.run_dir
    try:
        resuming = check_run_dir(config)
        run_dir.mkdir(parents=True, exist_ok=True)
        text = dump_yaml(config)
        path = run_dir / CONFIG_FILE
        if not resuming or path.read_text(encoding="utf-8") != text:
            atomic_write_text(path, text)
    except OSError as error:
        raise CheckpointError(
            f"run folder {run_dir}: {error.strerror}; choose another runs_dir"
        ) from None
    return resuming


def read_run_config(run_dir: str | Path) -> Config:
    """Read the `Config` of an existing run. Raises `CheckpointError` when it is missing or not
    readable.
    """
    path = Path(run_dir) / CONFIG_FILE
    try:
        if not os.path.lexists(path):
            what = f"no {CONFIG_FILE}" if os.path.isdir(run_dir) else "no such folder"
            raise CheckpointError(
                f"run folder {run_dir}: {what}; give the folder of a training run"
            )
        tree = parse_yaml(read_bounded(path, MAX_YAML_BYTES, CheckpointError).decode("utf-8"))
        return from_dict(Config, tree if isinstance(tree, dict) else {"config.yaml": tree})
    except ConfigError as error:
        raise CheckpointError(
            f"run folder {run_dir}: {CONFIG_FILE} is not of this version: {error}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"run folder {run_dir}: {CONFIG_FILE} is damaged ({reason}); restore or delete it"
        ) from None


def check_same_curve(run_dir: Path, config: Config) -> None:
    """Raise CheckpointError, one line, unless the run in `run_dir` may be continued with
    `config`.
    """
    try:
        before = read_run_config(run_dir)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or choose another name") from None
    old, new = _curve_fields(before), _curve_fields(config)
    if config.steps > before.steps:  # goes on, as a run of so many steps (docs/resume.md)
        old = _curve_fields(dataclasses.replace(before, steps=config.steps))
        warmup = "optimizer.warmup_steps"
        if new[warmup] == before.optimizer.warmup(before.steps):
            old[warmup] = new[warmup]  # the warm-up that was done
    for field in [*new, *(key for key in old if key not in new)]:
        if old.get(field) != new.get(field):
            raise CheckpointError(
                f"config field {field} = {_short(new.get(field))}: run folder {run_dir} was "
                "started with "
                f"{_short(old.get(field))}; choose another --name, or delete that folder to start "
                "anew"
            )


def _curve_fields(config: Config) -> dict[str, Any]:
    """Map dotted fields to values, of the fields that shape the training curve. Derived ones in
    their effective form.
    """
    fields = {
        key: value
        for key, value in flatten(to_dict(config)).items()
        if on_resume(key) in (RAISED, REFUSED)
    }
    optimizer = config.optimizer
    # a ratio means a number of steps
    fields["optimizer.warmup_steps"] = optimizer.warmup(config.steps)
    unused = {"optimizer.warmup_ratio"}
    if optimizer.schedule != "wsd":
        unused.add("optimizer.decay_ratio")
    if optimizer.schedule == "constant":  # the only schedule that does not depend on where it ends
        unused |= {"optimizer.final_lr_ratio", "steps"}
    return {key: value for key, value in fields.items() if key not in unused}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Map dotted fields to values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _short(value: Any) -> str:
    return shorten(json.dumps(value), 80)
