"""Data on an object store is the data of the same folder on a disk, and what goes wrong there is
one line.
"""

import gzip
import json

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from support.stores import HAS_S3, STORES, bucket, serving, upload

from ttt_jax.config import Config, replace
from ttt_jax.data import check_data, load_tokenizer, make_loader
from ttt_jax.data.corpus import load_corpus
from ttt_jax.errors import DataError
from ttt_jax.files import stores

TOKENIZER = load_tokenizer("bytes")


@pytest.fixture(scope="module", params=STORES)
def scheme(request):
    with serving(request.param):
        yield request.param


@pytest.fixture
def url(scheme, tmp_path, monkeypatch):
    monkeypatch.setenv("TTT_JAX_CACHE", str(tmp_path / "cache"))
    return bucket(scheme)


def config_of(*entries, **changes) -> Config:
    base = {
        "data.train": [str(entry) for entry in entries],
        "data.seq_len": 64,
        "data.batch_size": 2,
        "data.heldout_fraction": 0.2,
    }
    return replace(Config(), base | changes)


def mixed(folder):
    (folder / "z" / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / "zz.txt").write_text("a file of the folder comes before its folders")
    (folder / "z" / "a.md").write_text("# below")
    (folder / "z" / "deep" / "b.txt.gz").write_bytes(gzip.compress(b"packed, and deep below"))
    (folder / "z.jsonl").write_text('{"text": "line one"}\n{"text": "line two"}\n')
    pq.write_table(pa.table({"text": ["row one", "row two"]}), folder / "d.parquet")
    np.save(folder / "e.npy", np.arange(4000, dtype=np.uint16).reshape(2, 2000) % 250)
    writer = ArrayRecordWriter(str(folder / "f.arrayrecord"), "group_size:1")
    writer.write(b"a record")
    writer.close()
    (folder / "p.png").write_bytes(b"\x89PNG\0\0")
    return folder


def test_a_folder_there_is_the_folder_here(tmp_path, url):
    folder = mixed(tmp_path / "d")
    upload(folder, f"{url}/x/d")
    here = load_corpus(config_of(folder), TOKENIZER)
    there = load_corpus(config_of(f"{url}/x/d"), TOKENIZER)
    assert len(here) == 10
    for name in ("key_N", "digest_N", "length_N", "array_N", "start_N"):
        np.testing.assert_array_equal(getattr(there, name), getattr(here, name))
    assert there.remarks[0] == here.remarks[0].replace(str(folder), f"{url}/x/d").replace(
        "(.git)", "(.git/HEAD)"
    )
    for i, length in enumerate(here.length_N.tolist()):
        np.testing.assert_array_equal(there.tokens(i, 0, length), here.tokens(i, 0, length))
    assert there.locate(there.key_N) == here.locate(here.key_N)
    # A slash at the end, and another folder whose name begins like it.
    upload(folder, f"{url}/x/d2")
    again = load_corpus(config_of(f"{url}/x/d/"), TOKENIZER)
    assert again.locate(again.key_N) == here.locate(here.key_N)


@pytest.mark.parametrize("name", ["book.txt", "book.txt.gz"])
def test_one_text_there_trains_as_here(tmp_path, url, name):
    text = "".join(f"{i} green bottles\n" for i in range(2000)).encode()
    (tmp_path / "d").mkdir()
    path = tmp_path / "d" / name
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    upload(tmp_path / "d", url)
    here = make_loader(config_of(path), tokenizer=TOKENIZER)
    there = make_loader(config_of(f"{url}/{name}"), tokenizer=TOKENIZER)
    for _ in range(20):
        batch, other = next(here), next(there)
        for field in batch:
            np.testing.assert_array_equal(other[field], batch[field])
    # A run that began with the local file goes on with the object, and not with a changed one.
    state = json.loads(json.dumps(here.get_state()))
    again = make_loader(config_of(f"{url}/{name}"), tokenizer=TOKENIZER)
    assert again.set_state(state) == []
    np.testing.assert_array_equal(next(again)["ids"], next(here)["ids"])
    changed = text.replace(b"7 green", b"7 brown")
    path.write_bytes(gzip.compress(changed) if name.endswith(".gz") else changed)
    upload(tmp_path / "d", url)
    with pytest.raises(DataError, match="data state: the content of training documents changed"):
        make_loader(config_of(f"{url}/{name}"), tokenizer=TOKENIZER).set_state(state)


def put(url: str, data: bytes) -> None:
    fsspec.filesystem(url.partition("://")[0]).pipe_file(url, data)


