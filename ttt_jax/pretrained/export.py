"""Write a model as a Hugging Face folder: config.json with the official `ttt_*` fields, sharded
safetensors, index.

Tensors are written one shard at a time; the folder appears complete or not at all.
"""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

from ttt_jax.checkpoint.checksums import write_checksums
from ttt_jax.errors import CheckpointError
from ttt_jax.files.new_folder import new_folder
from ttt_jax.files.reading import MAX_TOKENIZER_BYTES, check_regular, inside
from ttt_jax.model.transformer import Transformer
from ttt_jax.pretrained.hf_config import config_to_hf, write_config
from ttt_jax.pretrained.hf_weights import write_model
from ttt_jax.pretrained.safetensors_io import tensor_file_names

COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
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
      Face architecture can express the model.
    """
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(
            f"output {folder}: exists already; choose another folder or delete it"
        )
    raw = config_to_hf(model.config) | {"dtype": dtype}
    try:
        with new_folder(folder) as parts:
            write_config(parts, raw)
            write_model(model, parts, dtype, max_shard_bytes)
            write_checksums(parts, tensor_file_names(parts))
            if carry_from is not None:
                copy_companions(carry_from, parts)
    except OSError as error:
        raise CheckpointError(
            f"output {folder}: could not be written ({error}); free space or choose another folder"
        ) from None


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
    # glob would pass over links that lead nowhere.
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
