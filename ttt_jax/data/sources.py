"""Files to documents: how each format is read.

A document is `bytes` (UTF-8 text) or a 1-D integer array (already tokenised). Every reader goes
through its file once, in order, and gives a `BadRecord` in the place of a record that is no
document; `corpus.py` gives the random access.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from ttt_jax.data.compressed import DAMAGE, BudgetError, check_budget
from ttt_jax.data.parquet_pages import largest_page
from ttt_jax.data.quarantine import BadRecord, bad_record
from ttt_jax.data.source_files import SourceFile, open_file
from ttt_jax.errors import DataError
from ttt_jax.files.npy import map_npy, parse_npy
from ttt_jax.files.stores import StoredFile, StoreError
from ttt_jax.files.text import reason_of, without_mark

_NPY_MAGIC = b"\x93NUMPY"
_AT_ONCE = 64 << 20  # bytes of records that are unpacked at once
_HEAD = 1000  # bytes of a line of which an excerpt is made
Record = bytes | np.ndarray | BadRecord


def read_documents(file: SourceFile, *, text_field: str, max_bytes: int) -> Iterator[Record]:
    """Yield every record of `file`, in order; for `npy` use `open_npy`.

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
    except StoreError as error:
        raise file.error(
            f"cannot be read beyond its first {count} records ({error}); run the same command again"
        ) from None
    except BudgetError as error:
        raise file.error(str(error)) from None
    except DAMAGE as error:
        raise file.error(
            f"cannot be read beyond its first {count} records ({reason_of(error)}); replace the "
            "file"
        ) from None


def open_npy(file: SourceFile) -> np.ndarray:
    """Map an integer array, `[tokens]` or `[documents, tokens]`.

    Raises:
      DataError: not an `.npy` file, not integers, or more than two dimensions.
    """
    try:
        array = map_npy(file.local())
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


# ------------------------------------------------------------------------------------------ reading


def _text(
    unit: str, number: int, text: bytes, max_bytes: int, *, is_utf8: bool = False
) -> bytes | BadRecord:
    """Return a text, if it is one."""
    if len(text) > max_bytes:
        problem = f"has {len(text)} bytes or more, data.max_record_bytes = {max_bytes}"
        return bad_record(unit, number, "too large", problem, text)
    # An empty file is an ordinary thing, an empty record is not.
    if (not text or text.isspace()) and unit != "file":
        return bad_record(unit, number, "empty", "has an empty text", text)
    try:
        if not is_utf8:
            text.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 at byte {error.start}"
        if unit == "file":
            problem += ", so it is no text or has another encoding, which iconv can change"
        return bad_record(unit, number, "not UTF-8", problem, text)
    return text


def _read_text(file: SourceFile, max_bytes: int) -> Iterator[Record]:
    with open_file(file) as stream:
        pieces, size = [], 0
        while size <= max_bytes and (piece := stream.read(min(1 << 20, max_bytes + 1 - size))):
            pieces.append(piece)
            size += len(piece)
        yield _text("file", 0, without_mark(b"".join(pieces)), max_bytes)


def _read_jsonl(file: SourceFile, text_field: str, max_bytes: int) -> Iterator[Record]:
    with open_file(file) as stream:
        number = 0
        while line := stream.readline(max_bytes + 1):
            number += 1
            line = without_mark(line) if number == 1 else line
            if len(line) > max_bytes and not line.endswith(b"\n"):
                problem = f"has more bytes than data.max_record_bytes = {max_bytes}"
                yield bad_record("line", number, "too large", problem, line)
                while line and not line.endswith(b"\n"):
                    line = stream.readline(1 << 20)
            elif not line.isspace():
                head, ended = line[:_HEAD], line.endswith(b"\n")
                try:
                    words = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    problem = f"is not UTF-8 at byte {error.start}"
                    yield bad_record("line", number, "not UTF-8", problem, head)
                    continue
                line = b""  # a line may have a GB, and each form of it takes as much
                yield _json_text(number, [words], text_field, max_bytes, head, ended)


def _json_text(
    number: int, words: list[str], text_field: str, max_bytes: int, head: bytes, ended: bool
) -> bytes | BadRecord:
    """Return the text of a JSON line.

    Args:
      words: the line, which is taken out, so that its memory can be given back.
      head, ended: its first bytes, and whether it ended with a line break.
    """
    try:
        record = json.loads(words.pop())
    except (ValueError, RecursionError) as error:
        hint = "" if ended else ", and has no end: the file may be cut short"
        problem = f"is not JSON ({reason_of(error)}){hint}"
        return bad_record("line", number, "not JSON", problem, head)
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        return bad_record("line", number, *_missing(record, text_field), head)
    del record
    return _text("line", number, text.encode("utf-8", errors="replace"), max_bytes, is_utf8=True)


