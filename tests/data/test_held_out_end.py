"""One text file, or a few: the end of the longest is held out, the same one at every start."""

import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import zstandard

from ttt_jax.config import Config, replace
from ttt_jax.data import (
    check_data,
    data_remarks,
    heldout_remarks,
    heldout_rows,
    load_tokenizer,
    make_loader,
)
from ttt_jax.data.heldout import split
from ttt_jax.errors import DataError

TOKENIZER = load_tokenizer("bytes")
# no two places alike; 10,000 bytes, with the end token 10,001 tokens
BOOK = "".join(f"{i:07d} naïve\n" for i in range(667))[:9334]
assert len(BOOK.encode()) == 10_000


def config_of(*paths: Path, **changes) -> Config:
    base = {
        "data.train": [str(path) for path in paths],
        "data.seq_len": 64,
        "data.batch_size": 2,
        "model.ttt.layers": [0],
        "model.ttt.chunk_size": 16,
    }
    return replace(
        Config(), base | {key.replace("__", "."): value for key, value in changes.items()}
    )


def documents(corpus) -> list[list[int]]:
    return [corpus.tokens(i, 0, int(corpus.length_N[i])).tolist() for i in range(len(corpus))]


PACKERS = {
    "book.txt": bytes,
    "book.md": bytes,
    "book": bytes,
    "book.txt.gz": gzip.compress,
    "book.md.xz": lzma.compress,
    "BOOK.TXT.ZST": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_the_end_of_one_text_file(tmp_path, name, fraction):
    path = tmp_path / name
    path.write_bytes(PACKERS[name](BOOK.encode()))
    config = config_of(path, data__heldout_fraction=fraction)
    train, heldout, remark, held_out = split(config, TOKENIZER)
    (begin,), (end,) = documents(train), documents(heldout)
    assert begin + end == [*BOOK.encode(), 256]
    assert len(end) == round(fraction * 10_001)
    assert remark is None
    assert held_out == (
        f"data.heldout_fraction = {fraction:g}: holds out the end of {name} ({len(end)} of 10001 "
        f"tokens, {100 * fraction:.3g} %)"
    )
    assert data_remarks(config, TOKENIZER) == [held_out]
    assert heldout_remarks(config, TOKENIZER) == []


def test_what_is_trained_on_and_what_is_evaluated(tmp_path):
    """Through the loader: an epoch's targets are the beginning, the held-out rows are the end."""
    path = tmp_path / "book.txt"
    path.write_text(BOOK)
    config = config_of(path, data__shuffle=False, data__pack=False)
    loader = make_loader(config, tokenizer=TOKENIZER)
    whole, cut = [*BOOK.encode(), 256], 10_001 - 500
    pieces = -(-cut // 64)
    seen: list[int] = []
    for _ in range(-(-pieces // 2)):
        batch = next(loader)
        for row, weights in zip(batch["ids"], batch["segment_ids"], strict=True):
            seen += row[weights > 0].tolist()
    assert seen[:cut] == whole[:cut]
    rows = heldout_rows(config, tokenizer=TOKENIZER, rows=100)
    assert rows["ids"][rows["segment_ids"] > 0].tolist() == whole[cut:]
    (first, *_) = make_loader(config, tokenizer=TOKENIZER).documents({0: [0]})
    assert (first.file, first.document, first.start) == ("book.txt", 0, 0)


def test_the_end_of_token_ids(tmp_path):
    ids = (np.arange(5000) % 250).astype(np.uint16)
    np.save(tmp_path / "a.npy", ids)
    train, heldout, _, held_out = split(config_of(tmp_path / "a.npy"), TOKENIZER)
    assert documents(train) == [ids[:4750].tolist()]
    assert documents(heldout) == [ids[4750:].tolist()]
    assert "holds out the end of a.npy (250 of 5000 tokens, 5 %)" in held_out


def test_a_run_goes_on_with_the_same_end_only(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(BOOK)
    loader = make_loader(config_of(path), tokenizer=TOKENIZER)
    expected = [next(loader)["ids"] for _ in range(8)]
    early = make_loader(config_of(path), tokenizer=TOKENIZER)
    for _ in range(4):
        next(early)
    state = json.loads(json.dumps(early.get_state()))
    path.with_name("copy").write_text(BOOK)
    path.with_name("copy").rename(path)  # another inode and time, the same text
    again = make_loader(config_of(path), tokenizer=TOKENIZER)
    assert again.set_state(state) == []
    for ids in expected[4:]:
        np.testing.assert_array_equal(next(again)["ids"], ids)
    other = make_loader(config_of(path, data__heldout_fraction=0.06), tokenizer=TOKENIZER)
    with pytest.raises(DataError, match="data state: the training documents"):
        other.set_state(state)
    for place in (10, 9990):  # a letter of the part to train on; one of the end
        path.write_text(BOOK[: place - 700] + "#" + BOOK[place - 699 :])
        changed = make_loader(config_of(path), tokenizer=TOKENIZER)
        with pytest.raises(DataError, match="data state: the content of training documents"):
            changed.set_state(state)


@pytest.mark.parametrize(
    ("text", "fraction", "message"),
    [
        ("x" * 1000, 0.05, "of 1001 tokens at the end of a.txt gives 50 tokens and leaves 951"),
        ("x" * 1258, 0.05, "gives 63 tokens and leaves 1196, too short; give 1280 tokens or more"),
        ("x" * 1000, 0.95, "gives 951 tokens and leaves 50, too short; give 1280 tokens or more"),
        ("", 0.05, "empty: none of its 1 documents has 2 tokens or more"),
        (" \n", 0.05, "gives 0 tokens and leaves 3, too short"),
    ],
)
def test_too_short_is_one_line(tmp_path, text, fraction, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        check_data(
            config_of(tmp_path / "a.txt", data__heldout_fraction=fraction), tokenizer=TOKENIZER
        )
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("config field data.train = ")
    least = config_of(tmp_path / "a.txt", data__heldout_fraction=fraction)
    (tmp_path / "a.txt").write_text("x" * 1279)
    assert min(vars(check_data(least, tokenizer=TOKENIZER)).values()) > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOOK.encode("latin-1"), "the file is not UTF-8 at byte 10, so it is no text or has anoth"),
        (BOOK.encode("utf-16"), "the file is not UTF-8 at byte 0"),
        (b"%PDF-1.7\n\xe2\xe3\xcf\xd3" + bytes(5000), "the file is not UTF-8 at byte 9"),
        (gzip.compress(BOOK.encode())[:-300], "cannot be read beyond its first 0 records"),
    ],
    ids=["latin-1", "utf-16", "pdf", "cut short"],
)
def test_what_is_no_text_is_one_line(tmp_path, content, message):
    path = tmp_path / ("a.txt.gz" if content[:2] == b"\x1f\x8b" else "a.txt")
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        check_data(config_of(path), tokenizer=TOKENIZER)
    assert "\n" not in str(error.value)


def test_a_huge_line_is_an_ordinary_text(tmp_path):
    (tmp_path / "a.txt").write_text("ab " * 700_000)
    summary = check_data(config_of(tmp_path / "a.txt"), tokenizer=TOKENIZER)
    assert summary.train_tokens + summary.heldout_tokens == 2_100_001
    with pytest.raises(DataError, match="the file has 1001 bytes or more, "):
        check_data(config_of(tmp_path / "a.txt", data__max_record_bytes=1000), tokenizer=TOKENIZER)


# ----------------------------------------------------------------------------------- several files


def write(folder: Path, **texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_of_a_few_files_the_end_of_the_longest(tmp_path):
    """A whole one of two would be half of everything."""
    folder = write(tmp_path / "d", a=BOOK, b=BOOK[:7000].upper())
    train, heldout, _, held_out = split(config_of(folder), TOKENIZER)
    tokens = 10_001 + len(BOOK[:7000].upper().encode()) + 1
    (end,) = documents(heldout)
    assert end == [*BOOK.encode(), 256][-round(0.05 * tokens) :]
    assert documents(train)[0] == [*BOOK.encode(), 256][: -len(end)]
    assert len(train) == 2
    assert "holds out the end of a.txt" in held_out
    # One giant among small ones, whose hash is among those that are held out: never all of it.
    for i in range(40):
        write(folder, **{f"small{i}": f"some words, number {i}"})
    both = split(config_of(folder), TOKENIZER)
    assert int(both.heldout.length_N.sum()) < 0.3 * tokens


def test_of_many_files_some_are_held_out_whole(tmp_path):
    folder = write(tmp_path / "d", **{f"f{i}": f"text {i} " * 20 for i in range(100)})
    train, heldout, _, held_out = split(config_of(folder), TOKENIZER)
    assert len(train) + len(heldout) == 100
    assert not set(train.key_N.tolist()) & set(heldout.key_N.tolist())
    assert f"holds out {len(heldout)} of 100 documents" in held_out


def test_the_end_of_a_text_that_is_there_twice_is_not_held_out(tmp_path):
    """Its copy would be trained on."""
    folder = write(tmp_path / "d", a=BOOK, b=BOOK, c="something short " * 10)
    with pytest.raises(DataError, match="are copies of training documents; remove the copies"):
        split(config_of(folder), TOKENIZER)


def test_an_end_that_shows_nothing_of_ttt_is_said(tmp_path):
    (tmp_path / "a.txt").write_text(BOOK)
    config = config_of(tmp_path / "a.txt", data__seq_len=512, model__ttt__chunk_size=512)
    (line,) = data_remarks(config, TOKENIZER)
    assert line.endswith(
        "none is longer than model.ttt.chunk_size = 512, so it cannot show what TTT does"
    )
