"""Files on object stores, `s3://BUCKET/KEY` and `gs://BUCKET/KEY`, through fsspec.

A store has no folders and no locks, and a name appears when its object is complete. Whatever a
store's library raises becomes a `StoreError`, an OSError with a phrase for its message, so that
readers of local files read these, too. `memory://` is fsspec's own, for tests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import os
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from ttt_jax.files.text import reason_of

# Scheme -> the package that fsspec needs for it, and the extra that brings it.
SCHEMES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "memory": ("fsspec", "s3")}
_BLOCK_BYTES = 8 << 20  # read at once from a store
_BUFFER = 1 << 20
# What a listing tells of an object that changes when its content does.
_VERSION = ("ETag", "etag", "generation", "md5Hash", "LastModified", "mtime", "updated", "created")


class StoreError(OSError):
    """What a store refused, or why it cannot be reached. The message continues a file's name."""


def is_url(entry: str | os.PathLike[str]) -> bool:
    """Say whether a path is on a store."""
    return "://" in os.fspath(entry)


def open_store(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the URL's path in it.

    Raises: StoreError, a phrase, for a kind of store that is not supported or lacks its package.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES if name != "memory")
        raise StoreError(f"{scheme[:40]}:// is not supported; copy it to a disk, or use {known}")
    if not rest.strip("/"):
        raise StoreError(f"names no bucket; write {scheme}://BUCKET/PATH")
    package, extra = SCHEMES[scheme]
    try:
        import fsspec

        for library in ("s3fs", "gcsfs"):  # they log stack traces of what becomes one line here
            if (log := logging.getLogger(library)).level == logging.NOTSET:
                log.setLevel(logging.CRITICAL)
        options = {"config_kwargs": {"connect_timeout": 10}} if scheme == "s3" else {}
        store = fsspec.filesystem(scheme, **options)
    except ImportError:
        raise StoreError(f"needs the package {package}; pip install 'ttt-jax[{extra}]'") from None
    except Exception as error:  # credentials, settings: every store has errors of its own
        raise StoreError(f"cannot be opened ({reason_of(error)}); check the credentials") from None
    return store, store._strip_protocol(url)


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """An object, with what readers need of a `pathlib.Path`.

    Attributes:
      size: bytes.
      version: changes when the content does, as far as the store tells.
    """

    url: str
    size: int
    version: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return PurePosixPath(self.url).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.url).suffix

    @property
    def suffixes(self) -> list[str]:
        return PurePosixPath(self.url).suffixes

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Open it for reading; reading raises OSError. Raises OSError."""
        store, path = open_store(self.url)
        try:
            stream = store.open(path, mode, block_size=_BLOCK_BYTES)
        except Exception as error:
            raise store_error(error) from None
        return cast(IO[bytes], io.BufferedReader(_Stream(stream), _BUFFER))

    def copy_to(self, folder: Path) -> Path:
        """Copy it into a local folder, whole or not at all, unless it is there; its path there.

        For readers that map a file, or are not Python. Raises OSError.
        """
        key = hashlib.sha256(f"{self.url}\0{self.version}\0{self.size}".encode()).hexdigest()[:24]
        path = folder / f"object-{key}{self.suffix}"
        if path.is_file() and path.stat().st_size == self.size:
            return path
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with self.open() as source, partial.open("wb") as target:
                while block := source.read(_BLOCK_BYTES):
                    target.write(block)
            if partial.stat().st_size != self.size:
                raise StoreError("changed while it was read; run the same command again")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return path


class _Stream(io.RawIOBase):
    """A stream of fsspec, which raises nothing but OSError."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except Exception as error:
            raise store_error(error) from None
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def store_error(error: BaseException) -> OSError:
    """Return FileNotFoundError as it is, and everything else as a StoreError."""
    if isinstance(error, FileNotFoundError | StoreError):
        return error
    return StoreError(reason_of(error))


def list_files(url: str) -> tuple[list[tuple[str, StoredFile]], bool]:
    """List what a URL names, as the store has it now.

    Returns:
      (name below the URL, file) in the order of names, and whether the URL is a folder. Empty and a
      folder when nothing is there.

    Raises: StoreError.
    """
    store, root = open_store(url)
    scheme = url.partition("://")[0]
    try:
        store.invalidate_cache()
        found = {} if url.endswith("/") else _single(store, root)
        is_folder = not found
        found = found or store.find(root, detail=True)
    except FileNotFoundError:
        return [], True
    except Exception as error:
        raise StoreError(
            f"cannot be listed ({reason_of(error)}); check the address, the credentials and the "
            "network"
        ) from None
    files = []
    for path, info in found.items():
        name = path.removeprefix(root).lstrip("/") if is_folder else PurePosixPath(path).name
        if name and not path.endswith("/"):  # some tools write an object for a folder
            file = StoredFile(f"{scheme}://{path.lstrip('/')}", int(info["size"]), _version(info))
            files.append((name, file))
    return sorted(files, key=lambda item: walk_order(item[0])), is_folder


def _single(store: Any, path: str) -> dict[str, Any]:
    info = store.info(path)
    return {} if info["type"] == "directory" else {path: info}


def walk_order(name: str) -> list[tuple[int, str]]:
    """Sort names as a walk through local folders meets them: the files of a folder, then its
    folders.
    """
    *folders, last = name.split("/")
    return [*((1, folder) for folder in folders), (0, last)]


def _version(info: dict[str, Any]) -> str:
    return repr([(key, str(info[key])) for key in _VERSION if key in info])
