"""Files to documents: which files a config names, and how each format is read.

A document is `bytes` (UTF-8 text) or a 1-D integer array (already tokenised). Every reader goes through its file once,
in order, and gives a `BadRecord` in the place of a record that is no document; `corpus.py` gives the random access.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import lzma
import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from ttt_jax.data.quarantine import BadRecord, bad_record
from ttt_jax.errors import DataError
from ttt_jax.npy_file import map_npy, parse_npy

try:
    import zstandard
except ImportError:  # needed for .zst files only
    zstandard = None

STDLIB = "stdlib"
_COMPRESSION = (".gz", ".xz", ".zst")
_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrayrecord": "arrayrecord",
    ".array_record": "arrayrecord",
    ".npy": "npy",
}
# Of the standard library: tests, bundled third-party code, and generated or tabular modules.
_STDLIB_SKIP = {"test", "tests", "idlelib", "site-packages", "dist-packages", "pydoc_data", "encodings", "_bundled"}
_NPY_MAGIC = b"\x93NUMPY"
Record = bytes | np.ndarray | BadRecord
# What the decompressors raise on a damaged file.
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError) + ((zstandard.ZstdError,) if zstandard else ())


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of a corpus.

    `name` identifies it independently of where the corpus lies (the held-out split hangs on it), `label` is how errors
    name the config field and value that it came from.
    """

    path: Path
    name: str
    format: str
    label: str

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.label}: {self.path.name}: {problem}")


def find_files(entries: tuple[str, ...], *, field: str, format: str) -> list[SourceFile]:
    """The files that a config field names, in a fixed order.

    In a folder, hidden files, `__pycache__` and files whose format does not apply are left out.

    Args:
      entries: files, folders, or "stdlib".
      field: the config field's name, for errors.
      format: `DataConfig.format`.

    Raises:
      DataError: a path is missing, or a folder holds nothing to read.
    """
    if not entries:
        raise DataError(f"config field {field} = []: no data; name files or folders, or {STDLIB!r}")
    files: list[SourceFile] = []
    for entry in entries:
        label = f"config field {field} = {entry!r}"
        path = Path(entry).expanduser()
        if entry == STDLIB:
            files += _stdlib(label)
        elif os.path.isdir(path):  # False, not an error, for names that no file system takes
            found = [
                SourceFile(child, child.relative_to(path).as_posix(), kind, label)
                for child in _walk(path)
                if (kind := _folder_format(child, format, label)) is not None
            ]
            if not found:
                raise DataError(f"{label}: the folder holds no file of data.format {format!r}; check both")
            files += found
        elif os.path.isfile(path):
            kind = _format_of(path) or "text" if format == "auto" else format
            files.append(SourceFile(path, path.name, kind, label))
        else:
            raise DataError(f"{label}: no such file or folder; give an existing path, or {STDLIB!r}")
    return files


def read_documents(file: SourceFile, *, text_field: str, max_bytes: int) -> Iterator[Record]:
    """Every record of `file`, in order; for `npy` use `open_npy`.

    Args:
      max_bytes: a record with more bytes is a bad one.

    Raises:
      DataError: the file as a whole cannot be read to its end, or holds no texts.
    """
    count = 0
    try:
        if file.format == "text":
            records = _read_text(file, max_bytes)
        elif file.format == "jsonl":
            records = _read_jsonl(file, text_field, max_bytes)
        elif file.format == "parquet":
            records = _read_parquet(file, text_field, max_bytes)
        else:
            records = _read_arrayrecord(file, max_bytes)
        for record in records:
            yield record
            count += 1
    except FileNotFoundError:
        raise file.error("has vanished; restore the file") from None
    except _DAMAGE as error:
        raise file.error(f"cannot be read beyond its first {count} records ({_one_line(error)}); replace the file") from None


