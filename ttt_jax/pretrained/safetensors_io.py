"""Safetensors, read and written piece by piece; nothing in a file is trusted, and nothing is ever
unpickled.

The header of a file is parsed and checked completely (sizes against the file's length) before any
tensor is read, so a damaged or hostile file costs an error and no memory. Tensors are read with
plain reads instead of a memory map: mapped pages stay resident as long as the map does, so a
folder's peak would be the folder. Nothing here imports jax.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from ttt_jax.checkpoint.checksums import CHECKSUMS, compare_files
from ttt_jax.errors import CheckpointError
from ttt_jax.files.reading import inside, list_names, read_json_object, show
from ttt_jax.files.text import one_line

WHOLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_NOTE = "ttt_jax_checksums"  # in the metadata of a file: the name of what holds its checksum
MAX_HEADER_BYTES = 25_000_000  # 70B models have 0.1 MB
_SIZES = {
    1: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"),
    2: ("U16", "I16"),
    4: ("U32", "I32"),
    8: ("U64", "I64"),
}
_ITEM_BYTES = {name: size for size, names in _SIZES.items() for name in names}
FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_ITEM_BYTES |= {name: dtype.itemsize for name, dtype in FLOATS.items()}
_CODES = {dtype: name for name, dtype in FLOATS.items()}
DTYPES = {dtype.name: dtype for dtype in FLOATS.values()}  # by numpy's names


class TensorSource(Protocol):
    """Where tensors come from, under their Hugging Face names: a folder of safetensors, or an Orbax
    checkpoint.
    """

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype | None:
        """Return the dtype; None when the tensor is not made of floats."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read rows `start:stop` of the first axis. Raises CheckpointError when they cannot be read
        or are not finite.
        """
        ...


def row_blocks(shape: tuple[int, ...], itemsize: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) along the first axis, of at most `max_bytes` each (but of one row at
    least).
    """
    row = max(1, math.prod(shape[1:]) * itemsize)
    step = max(1, max_bytes // row)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


class _Entry(NamedTuple):
    path: Path
    code: str
    shape: tuple[int, ...]
    offset: int  # in the file
    nbytes: int


class TensorFiles:
    """The safetensors of a folder, sharded or not, as a `TensorSource`. Files are open only while
    they are read.
    """

    def __init__(self, folder: str | Path):
        """Read and check every header, and compare the files with their checksums if this project
        wrote them.

        Raises: CheckpointError naming the file and what is wrong with it.
        """
        self.folder = Path(folder)
        self.largest_file = 0
        self._entries: dict[str, _Entry] = {}
        promised = False
        for name, listed in _shards(self.folder).items():
            path = inside(self.folder, name)
            if not path.is_file():
                raise CheckpointError(
                    f"checkpoint {folder}: {name} is missing (only safetensors are read, never "
                    "pickles)"
                )
            entries, says_so = _read_header(path)
            promised = promised or says_so
            for tensor, entry in entries.items():
                if tensor in self._entries:
                    raise CheckpointError(
                        f"checkpoint {folder}: tensor {show(tensor)} is in two files"
                    )
                self._entries[tensor] = entry
                listed.discard(tensor)
            if listed:
                raise CheckpointError(
                    f"{self.folder / INDEX_FILE}: {name} does not hold {list_names(sorted(listed))}"
                )
            self.largest_file = max(self.largest_file, path.stat().st_size)
        _compare(self.folder, promised)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype | None:
        return FLOATS.get(self._entries[name].code)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        entry, dtype = self._entries[name], self.dtype(name)
        if dtype is None:
            raise CheckpointError(
                f"{entry.path}: tensor {show(name)} has dtype {entry.code}; give an unquantised "
                "checkpoint"
            )
        shape, offset = entry.shape, entry.offset
        if shape:
            start, stop, _ = slice(start, stop).indices(shape[0])
            offset += start * math.prod(shape[1:]) * dtype.itemsize
            shape = (max(0, stop - start), *shape[1:])
        array = np.empty(shape, dtype)
        _read_into(entry.path, offset, array)
        if not all_finite(array):
            raise CheckpointError(
                f"{entry.path}: tensor {show(name)} holds NaN or infinity; the checkpoint is broken"
            )
        return array


def all_finite(array: np.ndarray) -> bool:
    flat, block = array.reshape(-1), 1 << 18  # in blocks: the temporaries stay small
    for start in range(0, flat.size, block):
        part = flat[start : start + block]
        # All exponent bits are set; several times faster than isfinite.
        if part.dtype == FLOATS["BF16"]:
            bad = bool(((part.view(np.uint16) & 0x7F80) == 0x7F80).any())
        else:
            bad = not np.isfinite(part).all()
        if bad:
            return False
    return True


def tensor_file_names(folder: Path) -> list[str]:
    """Return the names of what `write_tensors` wrote: safetensors and their index."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix == ".safetensors" or path.name == INDEX_FILE
    )


# ------------------------------------------------------------------------------------------ reading


def _compare(folder: Path, promised: bool) -> None:
    """Compare with `checksums.json`; a file of that name that the tensors do not speak of may be of
    another tool.

    Raises: CheckpointError.
    """
    wrong = None
    if promised and not (folder / CHECKSUMS).exists():
        wrong = f"{CHECKSUMS}: missing"
    elif promised:
        wrong = compare_files(folder)
    if wrong:
        raise CheckpointError(
            f"checkpoint {folder}: damaged ({wrong}); restore the file, or convert the original "
            "again"
        )


def _shards(folder: Path) -> dict[str, set[str]]:
    """Read file name -> the tensors that the index says it holds."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return {WHOLE_FILE: set()}
    try:
        weight_map = read_json_object(inside(folder, INDEX_FILE), CheckpointError).get("weight_map")
    except CheckpointError as error:
        raise CheckpointError(f"{error} (not a safetensors index)") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: not a safetensors index: no weight_map")
    shards: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
            or "\0" in name
        ):
            raise CheckpointError(
                f"{index}: shard {show(str(name))!r} is not a plain file name ending in "
                ".safetensors"
            )
        shards.setdefault(name, set()).add(tensor)
    if WHOLE_FILE not in shards and (folder / WHOLE_FILE).exists():
        # transformers reads the file, vLLM the shards.
        raise CheckpointError(
            f"checkpoint {folder}: holds {WHOLE_FILE}, and {INDEX_FILE} that lists other files: "
            "two models; delete what is not meant"
        )
    return dict(sorted(shards.items()))


