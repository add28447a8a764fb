"""Every format gives its documents back, and everything wrong with a file is one line."""

import gzip
import io
import json
import lzma
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from ttt_jax.config import Config, replace
from ttt_jax.data import cache, check_data, corpus, heldout_rows, load_tokenizer, make_loader
from ttt_jax.data.heldout import split_corpus
from ttt_jax.errors import DataError

TOKENIZER = load_tokenizer("bytes")
TEXTS = ["first document", "naïve café\r\n", "日本語のテキスト", "x" * 50]


def config_of(*paths: Path, **changes) -> Config:
    base = {
        "model.vocab_size": 257,
        "data.train": [str(path) for path in paths],
        "data.seq_len": 64,
        "data.batch_size": 2,
        "data.pack": False,
        "data.shuffle": False,
    }
    return replace(
        Config(), base | {key.replace("__", "."): value for key, value in changes.items()}
    )


def documents_of(config: Config, field: str = "data.train") -> list[list[int]]:
    """The documents' tokens."""
    found = corpus.load_corpus(config, TOKENIZER, field=field)
    return [found.tokens(i, 0, int(found.length_N[i])).tolist() for i in range(len(found))]


def texts_of(config: Config) -> list[str]:
    documents = documents_of(config)
    assert all(document[-1] == 256 for document in documents)
    return [TOKENIZER.decode(document) for document in documents]


def jsonl(texts: list[str]) -> bytes:
    return (
        "\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(texts)).encode()
        + b"\n\n"
    )


def write_arrayrecord(path: Path, records: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def damaged_arrayrecord(path: Path, records: list[bytes]) -> None:
    """The file can be opened, but its first block cannot be read."""
    write_arrayrecord(path, records)
    data = bytearray(path.read_bytes())
    data[64] ^= 1
    path.write_bytes(data)


def npy_bytes(ids: list[int]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(ids, np.uint16))
    return stream.getvalue()


def parquet_bytes(texts: list[str]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".xz", lzma.compress),
        (".zst", zstandard.ZstdCompressor().compress),
    ],
)
def test_jsonl(tmp_path, suffix, compress):
    path = tmp_path / f"data.jsonl{suffix}"
    path.write_bytes(compress(jsonl(TEXTS)))
    assert texts_of(config_of(path)) == TEXTS


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_byte_order_mark_is_no_text(tmp_path, compress):
    """Of files, not of the texts in them: also the hash of the tokens is that of the text."""
    mark, texts = "\ufeff".encode(), ["\ufeffmarked", "text\ufeff"]
    found = []
    for start in (mark, b""):
        for name, data in (("a.jsonl.gz", jsonl(texts)), ("b.txt.gz", b"words")):
            name = name if compress is gzip.compress else name.removesuffix(".gz")
            (tmp_path / name).write_bytes(compress(start + data))
        config = config_of(tmp_path)
        assert texts_of(config) == [*texts, "words"]
        found.append(corpus.load_corpus(config, TOKENIZER).content())
    assert found[0] == found[1]


def test_concatenated_zst_frames(tmp_path):
    path = tmp_path / "data.jsonl.zst"
    compress = zstandard.ZstdCompressor().compress
    path.write_bytes(compress(jsonl(TEXTS[:2])) + compress(jsonl(TEXTS[2:])))
    assert texts_of(config_of(path)) == TEXTS


def test_parquet(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"n": list(range(4)), "body": TEXTS}), path, row_group_size=3)
    assert texts_of(config_of(path, data__text_field="body")) == TEXTS


