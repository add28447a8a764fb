"""Finds presets, the YAML files of `configs/`, by their names; an installed copy has them, too."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from ttt_jax.errors import ConfigError

PRESETS = Path(__file__).parent.parent / "presets"
RUN_CONFIG = "config.yaml"  # of a run folder


def preset_names() -> list[str]:
    """List the names of all presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """Return the file of a preset or of a run folder, or the path that is neither.

    A preset counts before a file of the same name: a name means the same in every folder.

    Raises:
      ConfigError: a word that is neither; the line has the names that are close, and all.
    """
    word, names = str(name), preset_names()
    if word in names:
        return PRESETS / f"{word}.yaml"
    path = Path(name)
    if os.path.isfile(path / RUN_CONFIG):
        return path / RUN_CONFIG
    is_path = path.suffix in (".yaml", ".yml") or path.name != word
    if is_path or os.path.isfile(path):  # False, not an error, for names that no system takes
        return path
    near, known = difflib.get_close_matches(word, names, n=3, cutoff=0.5), ", ".join(names)
    if word and os.path.isdir(path):
        raise ConfigError(
            f"config {word}: a folder without {RUN_CONFIG}; give a run folder, a YAML file or a "
            "preset, and data with --data.train"
        )
    fix = f"did you mean {' or '.join(near)}? (presets: {known})" if near else f"presets: {known}"
    raise ConfigError(f"config {word}: no such file, and no preset of this name; {fix}")


def is_preset(file: Path) -> bool:
    """Say whether a file is one of this project's presets, by whatever link it is named."""
    return file.resolve().parent == PRESETS.resolve()


def place_of_run(file: Path) -> dict[str, Any]:
    """Return the fields that name the run folder in which a config lies: a run that was moved goes
    on where it is.
    """
    folder = file.absolute().parent
    return {"runs_dir": str(folder.parent), "name": folder.name}


def same_preset(path: Path) -> str:
    """Make the end of the error line about a missing file whose name is that of a preset."""
    return f"; the preset is {path.stem}" if path.stem in preset_names() else ""
