"""How fast data files are read, and what hashing their content costs at the start of a run.

    python benchmarks/reading_data.py --megabytes 1000

Writes the same records (Python's own source, cut into documents) as JSONL, gz, xz, zst, Parquet and
text into a temporary folder, reads every file once from the page cache without tokenising it, and
prints MB of text per second of CPU time, of all threads, so that other jobs do not count. Before a
time is taken, the records are compared with those written. Then the byte tokenizer reads the JSONL,
and the hashes of a start are timed alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from ttt_jax.config import Config, replace
from ttt_jax.data import digests, load_tokenizer
from ttt_jax.data.corpus import load_corpus
from ttt_jax.data.source_files import SourceFile
from ttt_jax.data.sources import read_documents


def records(megabytes: int) -> list[str]:
    """Documents of some 10 kB, all different."""
    root = Path(sysconfig.get_paths()["stdlib"])
    text = "".join(path.read_text("utf-8", "replace") for path in sorted(root.glob("*.py")))
    found: list[str] = []
    size = place = 0
    while size < megabytes * 1_000_000:
        length = 2_000 + (place * 7919) % 16_000
        found.append(f"{len(found)} {text[place % (len(text) - 20_000) :][:length]}")
        size, place = size + len(found[-1].encode()), place + length + 1
    return found


def write(folder: Path, texts: list[str]) -> Iterator[tuple[str, Path]]:
    """(name of the format, its file); one file at a time."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    plain = folder / "a.jsonl"
    plain.write_bytes(lines)
    yield "jsonl", plain
    whole = folder / "a.txt"
    whole.write_bytes("".join(texts).encode())
    yield "text, one file", whole
    packed = folder / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(lines, 6))
    yield "jsonl.gz", packed
    packed = folder / "a.jsonl.xz"
    packed.write_bytes(lzma.compress(lines, preset=1))
    yield "jsonl.xz", packed
    packed = folder / "a.jsonl.zst"
    packed.write_bytes(zstandard.ZstdCompressor(level=3).compress(lines))
    yield "jsonl.zst", packed
    for codec in ("zstd", "snappy"):
        packed = folder / f"{codec}.parquet"
        pq.write_table(pa.table({"text": texts}), packed, compression=codec)
        yield f"parquet ({codec})", packed


def seconds_to_read(path: Path, expected: list[str]) -> float:
    """One pass over the file; the records are compared in a pass before it, which warms the page
    cache too.
    """
    kind = {".parquet": "parquet", ".txt": "text"}.get(path.suffix, "jsonl")
    if kind == "text":
        expected = ["".join(expected)]
    file = SourceFile(path, path.name, kind, "bench")
    read = lambda: read_documents(file, text_field="text", max_bytes=1 << 30)
    for got, text in zip(read(), expected, strict=True):
        assert got == text.encode(), path
    begin = time.process_time()
    for _ in read():
        pass
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=256)
    args = parser.parse_args()
    texts = records(args.megabytes)
    size = sum(len(text.encode()) for text in texts)
    print(f"{len(texts)} records, {size / 1e6:.0f} MB of text")
    with tempfile.TemporaryDirectory() as name:
        for kind, path in write(Path(name), texts):
            seconds = seconds_to_read(path, texts)
            stored = path.stat().st_size / 1e6
            rate = size / 1e6 / seconds
            print(f"{kind:18} {stored:8.1f} MB  {seconds:7.2f} s  {rate:7.0f} MB/s", flush=True)
            if kind != "jsonl":
                path.unlink()
        tokenise(Path(name) / "a.jsonl", size)


def tokenise(path: Path, size: int) -> None:
    """Tokenising with the hashes of a start, and the hashes alone."""
    config = replace(
        Config(),
        {"model.vocab_size": 257, "data.train": [str(path)], "data.heldout_fraction": 0.01},
    )
    begin = time.process_time()
    corpus = load_corpus(config, load_tokenizer("bytes"))
    whole = time.process_time() - begin
    dtype = np.dtype(np.uint16)
    documents = [corpus.tokens(i, 0, int(n)) for i, n in enumerate(corpus.length_N)]
    begin = time.process_time()
    for ids in documents:
        digests.digest_tokens(ids, dtype)
    alone = time.process_time() - begin
    print(
        f"reading and tokenising (bytes) {size / 1e6:.0f} MB: {whole:.2f} s, of which hashing: "
        f"{alone:.2f} s"
    )


if __name__ == "__main__":
    main()
