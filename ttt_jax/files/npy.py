"""`.npy` files: read without unpickling, and with one kind of error for all that can be wrong with
them.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from ttt_jax.files.text import reason_of


def map_npy(path: str | Path) -> np.ndarray:
    """Map the array of a file. Raises ValueError, one line, when it is not the `.npy` file of a
    plain array.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    # numpy parses the header as Python literals: damaged ones surface in many ways.
    except Exception as error:
        raise ValueError(reason_of(error)) from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError("an .npz archive; save one array with numpy.save")
    return array


def parse_npy(data: bytes) -> np.ndarray:
    """Read the array in `data`. Raises ValueError, one line."""
    try:
        stream = io.BytesIO(data)
        version = np.lib.format.read_magic(stream)
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read_header(stream)
        # Before it is allocated: a header may claim any size.
        if int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize > len(data):
            raise ValueError(f"its header claims the shape {list(shape)}, it has {len(data)} bytes")
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:
        raise ValueError(reason_of(error)) from None
