"""Checksums do not fail open: a missing file is damage where one was written, whoever reads; what
is written is synced.
"""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.checkpoints import (
    Model,
    abstract,
    assert_same_bits,
    newest_of,
    older,
    refusal,
    save,
    save_parameters,
)
from support.fuzzing import SMALL
from support.hf_folders import make_folder, read_folder

from ttt_jax import load_pretrained
from ttt_jax.checkpoint.checkpointer import Checkpointer
from ttt_jax.checkpoint.checksums import CHECKSUMS, find_damage, write_checksums
from ttt_jax.checkpoint.parameters import find_checkpoint, load_model_params
from ttt_jax.config import CheckpointConfig, Config
from ttt_jax.errors import CheckpointError
from ttt_jax.model.transformer import abstract_transformer
from ttt_jax.pretrained.convert import convert
from ttt_jax.pretrained.export import save_pretrained
from ttt_jax.pretrained.hf_weights import load_hf
from ttt_jax.pretrained.load import initial_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 21 and 50 of a run."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpointer(folder, CheckpointConfig(keep=3)) as checkpointer:
        for step in (21, 50):
            save(checkpointer, step, Model(seed=step))
    return folder


@pytest.fixture
def steps(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One model, as all that this project writes: a converted folder, and Hugging Face folders in
    one file and in shards.
    """
    root = tmp_path_factory.mktemp("written")
    make_folder(root / "foreign", SMALL)
    convert(root / "foreign", root / "orbax", to="orbax")
    convert(root / "foreign", root / "hf", to="hf")
    convert(root / "orbax", root / "shards", to="hf", max_shard_bytes=900)
    save_pretrained(load_hf(root / "foreign"), root / "saved", dtype="float32", max_shard_bytes=900)
    return root


@pytest.fixture
def models(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "models"))


OURS = ("orbax", "hf", "shards", "saved")


def flip_weight(folder):
    """Flip the lowest bit of a weight: it stays finite and in its place."""
    arrays = sorted(folder.glob("model/embed/0.*")) or sorted(folder.glob("*.safetensors"))
    data = bytearray(arrays[0].read_bytes())
    data[-4] ^= 1
    arrays[0].write_bytes(bytes(data))
    return arrays[0].name


def readers(folder):
    config = load_config_of(folder)
    return {
        "load": lambda: load_pretrained(folder),
        "convert": lambda: convert(folder, folder.parent / "out", to="orbax"),
        "init_from": lambda: initial_model(config, abstract_transformer(config.model)),
    }


def load_config_of(folder):
    from ttt_jax.pretrained.hf_config import config_from_hf

    return Config(model=config_from_hf(SMALL), init_from=str(folder))


# -------------------------------------------------------------------------------------- run folders


def test_missing_checksums_are_damage(steps):
    (steps / "50" / CHECKSUMS).unlink()
    assert find_damage(steps / "50") == "checksums.json: missing"
    assert "50: damaged (checksums.json: missing)" in refusal(find_checkpoint, steps)
    warned = []
    assert newest_of(steps, Model(), warned)[0] == 21
    assert "checksums.json: missing" in warned[0]


def test_a_missing_or_unreadable_note_is_damage(steps):
    (steps / "50" / CHECKSUMS).unlink()
    for spoil in (
        lambda path: path.write_text("{"),
        lambda path: path.write_text('{"format": 3}'),
        Path.unlink,
    ):
        spoil(steps / "50/extra/metadata")
        assert find_damage(steps / "50").startswith("extra/metadata: ")


def test_a_renamed_step_is_noticed(steps):
    shutil.rmtree(steps / "50")
    (steps / "21").rename(steps / "50")
    assert (
        find_damage(steps / "50") == "extra/metadata: it is of step 21, and the folder was renamed"
    )
    assert "it is of step 21, and the folder was renamed" in refusal(find_checkpoint, steps)
    assert "it is of step 21, and the folder was renamed" in refusal(newest_of, steps, Model(), [])
    (steps / "50").rename(steps / "best")  # a name that is no step's says nothing
    assert find_damage(steps / "best") is None


def test_what_is_kept_in_extra_is_not_returned(steps):
    with Checkpointer(steps, CheckpointConfig()) as checkpointer:
        assert checkpointer.extra(50) == {"a": 0.1}
    assert json.loads((steps / "50/extra/metadata").read_text()) == {
        "a": 0.1,
        "format": {"step": 50, "checksums": True},
    }


def test_older_checkpoints_warn_everywhere(steps):
    older(steps / "50")
    warned = []
    assert newest_of(steps, Model(), warned)[0] == 50
    assert "has no checksums (an older version's)" in warned[0]
    with pytest.warns(
        UserWarning, match=r"50: has no checksums \(an older version's\); read unverified"
    ):
        params = load_model_params(steps, abstract(Model()))
    assert_same_bits(params, Model(seed=50))


def test_parameters_alone_have_checksums(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save_parameters(tmp_path, {"w": jnp.ones(64)})
    (tmp_path / "notes.txt").write_text("changed")
    assert load_model_params(tmp_path, {"w": jnp.ones(64)})["w"].sum() == 64
    next(path for path in (tmp_path / "model").rglob("*") if path.is_file()).write_bytes(b"x")
    assert "damaged (model/" in refusal(load_model_params, tmp_path, {"w": jnp.ones(64)})


# --------------------------------------------------------------- converted and Hugging Face folders


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("reader", ["load", "convert", "init_from"])
def test_one_flipped_bit_is_noticed(models, kind, reader):
    name = flip_weight(models / kind)
    with pytest.raises(CheckpointError, match=f"{name}: its content changed since it was written"):
        readers(models / kind)[reader]()
    assert not (models / "out").exists()


@pytest.mark.parametrize("kind", OURS)
def test_checksums_that_are_gone_are_noticed(models, kind):
    (models / kind / CHECKSUMS).unlink()
    for read in readers(models / kind).values():
        with pytest.raises(CheckpointError, match=r"checksums\.json: missing"):
            read()


def test_a_lost_shard_and_a_changed_index_are_noticed(models):
    index = models / "shards/model.safetensors.index.json"
    index.write_text(index.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"index\.json: \d+ bytes instead of"):
        load_pretrained(models / "shards")


def test_a_changed_description_is_noticed(models):
    path = models / "orbax/ttt_jax.json"
    path.write_text(path.read_text().replace('"lr": 0.5', '"lr": 0.7'))
    with pytest.raises(CheckpointError, match=r"ttt_jax\.json: its content changed"):
        load_pretrained(models / "orbax")


def test_what_people_edit_has_no_checksum(models):
    for kind in ("hf", "saved"):
        raw = json.loads((models / kind / "config.json").read_text())
        (models / kind / "config.json").write_text(json.dumps(raw | {"ttt_lr": 0.25}))
        (models / kind / "generation_config.json").write_text('{"eos_token_id": 1}')
        model = load_pretrained(models / kind)
        assert (model.config.ttt.lr, model.eos_ids) == (0.25, (1,))


def test_an_older_converted_folder_warns(models):
    path = models / "orbax/ttt_jax.json"
    fields = json.loads(path.read_text())
    assert fields.pop("checksums") is True
    path.write_text(json.dumps(fields))
    (models / "orbax" / CHECKSUMS).unlink()
    with pytest.warns(UserWarning, match=r"orbax: has no checksums \(an older version's\)"):
        model = load_pretrained(models / "orbax")
    jax.tree.map(np.testing.assert_array_equal, model, load_pretrained(models / "foreign"))


def test_a_file_of_another_tool_is_none_of_ours(models):
    (models / "foreign" / CHECKSUMS).write_text("md5 of everything")
    jax.tree.map(
        np.testing.assert_array_equal,
        load_pretrained(models / "foreign"),
        load_pretrained(models / "hf"),
    )


def test_other_tools_read_what_is_written(models):
    stored = read_folder(models / "foreign")
    for kind in ("hf", "shards"):
        assert {name: x.tobytes() for name, x in read_folder(models / kind).items()} == {
            name: x.tobytes() for name, x in stored.items()
        }


# -------------------------------------------------------------------------------------- a power cut


@pytest.fixture
def synced(monkeypatch):
    """Paths in the order in which they were synced."""
    paths, fsync = [], os.fsync

    def record(descriptor):
        paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return paths


def below(folder):
    return {str(path) for path in folder.rglob("*")}


def test_a_checkpoint_is_on_the_disk_before_older_ones_go(tmp_path, synced, monkeypatch):
    events = []
    monkeypatch.setattr(
        "ttt_jax.checkpoint.checkpointer.prune", lambda *_: events.append(len(synced))
    )
    with Checkpointer(tmp_path / "checkpoints", CheckpointConfig()) as checkpointer:
        save(checkpointer, 7, Model())
    done = {path.replace(".orbax-checkpoint-tmp", "") for path in synced[: events[0]]}
    step = tmp_path / "checkpoints/7"
    wanted = below(step)
    # of Orbax; no restore reads them
    later = {str(step / name) for name in ("_CHECKPOINT_METADATA", "commit_success.txt")}
    assert {
        str(step / name) for name in ("checksums.json", "data_state/metadata", "extra/metadata")
    } <= wanted
    assert wanted - later <= done
    # The name of the step's folder, after all that is in it.
    assert synced[: events[0]][-1] == str(tmp_path / "checkpoints")


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_converted_folder_is_on_the_disk(written, tmp_path, synced, to):
    convert(written / "foreign", tmp_path / "out", to=to)
    done = {path.replace(f".out.tmp-{os.getpid()}", "out") for path in synced}
    assert below(tmp_path / "out") | {str(tmp_path)} <= done
    synced.clear()
    if to == "hf":
        save_pretrained(load_hf(written / "foreign"), tmp_path / "saved")
        done = {path.replace(f".saved.tmp-{os.getpid()}", "saved") for path in synced}
        assert below(tmp_path / "saved") | {str(tmp_path)} <= done


def test_names_may_be_chosen(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    write_checksums(tmp_path, ["a"])
    (tmp_path / "b").write_text("3")
    assert find_damage(tmp_path) is None
    (tmp_path / "a").write_text("3")
    assert find_damage(tmp_path) == "a: its content changed since it was written"