def test_arrayrecord_of_text_and_of_tokens(tmp_path):
    write_arrayrecord(tmp_path / "data.array_record", [text.encode() for text in TEXTS])
    assert texts_of(config_of(tmp_path)) == TEXTS
    write_arrayrecord(
        tmp_path / "data.array_record", [npy_bytes([1, 2, 3]), b"text", npy_bytes([4, 5])]
    )
    # token ids are taken as they are, without an end token
    expected = [[1, 2, 3], [*b"text", 256], [4, 5]]
    assert documents_of(config_of(tmp_path / "data.array_record")) == expected


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint32", ">i8"])
def test_npy(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.arange(10, dtype=dtype))
    np.save(tmp_path / "b.npy", np.arange(12, dtype=dtype).reshape(3, 4))
    np.save(tmp_path / "c.npy", np.asfortranarray(np.arange(6, dtype=dtype).reshape(2, 3)))
    expected = [list(range(10)), [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [0, 1, 2], [3, 4, 5]]
    assert documents_of(config_of(tmp_path)) == expected


def test_folder_of_text_in_order_without_hidden_and_binary_files(tmp_path):
    for name, content in [
        ("b.txt", b"second"),
        ("a.md", b"first"),
        ("sub/c.py", b"third"),
        (".hidden", b"no"),
        ("__pycache__/x.txt", b"no"),
        ("picture.png", b"\x89PNG\0\0"),
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert texts_of(config_of(tmp_path)) == ["first", "second", "third"]


def test_explicit_format_and_several_entries(tmp_path):
    (tmp_path / "records").write_bytes(jsonl(TEXTS[:2]))
    (tmp_path / "other.dat").write_bytes(jsonl(TEXTS[2:]))
    config = config_of(tmp_path / "records", tmp_path / "other.dat", data__format="jsonl")
    assert texts_of(config) == TEXTS


def test_eos_and_min_document(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(jsonl(["a", "bb", "ccc"]))
    assert documents_of(config_of(path)) == [[97, 256], [98, 98, 256], [99, 99, 99, 256]]
    # one token predicts nothing
    assert documents_of(config_of(path, data__eos=False)) == [[98, 98], [99, 99, 99]]
    assert documents_of(config_of(path, data__min_document=4)) == [[99, 99, 99, 256]]


def test_stdlib_is_found_and_has_no_tests():
    config = replace(Config(), {"model.vocab_size": 257})
    files = corpus.find_files(config.data.train, field="data.train", format="auto").files
    names = [file.name for file in files]
    assert "stdlib/json/decoder.py" in names
    assert "stdlib/argparse.py" in names
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "site-packages", "__pycache__"}
    summary = check_data(config, tokenizer=TOKENIZER)
    assert summary.train_tokens > 3_000_000
    assert 0.01 < summary.heldout_documents / summary.train_documents < 0.12


def test_large_text_goes_to_the_cache_and_is_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TTT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "MEMORY_LIMIT", 64)
    path = tmp_path / "data.jsonl"
    path.write_bytes(jsonl(TEXTS * 5))
    expected = [[*text.encode(), 256] for text in TEXTS * 5]
    assert documents_of(config_of(path)) == expected
    assert sorted(file.suffix for file in (tmp_path / "cache").iterdir()) == [".bin", ".npz"]

    corpus._recent.clear()
    monkeypatch.setattr(corpus, "read_documents", None)  # a second reading would fail
    assert documents_of(config_of(path)) == expected


def test_unfinished_cache_files_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TTT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "MEMORY_LIMIT", 64)
    monkeypatch.setattr(corpus, "_BATCH_BYTES", 100)
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(TEXTS * 5))[:-4])
    with pytest.raises(DataError, match="cannot be read beyond its first 20 records"):
        documents_of(config_of(path))
    assert list((tmp_path / "cache").iterdir()) == []


# ------------------------------------------------------------------------------------------- errors


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as stream:
        np.save(stream, array, allow_pickle=True)


