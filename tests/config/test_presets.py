"""Presets by their names, in every folder."""

from pathlib import Path

import pytest

from ttt_jax.config import load_config, preset_names, read_written
from ttt_jax.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_name_is_its_file_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert preset_names() == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    assert {"default", "qwen3_0p6b"} <= set(preset_names())
    (tmp_path / "books").write_text("name: another")  # a name does not depend on what lies here
    for name in preset_names():
        assert read_written(name) == read_written(CONFIGS / f"{name}.yaml")
    assert load_config("default", ["--steps", "7"]).steps == 7


def test_a_file_needs_no_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("name: mine\n")
    assert load_config("mine").name == load_config(tmp_path / "mine").name == "mine"


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("Qwen3-0p6b", "did you mean qwen3_0p6b"),
        ("xyz", "name; presets: 1p5b, 500m, books, continual, default"),
        ("configs/500m.yaml", "no such file (there: no YAML file in configs); the preset is 500m"),
        ("books.yml", "; the preset is books"),
        ("none/xyz.yaml", "no such file (there: no YAML file in none)"),
        ("", "config : no such file"),
    ],
)
def test_a_wrong_one_is_told_with_the_right_ones(word, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(word)
    line = str(caught.value)
    assert line.startswith(f"config {word}: no such file")
    assert wanted in line
    assert "\n" not in line