def open_npy(file: SourceFile) -> np.ndarray:
    """A memory-mapped integer array, `[tokens]` or `[documents, tokens]`.

    Raises:
      DataError: not an `.npy` file, not integers, or more than two dimensions.
    """
    try:
        array = map_npy(file.path)
    except ValueError as error:
        raise file.error(f"not a readable .npy file ({error}); write it with numpy.save") from None
    if problem := _token_problem(array, max_dims=2):
        raise file.error(problem)
    return array


def _token_problem(array: np.ndarray, max_dims: int) -> str | None:
    if array.dtype.kind not in "iu":
        return f"token ids of dtype {array.dtype}; save them as an integer dtype such as uint32"
    if not 1 <= array.ndim <= max_dims:
        shapes = "[tokens]" if max_dims == 1 else "[tokens] or [documents, tokens]"
        return f"token ids of shape {list(array.shape)}; save them as {shapes}"
    return None


# ---------------------------------------------------------------------------------------------------------- finding


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(folder, name)


def _format_of(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSION:
        suffixes.pop()
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _folder_format(path: Path, format: str, label: str) -> str | None:
    """The format to read a folder's file in, None to leave it out."""
    known = _format_of(path)
    if format not in ("auto", "text"):
        return format if known == format else None
    if known is not None and format == "auto":
        return known
    file = SourceFile(path, path.name, "text", label)
    try:
        with _open(file) as stream:
            return None if b"\0" in stream.read(4096) else "text"  # a NUL is the usual sign of a binary file
    except _DAMAGE as error:
        raise file.error(f"cannot be read ({_one_line(error)}); remove or replace it") from None


def _stdlib(label: str) -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in _walk(root):
        name = path.relative_to(root)
        generated = name.name.startswith("_sysconfigdata")  # holds this machine's paths
        if path.suffix == ".py" and not generated and not _STDLIB_SKIP.intersection(name.parts):
            files.append(SourceFile(path, f"{STDLIB}/{name.as_posix()}", "text", label))
    if not files:
        raise DataError(f"{label}: this Python keeps no source files in {root}; name files or folders instead")
    return files


# ---------------------------------------------------------------------------------------------------------- reading


def _open(file: SourceFile) -> IO[bytes]:
    suffix = file.path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(file.path, "rb"))
    if suffix == ".xz":
        return cast(IO[bytes], lzma.open(file.path, "rb"))
    if suffix == ".zst":
        return _open_zst(file)
    return open(file.path, "rb")


def _open_zst(file: SourceFile) -> IO[bytes]:
    if zstandard is None:
        raise file.error("reading .zst needs the package zstandard; pip install zstandard")
    return io.BufferedReader(_ZstStream(file.path), 1 << 20)


class _ZstStream(io.RawIOBase):
    """All frames of a .zst file. zstandard's own reader takes a file that is cut short for one that ends there."""

    _PIECE = 1 << 12  # compressed bytes at a time: a block of zeros grows by a factor of 30,000

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("rb")
        self._frame: Any = None
        self._rest, self._ready = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._rest or self._file.read(self._PIECE)
            if not data:
                if self._frame is not None:
                    raise EOFError("compressed file ended before the end of a frame")
                return 0
            if self._frame is None:
                assert zstandard is not None
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(data)
            self._rest = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _text(unit: str, number: int, text: bytes, max_bytes: int) -> bytes | BadRecord:
    """A text, if it is one."""
    if len(text) > max_bytes:
        problem = f"has {len(text)} bytes or more, data.max_record_bytes = {max_bytes}"
        return bad_record(unit, number, "too large", problem, text)
    if not text.strip() and unit != "file":  # an empty file is an ordinary thing, an empty record is not
        return bad_record(unit, number, "empty", "has an empty text", text)
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        return bad_record(unit, number, "not UTF-8", f"is not UTF-8 at byte {error.start}", text)
    return text


def _read_text(file: SourceFile, max_bytes: int) -> Iterator[Record]:
    with _open(file) as stream:
        pieces, size = [], 0
        while size <= max_bytes and (piece := stream.read(min(1 << 20, max_bytes + 1 - size))):
            pieces.append(piece)
            size += len(piece)
        yield _text("file", 0, b"".join(pieces), max_bytes)


