"""Which files a config names, how each is read, and how it is opened."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from ttt_jax.data.compressed import DAMAGE, SUFFIXES, open_compressed
from ttt_jax.errors import DataError
from ttt_jax.files.reading import show
from ttt_jax.files.stores import StoredFile, StoreError, is_url, list_files
from ttt_jax.files.text import cache_folder, reason_of

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


_NAMED = 3  # skipped files of a kind that are named
_KINDS = 8  # kinds of files that are told apart
_READERS = 16  # objects of a store whose beginning is read at once


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of a corpus.

    `name` identifies it independently of where the corpus lies (the held-out split hangs on it),
    `label` is how errors name the config field and value that it came from.
    """

    path: Path | StoredFile
    name: str
    format: str
    label: str

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.label}: {self.path.name}: {problem}")

    @property
    def size(self) -> int:
        """Bytes. Raises OSError."""
        return self.path.size if isinstance(self.path, StoredFile) else self.path.stat().st_size

    def identity(self) -> tuple[object, ...]:
        """Return the same for two names of one file: a link, a hard link. Raises OSError."""
        if isinstance(self.path, StoredFile):
            return (self.path.url,)
        found = self.path.stat()
        return found.st_dev, found.st_ino

    def version(self) -> tuple[object, ...]:
        """Return what changes when the file does. Raises OSError."""
        if isinstance(self.path, StoredFile):
            return self.path.url, self.path.size, self.path.version
        found = self.path.stat()
        # The time of the inode's last change, too: tools that copy files set the other one back.
        times = found.st_mtime_ns, found.st_ctime_ns
        return str(self.path.resolve()), found.st_size, *times

    def local(self) -> Path:
        """Return its path on a disk; of a stored file, that of a copy in the cache folder.

        Raises: DataError, one line, when it cannot be copied.
        """
        if isinstance(self.path, Path):
            return self.path
        try:
            return self.path.copy_to(cache_folder())
        except OSError as error:
            raise self.error(
                f"cannot be copied to the cache folder {cache_folder()} ({reason_of(error)}); "
                "check the store, and the space there"
            ) from None


class Found(NamedTuple):
    """Fields: the files, in a fixed order, and a line for the user for each folder: what is read,
    what is skipped.
    """

    files: list[SourceFile]
    remarks: list[str]


def find_files(entries: tuple[str, ...], *, field: str, format: str) -> Found:
    """Find the files that a config field names.

    In a folder, hidden files, `__pycache__`, binary files and files whose format does not apply are
    skipped.

    Args:
      entries: files, folders, URLs of both, or "stdlib".
      field: the config field's name, for errors.
      format: `DataConfig.format`.

    Raises:
      DataError: a path is missing, or a folder holds nothing to read.
    """
    if not entries:
        raise DataError(f"config field {field} = []: no data; name files or folders, or {STDLIB!r}")
    files: list[SourceFile] = []
    remarks: list[str] = []
    for entry in entries:
        label = f"config field {field} = {entry!r}"
        path = Path(entry).expanduser()
        if entry == STDLIB:
            files += _stdlib(label)
            continue
        found: Iterable[_Entry]
        if is_url(entry):
            found, is_folder = _stored(entry, label)
        elif os.path.isdir(path):  # False, not an error, for names that no file system takes
            found = ((child.relative_to(path).as_posix(), child, no) for child, no in _walk(path))
            is_folder = True
        elif os.path.isfile(path):
            found, is_folder = [(path.name, path, None)], False
        else:
            raise DataError(
                f"{label}: no such file or folder; give an existing path, or {STDLIB!r}"
            )
        if is_folder:
            chosen, remark = _choose(found, format, label, f"{field} = {entry!r}")
            files += chosen
            remarks.append(remark)
        else:
            for name, path, _ in found:
                kind = _format_of(path) or "text" if format == "auto" else format
                files.append(SourceFile(path, name, kind, label))
    return Found(files, remarks)


# In a folder: the name below it, where it lies, and why it is skipped if that is known already.
_Entry = tuple[str, Path | StoredFile, str | None]


def _choose(
    found: Iterable[_Entry], format: str, label: str, title: str
) -> tuple[list[SourceFile], str]:
    """Choose the files of a folder that are read, and say which are and which are not."""
    files: list[SourceFile] = []
    skipped: dict[str, list[str]] = collections.defaultdict(list)
    for (name, path, reason), kind in _with_formats(found, format, label):
        if reason is None and kind is not None:
            files.append(SourceFile(path, name, kind, label))
        else:
            unfit = "binary" if format in ("auto", "text") else f"not {format}"
            skipped[reason or unfit].append(name)
    left_out = "; ".join(
        f"{len(names)} {reason} ({_some(names)})" for reason, names in sorted(skipped.items())
    )
    if not files:
        saw = f" (there: {left_out})" if left_out else ""
        raise DataError(
            f"{label}: the folder holds no file of data.format {format!r}{saw}; check both"
        )
    counted = collections.Counter(_kind(file.name) for file in files).most_common()
    kinds = ", ".join(f"{count} {kind}" for kind, count in counted[:_KINDS])
    more = sum(count for _, count in counted[_KINDS:])
    kinds += f" and {more} others" if more else ""
    read = f"{title}: reads {_files(len(files))} ({kinds})"
    return files, f"{read}; skips {left_out}" if skipped else f"{read}; skips none"


