"""Conversions that are refused or fail: one line, and an output that stays as it was."""

import json

import numpy as np
import pytest
from support.conversions import OFFICIAL, PLAIN, same_params
from support.hf_folders import assert_same_tensors, make_folder, read_folder

from ttt_jax import load_pretrained
from ttt_jax.command.cli import main
from ttt_jax.errors import CheckpointError, ConfigError, UserError
from ttt_jax.pretrained import convert as convert_module
from ttt_jax.pretrained.convert import convert
from ttt_jax.pretrained.hf_config import read_config
from ttt_jax.pretrained.orbax_folder import OrbaxWriter
from ttt_jax.pretrained.orbax_layout import read_description


def test_existing_output_needs_overwrite(plain, tmp_path, capsys):
    folder, out = str(OFFICIAL), str(tmp_path / "out")
    assert main(["convert", folder, out, "--to", "orbax"]) == 0
    assert main(["convert", str(tmp_path / "nowhere"), out, "--to", "hf"]) == 2, (
        "refused before the source is looked at"
    )
    assert "exists already; choose another folder, or add --overwrite" in capsys.readouterr().err
    assert main(["convert", str(plain), out, "--to", "hf", "--overwrite"]) == 0
    assert_same_tensors(read_folder(plain), read_folder(tmp_path / "out"))
    assert not (tmp_path / "out" / "ttt_jax.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "plain"]


def test_overwrite_replaces_model_folders_only(plain, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(plain)
    for name, words in (
        ("mine", "not a model folder"),
        ("file", "not a folder"),
        ("link", "not a folder"),
    ):
        with pytest.raises(CheckpointError, match=words):
            convert(plain, tmp_path / name, to="hf", overwrite=True)
    for output in (plain, tmp_path / "plain" / ".." / "plain"):
        with pytest.raises(CheckpointError, match="would delete the source"):
            convert(plain, output, to="hf", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "mine", "plain"]


@pytest.mark.parametrize("to", ["orbax", "hf"])
@pytest.mark.parametrize(
    "problem",
    [OSError(28, "No space left on device"), KeyboardInterrupt()],
    ids=["full", "interrupt"],
)
def test_a_failure_leaves_the_old_output_and_nothing_else(
    plain, to, problem, tmp_path, monkeypatch
):
    convert(plain, tmp_path / "out", to=to)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}

    def fail(*_):
        raise problem

    monkeypatch.setattr(convert_module, "copy_companions", fail)  # the last thing written
    expected = CheckpointError if isinstance(problem, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        convert(plain, tmp_path / "out", to=to, overwrite=True)
    with pytest.raises(expected):
        convert(plain, tmp_path / "new", to=to)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "plain"]


def test_a_full_disk_below_tensorstore_is_one_short_line(plain, tmp_path, monkeypatch, capsys):
    """Which says so in a ValueError of a page, with the name of the temporary folder."""

    def full(*_):
        where = tmp_path / ".out.tmp-1"
        raise ValueError(f"RESOURCE_EXHAUSTED: {where}: No space left on device [{'x' * 999}]")

    monkeypatch.setattr(OrbaxWriter, "_lay_out", full)
    out = tmp_path / "out"
    assert main(["convert", str(plain), str(out), "--to", "orbax"]) == 2
    assert capsys.readouterr().err == (
        f"error: output {out}: could not be written (No space left on device); free space or "
        "choose another\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["plain"]


def drop_and_add(stored):
    del stored["model.norm.weight"]
    stored["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    stored["model.layers.2.mlp.down_proj.weight"] = np.zeros((48, 32), np.float32)


def put(name, index, value):
    def change(stored):
        stored[name][index] = value

    return change


UP = "model.layers.1.mlp.up_proj.weight"


HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


NORM = "model.norm.weight"


BROKEN = {
    "tensors": (
        drop_and_add,
        r"missing model\.norm\.weight; unknown "
        r"model\.layers\.0\.self_attn\.q_proj\.bias; wrong shape "
        r"model\.layers\.2\.mlp\.down_proj\.weight \(48, 32\) \(expected \(32, 48\)\)$",
    ),
    "nan": (
        put(UP, (40, 3), np.nan),
        r"tensor model\.layers\.1\.mlp\.up_proj\.weight holds NaN "
        r"or infinity",
    ),
    "infinity": (put(NORM, 5, np.inf), r"tensor model\.norm\.weight holds NaN or infinity"),
    "float64": (
        lambda s: s.update({NORM: s[NORM].astype(np.float64)}),
        r"choose --dtype .*: "
        r"model\.norm\.weight$",
    ),
    "integers": (
        lambda s: s.update({NORM: s[NORM].astype(np.int8)}),
        r"not of floats "
        r"\(quantised\?\) "
        r"model\.norm",
    ),
    "head": (
        lambda s: s.update({HEAD: s[EMBED] + 1}),
        r"lm_head\.weight is not "
        r"model\.embed_tokens\.weight",
    ),
}


@pytest.mark.parametrize("to", ["orbax", "hf"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_source_is_named_and_leaves_no_trace(case, to, tmp_path):
    change, words = BROKEN[case]
    make_folder(tmp_path / "source", PLAIN, change=change)
    with pytest.raises(CheckpointError, match=words) as error:
        convert(tmp_path / "source", tmp_path / "out", to=to)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_values_that_do_not_fit_are_refused(plain, tmp_path):
    # rounds to infinity in bfloat16
    make_folder(tmp_path / "source", PLAIN, change=put(UP, (0, 0), 3.4028235e38))
    with pytest.raises(
        CheckpointError,
        match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight does not fit into bfloat16",
    ):
        convert(tmp_path / "source", tmp_path / "out", to="hf", dtype="bfloat16")
    convert(tmp_path / "source", tmp_path / "out", to="hf")
    wide = tmp_path / "wide"
    make_folder(wide, PLAIN, change=lambda s: s.update({UP: s[UP].astype(np.float64)}))
    convert(wide, tmp_path / "single", to="orbax", dtype="float32")
    same_params(load_pretrained(tmp_path / "single"), load_pretrained(wide))


def test_what_is_no_model_is_refused(plain, tmp_path):
    (tmp_path / "empty").mkdir()
    for source, words in (
        ("nowhere", "no such folder"),
        ("empty", r"holds no config\.json, ttt_jax\.json or config\.yaml"),
    ):
        with pytest.raises(CheckpointError, match=words):
            convert(tmp_path / source, tmp_path / "out", to="hf")
    raw = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(raw | {"model_type": "mamba"}))
    with pytest.raises(
        ConfigError,
        match="model_type = 'mamba' is not supported; supported: llama, qwen3, qwen2, mistral",
    ):
        convert(plain, tmp_path / "out", to="hf")


def test_a_damaged_converted_folder(plain, tmp_path):
    convert(plain, tmp_path / "orbax", to="orbax")
    path = tmp_path / "orbax" / "ttt_jax.json"
    good = json.loads(path.read_text())
    assert read_description(tmp_path / "orbax").model == read_config(plain)
    changes = [
        ({"format": "ttt_jax model 9"}, "this version reads 'ttt_jax model 1'"),
        ({"model": 3}, "damaged"),
        ({"dtypes": {"x": "int8"}}, "damaged"),
        (
            {"model": good["model"] | {"d_ff": 49}},
            r"wrong shape groups\.0\.blocks\.0\.mlp\.down \(1, 3, 32, 48\)",
        ),
        ({"model": good["model"] | {"tie_embeddings": False}}, "missing head"),
    ]
    for change, words in changes:
        path.write_text(json.dumps(good | change))
        with pytest.raises(CheckpointError, match=words) as error:
            convert(tmp_path / "orbax", tmp_path / "out", to="hf")
        assert "\n" not in str(error.value)
        with pytest.raises(UserError):
            load_pretrained(tmp_path / "orbax")
    path.write_text(json.dumps(good))
    chunk = tmp_path / "orbax/model/embed/0.0"
    chunk.write_bytes(chunk.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"embed/0\.0: missing, or not of \d+ bytes"):
        convert(tmp_path / "orbax", tmp_path / "out", to="hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["orbax", "plain"]
