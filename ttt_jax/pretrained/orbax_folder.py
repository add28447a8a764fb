"""The parameters of a converted model in Orbax's format, read and written piece by piece.

Arrays are stacked over layers, as the model holds them, and such a stack can be larger than the
host's memory; so `OrbaxWriter` fills them chunk by chunk through tensorstore, in files that Orbax
itself has laid out, and `OrbaxTensors` reads single rows of single layers. What else is in the
folder is said in orbax_layout.py.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from ttt_jax.checkpoint.trees import check_chunks
from ttt_jax.errors import CheckpointError
from ttt_jax.files.reading import list_names
from ttt_jax.files.text import reason_of
from ttt_jax.model.transformer import Transformer
from ttt_jax.pretrained.hf_weights import parameters, tensor_places
from ttt_jax.pretrained.orbax_layout import MODEL, misfits
from ttt_jax.pretrained.safetensors_io import DTYPES, all_finite

# Chunks cut the last axis, too: devices that hold slices of it need not each read everything.
_CHUNK_COLUMNS = 8
_CHUNK_BYTES = 8 << 20


def _context(cache_bytes: int = 0) -> ts.Context:
    # One copy at a time: each one in flight holds its chunk.
    limits = {
        "data_copy_concurrency": {"limit": 1},
        "file_io_concurrency": {"limit": 2},
        "file_io_sync": False,
    }
    return ts.Context(limits | {"cache_pool": {"total_bytes_limit": cache_bytes}})


# ------------------------------------------------------------------------------------------ writing


class OrbaxWriter:
    """Writes `folder/model`, some rows at a time; each call is done before it returns."""

    def __init__(
        self, folder: Path, abstract: Transformer, dtypes: dict[str, np.dtype], block_bytes: int
    ):
        """Lays out every array.

        Args:
          abstract: the model's structure.
          dtypes: tensor name -> dtype to store; one for all tensors of a stack.
          block_bytes: about what one `write` will bring.

        Raises: OSError, as `write` does.
        """
        self._places = tensor_places(abstract)
        leaves = parameters(abstract)
        stored = {self._places[name][0]: dtype for name, dtype in dtypes.items()}
        try:
            self._arrays = self._lay_out(folder, leaves, stored, block_bytes)
        except (OSError, ValueError) as error:
            raise _not_written(error) from None

    @staticmethod
    def _lay_out(
        folder: Path, leaves: dict[str, Any], stored: dict[str, np.dtype], block_bytes: int
    ) -> dict[str, Any]:
        # Orbax writes the tree, its metadata and the commit marks around placeholders; the arrays
        # then take their places.
        placeholders = {
            ours: np.zeros((1,) * leaf.ndim, stored[ours]) for ours, leaf in leaves.items()
        }
        # Plain files: with OCDBT every commit would rewrite its index.
        logger = logging.getLogger("absl")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it would warn that there is no OCDBT index to merge
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as writer:
                writer.save((folder / MODEL).absolute(), args=ocp.args.PyTreeSave(placeholders))
        finally:
            logger.setLevel(level)
        arrays, context = {}, _context()
        for ours, leaf in leaves.items():
            chunk = _chunk_shape(
                leaf.shape,
                2 if ours.startswith("groups.") else 0,
                stored[ours].itemsize,
                block_bytes,
            )
            arrays[ours] = ts.open(
                {
                    "driver": "zarr",
                    "kvstore": _kvstore(folder / MODEL, ours),
                    # Weights hardly compress.
                    "metadata": {"shape": list(leaf.shape), "chunks": chunk, "compressor": None},
                },
                dtype=_ts_dtype(stored[ours]),
                create=True,
                delete_existing=True,
                context=context,
            ).result()
        return arrays

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        ours, index = self._places[name]
        try:
            target = self._arrays[ours][(*index, slice(start, start + rows.shape[0]))]
            target.write(rows, can_reference_source_data_indefinitely=True).result()
        except (OSError, ValueError) as error:
            raise _not_written(error) from None


def _not_written(error: Exception) -> OSError:
    """Make of tensorstore's ValueError what it is, without its paths and settings where that is a
    full disk.
    """
    full = os.strerror(errno.ENOSPC)
    return OSError(errno.ENOSPC, full) if full in str(error) else OSError(reason_of(error))


def _chunk_shape(
    shape: tuple[int, ...], stack_axes: int, itemsize: int, block_bytes: int
) -> list[int]:
    tensor = shape[stack_axes:]
    if len(tensor) == 1:
        return [1] * stack_axes + list(tensor)
    columns = tensor[-1]
    if columns % _CHUNK_COLUMNS == 0 and columns >= 128 * _CHUNK_COLUMNS:
        columns //= _CHUNK_COLUMNS
    limit = min(_CHUNK_BYTES, max(1, block_bytes * columns // tensor[-1]))
    rows = max(1, min(tensor[0], limit // (math.prod(tensor[1:-1]) * columns * itemsize)))
    return [1] * stack_axes + [rows, *tensor[1:-1], columns]


def _kvstore(model: Path, parameter: str) -> dict[str, Any]:
    if (model / "manifest.ocdbt").is_file():
        return {"driver": "ocdbt", "base": f"file://{model.absolute()}/", "path": f"{parameter}/"}
    return {"driver": "file", "path": f"{model.absolute()}/{parameter}/"}


def _ts_dtype(dtype: np.dtype) -> ts.dtype:
    return ts.bfloat16 if dtype == np.dtype(ml_dtypes.bfloat16) else ts.dtype(dtype)


# ------------------------------------------------------------------------------------------ reading


class OrbaxTensors:
    """The parameters of an Orbax checkpoint under their Hugging Face names, as a `TensorSource`.

    Memory: what is read at once, and the stored chunks that a row lies in (64 MiB at most as this
    version writes them).
    """

    def __init__(
        self,
        checkpoint: Path,
        abstract: Transformer,
        dtypes: dict[str, str] | None = None,
        tied_head: bool = False,
    ):
        """Opens `checkpoint/model`.

        Args:
          abstract: the structure of the model that the checkpoint's config describes.
          dtypes, tied_head: see `Description`.

        Raises: CheckpointError when it cannot be read or holds other parameters than the model.
        """
        self.checkpoint = checkpoint
        self._dtypes = dtypes or {}
        self._open: tuple[str, Any] | None = None
        try:
            self._stored = dict(
                ocp.PyTreeCheckpointHandler().metadata(epath.Path(checkpoint / MODEL)).tree
            )
            metadata = json.loads((checkpoint / MODEL / "_METADATA").read_text(encoding="utf-8"))
            self._driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
            check_chunks(self._stored)
        except Exception as error:  # damaged JSON surfaces in many ways
            raise self._damaged(error) from None
        self._places = tensor_places(abstract)
        wanted = parameters(abstract)
        found = {
            name: tuple(array.shape) if name in wanted else ()
            for name, array in self._stored.items()
        }
        problems = misfits(found, wanted)
        if problems:
            raise CheckpointError(
                f"checkpoint {checkpoint}: its parameters do not fit its config: "
                f"{list_names(problems)}"
            )
        self._head = (
            {"lm_head.weight": "model.embed_tokens.weight"}
            if tied_head and abstract.head is None
            else {}
        )

    def __iter__(self) -> Iterator[str]:
        return iter([*self._places, *self._head])

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._head

    def shape(self, name: str) -> tuple[int, ...]:
        ours, index = self._places[self._head.get(name, name)]
        return tuple(self._stored[ours].shape[len(index) :])

    def dtype(self, name: str) -> np.dtype | None:
        if name in self._dtypes:
            return DTYPES[self._dtypes[name]]
        stored = np.dtype(self._stored[self._places[self._head.get(name, name)][0]].dtype)
        return stored if stored in DTYPES.values() else None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        ours, index = self._places[self._head.get(name, name)]
        start, stop, _ = slice(start, stop).indices(self.shape(name)[0])
        dtype = self.dtype(name)
        try:
            rows = np.asarray(self._array(ours)[(*index, slice(start, stop))].read().result())
        except (OSError, ValueError) as error:
            raise self._damaged(error) from None
        if not all_finite(rows):
            raise CheckpointError(
                f"checkpoint {self.checkpoint}: parameter {ours} holds NaN or infinity"
            )
        return rows if dtype is None else rows.astype(dtype, copy=False)

    @property
    def block_bytes(self) -> int:
        """Return a good size of what is read at once: the chunks that hold one row, at most."""
        return max((self._band_bytes(ours) for ours in self._stored), default=0)

    def _band_bytes(self, ours: str) -> int:
        stored = self._stored[ours]
        shape, storage = tuple(stored.shape), stored.storage
        chunk = (
            shape
            if storage is None or storage.chunk_shape is None
            else tuple(size or 1 for size in storage.chunk_shape)
        )
        row_axis = 2 if ours.startswith("groups.") else 0
        across = (
            math.ceil(size / part)
            for size, part in zip(shape[row_axis + 1 :], chunk[row_axis + 1 :], strict=True)
        )
        return math.prod(chunk) * math.prod(across) * np.dtype(stored.dtype).itemsize

    def _array(self, ours: str) -> Any:
        # One array is open at a time. Its cache holds the chunks that several blocks (or, in old
        # runs, layers) share.
        if self._open is None or self._open[0] != ours:
            self._open = None
            spec: dict[str, Any] = {
                "driver": self._driver,
                "kvstore": _kvstore(self.checkpoint / MODEL, ours),
            }
            if self._driver == "zarr":
                # A chunk that is gone is an error, not zeros.
                spec["fill_missing_data_reads"] = False
            self._open = (
                ours,
                ts.open(spec, open=True, context=_context(self._band_bytes(ours))).result(),
            )
        return self._open[1]

    def _damaged(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self.checkpoint}: incomplete or damaged ({reason_of(error)})"
        )