def _read_jsonl(file: SourceFile, text_field: str, max_bytes: int) -> Iterator[Record]:
    with _open(file) as stream:
        number = 0
        while line := stream.readline(max_bytes + 1):
            number += 1
            if len(line) > max_bytes and not line.endswith(b"\n"):
                problem = f"has more bytes than data.max_record_bytes = {max_bytes}"
                yield bad_record("line", number, "too large", problem, line)
                while line and not line.endswith(b"\n"):
                    line = stream.readline(1 << 20)
            elif line.strip():
                yield _json_text(number, line, text_field, max_bytes)


def _json_text(number: int, line: bytes, text_field: str, max_bytes: int) -> bytes | BadRecord:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return bad_record("line", number, "not UTF-8", f"is not UTF-8 at byte {error.start}", line)
    except (ValueError, RecursionError) as error:
        hint = "" if line.endswith(b"\n") else ", and has no end: the file may be cut short"
        return bad_record("line", number, "not JSON", f"is not JSON ({_one_line(error)}){hint}", line)
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        return bad_record("line", number, *_missing(record, text_field), line)
    return _text("line", number, text.encode("utf-8", errors="replace"), max_bytes)


def _missing(record: object, text_field: str) -> tuple[str, str]:
    """(kind, problem) of a JSON line without a text."""
    if not isinstance(record, dict):
        return "wrong type", f"is a {type(record).__name__}, not an object; write one {{...}} a line"
    if text_field in record:
        kind = type(record[text_field]).__name__
        return "wrong type", f"field {text_field!r} is a {kind}, not a string; fix it or set data.text_field"
    names = ", ".join(str(name)[:40] for name in list(record)[:8])
    return "no text", f"has no field {text_field!r} (fields: {names}); set data.text_field"


def _read_parquet(file: SourceFile, text_field: str, max_bytes: int) -> Iterator[Record]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise file.error("reading Parquet needs the package pyarrow; pip install pyarrow") from None
    try:
        with pq.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise file.error(f"no column {text_field!r} (columns: {', '.join(names[:8])}); set data.text_field")
            kind = table.schema_arrow.field(text_field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise file.error(f"column {text_field!r} holds {kind}, not strings; set data.text_field")
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for text in batch.column(0).cast(pa.large_binary()).to_pylist():  # pyarrow checks no UTF-8
                    if text is None:
                        yield bad_record("row", row, "no text", f"has a null {text_field!r}")
                    else:
                        yield _text("row", row, text, max_bytes)
                    row += 1
    except DataError:
        raise
    except (pa.ArrowException, ValueError) as error:  # ValueError: names that are not UTF-8
        raise file.error(f"not a readable Parquet file ({_one_line(error)}); replace it") from None


def _read_arrayrecord(file: SourceFile, max_bytes: int) -> Iterator[Record]:
    """A record is UTF-8 text, or token ids as `numpy.save` writes them (recognised by its magic bytes)."""
    from grain.sources import ArrayRecordDataSource

    try:
        source: Any = ArrayRecordDataSource(str(file.path))
        with source:
            for start in range(0, len(source), 1024):
                stop = min(start + 1024, len(source))
                for number, record in enumerate(source.__getitems__(range(start, stop)), start):
                    is_tokens = record.startswith(_NPY_MAGIC)
                    yield _token_record(number, record) if is_tokens else _text("record", number, record, max_bytes)
    except (RuntimeError, ValueError, IndexError) as error:  # damage anywhere: blocks have checksums of their own
        raise file.error(f"not a readable ArrayRecord file ({_one_line(error)}); replace it") from None


def _token_record(number: int, record: bytes) -> np.ndarray | BadRecord:
    try:
        array = parse_npy(record)
    except ValueError as error:
        problem = f"of token ids is damaged ({error}); write it with numpy.save"
        return bad_record("record", number, "damaged", problem, record)
    if problem := _token_problem(array, max_dims=1):
        return bad_record("record", number, "wrong type", f"has {problem}", record)
    return array


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
