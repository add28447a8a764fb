"""Documents have a hash of their content, and a run goes on with the same content only."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from ttt_jax.config import Config, replace
from ttt_jax.data import cache, corpus, digests, load_tokenizer, make_loader
from ttt_jax.errors import DataError

TOKENIZER = load_tokenizer("bytes")
U16 = np.dtype(np.uint16)


def config_of(train: Path, **changes) -> Config:
    base = {
        "data.train": [str(train)],
        "data.seq_len": 64,
        "data.batch_size": 2,
        "data.heldout_fraction": 0.2,
    }
    return replace(Config(), base | changes)


def state_of(config: Config) -> dict:
    loader = make_loader(config, tokenizer=TOKENIZER)
    for _ in range(3):
        next(loader)
    return json.loads(json.dumps(loader.get_state()))


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


LINES = [f"line {i:03d} of the text" for i in range(60)]


@pytest.mark.parametrize(
    "change",
    [
        lambda texts: [text.upper() for text in texts],
        lambda texts: texts[1:] + texts[:1],
        lambda texts: [*texts[:30], texts[30].replace("of", "if"), *texts[31:]],
    ],
    ids=["upper case", "rotated", "one letter"],
)
def test_changed_text_of_the_same_lengths_is_refused(tmp_path, change):
    path = tmp_path / "a.jsonl"
    write_lines(path, LINES)
    state = state_of(config_of(path))
    before = path.stat()
    write_lines(path, change(LINES))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `rsync -t` and `cp -p` do
    assert path.stat().st_size == before.st_size
    loader = make_loader(config_of(path), tokenizer=TOKENIZER)
    with pytest.raises(
        DataError, match=r"data state: the (content of training|held-out) documents changed since"
    ) as error:
        loader.set_state(state)
    assert "\n" not in str(error.value)
    write_lines(path, LINES)
    assert make_loader(config_of(path), tokenizer=TOKENIZER).set_state(state) == []


@pytest.mark.parametrize("shape", [(6000,), (60, 100)])
def test_token_arrays_of_the_same_shape_with_other_values_are_refused(tmp_path, shape):
    train, heldout = tmp_path / "a.npy", tmp_path / "b.npy"
    ids = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint16)
    np.save(train, ids)
    np.save(heldout, ids[:40] // 2)
    config = config_of(train, **{"data.heldout": [str(heldout)], "data.min_document": 2})
    state = state_of(config)
    for path, what in (
        (train, "the content of training documents"),
        (heldout, "the held-out documents"),
    ):
        original = np.load(path)
        changed = original.copy()
        changed.flat[-1] ^= 1
        np.save(path, changed)
        with pytest.raises(DataError, match=what):
            make_loader(config, tokenizer=TOKENIZER).set_state(state)
        np.save(path, original)
    assert make_loader(config, tokenizer=TOKENIZER).set_state(state) == []


def test_a_state_without_content_is_accepted_and_says_so(tmp_path):
    path = tmp_path / "a.jsonl"
    write_lines(path, LINES)
    state = state_of(config_of(path))
    for name in ("content", "heldout"):
        del state["identity"][name]  # as older versions wrote it
    loader = make_loader(config_of(path), tokenizer=TOKENIZER)
    (remark,) = loader.set_state(state)
    assert "content" in remark
    assert "was not compared" in remark
    next(loader)
    assert make_loader(config_of(path), tokenizer=TOKENIZER).set_state(loader.get_state()) == []
    write_lines(
        path, [*LINES[:-1], LINES[-1] + "!"]
    )  # what the old form could tell is still compared
    with pytest.raises(DataError, match=r"the training documents \(names or lengths\) changed"):
        make_loader(config_of(path), tokenizer=TOKENIZER).set_state(state)


def test_cached_tokens_that_changed_are_read_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("TTT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "MEMORY_LIMIT", 64)
    path = tmp_path / "a.jsonl"
    write_lines(path, LINES)
    first = corpus.load_corpus(config_of(path), TOKENIZER)
    (tokens,) = (tmp_path / "cache").glob("*.bin")
    data = bytearray(tokens.read_bytes())
    data[100] ^= 1
    tokens.write_bytes(data)
    corpus._recent.clear()
    again = corpus.load_corpus(config_of(path), TOKENIZER)
    assert (
        again.tokens(2, 0, 21).tobytes()
        == first.tokens(2, 0, 21).tobytes()
        == np.array([*LINES[2].encode(), 256], U16).tobytes()
    )
    assert again.content() == first.content()
    assert tokens.read_bytes() != data


def test_one_document_has_one_digest_whatever_holds_it():
    ids = np.random.default_rng(1).integers(0, 200, 70_000)
    for dtype in (np.uint8, np.int64, np.dtype(">i4")):
        assert digests.digest_tokens(ids.astype(dtype), U16) == digests.digest_tokens(ids, U16)
        assert digests.digest_rows(ids.astype(dtype), 7, 10_000, U16)[3] == digests.digest_tokens(
            ids[30_000:40_000], U16
        )
    assert digests.digest_tokens(np.append(ids, 256), U16, 256) == digests.digest_tokens(
        ids, U16, 256
    )
    assert digests.digest_tokens(np.append(ids, 256), U16) != digests.digest_tokens(ids, U16)
    assert digests.digest_rows(ids[:0], 0, 5, U16).shape == (0,)
    assert digests.digest_rows(ids[:0], 5, 0, U16).tolist() == [0] * 5


def test_of_a_large_array_the_stated_samples_are_hashed(monkeypatch):
    monkeypatch.setattr(digests, "WHOLE", 1000)
    monkeypatch.setattr(digests, "PIECES", 5)
    monkeypatch.setattr(digests, "PIECE", 10)
    ranges = digests.hashed_ranges(2000)
    assert ranges == [
        (0, 1000),
        (1000, 1010),
        (1247, 1257),
        (1495, 1505),
        (1742, 1752),
        (1990, 2000),
    ]
    for tokens in (
        1000,
        1001,
        1005,
        1012,
        1049,
        1050,
        1051,
        1100,
    ):  # fewer than five pieces behind the whole part
        ranges = digests.hashed_ranges(tokens)
        assert all(start < stop for start, stop in ranges)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
        assert ranges[-1][1] == tokens
    ids = np.arange(2000) % 251
    for rows, width in ((1, 2000), (100, 20), (400, 5)):
        digest_N = digests.digest_rows(ids, rows, width, U16)
        for at in (0, 999, 1000, 1009, 1010, 1300, 1500, 1751, 1990, 1999):
            changed = ids.copy()
            changed[at] += 1
            different = digests.digest_rows(changed, rows, width, U16) != digest_N
            hashed = any(start <= at < stop for start, stop in digests.hashed_ranges(2000))
            assert different.tolist() == [hashed and row == at // width for row in range(rows)], (
                rows,
                width,
                at,
            )
    assert (digests.digest_rows(ids, 400, 5, U16) == 0).sum() == 400 - 200 - 2 - 3 - 2 - 3 - 2
