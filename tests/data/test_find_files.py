"""Which files of a folder are read under a format that is asked for."""

import gzip

import pytest

from ttt_jax.data.source_files import find_files


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
    found = find_files((str(tmp_path),), field="data.train", format=format)
    assert [file.name for file in found] == names
    assert format == "auto" or {file.format for file in found} == {format}