HOSTILE = [
    ("none.txt", None, "nothing is stored there; check the bucket, the path and the credentials"),
    ("a.txt", b"", "empty: none of its 1 documents has 2 tokens"),
    ("a.txt", b"\xff\xfe\0bad", "not UTF-8 at byte 0"),
    ("a.txt.gz", gzip.compress(b"x" * 5000)[:-9], "cannot be read beyond its first 0 records"),
    ("a.npy", b"\x93NUMPY\x01\0", "not a readable .npy file"),
    ("a.parquet", b"PAR1 cut", "not a readable Parquet file"),
    ("a.arrayrecord", b"junk" * 100, "not a readable ArrayRecord file"),
    ("a.jsonl", b'{"text": "x"}\n{"te', "line 2 is not JSON"),
]


@pytest.mark.parametrize(("name", "data", "message"), HOSTILE, ids=[m[:20] for *_, m in HOSTILE])
def test_what_is_wrong_with_an_object_is_one_line(url, name, data, message):
    if data is not None:
        put(f"{url}/{name}", data)
    with pytest.raises(DataError, match=message) as error:
        check_data(config_of(f"{url}/{name}"), tokenizer=TOKENIZER)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"config field data.train = '{url}/{name}': ")


@pytest.mark.parametrize("name", ["a.jsonl", "a.npy", "a.parquet"])
def test_an_object_that_vanishes_after_it_was_listed(url, name, tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.arange(1000, dtype=np.uint16) % 200)
    pq.write_table(pa.table({"text": ["row one"]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "line one"}\n')
    put(f"{url}/{name}", (tmp_path / name).read_bytes())
    listed = stores.list_files

    def and_gone(entry):
        found = listed(entry)
        fsspec.filesystem(url.partition("://")[0]).rm_file(entry)
        return found

    monkeypatch.setattr("ttt_jax.data.source_files.list_files", and_gone)
    with pytest.raises(DataError, match=r"vanished|cannot be copied") as error:
        check_data(config_of(f"{url}/{name}"), tokenizer=TOKENIZER)
    assert "\n" not in str(error.value)


def test_the_same_object_in_both_fields_is_refused(url):
    put(f"{url}/d/a.txt", b"some text " * 400)
    put(f"{url}/d/b.txt", b"more text " * 400)
    config = config_of(f"{url}/d", **{"data.heldout": [f"{url}/d/a.txt"]})
    with pytest.raises(DataError, match=r"a\.txt: is a training file, too"):
        check_data(config, tokenizer=TOKENIZER)


def test_token_ids_are_copied_once(url, tmp_path, monkeypatch):
    ids = np.arange(9000, dtype=np.uint16) % 200
    np.save(tmp_path / "a.npy", ids)
    put(f"{url}/a.npy", (tmp_path / "a.npy").read_bytes())
    config = config_of(f"{url}/a.npy")
    first = load_corpus(config, TOKENIZER)
    np.testing.assert_array_equal(first.tokens(0, 0, 9000), ids)
    (copy,) = (tmp_path / "cache").iterdir()
    assert copy.read_bytes() == (tmp_path / "a.npy").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(stores.StoredFile, "open", None)
        load_corpus(replace(config, {"data.max_record_bytes": 10_000}), TOKENIZER)
    np.save(tmp_path / "a.npy", ids[::-1])
    put(f"{url}/a.npy", (tmp_path / "a.npy").read_bytes())
    np.testing.assert_array_equal(load_corpus(config, TOKENIZER).tokens(0, 0, 9000), ids[::-1])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("https://x.org/a.txt", "https:// is not supported; copy it to a disk, or use s3://, gs:"),
        ("file:///etc/passwd", "file:// is not supported"),
        ("simplecache::s3://b/a", "simplecache::s3:// is not supported"),
        ("s3://", "names no bucket; write s3://BUCKET/PATH"),
        ("memory:///", "names no bucket"),
        ("://", ":// is not supported"),
        ("s3\n://b", "is not supported"),
    ],
)
def test_other_kinds_of_paths_are_refused(entry, message):
    with pytest.raises(DataError, match=message) as error:
        check_data(config_of(entry), tokenizer=TOKENIZER)
    assert "\n" not in str(error.value)


def test_a_store_without_its_package_is_one_line(monkeypatch):
    def missing(scheme, **options):
        raise ImportError("Install s3fs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(DataError, match=r"needs the package s3fs; pip install 'ttt-jax\[s3\]'"):
        check_data(config_of("s3://b/a.txt"), tokenizer=TOKENIZER)


@pytest.mark.skipif(not HAS_S3, reason="needs s3fs")
def test_a_server_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(DataError, match="cannot be listed") as error:
        check_data(config_of("s3://some-bucket/a.txt"), tokenizer=TOKENIZER)
    assert "\n" not in str(error.value)
    fsspec.filesystem("s3").clear_instance_cache()
