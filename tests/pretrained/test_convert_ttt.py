"""Fast weights for a plain model while it is converted: they change nothing yet."""

import json
import shutil

import numpy as np
import pytest
from support.conversions import logits
from support.hf_folders import BF16, assert_same_tensors, read_folder

from ttt_jax import load_pretrained
from ttt_jax.checkpoint.checksums import write_checksums
from ttt_jax.command.cli import main
from ttt_jax.config import TTTConfig
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.pretrained.convert import convert
from ttt_jax.pretrained.hf_config import read_config
from ttt_jax.pretrained.orbax_layout import DESCRIPTION

EQUIP = ["--ttt.layers", "0,2", "--ttt.chunk_size", "8", "--ttt.lr", "0.5"]


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_plain_model_gets_ttt_that_changes_nothing_yet(plain, to, tmp_path, capsys):
    assert main(["convert", str(plain), str(tmp_path / "out"), "--to", to, "--verify", *EQUIP]) == 0
    out = capsys.readouterr().out
    assert "4 of them new" in out
    assert "relative RMS of the logits 0.0e+00" in out
    model = load_pretrained(tmp_path / "out")
    assert model.config.ttt == TTTConfig(layers=(0, 2), chunk_size=8, lr=0.5, normalize_source=True)
    np.testing.assert_array_equal(logits(model), logits(load_pretrained(plain)))
    convert(tmp_path / "out", tmp_path / "hf", to="hf")
    before, after = read_folder(plain), read_folder(tmp_path / "hf")
    new = {name: after.pop(name) for name in sorted(set(after) - set(before))}
    assert_same_tensors(before, after)
    assert list(new) == [
        f"model.layers.{i}.mlp.ttt_{what}.weight" for i in (0, 2) for what in ("conv", "proj")
    ]
    for name, x in new.items():
        if name.endswith("conv.weight"):
            assert not x.any()
        else:
            np.testing.assert_array_equal(x, np.diag(np.diagonal(x)))
            assert 0.5 < np.std(np.diagonal(x)) / 0.02 < 1.5


def test_fields_that_a_plain_model_has_without_use_are_not_taken_over(plain, tmp_path, capsys):
    """A run without TTT layers keeps its other `ttt.*`; what is not taken over is said."""
    convert(plain, tmp_path / "run", to="orbax")
    about = tmp_path / "run" / DESCRIPTION
    tree = json.loads(about.read_text())
    assert tree["model"]["ttt"]["layers"] == []
    tree["model"]["ttt"] |= {"write": "ridge", "decay": 0.5, "chunk_size": 16, "ridge": 1.0}
    about.write_text(json.dumps(tree | {"hf_config": None}))  # a run has none
    (tmp_path / "run" / "checksums.json").unlink()
    write_checksums(tmp_path / "run")
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "o"), "--to", "hf", *EQUIP]) == 0
    ttt = read_config(tmp_path / "o").ttt
    assert ttt == TTTConfig(layers=(0, 2), chunk_size=8, lr=0.5, normalize_source=True)
    where = f"of {tmp_path / 'run'}, which has no TTT layers, is not taken over; it is"
    lines = [f"note: ttt.write = ridge {where} sum", f"note: ttt.decay = 0.5 {where} 1.0"]
    assert sorted(capsys.readouterr().err.splitlines()) == sorted(lines)
    found = convert(tmp_path / "run", tmp_path / "same", to="hf")
    assert (found.left, read_config(tmp_path / "same").ttt.layers) == ({}, ())


def test_new_targets_may_keep_the_official_source(plain, tmp_path):
    convert(plain, tmp_path / "out", to="hf", ttt={"layers": [1], "normalize_source": False})
    assert not read_config(tmp_path / "out").ttt.normalize_source


def test_fresh_parameters_depend_on_the_seed_alone(plain, tmp_path):
    ttt = {"layers": [1], "chunk_size": 8}
    for name, seed, to in (("a", 0, "hf"), ("b", 0, "orbax"), ("c", 1, "hf")):
        convert(plain, tmp_path / name, to=to, ttt=ttt, seed=seed)
    convert(tmp_path / "b", tmp_path / "b_hf", to="hf")
    assert_same_tensors(read_folder(tmp_path / "a"), read_folder(tmp_path / "b_hf"))
    proj = "model.layers.1.mlp.ttt_proj.weight"
    assert (read_folder(tmp_path / "a")[proj] != read_folder(tmp_path / "c")[proj]).any()
    convert(plain, tmp_path / "half", to="hf", ttt=ttt | {"proj": False}, dtype="bfloat16")
    half = read_folder(tmp_path / "half")
    assert proj not in half
    assert half["model.layers.1.mlp.ttt_conv.weight"].dtype == BF16


@pytest.mark.parametrize(
    ("ttt", "words"),
    [
        (
            {"layers": [0, 1]},
            r"--ttt\.layers \[0, 1\]: .* has TTT parameters already, with ttt\.layers = \[0, 2\]",
        ),
        (
            {"layers": [0, 2], "chunk_size": 32},
            r"--ttt\.chunk_size 32: .* with ttt\.chunk_size = 16",
        ),
        ({"lr": 1.0}, r"--ttt\.lr 1\.0: "),
    ],
)
def test_ttt_that_conflicts_is_refused(golden_model, ttt, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        convert(golden_model[0], tmp_path / "out", to="orbax", ttt=ttt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ttt", "words"),
    [
        ({"lr": 1.0}, r"name them with --ttt\.layers"),
        ({"layers": [3]}, "layer 3 does not exist in a model of 3 layers"),
        ({"layers": [0], "chunk_size": 0}, "chunk_size = 0"),
    ],
)
def test_ttt_that_makes_no_sense_is_refused(plain, ttt, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        convert(plain, tmp_path / "out", to="orbax", ttt=ttt)
    assert [p.name for p in tmp_path.iterdir()] == ["plain"]


def test_agreeing_options_and_tensors_without_config_fields(golden_model, tmp_path):
    """Options that repeat what is there are fine, and name TTT tensors that config.json keeps
    silent about.
    """
    folder, _ = golden_model
    ttt = read_config(folder).ttt
    options = {
        "layers": list(ttt.layers),
        "chunk_size": 16,
        "lr": 0.5,
        "target": ttt.target,
        "proj": True,
    }
    assert convert(folder, tmp_path / "same", to="hf", ttt=options).fresh == 0
    silent = tmp_path / "silent"
    shutil.copytree(folder, silent)
    raw = json.loads((silent / "config.json").read_text())
    (silent / "config.json").write_text(
        json.dumps({k: v for k, v in raw.items() if not k.startswith("ttt_")})
    )
    assert convert(silent, tmp_path / "named", to="hf", ttt=options).fresh == 0
    for name in ("same", "named"):
        assert_same_tensors(read_folder(folder), read_folder(tmp_path / name))
        assert read_config(tmp_path / name) == read_config(folder)
    with pytest.raises(CheckpointError, match=r"unknown model\.layers\.2\.mlp\.ttt_conv\.weight"):
        convert(silent, tmp_path / "out", to="hf", ttt=options | {"layers": [0]})
