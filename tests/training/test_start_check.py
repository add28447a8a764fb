"""What `init_from` may change, field by field, and the loss of the source beside that of the run's
start.
"""

import re

import jax
import numpy as np
import pytest
from support.fuzzing import SMALL
from support.hf_folders import make_folder

import ttt_jax.training.start_check
from ttt_jax.checkpoint.checkpointer import Checkpointer
from ttt_jax.config import (
    CheckpointConfig,
    Config,
    MeshConfig,
    dump_yaml,
    replace,
)
from ttt_jax.errors import ConfigError, VerificationError
from ttt_jax.model.transformer import abstract_transformer
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.pretrained.convert import convert
from ttt_jax.pretrained.hf_config import config_from_hf
from ttt_jax.pretrained.hf_weights import load_hf
from ttt_jax.pretrained.load import initial_model, load_pretrained
from ttt_jax.training.start_check import checked_start
from ttt_jax.training.step import abstract_state

# ------------------------------------------------------------------------------------------- losses

RAW = SMALL | {"vocab_size": 31, "max_position_embeddings": 128, "initializer_range": 0.5}
PLAIN = {name: value for name, value in RAW.items() if not name.startswith("ttt_")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same weights as a Hugging Face, a converted and a run folder, and a plain model without
    TTT.
    """
    root = tmp_path_factory.mktemp("sources")
    make_folder(root / "hf", RAW)
    make_folder(root / "plain", PLAIN)
    convert(root / "hf", root / "orbax", to="orbax")
    run = Config(name="run", runs_dir=str(root), model=config_from_hf(RAW))
    (root / "run").mkdir()
    (root / "run/config.yaml").write_text(dump_yaml(run))
    with Checkpointer(root / "run/checkpoints", CheckpointConfig()) as checkpointer:
        checkpointer.save(
            3, model=load_hf(root / "hf"), opt_state={"a": jax.numpy.zeros(1)}, data_state={}
        )
    return root


def start(source, raw=RAW, compute_dtype="float32", **changes):
    config = Config(
        model=replace(config_from_hf(raw), changes),
        init_from=str(source),
        compute_dtype=compute_dtype,
    )
    config = replace(config, {"data.seq_len": 48, "data.batch_size": 2})
    ids = np.random.default_rng(0).integers(0, 31, (2, 49)).astype(np.int32)
    rows = {
        "ids": ids[:, :-1],
        "targets": ids[:, 1:],
        "segment_ids": np.ones((2, 48), np.int32),
        "positions": np.tile(np.arange(48, dtype=np.int32), (2, 1)),
        "weights": np.ones((2, 48), np.float32),
    }
    mesh = make_mesh(MeshConfig())
    return checked_start(config, abstract_state(config, mesh)[0].model, rows, mesh)


def losses(text):
    (found,) = re.findall(
        r"\(2 x 48 tokens\): ([\d.]+) as it is, ([\d.]+) at the start of this run\n", text
    )
    return [float(value) for value in found]


@pytest.mark.parametrize("kind", ["hf", "orbax", "run", "run/checkpoints/3"])
def test_a_start_equals_its_source(sources, kind, capsys):
    model = start(sources / kind)
    text = capsys.readouterr().out
    assert text.count("\n") == 1  # and nothing else is said
    assert text.startswith(f"init_from {sources / kind}: loss of the first held-out rows")
    theirs, ours = losses(text)
    assert theirs == ours
    assert theirs > 0.5
    for x, y in zip(
        jax.tree.leaves(model), jax.tree.leaves(load_pretrained(sources / "hf")), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def test_new_layers_start_at_zero(sources, capsys):
    start(sources / "plain")
    text = capsys.readouterr().out
    assert f"`ttt-jax convert {sources / 'plain'} DST --to hf --ttt.calibrate TEXT`" in text
    assert len(set(losses(text))) == 1
    start(sources / "run", **{"ttt.layers": [0, 1]})  # the layers are grouped otherwise
    text = capsys.readouterr().out
    assert "--ttt.calibrate" not in text, "it has TTT layers already"
    assert len(set(losses(text))) == 1


@pytest.mark.slow
def test_bfloat16_is_compared_to_its_rounding(sources, capsys):
    start(sources / "hf", compute_dtype="bfloat16")
    theirs, ours = losses(capsys.readouterr().out)
    assert abs(ours - theirs) < 0.01 * theirs


@pytest.mark.parametrize("kind", ["hf", "orbax", "run"])
@pytest.mark.parametrize("field", ["rope.base", "max_positions", "norm_eps"])
def test_another_model_is_refused_before_anything_is_read(
    sources, kind, field, capsys, monkeypatch
):
    monkeypatch.setattr(ttt_jax.training.start_check, "load_pretrained", None)
    value = {"rope.base": 1e6, "max_positions": 64, "norm_eps": 1e-5}[field]
    with pytest.raises(
        ConfigError, match=rf"^config field model\.{field} = .*; set model\.{field} to "
    ):
        start(sources / kind, **{field: value})
    config = Config(
        model=replace(config_from_hf(RAW), {field: value}), init_from=str(sources / kind)
    )
    with pytest.raises(ConfigError, match=field):  # and where nothing is printed, too
        initial_model(config, abstract_transformer(config.model))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (
            "hf",
            {"rope.kind": "yarn", "rope.factor": 8.0, "rope.original_max_positions": 16},
            "model.rope.kind is yarn here",
        ),
        ("orbax", {"sliding_window": 4}, "model.sliding_window is 4 here, null in the checkpoint"),
        ("run", {"ttt.lr": 40.0}, "model.ttt.lr is 40.0 here, 0.5 in the checkpoint"),
    ],
)
def test_what_continual_training_changes_is_printed_with_both_losses(
    sources, kind, changes, words, capsys
):
    start(sources / kind, **changes)
    text = capsys.readouterr().out
    assert f"init_from {sources / kind}: {words}" in text
    theirs, ours = losses(text)
    assert theirs != ours


def test_a_difference_that_nobody_asked_for_is_an_error(sources, monkeypatch, capsys):
    def wrong(config, abstract):
        return jax.tree.map(lambda x: 1.01 * x, initial_model(config, abstract))

    monkeypatch.setattr(ttt_jax.training.start_check, "initial_model", wrong)
    with pytest.raises(VerificationError, match="though nothing was changed") as caught:
        start(sources / "hf")
    assert "\n" not in str(caught.value)
    with pytest.raises(VerificationError):  # nor does what enters no computation allow it
        start(sources / "hf", max_positions=256)
    with pytest.raises(VerificationError):  # nor do new layers, which start at zero
        start(sources / "plain")
    capsys.readouterr()
    start(sources / "hf", **{"ttt.lr": 40.0})  # something was changed: both numbers are printed
    theirs, ours = losses(capsys.readouterr().out.partition("ttt.lr")[2])
    assert theirs != ours


def test_what_is_not_compared_is_said(sources, tmp_path, monkeypatch, capsys):
    with Checkpointer(tmp_path / "alone", CheckpointConfig()) as checkpointer:
        checkpointer.save(
            1, model=load_hf(sources / "hf"), opt_state={"a": jax.numpy.zeros(1)}, data_state={}
        )
    start(tmp_path / "alone")
    assert (
        "was not compared with this run's: its folder holds no config of a model"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("kind", ["plain", "hf", "run"])
def test_a_source_that_is_too_large_for_one_device_is_read_on_all(
    sources, kind, monkeypatch, capsys
):
    start(sources / kind)
    alone = losses(capsys.readouterr().out)
    monkeypatch.setattr(ttt_jax.training.start_check, "too_large", lambda model, dtype: "large")
    monkeypatch.setattr(ttt_jax.training.start_check, "load_pretrained", None)
    start(sources / kind)
    theirs, ours = losses(capsys.readouterr().out)
    assert theirs == ours
    assert [theirs, ours] == pytest.approx(alone, abs=1e-4)
