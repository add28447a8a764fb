"""How large the pages of a Parquet column are, read from their headers before anything is unpacked.

A value of a column is part of a page, of data or of the dictionary; so the largest page says how
many values may be unpacked at once. A dictionary of one long text takes a few kB in the file and
stands for that text in every row.
"""

from __future__ import annotations

from typing import IO, NamedTuple

from ttt_jax.data.compressed import check_budget

# Bytes in which a header is looked for; a longer one is read again with 16 times as many.
_WINDOW = 1 << 16
_LONGEST = 1 << 24
_DEEPEST = 8  # structs and lists within one another


class Page(NamedTuple):
    """Fields: bytes of the header, of the page as it is stored, and of the page unpacked."""

    header: int
    stored: int
    unpacked: int


def largest_page(file: IO[bytes], start: int, length: int) -> int:
    """Find the largest page of a column chunk, in bytes, unpacked.

    Args:
      file: open for reading.
      start, length: where the chunk lies.

    Raises:
      BudgetError: a page, or all of them, unpack to more than their size allows
        (`compressed.check_budget`).
      ValueError: what lies there are no pages.
    """
    place, largest, unpacked = start, 0, 0
    while place < start + length:
        page = _read_page(file, place)
        place += page.header + page.stored
        largest, unpacked = max(largest, page.unpacked), unpacked + page.unpacked
        check_budget(page.unpacked, page.stored)
        check_budget(unpacked, place - start)
    return largest


def _read_page(file: IO[bytes], place: int) -> Page:
    window = _WINDOW
    while True:
        file.seek(place)
        data = file.read(window)
        try:
            fields, end = _read_struct(data, 0)
            break
        except IndexError:
            if len(data) < window or window >= _LONGEST:
                raise ValueError("a page's header is cut short") from None
            window *= 16
    if not all(isinstance(fields.get(number), int) and fields[number] >= 0 for number in (2, 3)):
        raise ValueError("a page's header has no sizes")
    return Page(end, fields[3], fields[2])


# ------------------------------------------------------------------------ Thrift's compact protocol


def _read_struct(data: bytes, place: int, depth: int = 0) -> tuple[dict[int, int], int]:
    """Read (field number -> value of the integer fields, end). Raises IndexError behind the end of
    `data`, ValueError.
    """
    fields: dict[int, int] = {}
    number = 0
    while True:
        kind, delta = data[place] & 15, data[place] >> 4
        place += 1
        if kind == 0:
            return fields, place
        if delta:
            number += delta
        else:
            coded, place = _read_varint(data, place)
            number = coded >> 1 ^ -(coded & 1)
        if kind in (4, 5, 6):
            coded, place = _read_varint(data, place)
            fields[number] = coded >> 1 ^ -(coded & 1)
        else:
            place = _skip(data, place, kind, depth)


def _skip(data: bytes, place: int, kind: int, depth: int) -> int:
    if depth > _DEEPEST:
        raise ValueError("a page's header nests too deep")
    if kind in (1, 2):  # a boolean is in its field's header
        return place
    if kind == 3:
        return place + 1
    if kind in (4, 5, 6):
        return _read_varint(data, place)[1]
    if kind == 7:
        return place + 8
    if kind == 8:
        length, place = _read_varint(data, place)
        if place + length > len(data):
            raise IndexError
        return place + length
    if kind in (9, 10):
        count, of = data[place] >> 4, data[place] & 15
        place += 1
        if count == 15:
            count, place = _read_varint(data, place)
        for _ in range(count):
            place = place + 1 if of in (1, 2) else _skip(data, place, of, depth + 1)
            data[place - 1]
        return place
    if kind == 12:
        return _read_struct(data, place, depth + 1)[1]
    raise ValueError("a page's header has a field of an unknown kind")


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a page's header has a number that does not end")