BAD_FILES = [
    (
        "a.jsonl",
        lambda p: write(p, b'{"text": "ok"}\n{"body": "x"}\n'),
        r"line 2 has no field 'text' \(fields: body\)",
    ),
    ("a.jsonl", lambda p: write(p, b'{"text": 3}\n'), "field 'text' is a int, not a string"),
    ("a.jsonl", lambda p: write(p, b"[1]\n"), "line 1 is a list, not an object"),
    ("a.jsonl", lambda p: write(p, b'{"text": "\xff"}\n'), "line 1 is not UTF-8 at byte 10"),
    ("a.jsonl", lambda p: write(p, b'{"text": " "}\n'), "line 1 has an empty text"),
    (
        "a.jsonl",
        lambda p: write(p, b'{"text": "cut sh'),
        "line 1 is not JSON .* has no end: the file may be cut short",
    ),
    ("a.jsonl", lambda p: write(p, b"[" * 100_000), "line 1 is not JSON"),
    ("a.jsonl", lambda p: write(p, b""), "empty"),
    ("a.jsonl.gz", lambda p: write(p, b"not gzip"), "cannot be read"),
    ("a.jsonl.gz", lambda p: write(p, gzip.compress(jsonl(TEXTS))[:-12]), "cannot be read"),
    ("a.jsonl.xz", lambda p: write(p, b"not xz"), "cannot be read"),
    ("a.jsonl.xz", lambda p: write(p, lzma.compress(jsonl(TEXTS))[:-9]), "cannot be read"),
    ("a.jsonl.zst", lambda p: write(p, b"not zst"), "cannot be read"),
    (
        "a.jsonl.zst",
        lambda p: write(p, zstandard.ZstdCompressor().compress(jsonl(TEXTS))[:-5]),
        "cannot be read",
    ),
    ("a.txt", lambda p: write(p, b"caf\xe9"), "the file is not UTF-8 at byte 3"),
    ("a.parquet", lambda p: write(p, b"not parquet"), "not a readable Parquet file"),
    (
        "a.parquet",
        lambda p: pq.write_table(pa.table({"n": [1]}), p),
        r"no column 'text' \(columns: n\)",
    ),
    (
        "a.parquet",
        lambda p: pq.write_table(pa.table({"text": [1]}), p),
        "column 'text' holds int64",
    ),
    (
        "a.parquet",
        lambda p: pq.write_table(pa.table({"text": ["a", None]}), p),
        "row 1 has a null 'text'",
    ),
    ("a.arrayrecord", lambda p: write(p, b"not a record file"), "not a readable ArrayRecord file"),
    (
        "a.arrayrecord",
        lambda p: damaged_arrayrecord(p, [b"one", b"two", b"three"]),
        "not a readable ArrayRecord file",
    ),
    ("a.arrayrecord", lambda p: write_arrayrecord(p, [npy_bytes([1, 2])[:-3]]), "damaged"),
    (
        "a.arrayrecord",
        lambda p: write_arrayrecord(p, [npy_bytes([1, 999])]),
        "token id 999 is outside",
    ),
    ("a.npy", lambda p: save(p, np.ones(4, np.float32)), "dtype float32"),
    ("a.npy", lambda p: save(p, np.ones(4, bool)), "dtype bool"),
    ("a.npy", lambda p: save(p, np.array([{"a": 1}], object)), "not a readable .npy file"),
    ("a.npy", lambda p: save(p, np.ones((2, 2, 2), int)), r"shape \[2, 2, 2\]"),
    (
        "a.npy",
        lambda p: save(p, np.array([1, 257])),
        "token id 257 is outside model.vocab_size = 257",
    ),
    ("a.npy", lambda p: save(p, np.array([1, -1])), "token id -1 is outside"),
    ("a.npy", lambda p: save(p, np.zeros(0, int)), "empty|not a readable"),
    ("a.npy", lambda p: write(p, b"junk"), "not a readable .npy file"),
    ("a.npy", lambda p: write(p, npy_bytes(list(range(100)))[:-1]), "not a readable .npy file"),
    ("a.parquet", lambda p: write(p, parquet_bytes(TEXTS)[:-8]), "not a readable Parquet file"),
    ("a.arrayrecord", lambda p: write_arrayrecord(p, [b"ok", b""]), "record 1 has an empty text"),
    ("a.arrayrecord", lambda p: write_arrayrecord(p, [b"\xff"]), "record 0 is not UTF-8"),
    ("a.txt", lambda p: write(p, b""), "empty: none of its 1 documents has 2 tokens or more"),
]


