"""Files that expand a thousand times: refused in one line, in little memory; what is cut short is
noticed at every byte.
"""

import gzip
import io
import json
import lzma
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from ttt_jax.data import compressed, parquet_pages
from ttt_jax.data.compressed import open_compressed
from ttt_jax.data.quarantine import BadRecord
from ttt_jax.data.source_files import SourceFile
from ttt_jax.data.sources import read_documents
from ttt_jax.errors import DataError

MIB = 1 << 20
FORMATS = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet", ".arrayrecord": "arrayrecord"}


def records(path: Path, max_bytes: int = 100_000):
    kind = next(FORMATS[suffix] for suffix in path.suffixes if suffix in FORMATS)
    file = SourceFile(path, path.name, kind, "config field data.train = 'x'")
    return read_documents(file, text_field="text", max_bytes=max_bytes)


def refusal(path: Path, max_bytes: int = 100_000) -> str:
    with pytest.raises(DataError) as error:
        for _ in records(path, max_bytes):
            pass
    assert "\n" not in str(error.value)
    return str(error.value)


def rle_frame(blocks: int) -> bytes:
    """A zstd frame of one repeated byte: 4 bytes for 128 KiB."""
    block = lambda last: (131072 << 3 | 1 << 1 | last).to_bytes(3, "little") + b"x"
    header = (0xFD2FB528).to_bytes(4, "little") + bytes([0, 0x38])
    return header + block(0) * (blocks - 1) + block(1)


