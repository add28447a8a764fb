"""Where the copy of a run lies (run_copy.py): its files, by their names from the run's folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ttt_jax.checkpoint.checksums import CHECKPOINT_FOLDER
from ttt_jax.files.stores import is_url, open_store, store_error
from ttt_jax.files.text import sync


class Place:
    """The folder of one run below `checkpoint.copy_to`. Every method raises OSError only."""

    def __init__(self, target: str, name: str) -> None:
        if is_url(target):
            self._store, root = open_store(target)
        else:
            import fsspec

            self._store = fsspec.filesystem("file", auto_mkdir=True)
            root = os.path.abspath(os.path.expanduser(target))
        self.root = f"{root.rstrip('/')}/{name}"

    def names(self, below: str = "") -> list[str]:
        """List all files below a folder of the copy, by their names from there."""
        start = f"{self.root}/{below}".rstrip("/")

        def find() -> list[str]:
            self._store.invalidate_cache()
            return self._store.find(start)

        try:
            return sorted(path[len(start) :].lstrip("/") for path in _guarded(find))
        except FileNotFoundError:
            return []

    def put(self, source: Path, name: str) -> None:
        target = f"{self.root}/{name}"
        if source.suffix == ".jsonl":  # another thread may be writing its last line
            data = source.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            _guarded(lambda: self._store.pipe_file(target, whole))
        else:
            _guarded(lambda: self._store.put_file(str(source), target))

    def put_bytes(self, data: bytes, name: str) -> None:
        _guarded(lambda: self._store.pipe_file(f"{self.root}/{name}", data))

    def get(self, name: str, target: Path) -> None:
        """Fetch a file: whole, or not at all."""
        partial = target.with_name(f".{target.name}.tmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        _guarded(lambda: self._store.get_file(f"{self.root}/{name}", str(partial)))
        sync(partial)
        os.replace(partial, target)

    def size(self, name: str) -> int:
        return int(_guarded(lambda: self._store.info(f"{self.root}/{name}"))["size"])

    def remove(self, name: str) -> None:
        _guarded(lambda: self._store.rm_file(f"{self.root}/{name}"))

    def remove_folder(self, name: str) -> None:
        def remove() -> None:
            self._store.invalidate_cache()
            self._store.rm(f"{self.root}/{name}", recursive=True)

        with contextlib.suppress(FileNotFoundError):  # of a store, when nothing is below it
            _guarded(remove)

    def steps(self) -> dict[int, list[str]]:
        """Map the numbers of steps, complete or not, to their files."""
        steps: dict[int, list[str]] = {}
        for name in self.names(CHECKPOINT_FOLDER):
            number, _, rest = name.partition("/")
            if number.isdecimal() and rest:
                steps.setdefault(int(number), []).append(rest)
        return steps


def _guarded(call: Callable[[], Any]) -> Any:
    """Call a store, whose library raises what it likes. Raises OSError only."""
    try:
        return call()
    except Exception as error:
        raise store_error(error) from None