def _read_header(path: Path) -> tuple[dict[str, _Entry], bool]:
    """Read the tensors of a file, and whether it says that checksums were written beside it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _broken(path, f"its header claims {length} bytes, the file has {size}")
            text = file.read(length)
    except OSError as error:
        raise _broken(path, error.strerror or "input/output error") from None
    try:
        header = json.loads(
            text.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(path, pairs)
        )
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _broken(path, f"its header is not JSON: {one_line(error, 120, end='')}") from None
    if not isinstance(header, dict):
        raise _broken(path, "its header is not an object")
    about = header.pop("__metadata__", None)
    promised = isinstance(about, dict) and about.get(_NOTE) == CHECKSUMS
    entries = {name: _entry(path, name, fields, 8 + length) for name, fields in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise _broken(
                path, f"tensor {show(name)} begins at byte {entry.offset}, expected {end}"
            )
        end += entry.nbytes
    if end != size:
        raise _broken(path, f"its tensors end at byte {end}, the file at {size}")
    return entries, promised


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _broken(path, f"{show(name)} is listed twice in its header")
    return result


def _entry(path: Path, name: str, fields: Any, base: int) -> _Entry:
    def whole(values: Any, count: int | None = None) -> bool:
        right = isinstance(values, list) and (count is None or len(values) == count)
        return right and all(type(value) is int and 0 <= value < 1 << 62 for value in values)

    if (
        not isinstance(fields, dict)
        or not whole(fields.get("shape"))
        or not whole(fields.get("data_offsets"), 2)
    ):
        raise _broken(path, f"tensor {show(name)} has no valid shape and data_offsets")
    code, shape, (begin, end) = fields.get("dtype"), tuple(fields["shape"]), fields["data_offsets"]
    if not isinstance(code, str) or code not in _ITEM_BYTES:
        raise _broken(path, f"tensor {show(name)} has the unknown dtype {show(str(code))!r}")
    if len(shape) > 32 or end - begin != math.prod(shape) * _ITEM_BYTES[code]:
        raise _broken(
            path, f"tensor {show(name)} has {end - begin} bytes, which is not its shape in {code}"
        )
    return _Entry(path, code, shape, base + begin, end - begin)


def _broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: not a readable safetensors file: {reason}; fetch the file again"
    )


def _read_into(path: Path, offset: int, array: np.ndarray) -> None:
    view = array.reshape(-1).view(np.uint8).data
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while view:
                count = file.readinto(view)
                if not count:
                    raise _broken(path, "it became shorter while it was read")
                view = view[count:]
    except OSError as error:
        raise _broken(path, error.strerror or "input/output error") from None


# ------------------------------------------------------------------------------------------ writing


class TensorSpec(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    folder: Path,
    specs: Sequence[TensorSpec],
    blocks: Callable[[TensorSpec], Iterator[np.ndarray]],
    max_shard_bytes: int,
) -> None:
    """Write `model.safetensors`, or shards of at most `max_shard_bytes` (one tensor at least) with
    their index.

    Headers are written first, from the specs, so that no more than one block is held at a time.
    They say that there are checksums, which the caller writes when everything else is there.

    Args:
      blocks: the rows of a tensor in order, in the spec's dtype.
    """
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    count, weight_map = len(shards), {}
    for i, shard in enumerate(shards, start=1):
        name = WHOLE_FILE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
        # Wide ones first, so that all are aligned.
        _write_file(folder / name, sorted(shard, key=lambda spec: -spec.dtype.itemsize), blocks)
        weight_map |= {spec.name: name for spec in shard}
    if count > 1:
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in specs)},
            "weight_map": weight_map,
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(
    path: Path, specs: list[TensorSpec], blocks: Callable[[TensorSpec], Iterator[np.ndarray]]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _NOTE: CHECKSUMS}}
    end = 0
    for spec in specs:
        offsets = [end, end := end + spec.nbytes]
        header[spec.name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        _write_all(file, len(text).to_bytes(8, "little") + text)
        for spec in specs:
            written = 0
            for block in blocks(spec):
                assert block.dtype == spec.dtype, (spec, block.dtype)
                _write_all(file, np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
                written += block.nbytes
            assert written == spec.nbytes, spec
        os.fsync(file.fileno())


def _write_all(file: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