def repeated(record: bytes, size: int) -> bytes:
    return record * (size // len(record) + 1)


LINE = json.dumps({"text": "a record like many others " * 800}).encode() + b"\n"


@pytest.mark.parametrize("content", [b"\0", LINE], ids=["zeros", "records"])
@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_what_expands_a_thousand_times_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"a.jsonl{suffix}"
    data = repeated(content, 70 * MIB)
    compress = {
        ".gz": lambda data: gzip.compress(data, 6 if content == b"\0" else 9),
        ".xz": lambda data: lzma.compress(data, preset=0),
        ".zst": zstandard.ZstdCompressor(level=1).compress,
    }[suffix]
    path.write_bytes(compress(data))
    assert len(data) > 200 * path.stat().st_size
    tracemalloc.start()
    message = refusal(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "a.jsonl" + suffix + ": expands to more than 200 times its size" in message
    assert "give it unpacked" in message
    assert peak < 16 * MIB


def test_what_expands_less_or_is_small_is_read(tmp_path):
    small = tmp_path / "a.jsonl.zst"
    small.write_bytes(zstandard.ZstdCompressor().compress(LINE * 2000))  # 42 MB
    assert sum(1 for _ in records(small)) == 2000
    rng = random.Random(0)
    noise = b"".join(
        json.dumps({"text": rng.randbytes(400).hex()}).encode() + b"\n" for _ in range(1000)
    )
    packed = zstandard.ZstdCompressor().compress(noise) + zstandard.ZstdCompressor().compress(
        LINE * 3500
    )
    mixed = tmp_path / "b.jsonl.zst"  # the ratio counts what has been read so far
    mixed.write_bytes(packed)
    assert len(packed) > 400_000
    assert sum(1 for _ in records(mixed)) == 4500


def test_memory_does_not_depend_on_how_much_a_frame_expands(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "MAX_RATIO", 1 << 40)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(rle_frame(2400))  # 10 kB for 300 MB
    tracemalloc.start()
    (record,) = records(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(record, BadRecord)
    assert record.kind == "too large"
    assert peak < 16 * MIB


def frames() -> dict[str, tuple[bytes, list[int]]]:
    """Compressed bytes, and the lengths at which they are whole: where a frame ends."""
    text = b"".join(f'{{"text": "number {i}"}}\n'.encode() for i in range(40))
    params = lambda **k: zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(**k)
    )
    one = {
        "plain": zstandard.ZstdCompressor().compress(text),
        "checksum": zstandard.ZstdCompressor(write_checksum=True).compress(text),
        "no size": params(write_content_size=False, window_log=10).compress(text * 30)[:],
        "raw": zstandard.ZstdCompressor().compress(random.Random(0).randbytes(300)),
        "rle": rle_frame(3),
        "empty": zstandard.ZstdCompressor().compress(b""),
        "skippable": (0x184D2A53).to_bytes(4, "little") + (7).to_bytes(4, "little") + b"ignored",
    }
    found = {name: (data, [len(data)]) for name, data in one.items()}
    both = b"".join(one.values())
    ends = [sum(len(data) for data in list(one.values())[:i]) for i in range(1, len(one) + 1)]
    return found | {"all": (both, ends)}


@pytest.mark.parametrize("name", frames())
def test_a_zst_file_that_is_cut_short_is_noticed_at_every_byte(tmp_path, name):
    data, ends = frames()[name]
    path = tmp_path / "a.zst"
    for length in range(1, len(data) + 1):
        path.write_bytes(data[:length])
        with open_compressed(path.open("rb"), path.suffix) as stream:
            if length in ends:
                expected = zstandard.ZstdDecompressor().stream_reader(
                    io.BytesIO(data[:length]), read_across_frames=True
                )
                assert stream.read() == expected.read()
            else:
                with pytest.raises((EOFError, zstandard.ZstdError)):
                    stream.read()
    for junk in (b"junk", b"(\xb5/", b"\x00"):
        path.write_bytes(data + junk)
        with (
            open_compressed(path.open("rb"), path.suffix) as stream,
            pytest.raises((EOFError, zstandard.ZstdError)),
        ):
            stream.read()


# ----------------------------------------------------------------------------- Parquet, ArrayRecord


def write_dictionary(path: Path, text: str, rows: int) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
    options = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30, "store_schema": False}
    pq.write_table(pa.table({"text": column}), path, **options)


def write_strings(path: Path, texts: list[str], **options) -> None:
    pq.write_table(
        pa.table({"text": texts}),
        path,
        compression="zstd",
        use_dictionary=False,
        store_schema=False,
        **options,
    )


PARQUET_BOMBS = {
    "a long value": lambda path: write_dictionary(path, "x" * 14_000_000, 4096),
    "a short value": lambda path: write_dictionary(path, "ordinary words " * 4000, 200_000),
    "a random value": lambda path: write_dictionary(
        path, random.Random(0).randbytes(500_000).hex(), 3000
    ),
    "plain pages": lambda path: write_strings(path, ["y" * 10_000_000] * 10),
    "shared prefixes": lambda path: write_strings(
        path, ["y" * 2_000_000] * 50, column_encoding={"text": "DELTA_BYTE_ARRAY"}
    ),
}


@pytest.mark.parametrize("name", PARQUET_BOMBS)
def test_a_parquet_file_that_expands_is_refused_in_little_memory(tmp_path, name):
    path = tmp_path / "a.parquet"
    PARQUET_BOMBS[name](path)
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    try:
        message = refusal(path)
    finally:
        pa.set_memory_pool(usual)
    assert "a.parquet: expands to more than 200 times its size" in message
    assert (0 if name == "plain pages" else 1000) <= pool.max_memory() < 400 * MIB, (
        pool.max_memory()
    )


@pytest.mark.parametrize(
    "options",
    [
        {"use_dictionary": False},
        {"compression": "none"},
        {"data_page_version": "2.0", "compression": "gzip"},
        {"row_group_size": 7, "write_statistics": ["text"]},
        {"data_page_size": 100, "write_page_checksum": True},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_LENGTH_BYTE_ARRAY"}},
    ],
    ids=str,
)
def test_pages_are_followed_from_header_to_header(tmp_path, options, monkeypatch):
    texts = [f"text {i} " * (1 + i % 50) for i in range(3000)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": list(range(3000)), "text": texts}), path, **options)
    metadata = pq.read_metadata(path)
    seen = []
    original = parquet_pages._read_page
    monkeypatch.setattr(
        parquet_pages, "_read_page", lambda *args: seen.append(original(*args)) or seen[-1]
    )
    with path.open("rb") as file:
        for group in range(metadata.num_row_groups):
            column = metadata.row_group(group).column(1)
            start = column.dictionary_page_offset or column.data_page_offset
            seen.clear()
            largest = parquet_pages.largest_page(file, start, column.total_compressed_size)
            assert sum(page.header + page.stored for page in seen) == column.total_compressed_size
            assert (
                sum(page.header + page.unpacked for page in seen) == column.total_uncompressed_size
            )
            assert largest == max(page.unpacked for page in seen)
    assert [text.decode() for text in records(path)] == texts


def test_pages_that_are_none_are_no_sizes(tmp_path):
    rng = random.Random(0)
    for length in (0, 1, 30, 5000):
        for _ in range(50):
            with pytest.raises((ValueError, compressed.BudgetError)):
                parquet_pages.largest_page(
                    io.BytesIO(rng.randbytes(length) + b"\x1c" * 9), 0, length + 1
                )
    for nested in (b"\x1c", b"\x19", b"\x99"):  # structs, lists, lists of many
        with pytest.raises(ValueError, match="nests too deep"):
            parquet_pages.largest_page(io.BytesIO(nested * 5000), 0, 10)


def test_an_arrayrecord_file_that_expands_is_refused(tmp_path):
    path = tmp_path / "a.arrayrecord"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for _ in range(40):
        writer.write(b"z" * 2_000_000)
    writer.close()
    assert "a.arrayrecord: expands to more than 200 times its size" in refusal(path)