def _some(names: list[str]) -> str:
    shown = ", ".join(show(name) for name in names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown}, ..."


def _files(count: int) -> str:
    return f"{count} file" if count == 1 else f"{count} files"


def _kind(name: str) -> str:
    """Return a name's ending, for instance `.jsonl.gz`."""
    suffixes = Path(name.lower()).suffixes
    last = suffixes[-2:] if suffixes and suffixes[-1] in SUFFIXES else suffixes[-1:]
    return show("".join(last)) or "without an ending"


def _with_formats(
    found: Iterable[_Entry], format: str, label: str
) -> Iterator[tuple[_Entry, str | None]]:
    """Add the format of each entry, None when it has none. Objects of a store are looked at many at
    once.
    """

    def kind(entry: _Entry) -> str | None:
        return None if entry[2] else _folder_format(entry[1], format, label)

    found = list(found)
    if any(isinstance(path, StoredFile) for _, path, _ in found):
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            yield from zip(found, pool.map(kind, found), strict=True)
    else:
        yield from ((entry, kind(entry)) for entry in found)


def open_file(file: SourceFile) -> IO[bytes]:
    """Open a file, unpacked. Raises DataError when the package for that is missing."""
    suffix = file.path.suffix.lower()
    if suffix not in SUFFIXES:
        return file.path.open("rb")
    try:
        return open_compressed(file.path.open("rb"), suffix)
    except ModuleNotFoundError as error:
        raise file.error(str(error)) from None


def _walk(root: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield everything in a folder: the files of a folder by name, then its folders by name; with
    why it is skipped, as far as that hangs on its name and kind.
    """

    def refuse(error: OSError) -> None:
        raise DataError(
            f"data folder {error.filename}: cannot be read ({error.strerror}); make it readable, "
            "or name other folders"
        )

    for folder, folders, names in os.walk(root, onerror=refuse):
        for name in sorted(names):
            path = Path(folder, name)
            yield path, _hidden(name) or (None if _is_file(path) else "not regular files")
        for name in sorted(folders):
            path = Path(folder, name)
            if reason := _hidden(name) or ("links to folders" if path.is_symlink() else None):
                folders.remove(name)
                yield path, reason
        folders.sort()


def _is_file(path: Path) -> bool:
    """Say whether opening it cannot hang. A link that leads nowhere is left to the reader."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


def _hidden(name: str) -> str | None:
    if name == "__pycache__":
        return "__pycache__"
    return "hidden" if name.startswith(".") else None


def _stored(entry: str, label: str) -> tuple[list[_Entry], bool]:
    """List what a URL names; whether it is a folder. Raises DataError."""
    try:
        found, is_folder = list_files(entry)
    except StoreError as error:
        raise DataError(f"{label}: {error}") from None
    if not found:
        raise DataError(
            f"{label}: nothing is stored there; check the bucket, the path and the credentials"
        )
    reasons = (
        next((no for part in name.split("/") if (no := _hidden(part))), None) if is_folder else None
        for name, _ in found
    )
    entries: list[_Entry] = [
        (name, file, no) for (name, file), no in zip(found, reasons, strict=True)
    ]
    return entries, is_folder


def _format_of(path: Path | StoredFile) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in SUFFIXES:
        suffixes.pop()
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _folder_format(path: Path | StoredFile, format: str, label: str) -> str | None:
    """Return the format to read a folder's file in, None to leave it out."""
    known = _format_of(path)
    if format not in ("auto", "text"):
        return format if known == format else None
    if known is not None and format == "auto":
        return known
    look = _is_text_object if isinstance(path, StoredFile) else _is_text
    try:
        return "text" if look(path) else None
    except DAMAGE as error:
        file = SourceFile(path, path.name, "text", label)
        raise file.error(f"cannot be read ({reason_of(error)}); remove or replace it") from None


def _is_text(path: Path | StoredFile) -> bool:
    """Say whether a file is no binary one. Raises what is in `DAMAGE`, and DataError."""
    with open_file(SourceFile(path, path.name, "text", "data")) as stream:
        return b"\0" not in stream.read(4096)  # a NUL is the usual sign


# A start lists its folders several times, and each look at an object is a request.
_is_text_object = functools.lru_cache(maxsize=1 << 20)(_is_text)


def _stdlib(label: str) -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path, skipped in _walk(root):
        name = path.relative_to(root)
        generated = name.name.startswith("_sysconfigdata")  # holds this machine's paths
        wanted = path.suffix == ".py" and skipped is None and not generated
        if wanted and not _STDLIB_SKIP.intersection(name.parts):
            files.append(SourceFile(path, f"{STDLIB}/{name.as_posix()}", "text", label))
    if not files:
        raise DataError(
            f"{label}: this Python keeps no source files in {root}; name files or folders instead"
        )
    return files
