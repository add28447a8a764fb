"""Files to documents: which files a config names, and how each format is read.

A document is `bytes` (UTF-8 text) or a 1-D integer array (already tokenised). Every reader goes through its file once,
in order; `corpus.py` gives the random access.
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

from ttt_jax.errors import DataError

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
        elif path.is_dir():
            found = [
                SourceFile(child, child.relative_to(path).as_posix(), kind, label)
                for child in _walk(path)
                if (kind := _folder_format(child, format, label)) is not None
            ]
            if not found:
                raise DataError(f"{label}: the folder holds no file of data.format {format!r}; check both")
            files += found
        elif path.is_file():
            kind = _format_of(path) or "text" if format == "auto" else format
            files.append(SourceFile(path, path.name, kind, label))
        else:
            raise DataError(f"{label}: no such file or folder; give an existing path, or {STDLIB!r}")
    return files


def read_documents(file: SourceFile, *, text_field: str) -> Iterator[bytes | np.ndarray]:
    """Every document of `file`, in order; for `npy` use `open_npy`.

    Raises:
      DataError: the file cannot be read, or a record is not what its format says.
    """
    try:
        if file.format == "text":
            with _open(file) as stream:
                yield stream.read()
        elif file.format == "jsonl":
            yield from _read_jsonl(file, text_field)
        elif file.format == "parquet":
            yield from _read_parquet(file, text_field)
        else:
            yield from _read_arrayrecord(file)
    except _DAMAGE as error:
        raise file.error(f"cannot be read ({_one_line(error)}); replace the file") from None


def open_npy(file: SourceFile) -> np.ndarray:
    """A memory-mapped integer array, `[tokens]` or `[documents, tokens]`.

    Raises:
      DataError: not an `.npy` file, not integers, or more than two dimensions.
    """
    try:
        array = np.load(file.path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise file.error(f"not a readable .npy file ({_one_line(error)}); write it with numpy.save") from None
    if not isinstance(array, np.ndarray):
        raise file.error("an .npz archive; save one array with numpy.save")
    _check_token_array(file, array, max_dims=2)
    return array


def _check_token_array(file: SourceFile, array: np.ndarray, max_dims: int) -> None:
    if array.dtype.kind not in "iu":
        raise file.error(f"token ids of dtype {array.dtype}; save them as an integer dtype such as uint32")
    if not 1 <= array.ndim <= max_dims:
        shapes = "[tokens]" if max_dims == 1 else "[tokens] or [documents, tokens]"
        raise file.error(f"token ids of shape {list(array.shape)}; save them as {shapes}")


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
    raw = open(file.path, "rb")  # noqa: SIM115  (closed with the stream around it)
    stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=True)
    return io.BufferedReader(stream, 1 << 20)


def _read_jsonl(file: SourceFile, text_field: str) -> Iterator[bytes]:
    with _open(file) as stream:
        for number, line in enumerate(iter(stream.readline, b""), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise file.error(f"line {number} is not JSON ({_one_line(error)}); fix the line") from None
            text = record.get(text_field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise file.error(f"line {number} {_missing(record, text_field)}")
            yield text.encode("utf-8", errors="replace")


def _missing(record: object, text_field: str) -> str:
    if not isinstance(record, dict):
        return f"is a {type(record).__name__}, not an object; write one {{...}} a line"
    if text_field in record:
        kind = type(record[text_field]).__name__
        return f"field {text_field!r} is a {kind}, not a string; fix it or set data.text_field"
    return f"has no field {text_field!r} (fields: {', '.join(map(str, list(record)[:8]))}); set data.text_field"


def _read_parquet(file: SourceFile, text_field: str) -> Iterator[bytes]:
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
                for text in batch.column(0).to_pylist():
                    if text is None:
                        raise file.error(f"row {row}: {text_field!r} is null; remove the row or set data.text_field")
                    yield text.encode("utf-8", errors="replace")
                    row += 1
    except pa.ArrowException as error:
        raise file.error(f"not a readable Parquet file ({_one_line(error)}); replace it") from None


def _read_arrayrecord(file: SourceFile) -> Iterator[bytes | np.ndarray]:
    """A record is UTF-8 text, or token ids as `numpy.save` writes them (recognised by its magic bytes)."""
    from grain.sources import ArrayRecordDataSource

    try:
        source: Any = ArrayRecordDataSource(str(file.path))
    except (RuntimeError, ValueError, IndexError) as error:
        raise file.error(f"not a readable ArrayRecord file ({_one_line(error)}); replace it") from None
    with source:
        for start in range(0, len(source), 1024):
            for record in source.__getitems__(range(start, min(start + 1024, len(source)))):
                yield _token_record(file, record) if record.startswith(_NPY_MAGIC) else record


def _token_record(file: SourceFile, record: bytes) -> np.ndarray:
    try:
        array = np.lib.format.read_array(io.BytesIO(record), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise file.error(f"a record of token ids is damaged ({_one_line(error)}); write it with numpy.save") from None
    _check_token_array(file, array, max_dims=1)
    return array


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
