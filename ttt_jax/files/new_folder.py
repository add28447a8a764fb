"""A folder that appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
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
        shutil.rmtree(parts, ignore_errors=True)
        raise
