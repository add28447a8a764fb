"""What a converted model's folder holds, and whether it is whole.

    FOLDER/ttt_jax.json            model config, tokenizer, and what restores the Hugging Face
                                   folder exactly
    FOLDER/model/                  every parameter under its dotted path, as in a checkpoint of
                                   train.py (orbax_folder.py)
    FOLDER/checksums.json          SHA-256 of the two above
    FOLDER/tokenizer.json, generation_config.json, ...

There is no `config.json`, so that no other tool takes the folder for a Hugging Face model.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ttt_jax.config import ModelConfig, from_dict, to_dict, validate_model
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.files.reading import find_companion, inside, list_names, read_json_object, show
from ttt_jax.files.text import atomic_write_text
from ttt_jax.model.transformer import Transformer
from ttt_jax.pretrained.hf_weights import parameters
from ttt_jax.pretrained.safetensors_io import DTYPES

DESCRIPTION = "ttt_jax.json"
MODEL = "model"
_FORMAT = "ttt_jax model 1"

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
_ZARR_DTYPES = {"<f4": DTYPES["float32"], "<f2": DTYPES["float16"], "bfloat16": DTYPES["bfloat16"]}


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
    """Tell whether `ttt_jax.json` is there. Raises CheckpointError when it is a link that leaves
    the folder, or no file.
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
    """Read `ttt_jax.json`. Raises CheckpointError when `ttt_jax.json` is missing, damaged or of
    another version.
    """
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
        dtype in DTYPES for dtype in map(str, dtypes.values())
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


# ------------------------------------------------------------------------------------------- layout


def check_layout(folder: Path, abstract: Transformer) -> None:
    """Check that every file of `folder/model` is there, of its exact size, and says what
    orbax_folder.py writes.

    Called before Orbax or tensorstore sees the folder: they trust array headers, and damaged ones
    have crashed the process.

    Args:
      abstract: the structure of the model that the folder's description names.

    Raises: CheckpointError naming the file, or listing the parameters that are missing, unknown or
    of the wrong shape.
    """
    model, leaves = folder / MODEL, parameters(abstract)
    try:
        keys = _read_keys(model, list(leaves)).keys()
        names = {str((name,)): name for name in leaves}
        headers = {
            name: _read_array_header(model / name) for key, name in names.items() if key in keys
        }
        found = {name: tuple(header["shape"]) for name, header in headers.items()}
        problems = misfits(found, leaves) + [f"unknown {show(key)}" for key in keys - names.keys()]
        if problems:
            raise CheckpointError(
                f"model {folder}: its parameters do not fit its description: "
                f"{list_names(sorted(problems))}"
            )
        for name, header in headers.items():
            _check_chunks(model, name, header)
    except OSError as error:
        raise CheckpointError(f"model {folder}: could not be read ({error.strerror})") from None


def misfits(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Any]) -> list[str]:
    """List the parameters that are missing, unknown or of the wrong shape.

    Args:
      found: parameter path -> shape.
      wanted: parameter path -> what has the right shape.
    """
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unknown {show(name)}" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        shape = tuple(wanted[name].shape)
        if found[name] != shape:
            problems.append(f"wrong shape {name} {found[name]} (expected {shape})")
    return sorted(problems)


def _read_keys(model: Path, names: list[str]) -> dict[str, Any]:
    """Read Orbax's list of parameters: key -> what it says about it. Raises CheckpointError."""
    metadata = read_json_object(inside(model, "_METADATA"), CheckpointError)
    tree = metadata.get("tree_metadata")
    expected = {str((name,)): [{"key": name, "key_type": 2}] for name in names}
    known = metadata.get("use_ocdbt") is False and metadata.get("use_zarr3") is False
    if (
        not known
        or not isinstance(tree, dict)
        or not all(_is_array(value, expected.get(key)) for key, value in tree.items())
    ):
        raise CheckpointError(
            f"{model / '_METADATA'}: not as ttt-jax convert writes it; convert again"
        )
    return tree


def _check_chunks(model: Path, name: str, header: dict[str, Any]) -> None:
    nbytes = math.prod(header["chunks"]) * _ZARR_DTYPES[header["dtype"]].itemsize
    counts = [
        math.ceil(size / part) for size, part in zip(header["shape"], header["chunks"], strict=True)
    ]
    for index in np.ndindex(*counts):
        path = model / name / ".".join(map(str, index))
        if path.is_symlink():
            inside(model, path.relative_to(model).as_posix())
        if not path.is_file() or path.stat().st_size != nbytes:
            raise CheckpointError(f"{path}: missing, or not of {nbytes} bytes; convert again")


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
    """Return a list of positive sizes, or the empty list for anything else."""
    right = isinstance(value, list) and all(
        type(size) is int and 0 < size < 1 << 48 for size in value
    )
    return value if right else []
