"""A memory as a PEFT adapter, for the engines that load LoRA.

D model width, F MLP width, R rank. dW = B A with `lora_alpha` = R, so that the adapter's scale is
1. It changes `down_proj` of the layers that adapt, and nothing else.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save

from ttt_jax.errors import CheckpointError
from ttt_jax.files.new_folder import new_folder
from ttt_jax.memory.memory import Memory
from ttt_jax.memory.spectrum import Factors, best_factors, dense
from ttt_jax.pretrained.safetensors_io import DTYPES

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


class Kept(NamedTuple):
    """What an adapter keeps of one layer: `error` is ||B A - dW||_F / ||dW||_F as stored."""

    layer: int
    error: float


def write_lora(
    memory: Memory,
    folder: str | Path,
    *,
    rank: int,
    dtype: str = "float32",
    base: str | None = None,
) -> list[Kept]:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Args:
      folder: must not exist; it appears when everything is written.
      rank: R, up to min(D, F), the full rank, which keeps everything.
      dtype: of the factors, "float32" or "bfloat16".
      base: name or folder of the base model, for tools that load it by the adapter's word.

    Raises: UserError for a rank that there is not; CheckpointError.
    """
    folder = Path(folder)
    if os.path.lexists(folder):  # a link that leads nowhere, too
        raise CheckpointError(f"output {folder}: exists already; choose another one or delete it")
    tensors, kept = {}, []
    memory.check_rank(rank)
    for layer in memory.layers:
        dW_DF = memory.dW(layer)
        B_DR, A_RF = (x.astype(DTYPES[dtype]) for x in best_factors(dW_DF, rank))
        exact, found = dW_DF.astype(np.float64), dense(Factors(B_DR, A_RF))
        size = np.linalg.norm(exact)
        kept.append(Kept(layer, float(np.linalg.norm(found - exact) / size) if size else 0.0))
        module = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(A_RF)
        tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(B_DR)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": ["down_proj"],
        "layers_to_transform": memory.layers,
        "layers_pattern": "layers",
    }
    sources = [source.to_json() for source in memory.sources]
    about = {"format": "pt", "ttt_jax_memory": json.dumps({"sources": sources})}
    try:
        with new_folder(folder) as parts:
            (parts / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (parts / WEIGHTS_FILE).write_bytes(save(tensors, metadata=about))
    except OSError as error:
        raise CheckpointError(
            f"output {folder}: could not be written ({error}); free space or choose another folder"
        ) from None
    return sorted(kept)
