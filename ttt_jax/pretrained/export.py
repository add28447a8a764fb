"""Write a model as a Hugging Face folder: config.json with the official `ttt_*` fields, sharded
safetensors, index.

Tensors are written one shard at a time; the folder appears complete or not at all.
"""

from __future__ import annotations

from pathlib import Path

from ttt_jax.checkpoint.checksums import write_checksums
from ttt_jax.data.tokenizer import ByteTokenizer
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.files.new_folder import new_folder
from ttt_jax.model.transformer import Transformer
from ttt_jax.pretrained.companions import (
    carry_companions,
    companions_of,
    write_byte_tokenizer,
    write_end_tokens,
)
from ttt_jax.pretrained.hf_config import config_to_hf, write_config
from ttt_jax.pretrained.hf_weights import write_model
from ttt_jax.pretrained.safetensors_io import tensor_file_names


def save_pretrained(
    model: Transformer,
    folder: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    carry_from: str | Path | None = None,
) -> None:
    """Write config.json and safetensors that transformers, the official code and `load_pretrained`
    read.

    Args:
      model: parameters of any dtype.
      folder: must not exist; it appears when everything is written.
      dtype: dtype of the tensors, "float32" or "bfloat16"; None keeps the model's.
      max_shard_bytes: tensors per file; more than one file gets `model.safetensors.index.json`.
      carry_from: folder whose tokenizer, chat template and generation config are copied along;
        None: those beside the model's own tokenizer, and its end tokens where it has none.

    Raises: CheckpointError when the folder exists or cannot be written; ConfigError when no Hugging
      Face architecture can express the model.
    """
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(
            f"output {folder}: exists already; choose another folder or delete it"
        )
    dtype = dtype or _dtype(model)
    carry_from = carry_from if carry_from is not None else companions_of(model.tokenizer)
    if carry_from is not None and not Path(carry_from).expanduser().exists():
        raise CheckpointError(
            f"output {folder}: {carry_from}, whose tokenizer belongs to the model, is gone; "
            "pass carry_from, a folder that holds it"
        )
    raw = config_to_hf(model.config) | {"dtype": dtype}
    try:
        with new_folder(folder) as parts:
            write_config(parts, raw)
            write_model(model, parts, dtype, max_shard_bytes)
            write_checksums(parts, tensor_file_names(parts))
            if carry_from is not None:
                carry_companions(carry_from, parts)
            elif model.eos_ids:
                write_end_tokens(model.eos_ids, parts)
            if carry_from is None and isinstance(model.tokenizer, ByteTokenizer):
                write_byte_tokenizer(parts, model.config.vocab_size)
    except OSError as error:
        raise CheckpointError(
            f"output {folder}: could not be written ({error}); free space or choose another folder"
        ) from None


def _dtype(model: Transformer) -> str:
    """Return the dtype of the parameters. Raises ConfigError for one that is not written."""
    name = model.embed[...].dtype.name
    if name not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype = {name} of the model: pass dtype float32 or bfloat16")
    return name