def _missing(record: object, text_field: str) -> tuple[str, str]:
    """Return (kind, problem) of a JSON line without a text."""
    if not isinstance(record, dict):
        return (
            "wrong type",
            f"is a {type(record).__name__}, not an object; write one {{...}} a line",
        )
    if text_field in record:
        kind = type(record[text_field]).__name__
        return (
            "wrong type",
            f"field {text_field!r} is a {kind}, not a string; fix it or set data.text_field",
        )
    names = ", ".join(str(name)[:40] for name in list(record)[:8])
    return "no text", f"has no field {text_field!r} (fields: {names}); set data.text_field"


def _read_parquet(file: SourceFile, text_field: str, max_bytes: int) -> Iterator[Record]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise file.error(
            "reading Parquet needs the package pyarrow; pip install 'ttt-jax[parquet]'"
        ) from None
    try:
        with contextlib.ExitStack() as stack:
            stored = isinstance(file.path, StoredFile)
            source = stack.enter_context(file.path.open("rb")) if stored else file.path
            table = stack.enter_context(pq.ParquetFile(source))
            names = table.schema_arrow.names
            if text_field not in names:
                raise file.error(
                    f"no column {text_field!r} (columns: {', '.join(names[:8])}); set "
                    "data.text_field"
                )
            kind = table.schema_arrow.field(text_field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise file.error(
                    f"column {text_field!r} holds {kind}, not strings; set data.text_field"
                )
            size, out = file.size, 0
            for row, text in enumerate(_parquet_column(file, table, text_field)):
                if text is None:
                    yield bad_record("row", row, "no text", f"has a null {text_field!r}")
                else:
                    out += len(text)
                    check_budget(out, size)
                    yield _text("row", row, text, max_bytes)
    except (DataError, BudgetError):
        raise
    except (pa.ArrowException, ValueError) as error:  # ValueError: names that are not UTF-8
        raise file.error(f"not a readable Parquet file ({reason_of(error)}); replace it") from None


def _parquet_column(file: SourceFile, table: Any, text_field: str) -> Iterator[bytes | None]:
    """Yield the values of a column, row group by row group, as many at once as `_AT_ONCE` bytes
    surely hold.

    Raises: BudgetError, and what pyarrow raises.
    """
    import pyarrow as pa

    with file.path.open("rb") as raw:
        for group in range(table.metadata.num_row_groups):
            rows = max(
                1, min(1024, _AT_ONCE // max(1, _largest_value(raw, table, group, text_field)))
            )
            options = {"batch_size": rows, "row_groups": [group], "columns": [text_field]}
            for batch in table.iter_batches(**options):
                # As bytes: pyarrow does not check that strings are UTF-8.
                yield from batch.column(0).cast(pa.large_binary()).to_pylist()


def _largest_value(raw: IO[bytes], table: Any, group: int, text_field: str) -> int:
    """Bound the bytes of a value of the column; `_AT_ONCE` when its pages cannot be told: then one
    row at a time.
    """
    columns = table.metadata.row_group(group)
    for number in range(columns.num_columns):
        column = columns.column(number)
        if column.path_in_schema == text_field:
            starts = [column.data_page_offset, column.dictionary_page_offset or 0]
            start = min(place for place in starts if place > 0)
            try:
                return largest_page(raw, start, column.total_compressed_size)
            except ValueError:
                return _AT_ONCE
    return _AT_ONCE


def _read_arrayrecord(file: SourceFile, max_bytes: int) -> Iterator[Record]:
    """Read records, each UTF-8 text, or token ids as `numpy.save` writes them (recognised by its
    magic bytes).
    """
    from grain.sources import ArrayRecordDataSource

    path = file.local()
    try:
        source: Any = ArrayRecordDataSource(str(path))
        size, out, start, count = path.stat().st_size, 0, 0, 1
        with source:
            while start < len(source):
                records = source.__getitems__(range(start, min(start + count, len(source))))
                out += sum(map(len, records))
                check_budget(out, size)
                # Nothing says how large the next ones are, so this goes by those before, one to
                # begin with.
                count = max(1, min(1024, 2 * count, _AT_ONCE // max(1, *map(len, records))))
                for number, record in enumerate(records, start):
                    is_tokens = record.startswith(_NPY_MAGIC)
                    yield (
                        _token_record(number, record)
                        if is_tokens
                        else _text("record", number, record, max_bytes)
                    )
                start += len(records)
    except BudgetError:
        raise
    # Damage anywhere is seen: blocks have checksums of their own.
    except (RuntimeError, ValueError, IndexError) as error:
        raise file.error(
            f"not a readable ArrayRecord file ({reason_of(error)}); replace it"
        ) from None


def _token_record(number: int, record: bytes) -> np.ndarray | BadRecord:
    try:
        array = parse_npy(record)
    except ValueError as error:
        problem = f"of token ids is damaged ({error}); write it with numpy.save"
        return bad_record("record", number, "damaged", problem, record)
    if problem := _token_problem(array, max_dims=1):
        return bad_record("record", number, "wrong type", f"has {problem}", record)
    return array
