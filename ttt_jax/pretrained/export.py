"""Write a model as a Hugging Face folder: config.json with the official `ttt_*` fields, sharded
safetensors, index.

The inverse of `hf.py`, through the same name map. Tensors are written one shard at a time; the
folder appears complete or not at all.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.checkpoint.checksums import write_checksums
from ttt_jax.errors import CheckpointError
from ttt_jax.files.reading import MAX_TOKENIZER_BYTES, check_regular, inside
from ttt_jax.files.text import sync, sync_tree
from ttt_jax.model.param_path import param_path
from ttt_jax.model.transformer import Transformer
from ttt_jax.pretrained.hf_config import config_to_hf
from ttt_jax.pretrained.hf_weights import tensor_names
from ttt_jax.pretrained.safetensors_io import TensorSpec, tensor_file_names, write_tensors

COMPANIONS = (
    *(
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template*",
        "vocab.json",
        "merges.txt",
    ),
    "generation_config.json",
)


def save_pretrained(
    model: Transformer,
    folder: str | Path,
    *,
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5 * 10**9,
    carry_from: str | Path | None = None,
) -> None:
    """Write config.json and safetensors that transformers, the official code and `load_pretrained`
    read.

    Args:
      model: parameters of any dtype.
      folder: must not exist; it appears when everything is written.
      dtype: dtype of the tensors, "float32" or "bfloat16".
      max_shard_bytes: tensors per file; more than one file gets `model.safetensors.index.json`.
      carry_from: folder whose tokenizer and generation config are copied along.

    Raises: CheckpointError when the folder exists or cannot be written; ConfigError when no Hugging
    Face architecture can
      express the model.
    """
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(
            f"output {folder}: exists already; choose another folder or delete it"
        )
    raw = config_to_hf(model.config) | {"dtype": dtype}
    parts = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        _write_folder(model, parts, raw, dtype, max_shard_bytes, carry_from)
        parts.rename(folder)
        sync(folder.absolute().parent)
    except OSError as error:
        shutil.rmtree(parts, ignore_errors=True)
        raise CheckpointError(
            f"output {folder}: could not be written ({error}); free space or choose another folder"
        ) from None


def _write_folder(
    model, parts: Path, raw: dict[str, Any], dtype: str, max_shard_bytes: int, carry_from
) -> None:
    write_config(parts, raw)
    _write_tensors(model, parts, dtype, max_shard_bytes)
    write_checksums(parts, tensor_file_names(parts))
    if carry_from is not None:
        copy_companions(carry_from, parts)
    sync_tree(parts)


def write_config(folder: Path, raw: dict[str, Any]) -> None:
    (folder / "config.json").write_text(
        json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def copy_companions(source: str | Path | None, folder: Path) -> None:
    """Copy the tokenizer (and chat template) and the generation config.

    Args:
      source: a folder, or a tokenizer.json alone; None copies nothing.

    Raises: CheckpointError for a link that leaves the source's folder, a pipe or device, and a file
    of absurd size.
    """
    if source is None:
        return
    source = Path(source).expanduser()
    if not source.is_dir():
        _copy(source, folder / "tokenizer.json")
        return
    # glob would pass over links that lead nowhere
    for name in sorted(entry.name for entry in source.iterdir()):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPANIONS):
            path = inside(source, name)
            if not path.is_dir() or path.suffix:  # folders of further templates are left out
                _copy(path, folder / name)


def _copy(source: Path, target: Path) -> None:
    size = check_regular(source, CheckpointError)
    if size > MAX_TOKENIZER_BYTES:
        raise CheckpointError(
            f"{source}: {size} bytes; such a file has at most {MAX_TOKENIZER_BYTES}"
        )
    shutil.copyfile(source, target)


def _write_tensors(model: Transformer, folder: Path, dtype: str, max_shard_bytes: int) -> None:
    """One layer of a stack at a time."""
    names, target = tensor_names(model), np.dtype(jnp.dtype(dtype))
    specs: list[TensorSpec] = []
    values: dict[str, Callable[[], jax.Array]] = {}
    for path, value in jax.tree_util.tree_flatten_with_path(model)[0]:
        ours = param_path(path)
        stacked = ours.startswith("groups.")
        for i, name in enumerate(names[ours]):
            specs.append(
                TensorSpec(name, tuple(value.shape[2:] if stacked else value.shape), target)
            )
            index = (i // value.shape[1], i % value.shape[1]) if stacked else ()
            values[name] = lambda value=value, index=index: value[index]
    write_tensors(
        folder,
        specs,
        lambda spec: iter([np.asarray(values[spec.name]().astype(dtype))]),
        max_shard_bytes,
    )
