"""Says where a result comes from, and writes it down at every start of a run."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from ttt_jax.files.text import atomic_write_text
from ttt_jax.run.environment import (
    append_environment,
    changed_environment,
    numeric_settings,
    read_environment,
)
from ttt_jax.run.folder import ENVIRONMENT_FILE

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def provenance() -> dict[str, Any]:
    """Say when, by which code and on what a result came about: date, commit, hardware, versions."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": _hardware(),
        "versions": _versions(),
    }


def _hardware() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "machine": platform.machine(),
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def commit() -> str | None:
    """Find the commit of the checkout that this file is tracked in, marked when files differ; None
    for an installed copy.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with local changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_environment(run_dir: str | Path, **facts: Any) -> list[str]:
    """Write `environment.json`: date, commit, hardware, versions and switches of this start, and
    `facts`.

    It replaces that of an earlier start; `environments.jsonl` keeps them all.

    Returns: warnings: what is not as it was at the last start, and what could not be written; a
      full disk does not keep a run from starting.
    """
    path = Path(run_dir) / ENVIRONMENT_FILE
    now = {**provenance(), "settings": numeric_settings(), **facts}
    before = read_environment(run_dir)
    warnings = changed_environment(run_dir, before, now)
    try:
        atomic_write_text(path, json.dumps(now, indent=2) + "\n")
        append_environment(run_dir, before, now)
    except OSError as error:
        warnings.append(f"{path}: not written ({error.strerror})")
    return warnings
