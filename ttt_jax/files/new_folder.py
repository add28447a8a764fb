"""A folder that appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from ttt_jax.files.text import sync, sync_tree


@contextlib.contextmanager
def new_folder(output: Path, replace: bool = False) -> Iterator[Path]:
    """Give a temporary sibling, which takes the output's place when all went well, and is removed
    otherwise.

    Args:
      replace: the output may exist, and is removed then.

    Raises: OSError.
    """
    output = output.absolute()
    parts = output.with_name(f".{output.name}.tmp-{os.getpid()}")
    old = output.with_name(f".{output.name}.old-{os.getpid()}")
    try:
        parts.mkdir(parents=True)
        yield parts
        sync_tree(parts)
        if replace and os.path.lexists(output):
            output.rename(old)
            try:
                parts.rename(output)
            except BaseException:
                old.rename(output)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            parts.rename(output)
        sync(output.parent)
    except BaseException:
        _remove(parts)
        raise


def _remove(parts: Path) -> None:
    """Remove a folder that threads may still write into: tensorstore's, behind a write that has
    failed, make it anew.
    """
    for _ in range(20):
        shutil.rmtree(parts, ignore_errors=True)
        time.sleep(0.05)
        if not os.path.lexists(parts):
            return
