"""Tokenised text: in memory while it is small, otherwise in the cache folder, from which later runs
map it.
"""

from __future__ import annotations

import contextlib
import fcntl
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from ttt_jax.data.digests import digest_array
from ttt_jax.errors import DataError
from ttt_jax.files.npy import map_npy
from ttt_jax.files.text import cache_folder

# Bytes of tokens kept in memory; grain copies them into every worker process.
MEMORY_LIMIT = 64 << 20
_PARTIAL = "partial-"  # how the names of unfinished files begin
_STALE = 86_400.0  # seconds after which an unfinished file that cannot be locked is nobody's


class TokenArray:
    """A flat integer array in memory, or mapped from a file, which worker processes then open again
    by its path.

    Args:
      array: the array, when it is in memory.
      path: the file otherwise; `.npy`, or raw numbers of `dtype` when that is given.
    """

    def __init__(
        self, array: np.ndarray | None = None, *, path: Path | None = None, dtype: str | None = None
    ) -> None:
        self._array, self._path, self._dtype = array, path, dtype
        self._bytes = 0  # of the file when it was mapped

    def read(self, start: int, length: int) -> np.ndarray:
        """Return tokens `start` to `start + length`; a view where they are mapped.

        Raises: DataError naming the file when it has vanished or become shorter since it was
        opened.
        """
        array = self._open() if self._array is None else self._array
        if self._path is not None:
            # Touching a page behind the end of a file kills the process, so its length is asked for
            # before each read.
            size = self._bytes
            # A file that was removed stays whole where it is mapped.
            with contextlib.suppress(FileNotFoundError):
                size = self._path.stat().st_size
            if size < self._bytes or start + length > len(array):
                raise DataError(
                    f"data file {self._path}: became shorter during the run; restore it and run "
                    "the same command again"
                )
        return array[start : start + length]

    def _open(self) -> np.ndarray:
        assert self._path is not None
        try:
            self._bytes = self._path.stat().st_size
            if self._dtype is None:
                self._array = map_npy(self._path).reshape(-1)
            else:
                self._array = np.memmap(self._path, dtype=self._dtype, mode="r")
        except (OSError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise DataError(
                f"data file {self._path}: vanished or cut short during the run ({reason}); "
                "restore it"
            ) from None
        return self._array

    def __getstate__(self) -> dict[str, Any]:
        array = self._array if self._path is None else None
        return {"_array": array, "_path": self._path, "_dtype": self._dtype, "_bytes": 0}


class TokenWriter:
    """Collects documents in memory, and moves them to a file in the cache folder once they exceed
    `MEMORY_LIMIT`.

    A context manager: leaving it without `finish` removes the unfinished file.

    Args:
      key: what `load_cached` will find the result by.
      dtype: of the stored ids.
    """

    def __init__(self, key: str, dtype: np.dtype) -> None:
        self._key, self._dtype = key, dtype
        self._blocks: list[np.ndarray] = []
        self._pending = 0
        self._file: IO[bytes] | None = None

    def append(self, ids: np.ndarray, end: list[int]) -> None:
        """Add a document: `ids`, integers `[length]`, then `end`."""
        block = np.empty(len(ids) + len(end), self._dtype)
        block[: len(ids)], block[len(ids) :] = ids, end
        self._blocks.append(block)
        self._pending += block.nbytes
        if self._pending > MEMORY_LIMIT:
            self._spill()

    def finish(self, length_N: np.ndarray, **columns: Any) -> TokenArray:
        """Return all tokens; the documents' lengths and the other arrays are kept beside them when
        they went to a file.

        Raises: DataError, one line, when the cache folder takes no more.
        """
        if self._file is None:
            return TokenArray(np.concatenate([np.empty(0, self._dtype), *self._blocks]))
        self._spill()
        tokens, index = _paths(self._key)
        partial = Path(self._file.name)
        try:
            self._file.flush()
            tokens_N = np.memmap(partial, dtype=self._dtype, mode="r")
            np.savez(
                _index_of(partial),
                length_N=length_N,
                tokens_digest=np.uint64(digest_array(tokens_N)),
                **columns,
            )
            partial.replace(tokens)
            _index_of(partial).replace(
                index
            )  # last and atomically: its presence says that the tokens are complete
        except OSError as error:
            raise _not_written(error) from None
        self._file.close()
        return TokenArray(path=tokens, dtype=self._dtype.str)

    def _spill(self) -> None:
        try:
            if self._file is None:
                cache_folder().mkdir(parents=True, exist_ok=True)
                remove_partial()
                self._file = _create_partial()
                _lock(self._file)
            for block in self._blocks:
                self._file.write(block.data)
        except OSError as error:
            raise _not_written(error) from None
        self._blocks, self._pending = [], 0

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(
                OSError
            ):  # closing writes what waits, and the disk may be full
                self._file.close()
            for path in (Path(self._file.name), _index_of(Path(self._file.name))):
                path.unlink(missing_ok=True)


def _create_partial() -> IO[bytes]:
    return tempfile.NamedTemporaryFile(dir=cache_folder(), prefix=_PARTIAL, delete=False)


def remove_partial() -> None:
    """Remove the files that writers have left which were killed. A writer holds a lock on its file
    while it lives.
    """
    for path in cache_folder().glob(f"{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            if path.suffix == ".npz":  # nobody locks it, but it is complete within seconds
                if time.time() - path.stat().st_mtime > _STALE:
                    path.unlink()
                continue
            with path.open("rb") as file:
                if _lock(file) or time.time() - path.stat().st_mtime > _STALE:
                    path.unlink()


def _lock(file: IO[bytes]) -> bool:
    """Lock a file until it is closed; whether that was possible."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another one has it, or this file system has no locks
        return False
    return True


def _index_of(partial: Path) -> Path:
    return partial.with_name(partial.name + ".npz")


def _not_written(error: OSError) -> DataError:
    return DataError(
        f"cache folder {cache_folder()}: cannot write tokenised text there ({error.strerror}); "
        "free some space, or name another folder in the environment variable TTT_JAX_CACHE"
    )


def load_cached(key: str, dtype: np.dtype) -> tuple[TokenArray, dict[str, np.ndarray]] | None:
    """Return what `TokenWriter` kept under `key`: tokens and the other arrays; None when nothing
    complete and unchanged is there.
    """
    tokens, index = _paths(key)
    try:
        # numpy does not close a damaged file.
        with index.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            arrays = dict(saved)
        if tokens.stat().st_size != int(arrays["length_N"].sum()) * dtype.itemsize:
            return None
        if digest_array(np.memmap(tokens, dtype=dtype, mode="r")) != int(
            arrays.pop("tokens_digest")
        ):
            return None
    except Exception:  # absent, or damaged in one of zip's and numpy's many ways: built again
        return None
    return TokenArray(path=tokens, dtype=dtype.str), arrays


def _paths(key: str) -> tuple[Path, Path]:
    return cache_folder() / f"tokens-{key}.bin", cache_folder() / f"tokens-{key}.npz"
