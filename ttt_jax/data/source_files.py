"""Which files a config names, how each is read, and how it is opened."""

from __future__ import annotations

import dataclasses
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ttt_jax.data.compressed import DAMAGE, SUFFIXES, open_compressed
from ttt_jax.errors import DataError
from ttt_jax.files.text import reason_of

STDLIB = "stdlib"
_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrayrecord": "arrayrecord",
    ".array_record": "arrayrecord",
    ".npy": "npy",
}
# Of the standard library: tests, bundled third-party code, and generated or tabular modules.
_STDLIB_SKIP = {
    "test",
    "tests",
    "idlelib",
    "site-packages",
    "dist-packages",
    "pydoc_data",
    "encodings",
    "_bundled",
}


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of a corpus.

    `name` identifies it independently of where the corpus lies (the held-out split hangs on it),
    `label` is how errors name the config field and value that it came from.
    """

    path: Path
    name: str
    format: str
    label: str

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.label}: {self.path.name}: {problem}")


def find_files(entries: tuple[str, ...], *, field: str, format: str) -> list[SourceFile]:
    """Find the files that a config field names, in a fixed order.

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
                raise DataError(
                    f"{label}: the folder holds no file of data.format {format!r}; check both"
                )
            files += found
        elif os.path.isfile(path):
            kind = _format_of(path) or "text" if format == "auto" else format
            files.append(SourceFile(path, path.name, kind, label))
        else:
            raise DataError(
                f"{label}: no such file or folder; give an existing path, or {STDLIB!r}"
            )
    return files


def open_file(file: SourceFile) -> IO[bytes]:
    """Open a file, unpacked. Raises DataError when the package for that is missing."""
    if file.path.suffix.lower() not in SUFFIXES:
        return open(file.path, "rb")
    try:
        return open_compressed(file.path)
    except ModuleNotFoundError as error:
        raise file.error(str(error)) from None


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and name != "__pycache__"
        )
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(folder, name)


def _format_of(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in SUFFIXES:
        suffixes.pop()
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _folder_format(path: Path, format: str, label: str) -> str | None:
    """Return the format to read a folder's file in, None to leave it out."""
    known = _format_of(path)
    if format not in ("auto", "text"):
        return format if known == format else None
    if known is not None and format == "auto":
        return known
    file = SourceFile(path, path.name, "text", label)
    try:
        with open_file(file) as stream:
            # A NUL is the usual sign of a binary file.
            return None if b"\0" in stream.read(4096) else "text"
    except DAMAGE as error:
        raise file.error(f"cannot be read ({reason_of(error)}); remove or replace it") from None


def _stdlib(label: str) -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in _walk(root):
        name = path.relative_to(root)
        generated = name.name.startswith("_sysconfigdata")  # holds this machine's paths
        if path.suffix == ".py" and not generated and not _STDLIB_SKIP.intersection(name.parts):
            files.append(SourceFile(path, f"{STDLIB}/{name.as_posix()}", "text", label))
    if not files:
        raise DataError(
            f"{label}: this Python keeps no source files in {root}; name files or folders instead"
        )
    return files
