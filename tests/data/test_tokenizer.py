"""The built-in byte tokenizer and tokenizer.json files."""

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from ttt_jax.config import Config, replace
from ttt_jax.data import heldout_rows, load_tokenizer, make_loader
from ttt_jax.data.rust_panics import panics_as_errors
from ttt_jax.errors import DataError

TEXT = "the cat sat on the mat, naïve 日本 the end"


def make_tokenizer(
    folder: Path, *, special: tuple[str, ...] = ("<|endoftext|>", "<|im_end|>"), **files
) -> Path:
    """A small byte-level BPE with truncation and padding switched on, and `name.json` files beside
    it.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, tree in files.items():
        (folder / f"{name}.json").write_text(json.dumps(tree))
    return folder


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, 256, 300]) == text.encode("utf-8", errors="replace").decode()
    [array] = tokenizer.encode_documents([text.encode("utf-8", errors="replace")])
    assert array.tolist() == ids


def test_bytes_attributes():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.encode("é\ud800") == [0xC3, 0xA9, ord("?")]
    assert tokenizer.decode(np.array([0xC3, 65])) == "\ufffdA"


def test_json_round_trip_without_truncation_padding_or_special_tokens(tmp_path):
    folder = make_tokenizer(tmp_path / "tok")
    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer.encode(TEXT)
    assert len(ids) > 8
    assert max(ids) < tokenizer.vocab_size <= 300
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == TEXT
    assert tokenizer.encode("a\ud800")[-1] == tokenizer.encode("?")[0]
    arrays = tokenizer.encode_documents([TEXT.encode(), b"", b"the cat"])
    assert [array.tolist() for array in arrays] == [ids, [], tokenizer.encode("the cat")]

    same = load_tokenizer(str(folder / "tokenizer.json"))
    assert same.fingerprint == tokenizer.fingerprint
    other = load_tokenizer(str(make_tokenizer(tmp_path / "other", special=("</s>",))))
    assert other.fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "<|endoftext|>"),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, "<|im_end|>"),
        ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}}, "<|im_end|>"),
        (
            {"generation_config": {"eos_token_id": [1, 0]}, "config": {"eos_token_id": 0}},
            "<|im_end|>",
        ),
        ({"config": {"eos_token_id": 1}}, "<|im_end|>"),
        (
            {"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": 10**6}},
            "<|endoftext|>",
        ),
    ],
)
def test_json_eos(tmp_path, files, expected):
    folder = make_tokenizer(tmp_path / "tok", **files)
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert load_tokenizer(str(folder)).eos_id == raw.token_to_id(expected)


def test_json_without_eos(tmp_path):
    folder = make_tokenizer(tmp_path / "tok", special=("<pad>",))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.eos_id is None
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT.upper())
    data = {"data.train": [str(tmp_path / "a.txt")], "data.heldout": [str(tmp_path / "b.txt")]}
    config = replace(Config(), {"model.vocab_size": 300, "data.tokenizer": str(folder), **data})
    with pytest.raises(
        DataError, match=r"^config field data.eos = true: .* has no end token; set data.eos false$"
    ):
        make_loader(config, tokenizer=tokenizer)
    make_loader(replace(config, {"data.eos": False}), tokenizer=tokenizer)


def test_json_through_the_loader(tmp_path):
    folder = make_tokenizer(tmp_path / "tok")
    tokenizer = load_tokenizer(str(folder))
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT.upper())
    data = {"data.train": [str(tmp_path / "a.txt")], "data.heldout": [str(tmp_path / "b.txt")]}
    config = replace(
        Config(), {"model.vocab_size": 300, "data.seq_len": 64, "data.pack": False, **data}
    )
    row = heldout_rows(config, tokenizer=tokenizer, rows=1)
    ids = row["ids"][row["segment_ids"] == 1]
    assert ids.tolist() == [*tokenizer.encode(TEXT.upper()), tokenizer.eos_id]
    batch = next(make_loader(config, tokenizer=tokenizer))
    assert tokenizer.decode(batch["ids"][0]) == TEXT


def test_errors_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{\n")
    for name, message in [
        ("missing", "no such file"),
        ("empty", "no tokenizer.json"),
        ("bad.json", "not a readable"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            load_tokenizer(str(tmp_path / name))
        assert str(caught.value).startswith("config field data.tokenizer = ")
        assert "\n" not in str(caught.value)


def panicking(folder: Path) -> Path:
    """A tokenizer whose regular expression gives up on "aaaa...": its library panics there."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate("abcdefgh x!")}, merges=[])
    )
    pattern = tokenizers.Regex(r"(?:a|aa|ab?)+c")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_panic_of_the_tokenizer_is_one_line(tmp_path, capfd):
    folder = panicking(tmp_path / "tok")
    tokenizer = load_tokenizer(str(folder))
    (tmp_path / "a.txt").write_text("a" * 40 + "!")
    config = replace(
        Config(),
        {"model.vocab_size": 300, "data.tokenizer": str(folder), "data.train": [str(tmp_path)]}
        | {"data.eos": False},
    )
    for action in (
        lambda: tokenizer.encode("a" * 40 + "!"),
        lambda: tokenizer.encode_documents([b"a" * 40 + b"!"] * 4),
        lambda: make_loader(config, tokenizer=tokenizer),
    ):
        with pytest.raises(
            DataError, match=r"tokenizer .*tokenizer\.json: fails on a text \(Onig"
        ) as error:
            action()
        assert "\n" not in str(error.value)
    assert "data.train" in str(error.value)
    assert "a.txt" in str(error.value)
    assert capfd.readouterr().err == ""
    assert tokenizer.encode("abc") == [0, 1, 2]
    assert tokenizer.decode([0, 1]) != ""


def test_what_else_is_written_to_standard_error_is_shown(capfd):
    with panics_as_errors("x", "y"):
        os.write(2, b"a warning of another thread\n")
    with contextlib.suppress(KeyError), panics_as_errors("x", "y"):
        os.write(2, b"before an error\n")
        raise KeyError
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "a warning of another thread\nbefore an error\nafter\n"
