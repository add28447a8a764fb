"""`train.py --init_from FOLDER --data.train FILES` alone, and a run that stands alone."""

import json
import shutil

import numpy as np
import pytest
from support.hf_folders import make_folder
from support.jobs import curve, one_device, write_corpus
from support.tokenizers import TEMPLATE, write_tokenizer

import train
from ttt_jax import generate, load_pretrained, save_pretrained
from ttt_jax.config import ModelConfig
from ttt_jax.data import load_tokenizer
from ttt_jax.errors import CheckpointError
from ttt_jax.inference.chat_template import template_of
from ttt_jax.pretrained.companions import keep_companions
from ttt_jax.pretrained.convert import convert
from ttt_jax.pretrained.hf_config import read_config
from ttt_jax.run.folder import read_run_config

RAW = {
    "model_type": "llama",
    "vocab_size": 300,
    "num_hidden_layers": 7,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "eos_token_id": [1, 2],
}
HELLO = [{"role": "user", "content": "hello"}], True
SETTINGS = {"eos_token": "<end>", "chat_template": TEMPLATE}


@pytest.fixture(scope="module", autouse=True)
def alone():
    with one_device():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A plain checkpoint with a tokenizer and a chat template, its run of four steps, its corpus.

    The checkpoint names its end tokens in config.json only.
    """
    root = tmp_path_factory.mktemp("place")
    make_folder(root / "source", RAW)
    (root / "source" / "generation_config.json").unlink()
    write_tokenizer(root / "source", tokenizer_config=SETTINGS)
    write_corpus(root / "corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        words = ["--init_from=source", "--data.train=corpus", "--steps=4", "--checkpoint.every=2"]
        assert train.main([*words, "--log.every=1"]) == 0
    return root


@pytest.fixture
def moved(place, tmp_path):
    """The run in another place, where nothing else is."""
    shutil.copytree(place / "runs" / "continual", tmp_path / "moved")
    return tmp_path / "moved"


def test_it_trains_the_first_time(place):
    config = read_run_config(place / "runs" / "continual")
    model, found = config.model, read_config(place / "source")
    assert (model.d_model, model.num_layers, model.max_positions) == (32, 7, 64)
    assert model.ttt.layers == (0, 6)
    assert ModelConfig(**{**vars(model), "ttt": found.ttt}) == found
    rows = curve(place / "runs" / "continual")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) for row in rows)
    report = json.loads((place / "runs" / "continual" / "report.json").read_text())
    assert report["config"]["data"]["tokenizer"] == "source"


def test_a_moved_run_is_a_model_with_tokenizer_template_and_end_tokens(place, moved):
    model, original = load_pretrained(moved), load_pretrained(place / "source")
    text = "fast weight update"
    assert model.tokenizer.encode(text) == original.tokenizer.encode(text)
    assert model.eos_ids == original.eos_ids == (1, 2)
    assert load_pretrained(moved / "checkpoints" / "4").eos_ids == (1, 2)
    (completion,) = generate(model, [text], max_new_tokens=2)
    assert completion.text is not None
    theirs, step = template_of(place / "source"), template_of(moved / "checkpoints" / "4")
    prompts = [template.render(*HELLO) for template in (theirs, step, template_of(moved))]
    assert prompts == ["[user] hello\n[assistant] "] * 3


def test_a_moved_run_goes_on_without_its_checkpoint(place, moved, tmp_path, monkeypatch, capsys):
    whole = curve(moved)
    (moved / "report.json").unlink()
    shutil.rmtree(moved / "checkpoints" / "4")
    shutil.copytree(place / "corpus", tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    assert train.main(["moved"]) == 0
    assert f"continuing {moved} from step 2" in capsys.readouterr().out
    assert curve(moved) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "moved"]
    before = {p: p.read_bytes() for p in moved.rglob("*") if p.is_file()}
    assert train.main(["moved"]) == 0  # finished: nothing changes
    assert before == {p: p.read_bytes() for p in moved.rglob("*") if p.is_file()}


def test_exports_carry_what_belongs_to_the_model(moved, tmp_path):
    model = load_pretrained(moved, dtype="bfloat16")
    save_pretrained(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    again = load_pretrained(tmp_path / "saved")
    assert again.embed[...].dtype == np.float32
    np.testing.assert_array_equal(again.embed[...], model.embed[...].astype(np.float32))
    save_pretrained(load_pretrained(moved), tmp_path / "wide")
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    convert(moved, tmp_path / "converted", to="hf")
    shutil.rmtree(moved)
    for name in ("saved", "wide", "converted"):
        folder = tmp_path / name
        assert load_pretrained(folder).eos_ids == (1, 2)
        assert load_pretrained(folder).tokenizer.fingerprint == model.tokenizer.fingerprint
        assert template_of(folder).render(*HELLO).startswith("[user] hello")
    with pytest.raises(CheckpointError, match="is gone; pass carry_from"):
        save_pretrained(model, tmp_path / "late")
    assert not (tmp_path / "late").exists()


def test_a_lone_tokenizer_keeps_the_end_token_that_files_beside_it_name(place, tmp_path):
    (tmp_path / "run").mkdir()
    for beside in ({}, {"config": {"eos_token_id": 2}}, {"generation_config": {"top_k": 3}}):
        shutil.rmtree(tmp_path / "alone", ignore_errors=True)
        path = str(write_tokenizer(tmp_path / "alone", **beside) / "tokenizer.json")
        tokenizer = load_tokenizer(path)
        keep_companions(path, tmp_path / "run", tokenizer)
        assert load_tokenizer(str(tmp_path / "run")).fingerprint == tokenizer.fingerprint
        kept = (tmp_path / "run" / "tokenizer.json").stat().st_mtime_ns
        keep_companions(path, tmp_path / "run", tokenizer)  # it is there
        assert (tmp_path / "run" / "tokenizer.json").stat().st_mtime_ns == kept
