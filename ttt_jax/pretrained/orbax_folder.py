"""A converted model: parameters in Orbax's format, beside what else makes it a model.

    FOLDER/ttt_jax.json            model config, tokenizer, and what restores the Hugging Face folder exactly
    FOLDER/model/                  every parameter under its dotted path, as in a checkpoint of train.py
    FOLDER/checksums.json          SHA-256 of the two above
    FOLDER/tokenizer.json, generation_config.json, ...

There is no `config.json`, so that no other tool takes the folder for a Hugging Face model. Arrays
are stacked over layers, as the model holds them, and such a stack can be larger than the host's
memory; so `OrbaxWriter` fills them chunk by chunk through tensorstore, in files that Orbax itself
has laid out, and `OrbaxTensors` reads single rows of single layers.

Letters: R repeats of a scanned pattern, N layers of a run in it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from ttt_jax.checkpoint.trees import check_chunks
from ttt_jax.config import ModelConfig, from_dict, to_dict, validate_model
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.files.reading import find_companion, inside, list_names, read_json_object, show
from ttt_jax.files.text import atomic_write_text, reason_of
from ttt_jax.model.param_path import param_path
from ttt_jax.model.transformer import Transformer
from ttt_jax.pretrained.hf_weights import tensor_names
from ttt_jax.pretrained.safetensors_io import FLOATS, TensorSpec, all_finite

DESCRIPTION = "ttt_jax.json"
MODEL = "model"
_FORMAT = "ttt_jax model 1"
# chunks cut the last axis, too: devices that hold slices of it need not each read everything
_CHUNK_COLUMNS = 8
_CHUNK_BYTES = 8 << 20
_DTYPES = {dtype.name: dtype for dtype in FLOATS.values()}

# An array's header, without what differs between arrays.
_ZARRAY = {
    "zarr_format": 2,
    "order": "C",
    "compressor": None,
    "filters": None,
    "fill_value": None,
    "dimension_separator": ".",
    "shape": [],
    "chunks": [],
    "dtype": "",
}
_ZARR_DTYPES = {
    "<f4": _DTYPES["float32"],
    "<f2": _DTYPES["float16"],
    "bfloat16": _DTYPES["bfloat16"],
}


# -------------------------------------------------------------------------------------- description


@dataclasses.dataclass(frozen=True)
class Description:
    """What `ttt_jax.json` says.

    Fields:
      model: the architecture.
      hf_config: the fields of the source's config.json, written back by a conversion to Hugging
        Face; None: there was none.
      dtypes: tensors that are stored wider than they were, with their own dtype (a stack of layers
        has one).
      tied_head: the source wrote its tied output head out as `lm_head.weight`.
      tokenizer: "bytes" for the built-in one; None: that of the folder, if it has one.
    """

    model: ModelConfig
    hf_config: dict[str, Any] | None = None
    dtypes: dict[str, str] = dataclasses.field(default_factory=dict)
    tied_head: bool = False
    tokenizer: str | None = None


def is_model_folder(folder: str | Path) -> bool:
    """Whether `ttt_jax.json` is there. Raises CheckpointError when it is a link that leaves the
    folder, or no file.
    """
    return find_companion(Path(folder), DESCRIPTION) is not None


def write_description(folder: Path, description: Description) -> None:
    fields = {
        "format": _FORMAT,
        "model": to_dict(description.model),
        "hf_config": description.hf_config,
    }
    fields |= {
        "dtypes": description.dtypes,
        "tied_head": description.tied_head,
        "tokenizer": description.tokenizer,
    }
    fields["checksums"] = True  # so that a checksums.json which is gone is noticed
    atomic_write_text(folder / DESCRIPTION, json.dumps(fields, indent=2) + "\n")


def read_description(folder: str | Path) -> Description:
    """Raises CheckpointError when `ttt_jax.json` is missing, damaged or of another version."""
    path = find_companion(Path(folder), DESCRIPTION)
    if path is None:
        raise CheckpointError(
            f"model {folder}: no {DESCRIPTION}; give a folder that ttt-jax convert --to orbax wrote"
        )
    raw = read_json_object(path, CheckpointError)
    if raw.get("format") != _FORMAT:
        found = show(str(raw.get("format")))
        raise CheckpointError(
            f"{path}: format is {found!r}, this version reads {_FORMAT!r}; convert again"
        )
    model, hf_config, dtypes = raw.get("model"), raw.get("hf_config"), raw.get("dtypes", {})
    tied_head, tokenizer = raw.get("tied_head", False), raw.get("tokenizer")
    if (
        not isinstance(model, dict)
        or not isinstance(hf_config, dict | None)
        or not isinstance(tied_head, bool)
    ):
        raise CheckpointError(f"{path}: damaged (model, hf_config or tied_head); convert again")
    if not isinstance(dtypes, dict) or not all(
        dtype in _DTYPES for dtype in map(str, dtypes.values())
    ):
        raise CheckpointError(f"{path}: damaged (dtypes); convert again")
    if tokenizer not in (None, "bytes"):
        raise CheckpointError(f"{path}: damaged (tokenizer); convert again")
    try:
        config = from_dict(ModelConfig, model)
        validate_model(config)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from None
    return Description(config, hf_config, dtypes, tied_head, tokenizer)


def check_layout(folder: Path, abstract: Transformer) -> None:
    """Every file of `folder/model` is there, of its exact size, and says what this module writes.

    Called before Orbax or tensorstore sees the folder: they trust array headers, and damaged ones
    have crashed the process.

    Args:
      abstract: the structure of the model that the folder's description names.

    Raises: CheckpointError naming the file, or listing the parameters that are missing, unknown or
    of the wrong shape.
    """
    model = folder / MODEL
    leaves = {
        param_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]
    }
    try:
        metadata = read_json_object(inside(model, "_METADATA"), CheckpointError)
        tree = metadata.get("tree_metadata")
        expected = {str((name,)): [{"key": name, "key_type": 2}] for name in leaves}
        known = metadata.get("use_ocdbt") is False and metadata.get("use_zarr3") is False
        known = (
            known
            and isinstance(tree, dict)
            and all(_is_array(value, expected.get(key)) for key, value in tree.items())
        )
        if not known or not isinstance(tree, dict):
            raise CheckpointError(
                f"{model / '_METADATA'}: not as ttt-jax convert writes it; convert again"
            )
        problems = [f"missing {name}" for name in leaves if str((name,)) not in tree]
        problems += [f"unknown {show(key)}" for key in tree if key not in expected]
        headers = {
            name: _read_array_header(model / name) for name in leaves if str((name,)) in tree
        }
        for name, header in headers.items():
            if header["shape"] != list(leaves[name].shape):
                problems.append(
                    f"wrong shape {name} {tuple(header['shape'])} (expected "
                    f"{tuple(leaves[name].shape)})"
                )
        if problems:
            raise CheckpointError(
                f"model {folder}: its parameters do not fit its description: "
                f"{list_names(sorted(problems))}"
            )
        for name, header in headers.items():
            nbytes = math.prod(header["chunks"]) * _ZARR_DTYPES[header["dtype"]].itemsize
            counts = [
                math.ceil(size / part)
                for size, part in zip(header["shape"], header["chunks"], strict=True)
            ]
            for index in np.ndindex(*counts):
                path = model / name / ".".join(map(str, index))
                if path.is_symlink():
                    inside(model, path.relative_to(model).as_posix())
                if not path.is_file() or path.stat().st_size != nbytes:
                    raise CheckpointError(
                        f"{path}: missing, or not of {nbytes} bytes; convert again"
                    )
    except OSError as error:
        raise CheckpointError(f"model {folder}: could not be read ({error.strerror})") from None


def _is_array(value: Any, key: list[dict[str, Any]] | None) -> bool:
    about = value.get("value_metadata") if isinstance(value, dict) else None
    if not isinstance(about, dict) or about.get("skip_deserialize", False) is not False:
        return False
    return key is None or value.get("key_metadata") == key


def _read_array_header(folder: Path) -> dict[str, Any]:
    path = inside(folder, ".zarray")
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; convert again")
    header = read_json_object(path, CheckpointError)
    right = (
        header | {"shape": [], "chunks": [], "dtype": ""} == _ZARRAY
        and str(header.get("dtype")) in _ZARR_DTYPES
    )
    shape, chunks = _sizes(header.get("shape")), _sizes(header.get("chunks"))
    if (
        not right
        or not shape
        or len(chunks) != len(shape)
        or any(a > b for a, b in zip(chunks, shape, strict=True))
    ):
        raise CheckpointError(f"{path}: not as ttt-jax convert writes it; convert again")
    return header


def _sizes(value: Any) -> list[int]:
    """A list of positive sizes, or the empty list for anything else."""
    right = isinstance(value, list) and all(
        type(size) is int and 0 < size < 1 << 48 for size in value
    )
    return value if right else []


# ------------------------------------------------------------------------------------------- places


def _places(abstract: Transformer) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> (parameter path, index in its stack)."""
    places = {}
    leaves = {
        param_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]
    }
    for ours, theirs in tensor_names(abstract).items():
        N = leaves[ours].shape[1] if ours.startswith("groups.") else 0
        for i, name in enumerate(theirs):
            places[name] = (ours, (i // N, i % N) if N else ())
    return places


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
        """
        self._places = _places(abstract)
        leaves = {
            param_path(path): leaf
            for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]
        }
        stored = {self._places[name][0]: dtype for name, dtype in dtypes.items()}
        try:
            self._arrays = self._lay_out(folder, leaves, stored, block_bytes)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"output {folder}: could not be written ({reason_of(error)})"
            ) from None

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
        # tensorstore's is a ValueError, for instance when the disk is full
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"output: tensor {name} could not be written ({reason_of(error)}); free space"
            ) from None


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
        self._places = _places(abstract)
        leaves = {
            param_path(path): leaf
            for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]
        }
        problems = [f"missing {name}" for name in leaves if name not in self._stored]
        problems += [f"unknown {show(name)}" for name in self._stored if name not in leaves]
        for name in leaves.keys() & self._stored.keys():
            found, wanted = tuple(self._stored[name].shape), tuple(leaves[name].shape)
            if found != wanted:
                problems.append(f"wrong shape {name} {found} (expected {wanted})")
        if problems:
            listed = list_names(sorted(problems))
            raise CheckpointError(
                f"checkpoint {checkpoint}: its parameters do not fit its config: {listed}"
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
            return _DTYPES[self._dtypes[name]]
        stored = np.dtype(self._stored[self._places[self._head.get(name, name)][0]].dtype)
        return stored if stored in _DTYPES.values() else None

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
        """A good size of what is read at once: the chunks that hold one row, at most."""
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
                # a chunk that is gone is an error, not zeros
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


def tensor_spec(source: Any, name: str, dtype: str | None) -> TensorSpec:
    """Name, shape and dtype of a tensor of a source once it is cast to `dtype` (None: as it is)."""
    return TensorSpec(
        name, source.shape(name), np.dtype(_DTYPES[dtype]) if dtype else source.dtype(name)
    )
