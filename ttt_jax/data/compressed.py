"""Compressed files, read in pieces, with a budget for what comes out of them.

What comes out may be `MAX_RATIO` times what went in, or `FREE_BYTES`, whichever is more. Text
compresses by a factor of 3 to 20, logs that repeat themselves by 100; zeros by 1,000 (gz), 7,000
(xz) and 30,000 (zst). Memory does not depend on the ratio.
"""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from typing import IO, Any, cast

try:
    import zstandard
except ImportError:  # needed for .zst files only
    zstandard = None

MAX_RATIO = 200
FREE_BYTES = 64 << 20
SUFFIXES = (".gz", ".xz", ".zst")
_BUFFER = 1 << 20
# What reading a damaged file raises.
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError) + (
    (zstandard.ZstdError,) if zstandard else ()
)


class BudgetError(OSError):
    """A file holds more than its budget. The message is a phrase that continues a file's name."""


def check_budget(out: int, size: int) -> None:
    """Raise BudgetError when `out` bytes are too many for `size` compressed ones."""
    if out > FREE_BYTES and out > MAX_RATIO * size:
        raise BudgetError(
            f"expands to more than {MAX_RATIO} times its size ({out} bytes from {size}); if that "
            "is meant, give it unpacked"
        )


def open_compressed(file: IO[bytes], suffix: str) -> IO[bytes]:
    """Give the bytes in a .gz, .xz or .zst file, of any number of members or frames; `file` is
    closed with them.

    Reading raises BudgetError, and what is in `DAMAGE`.

    Raises:
      ModuleNotFoundError: a .zst file, and the package zstandard is not installed.
    """
    try:
        if suffix == ".gz":
            stream: Any = gzip.GzipFile(fileobj=file, mode="rb")
        elif suffix == ".xz":
            stream = lzma.LZMAFile(file)  # noqa: SIM115
        else:
            stream = _ZstStream(file)
        return cast(IO[bytes], io.BufferedReader(_Bounded(file, stream), _BUFFER))
    except BaseException:
        file.close()
        raise


class _Bounded(io.RawIOBase):
    """A decompressing stream that counts what comes out of it."""

    def __init__(self, file: IO[bytes], stream: Any) -> None:
        super().__init__()
        self._file, self._stream, self._out = file, stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # What one read of the file gives, so that damage behind it takes nothing away from what
        # came before.
        data = self._stream.read1(len(buffer))
        count = len(data)
        buffer[:count] = data
        self._out += count
        if self._out > FREE_BYTES:
            check_budget(self._out, self._file.tell())
        return count

    def close(self) -> None:
        self._stream.close()
        self._file.close()
        super().close()


class _ZstStream:
    """All frames of a .zst file. zstandard's own reader takes a file that is cut short for one that
    ends there.
    """

    def __init__(self, file: IO[bytes]) -> None:
        if zstandard is None:
            raise ModuleNotFoundError(
                "reading .zst needs the package zstandard; pip install zstandard"
            )
        self._frames = _FrameWalker(file)
        self._reader = zstandard.ZstdDecompressor().stream_reader(
            cast(IO[bytes], self._frames), read_size=1 << 17, read_across_frames=True, closefd=False
        )

    def read1(self, size: int) -> bytes:
        data = self._reader.read1(size)
        if not data and size and not self._frames.complete:
            raise EOFError("compressed file ended before the end of a frame")
        return data

    def close(self) -> None:
        self._reader.close()


class _FrameWalker:
    """A file of zstd frames as the decompressor reads it; follows the headers of frames and blocks
    (RFC 8878).

    Attributes:
      complete: whether what has been read so far ends where a frame ends.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._head = b""  # of the header that is being read
        self._skip = 0  # bytes to the next header
        # Reads the next header from `_head`: its length, or 0 when more bytes are needed.
        self._next = self._magic
        self._checksum = False

    @property
    def complete(self) -> bool:
        return not self._head and not self._skip and self._next in (self._magic, self._unknown)

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._walk(data)
        return data

    def _walk(self, data: bytes) -> None:
        place = 0
        while place < len(data):
            if self._skip:
                step = min(self._skip, len(data) - place)
                self._skip, place = self._skip - step, place + step
                continue
            if self._next == self._unknown:
                return
            known = len(self._head)
            self._head += data[place : place + 18 - known]  # no header is longer
            length = self._next()
            place += (length or len(self._head)) - known
            if length:
                self._head = b""

    def _magic(self) -> int:
        if len(self._head) < 4:
            return 0
        number = int.from_bytes(self._head[:4], "little")
        if number == 0xFD2FB528:
            self._next = self._descriptor
        elif number >> 4 == 0x184D2A5:
            self._next = self._skippable
        else:  # the decompressor says what it is
            self._next = self._unknown
        return 4

    def _skippable(self) -> int:
        if len(self._head) < 4:
            return 0
        self._skip, self._next = int.from_bytes(self._head[:4], "little"), self._magic
        return 4

    def _descriptor(self) -> int:
        flags = self._head[0]
        single = flags >> 5 & 1
        self._checksum = bool(flags & 4)
        self._skip = (1 - single) + (0, 1, 2, 4)[flags & 3] + (single, 2, 4, 8)[flags >> 6]
        self._next = self._block
        return 1

    def _block(self) -> int:
        if len(self._head) < 3:
            return 0
        header = int.from_bytes(self._head[:3], "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        self._skip = 1 if kind == 1 else size
        if last:
            self._skip += 4 if self._checksum else 0
            self._next = self._magic
        return 3

    def _unknown(self) -> int:
        return 0
