"""No held-out document is a training document, whatever the files are called."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from ttt_jax.config import Config, replace
from ttt_jax.data import check_data, heldout_remarks, heldout_rows, load_tokenizer, make_loader
from ttt_jax.errors import DataError

TOKENIZER = load_tokenizer("bytes")
LONG = "".join(f"{i} green bottles, " for i in range(600))  # more than 4096 bytes
SHORT = "Licensed under the Apache License. "


def config_of(train: Path, heldout: Path | None = None, **changes) -> Config:
    base = {
        "data.train": [str(train)],
        "data.heldout": [str(heldout)] if heldout else [],
        "data.seq_len": 64,
    }
    return replace(Config(), base | {"data.batch_size": 2} | changes)


def refusal(config: Config) -> str:
    with pytest.raises(DataError) as error:
        make_loader(config, tokenizer=TOKENIZER)
    assert "\n" not in str(error.value)
    return str(error.value)


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("how", ["itself", "symlink", "hard link", "in its folder"])
@pytest.mark.parametrize("text", [LONG, "short"])
def test_a_file_of_both_fields_is_refused_before_anything_is_read(tmp_path, how, text, monkeypatch):
    (tmp_path / "d").mkdir()
    train = named = tmp_path / "d" / "train.txt"
    train.write_text(text)
    heldout = train if how == "itself" else tmp_path / "b.txt"
    if how == "symlink":
        os.symlink(train, heldout)
    elif how == "hard link":
        os.link(train, heldout)
    elif how == "in its folder":
        heldout, named = train, train.parent
        (tmp_path / "d" / "z.txt").write_text("another")
    monkeypatch.setattr("ttt_jax.data.corpus.read_documents", None)
    assert refusal(config_of(named, heldout)) == (
        f"config field data.heldout = '{heldout}': {heldout.name}: is a training file, too: "
        f"data.train = '{named}' names train.txt; take it out of data.train, or name another file "
        "here"
    )


@pytest.mark.parametrize("how", ["copy", "gz", "jsonl", "tokens", "tokens with an end"])
def test_the_training_file_under_another_name_is_refused(tmp_path, how):
    train = tmp_path / "train.txt"
    train.write_text(LONG)
    heldout = {"gz": tmp_path / "b.txt.gz", "jsonl": tmp_path / "b.jsonl"}.get(
        how, tmp_path / "b.txt"
    )
    if how == "copy":
        heldout.write_text(LONG)
    elif how == "gz":
        heldout.write_bytes(gzip.compress(LONG.encode()))
    elif how == "jsonl":
        heldout.write_bytes(jsonl(["something else " * 1000, LONG]))
    elif how.startswith("tokens"):
        heldout = tmp_path / "b.npy"
        np.save(heldout, np.array([*LONG.encode(), *([256] if "end" in how else [])], np.int32))
    message = refusal(config_of(train, heldout))
    record = 1 if how == "jsonl" else 0
    assert message.startswith(
        f"config field data.heldout = '{heldout}': 1 of {record + 1} held-out documents"
    )
    assert (
        f"are training documents too, for instance {heldout.name} #{record} is data.train's "
        "train.txt #0" in message
    )


def test_many_short_copies_are_refused_and_few_are_left_out(tmp_path):
    train, heldout = tmp_path / "train.jsonl", tmp_path / "heldout.jsonl"
    texts = [f"short document number {i}" for i in range(40)]
    train.write_bytes(jsonl([SHORT, *texts]))
    heldout.write_bytes(jsonl(texts))
    assert "40 of 40 held-out documents" in refusal(config_of(train, heldout))
    heldout.write_bytes(jsonl([*texts[:3], "fresh " * 20]))
    assert "3 of 4 held-out documents" in refusal(config_of(train, heldout))
    heldout.write_bytes(
        jsonl(["fresh " * 900, SHORT, SHORT, "more of it"])
    )  # 70 of some 5500 tokens: above one per cent
    assert "2 of 4 held-out documents" in refusal(config_of(train, heldout))
    heldout.write_bytes(jsonl(["fresh " * 900, SHORT, "more of it"]))
    config = config_of(train, heldout)
    assert check_data(config, tokenizer=TOKENIZER).heldout_documents == 2
    (line,) = heldout_remarks(config, TOKENIZER)
    assert (
        line == f"data.heldout: left out 1 of 3 held-out documents ({len(SHORT) + 1} of "
        f"{5401 + len(SHORT) + 1 + 11} tokens)" + (", which are copies of training documents")
    )
    rows = heldout_rows(config, tokenizer=TOKENIZER, rows=1000)
    assert not any(bytes(row[:12].astype(np.uint8)) == SHORT[:12].encode() for row in rows["ids"])
    heldout.write_bytes(jsonl(["fresh " * 900]))
    assert heldout_remarks(config_of(train, heldout), TOKENIZER) == []


def test_a_long_copy_among_much_else_is_refused(tmp_path):
    train, heldout = tmp_path / "train.jsonl", tmp_path / "heldout.jsonl"
    copy = LONG[:4095]  # with its end token 4096
    train.write_bytes(jsonl([LONG, copy]))
    heldout.write_bytes(jsonl([copy, "fresh " * 100_000]))
    message = refusal(config_of(train, heldout))
    assert "1 of 2 held-out documents (4096 of 604097 tokens)" in message
    assert "heldout.jsonl #0 is data.train's train.jsonl #1" in message
    train.write_bytes(jsonl([LONG, copy[:-1]]))
    heldout.write_bytes(jsonl([copy[:-1], "fresh " * 100_000]))
    assert len(heldout_remarks(config_of(train, heldout), TOKENIZER)) == 1


def test_copies_within_the_training_files_are_not_held_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([*(f"document {i}" for i in range(100)), *[SHORT] * 100]))
    config = config_of(path, **{"data.heldout_fraction": 0.3})
    (line,) = heldout_remarks(config, TOKENIZER)
    assert line.startswith("data.heldout_fraction: left out ")
    summary = check_data(config, tokenizer=TOKENIZER)
    left_out = int(line.split()[3])
    assert 10 < left_out < 60
    assert summary.train_documents + summary.heldout_documents + left_out == 200
    for row in heldout_rows(config, tokenizer=TOKENIZER, rows=1000)["ids"]:
        assert bytes(row[:9].astype(np.uint8)) == b"document "
    path.write_bytes(jsonl([SHORT] * 100))
    assert "are copies of training documents; remove the copies" in refusal(config)


def test_the_default_corpus_has_a_heldout_set():
    config = replace(Config(), {"model.vocab_size": 257})
    summary = check_data(config, tokenizer=TOKENIZER)
    assert summary.heldout_documents > 20
