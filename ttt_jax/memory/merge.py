"""A plain Hugging Face folder without TTT: the base architecture with W, or W + dW of a memory.

D model width, F MLP width.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.checkpoint.checksums import write_checksums
from ttt_jax.config import ModelConfig, TTTConfig
from ttt_jax.errors import CheckpointError, UserError
from ttt_jax.files.new_folder import new_folder
from ttt_jax.memory.memory import Memory
from ttt_jax.pretrained.companions import copy_companions, write_byte_tokenizer
from ttt_jax.pretrained.fingerprint import tensors_fingerprint
from ttt_jax.pretrained.hf_config import config_to_hf, write_config
from ttt_jax.pretrained.hf_weights import check_tensors, tensor_shapes
from ttt_jax.pretrained.safetensors_io import (
    DTYPES,
    TensorSpec,
    all_finite,
    tensor_file_names,
    write_tensors,
)
from ttt_jax.pretrained.source import Source


class Merged(NamedTuple):
    """What became of one layer's dW.

    Fields:
      ratio: ||dW||_F / ||W||_F.
      lost: ||stored - (W + dW)||_F / ||dW||_F, the error of rounding to the stored dtype.
    """

    layer: int
    ratio: float
    lost: float


def merge(
    source: Source,
    memory: Memory | None,
    folder: str | Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
) -> list[Merged]:
    """Write the model's base architecture with W + dW in the layers that adapt.

    Tensors are read and written one at a time.

    Args:
      source: the model that read (`open_source`): Hugging Face, converted, or a run.
      memory: None: W alone, which is what adapters go on.
      folder: must not exist; it appears when everything is written.
      dtype: of every tensor, "float32" or "bfloat16".

    Raises: UserError for a memory of another model; CheckpointError, ConfigError, one line.
    """
    folder = Path(folder)
    if os.path.lexists(folder):  # a link that leads nowhere, too
        raise CheckpointError(f"output {folder}: exists already; choose another one or delete it")
    raw = _plain_config(source, dtype)
    check_tensors(source.abstract, source.tensors, str(source.folder))
    if memory is not None and memory.model != tensors_fingerprint(source.abstract, source.tensors):
        raise UserError(f"memory: was not read by {source.folder}; give the model that read it")
    target, merged = DTYPES[dtype], []
    kept = {n: s for n, s in tensor_shapes(source.abstract).items() if ".mlp.ttt_" not in n}
    adapting = () if memory is None else memory.layers
    layers = {f"model.layers.{i}.mlp.down_proj.weight": i for i in adapting}

    def rows(spec: TensorSpec) -> Iterator[np.ndarray]:
        x = source.tensors.read(spec.name)
        if memory is not None and spec.name in layers:
            x, about = _with(x, memory, layers[spec.name], target)
            merged.append(about)
        with np.errstate(over="ignore"):
            x = x.astype(target)
        if not all_finite(x):
            raise CheckpointError(
                f"model {source.folder}: tensor {spec.name} does not fit into {dtype}"
            )
        yield x

    try:
        with new_folder(folder) as parts:
            write_config(parts, raw)
            specs = [TensorSpec(name, shape, target) for name, shape in kept.items()]
            write_tensors(parts, specs, rows, max_shard_bytes)
            write_checksums(parts, tensor_file_names(parts))
            if source.tokenizer == "bytes":
                write_byte_tokenizer(parts, source.model.vocab_size)
            else:
                copy_companions(source.tokenizer, parts)
    except OSError as error:
        raise CheckpointError(
            f"output {folder}: could not be written ({error}); free space or choose another folder"
        ) from None
    return sorted(merged)


def _with(
    w_DF: np.ndarray, memory: Memory, layer: int, target: np.dtype
) -> tuple[np.ndarray, Merged]:
    """(W + dW in float64, what rounding it to the target takes away)."""
    w_DF, dW_DF = w_DF.astype(np.float64), memory.dW(layer).astype(np.float64)
    sum_DF = w_DF + dW_DF
    lost, size = np.linalg.norm(sum_DF.astype(target) - sum_DF), np.linalg.norm(dW_DF)
    ratio = size / np.linalg.norm(w_DF) if w_DF.any() else math.inf
    return sum_DF, Merged(layer, float(ratio), float(lost / size) if size else 0.0)


def _plain_config(source: Source, dtype: str) -> dict[str, Any]:
    """config.json of the base architecture: the source's own fields where it has them, but for
    TTT's, or ours.
    """
    plain: ModelConfig = dataclasses.replace(source.model, ttt=TTTConfig())
    if source.hf_config is None:
        return config_to_hf(plain) | {"dtype": dtype}
    raw = {
        name: value
        for name, value in source.hf_config.items()
        if not name.startswith("ttt_") and name not in ("auto_map", "torch_dtype")
    }
    return raw | {"dtype": dtype}