@pytest.mark.parametrize(("name", "make", "message"), BAD_FILES)
def test_bad_files_are_one_line(tmp_path, name, make, message):
    path = tmp_path / name
    make(path)
    with pytest.raises(DataError, match=message) as caught:
        make_loader(config_of(path), tokenizer=TOKENIZER)
    text = str(caught.value)
    assert text.startswith("config field data.train = ")
    assert str(path) in text
    assert "\n" not in text


def test_bad_settings_are_one_line(tmp_path):
    good = tmp_path / "good.txt"
    good.write_text("some text " * 20)
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (
            {"data.train": [str(tmp_path / "missing")]},
            "data.train = '.*missing': no such file or folder",
        ),
        (
            {"data.heldout": [str(tmp_path / "missing")]},
            "data.heldout = '.*missing': no such file or folder",
        ),
        ({"data.train": [str(empty)]}, "data.train = '.*empty': the folder holds no file"),
        ({"data.train": []}, r"data.train = \[\]"),
        (
            {"data.format": "parquet", "data.train": [str(tmp_path)]},
            "holds no file of data.format 'parquet'",
        ),
        (
            {"model.vocab_size": 256},
            "data.tokenizer = 'bytes': its 257 ids do not fit model.vocab_size = 256",
        ),
        (
            {},
            "data.train = '.*good.txt': holding out .* gives 10 tokens .* give 1280 tokens or more",
        ),
        (
            {"data.min_document": 1000},
            "data.train = '.*good.txt': empty: none of its 1 documents has 1000 tokens",
        ),
        (
            {"data.heldout": [str(good)], "data.batch_size": 3},
            "data.batch_size = 3: must be a multiple of the 2",
        ),
    ]
    for changes, message in cases:
        config = replace(config_of(good), changes)
        with pytest.raises(DataError, match=message) as caught:
            make_loader(config, tokenizer=TOKENIZER, process_index=0, process_count=2)
        assert str(caught.value).startswith("config field ")
        assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------- held out


def test_heldout_split_is_stable_and_disjoint(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(jsonl([f"document {i}" for i in range(400)]))
    config = config_of(path, data__heldout_fraction=0.1)
    train, heldout = split_corpus(corpus.load_corpus(config, TOKENIZER), 0.1)
    assert len(train) + len(heldout) == 400
    assert 20 < len(heldout) < 65
    assert not set(train.key_N.tolist()) & set(heldout.key_N.tolist())

    # growing the file moves no document
    path.write_bytes(jsonl([f"document {i}" for i in range(800)]))
    _, later = split_corpus(corpus.load_corpus(config, TOKENIZER), 0.1)
    assert set(later.key_N.tolist()) >= set(heldout.key_N.tolist())
    assert len(later) < 130


def test_heldout_rows_take_long_documents_first_and_one_piece_of_each(tmp_path):
    lengths = {"a": 10, "b": 200, "c": 64, "d": 30, "e": 130}
    for name, length in lengths.items():
        (tmp_path / f"{name}.txt").write_text(name * length)
    train = tmp_path / "train"
    train.mkdir()
    (train / "x.txt").write_text("x" * 100)
    config = config_of(
        train, data__heldout=[str(tmp_path / f"{name}.txt") for name in lengths], data__eos=False
    )

    def letters(rows: int) -> list[str]:
        batch = heldout_rows(config, tokenizer=TOKENIZER, rows=rows)
        assert all(array.shape == (len(batch["ids"]), 64) for array in batch.values())
        assert set(np.unique(batch["segment_ids"])) <= {0, 1}
        return [chr(row[0]) for row in batch["ids"]]

    assert sorted(letters(3)) == ["b", "c", "e"]
    assert sorted(letters(5)[3:]) == ["a", "d"]
    assert sorted(letters(7)[5:]) == ["b", "e"]
    everything = letters(100)
    assert len(everything) == 1 + 4 + 1 + 1 + 3  # a, b, c, d, e
    assert everything[:7] == letters(7)
    assert "x" not in everything
