"""Describes the machine of each start of a run, and says what has changed since the last one.

Versions, devices, and the switches of jax and XLA that change rounding count. `environment.json`
describes the newest start, `environments.jsonl` each of them, a line each.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ttt_jax.run.folder import ENVIRONMENT_FILE, flatten

HISTORY_FILE = "environments.jsonl"
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
_SWITCHES = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)
_MAX_BYTES = 1 << 20  # of an environment file that is read back


def numeric_settings() -> dict[str, Any]:
    """Collect the switches outside the config that change rounding: environment variables, and
    jax's own as they are in effect.
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
    """Say in a line for the user when versions, devices or switches are not those of the last
    start; else none.

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
            changed.append(f"{short or name} {brief(old.get(name))} -> {brief(new.get(name))}")
    if not changed:
        return []
    return [
        f"changed since the last start: {', '.join(changed)}; the curve goes on equal to rounding "
        "at "
        f"best, not bit for bit (all starts: {Path(run_dir) / HISTORY_FILE})"
    ]


def read_environment(run_dir: str | Path) -> dict[str, Any] | None:
    """Read what `environment.json` says of the last start; None when it says nothing."""
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


def brief(value: Any) -> str:
    """Shorten a value of a field for a line of text."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.split()) or "''"
    return text if len(text) <= 80 else text[:77] + "..."
