"""Write a model as a Hugging Face folder: config.json with the official `ttt_*` fields, sharded safetensors, index.

The inverse of `hf.py`, through the same name map. Tensors are written one shard at a time; the folder appears complete or not
at all.
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
from ttt_jax.config.fields import ModelConfig, TTTConfig
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.files.companions import MAX_TOKENIZER_BYTES, check_regular, inside
from ttt_jax.model.param_path import param_path
from ttt_jax.model.transformer import Transformer
from ttt_jax.pretrained.hf_weights import OWN_TTT_FIELDS, tensor_names
from ttt_jax.pretrained.safetensors_io import TensorSpec, tensor_file_names, write_tensors
from ttt_jax.run.folder import sync, sync_tree

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mistral": "MistralForCausalLM",
}

COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.json", "merges.txt"),
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
    """Write config.json and safetensors that transformers, the official code and `load_pretrained` read.

    Args:
      model: parameters of any dtype.
      folder: must not exist; it appears when everything is written.
      dtype: dtype of the tensors, "float32" or "bfloat16".
      max_shard_bytes: tensors per file; more than one file gets `model.safetensors.index.json`.
      carry_from: folder whose tokenizer and generation config are copied along.

    Raises: CheckpointError when the folder exists or cannot be written; ConfigError when no Hugging Face architecture can
      express the model.
    """
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(f"output {folder}: exists already; choose another folder or delete it")
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
        raise CheckpointError(f"output {folder}: could not be written ({error}); free space or choose another folder") from None


def _write_folder(model, parts: Path, raw: dict[str, Any], dtype: str, max_shard_bytes: int, carry_from) -> None:
    write_config(parts, raw)
    _write_tensors(model, parts, dtype, max_shard_bytes)
    write_checksums(parts, tensor_file_names(parts))
    if carry_from is not None:
        copy_companions(carry_from, parts)
    sync_tree(parts)


def write_config(folder: Path, raw: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_companions(source: str | Path | None, folder: Path) -> None:
    """Copy the tokenizer (and chat template) and the generation config.

    Args:
      source: a folder, or a tokenizer.json alone; None copies nothing.

    Raises: CheckpointError for a link that leaves the source's folder, a pipe or device, and a file of absurd size.
    """
    if source is None:
        return
    source = Path(source).expanduser()
    if not source.is_dir():
        _copy(source, folder / "tokenizer.json")
        return
    for name in sorted(entry.name for entry in source.iterdir()):  # glob would pass over links that lead nowhere
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPANIONS):
            path = inside(source, name)
            if not path.is_dir() or path.suffix:  # folders of further templates are left out
                _copy(path, folder / name)


def _copy(source: Path, target: Path) -> None:
    size = check_regular(source, CheckpointError)
    if size > MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"{source}: {size} bytes; such a file has at most {MAX_TOKENIZER_BYTES}")
    shutil.copyfile(source, target)


def config_to_hf(model: ModelConfig) -> dict[str, Any]:
    """The fields of `config.json`, as transformers 4 writes them. `config_from_hf` of the result is `model` again.

    Raises: ConfigError when no supported architecture has this combination of features.
    """
    family = _family(model)
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "max_position_embeddings": model.max_positions,
        "rope_theta": model.rope.base,
        "rope_scaling": _rope_scaling(model),
        "attention_bias": model.o_bias,
        "mlp_bias": model.mlp_bias,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
    }
    if model.sliding_window is not None:
        raw["sliding_window"] = model.sliding_window
        if family != "mistral":
            full = set(model.full_attention_layers)
            kinds = ["full_attention" if i in full else "sliding_attention" for i in range(model.num_layers)]
            raw |= {"use_sliding_window": True, "layer_types": kinds}
    ttt = model.ttt
    if ttt.layers:
        if ttt.clip_norm is not None:
            raise ConfigError(f"config field model.ttt.clip_norm = {ttt.clip_norm:g}: the official format has no field for it")
        raw |= {"ttt_mode": True, "ttt_layers": list(ttt.layers), "ttt_chunk": ttt.chunk_size, "ttt_lr": ttt.lr}
        raw |= {"ttt_target": ttt.target, "ttt_proj": ttt.proj}
        # Left out where they say what the official code does, so that its checkpoints stay as they are.
        own = {theirs: (getattr(ttt, ours), getattr(TTTConfig(), ours)) for theirs, ours in OWN_TTT_FIELDS.items()}
        raw |= {name: value for name, (value, default) in own.items() if value != default}
    return raw


def _family(model: ModelConfig) -> str:
    """The architecture whose features are exactly the model's."""
    window = model.sliding_window is not None
    if model.qk_norm and model.qkv_bias == model.o_bias and not model.mlp_bias:
        return "qwen3"
    if not model.qk_norm and model.qkv_bias and not model.o_bias and not model.mlp_bias:
        return "qwen2"
    if not model.qk_norm and model.qkv_bias == model.o_bias and not window:
        return "llama"
    if not (model.qk_norm or model.qkv_bias or model.o_bias or model.mlp_bias or model.full_attention_layers):
        return "mistral"
    raise ConfigError(
        "config field model: no Hugging Face architecture has this combination of qk_norm, biases and sliding windows "
        f"(qk_norm {model.qk_norm}, qkv_bias {model.qkv_bias}, o_bias {model.o_bias}, mlp_bias {model.mlp_bias}, "
        f"sliding_window {model.sliding_window}, full_attention_layers {list(model.full_attention_layers)})"
    )


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    rope = model.rope
    if rope.kind == "default":
        return None
    raw: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    raw["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "llama3":
        return raw | {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    raw |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    return raw if rope.attention_factor is None else raw | {"attention_factor": rope.attention_factor}


def _write_tensors(model: Transformer, folder: Path, dtype: str, max_shard_bytes: int) -> None:
    """One layer of a stack at a time."""
    names, target = tensor_names(model), np.dtype(jnp.dtype(dtype))
    specs: list[TensorSpec] = []
    values: dict[str, Callable[[], jax.Array]] = {}
    for path, value in jax.tree_util.tree_flatten_with_path(model)[0]:
        ours = param_path(path)
        stacked = ours.startswith("groups.")
        for i, name in enumerate(names[ours]):
            specs.append(TensorSpec(name, tuple(value.shape[2:] if stacked else value.shape), target))
            index = (i // value.shape[1], i % value.shape[1]) if stacked else ()
            values[name] = lambda value=value, index=index: value[index]
    write_tensors(folder, specs, lambda spec: iter([np.asarray(values[spec.name]().astype(dtype))]), max_shard_bytes)
