"""Which files of a folder are read under a format that is asked for."""

import gzip
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ttt_jax.config import Config, replace
from ttt_jax.data import data_remarks, load_tokenizer
from ttt_jax.data.corpus import load_corpus
from ttt_jax.data.source_files import find_files
from ttt_jax.errors import DataError


@pytest.mark.parametrize(
    ("format", "names"),
    [
        ("auto", ["a.jsonl", "b.txt", "c.jsonl.gz", "d.parquet"]),
        ("jsonl", ["a.jsonl", "c.jsonl.gz"]),
        ("parquet", ["d.parquet"]),
        ("text", ["a.jsonl", "b.txt", "c.jsonl.gz"]),
    ],
)
def test_of_a_folder_the_files_of_the_format(tmp_path, format, names):
    """Others are left out, not read as what they are not; `text` takes whatever is no binary
    file.
    """
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "c"}\n'))
    (tmp_path / "d.parquet").write_bytes(b"PAR1\0\0PAR1")
    found = find_files((str(tmp_path),), field="data.train", format=format).files
    assert [file.name for file in found] == names
    assert format == "auto" or {file.format for file in found} == {format}


def mixed(folder):
    """One file of each kind that is read, and one of each that is skipped."""
    (folder / "sub" / "__pycache__").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / "sub" / "__pycache__" / "x.pyc").write_bytes(b"\0\1")
    (folder / "b.txt").write_text("text")
    (folder / "a.md").write_text("# markdown")
    (folder / "sub" / "a.jsonl").write_text('{"text": "line one"}\n{"text": "line two"}\n')
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    pq.write_table(pa.table({"text": ["row one", "row two"]}), folder / "d.parquet")
    np.save(folder / "e.npy", np.arange(20, dtype=np.uint16))
    (folder / "LICENSE").write_text("words")
    (folder / "empty.txt").write_text("")
    (folder / "p.png").write_bytes(b"\x89PNG\0\0")
    (folder / "q.zip").write_bytes(b"PK\3\4\0\0")
    (folder / ".hidden").write_text("x")
    os.mkfifo(folder / "pipe")
    os.symlink(folder / "sub", folder / "again")
    return folder


def test_a_folder_of_mixed_files_says_what_is_read_and_what_is_not(tmp_path):
    folder = mixed(tmp_path / "d")
    config = replace(Config(), {"data.train": [str(folder)]})
    corpus = load_corpus(config, load_tokenizer("bytes"))
    read = ["LICENSE", "a.md", "b.txt", "c.txt.gz", "d.parquet", "e.npy", "empty.txt"]
    assert [file.name for file in corpus.files] == [*read, "sub/a.jsonl"]
    texts = [
        bytes(corpus.tokens(i, 0, int(corpus.length_N[i]))[:-1].astype(np.uint8)).decode()
        for i in range(len(corpus) - 1)
    ]
    assert texts == [
        *("words", "# markdown", "text", "packed", "row one", "row two", "line one", "line two"),
    ]
    assert corpus.tokens(8, 0, 20).tolist() == list(range(20))
    assert corpus.remarks == (
        f"data.train = '{folder}': reads 8 files (2 .txt, 1 without an ending, 1 .md, 1 .txt.gz, 1 "
        ".parquet, 1 .npy, 1 .jsonl); skips 1 __pycache__ (sub/__pycache__); 2 binary (p.png, "
        "q.zip); 2 hidden (.hidden, .git); 1 links to folders (again); 1 not regular files (pipe)",
        f"data.train = '{folder}': leaves out 1 of 10 documents, which have fewer than 2 tokens "
        "(data.min_document)",
    )
    remarks = data_remarks(config, load_tokenizer("bytes"))
    assert remarks[:2] == list(corpus.remarks)
    assert "holds out 1 of 9 documents" in remarks[2]


def test_a_folder_without_any_file_to_read_names_what_is_there(tmp_path):
    folder = mixed(tmp_path / "d")
    (folder / "d.parquet").unlink()
    with pytest.raises(DataError, match=r"holds no file of data.format 'parquet' \(there: 1 __py"):
        find_files((str(folder),), field="data.train", format="parquet")
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file of data\.format 'auto'; check both"):
        find_files((str(empty),), field="data.train", format="auto")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("to", ["nowhere", "a.jsonl"])
def test_a_link_that_leads_nowhere_is_one_line(tmp_path, name, to):
    (tmp_path / "b.txt").write_text("some text")
    os.symlink(tmp_path / to, tmp_path / name)
    if not (tmp_path / "a.jsonl").is_symlink() and to == "a.jsonl":
        os.symlink(tmp_path / name, tmp_path / "a.jsonl")  # a circle of two
    config = replace(Config(), {"data.train": [str(tmp_path)]})
    with pytest.raises(
        DataError, match=r"a\.(jsonl|txt): (is not there|cannot be read) \("
    ) as error:
        load_corpus(config, load_tokenizer("bytes"))
    assert "\n" not in str(error.value)


def test_names_that_are_no_text_stay_on_one_line(tmp_path):
    (tmp_path / "a\nerror: b.png").write_bytes(b"\0")
    (tmp_path / "b.txt").write_text("b")
    (remark,) = find_files((str(tmp_path),), field="data.train", format="auto").remarks
    assert "\n" not in remark
    assert "skips 1 binary ('a\\nerror: b.png')" in remark


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(DataError, match="locked: cannot be read"):
        find_files((str(tmp_path),), field="data.train", format="auto")
