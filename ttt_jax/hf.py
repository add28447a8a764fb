"""Hugging Face folders: config.json (with the official `ttt_*` fields) and safetensors into our model.

The name map is one table, `tensor_names`; a checkpoint must hold exactly the tensors that it lists. Tensors are read one
at a time through safetensors, never unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from ttt_jax.config import ModelConfig, from_dict
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.model import Runtime, Transformer
from ttt_jax.paths import param_path
from ttt_jax.ttt import KERNEL

FAMILIES = ("llama", "qwen3", "qwen2", "mistral")
_TTT_FIELDS = {"ttt_layers": "layers", "ttt_chunk": "chunk_size", "ttt_lr": "lr", "ttt_target": "target", "ttt_proj": "proj"}


# ------------------------------------------------------------------------------------------------------------ config


def read_config(folder: str | Path) -> ModelConfig:
    """Translate `config.json`, as transformers 4 and 5 and the official In-Place TTT code write it.

    Raises: ConfigError naming the field when the architecture or a value is not supported.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"checkpoint {folder}: no config.json; give a Hugging Face model folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected an object of fields, got {type(raw).__name__}")
    return config_from_hf(raw, where=str(path))


def config_from_hf(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"{where}: model_type = {family!r} is not supported; supported: {', '.join(FAMILIES)}")

    def need(name: str) -> Any:
        if raw.get(name) is None:
            raise ConfigError(f"{where}: field {name} is missing")
        return raw[name]

    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"{where}: hidden_act = {raw['hidden_act']!r} is not supported; only silu (SwiGLU) is")
    layers, heads = need("num_hidden_layers"), need("num_attention_heads")
    window, full_layers = _windows(raw, family, layers)
    tree = {
        "vocab_size": need("vocab_size"),
        "d_model": need("hidden_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or need("hidden_size") // heads,
        "d_ff": need("intermediate_size"),
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "max_positions": raw.get("max_position_embeddings", 32768),
        "rope": _rope(raw, where),
        "qk_norm": family == "qwen3",
        "qkv_bias": family == "qwen2" or bool(raw.get("attention_bias", False)),
        "o_bias": family != "qwen2" and bool(raw.get("attention_bias", False)),
        "mlp_bias": bool(raw.get("mlp_bias", False)),
        "tie_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "sliding_window": window,
        "full_attention_layers": full_layers,
        "init_std": raw.get("initializer_range", 0.02),
        "ttt": _ttt(raw),
    }
    try:
        return from_dict(ModelConfig, tree)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _ttt(raw: dict[str, Any]) -> dict[str, Any]:
    if not raw.get("ttt_mode", False):
        return {}
    return {ours: raw[theirs] for theirs, ours in _TTT_FIELDS.items() if raw.get(theirs) is not None}


def _windows(raw: dict[str, Any], family: str, layers: int) -> tuple[int | None, list[int]]:
    window = raw.get("sliding_window")
    if window is None or (family != "mistral" and not raw.get("use_sliding_window", False)):
        return None, []
    types = raw.get("layer_types")
    if types:
        full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    else:  # older Qwen configs: the first `max_window_layers` layers see everything
        full = [] if family == "mistral" else list(range(min(raw.get("max_window_layers", layers), layers)))
    return (None, []) if len(full) == layers else (window, full)


def _rope(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """`rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    base = scaling.get("rope_theta", raw.get("rope_theta", 10000.0))
    if kind not in ("default", "llama3", "yarn"):
        raise ConfigError(f"{where}: rope type {kind!r} is not supported; supported: default, llama3, yarn")
    rope: dict[str, Any] = {"kind": kind, "base": base}
    if kind == "default":
        return rope
    if scaling.get("factor") is None:
        raise ConfigError(f"{where}: rope_scaling.factor is missing")
    rope["factor"] = scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
    rope["original_max_positions"] = original or raw.get("max_position_embeddings")
    if kind == "yarn" and (scaling.get("mscale") or scaling.get("truncate") is False):
        raise ConfigError(f"{where}: rope_scaling fields mscale and truncate are not supported")
    for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
        if scaling.get(name) is not None:
            rope[name] = scaling[name]
    return rope


# ------------------------------------------------------------------------------------------------------------- names

_BLOCK_NAMES = {
    "attention_norm.scale": "input_layernorm.weight",
    "attention.q": "self_attn.q_proj.weight",
    "attention.k": "self_attn.k_proj.weight",
    "attention.v": "self_attn.v_proj.weight",
    "attention.o": "self_attn.o_proj.weight",
    "attention.q_bias": "self_attn.q_proj.bias",
    "attention.k_bias": "self_attn.k_proj.bias",
    "attention.v_bias": "self_attn.v_proj.bias",
    "attention.o_bias": "self_attn.o_proj.bias",
    "attention.q_norm.scale": "self_attn.q_norm.weight",
    "attention.k_norm.scale": "self_attn.k_norm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "mlp.gate": "mlp.gate_proj.weight",
    "mlp.up": "mlp.up_proj.weight",
    "mlp.down": "mlp.down_proj.weight",
    "mlp.gate_bias": "mlp.gate_proj.bias",
    "mlp.up_bias": "mlp.up_proj.bias",
    "mlp.down_bias": "mlp.down_proj.bias",
    "mlp.target.conv": "mlp.ttt_conv.weight",
    "mlp.target.proj": "mlp.ttt_proj.weight",
}
_TOP_NAMES = {"embed": "model.embed_tokens.weight", "norm.scale": "model.norm.weight", "head": "lm_head.weight"}


def tensor_names(model: Transformer) -> dict[str, list[str]]:
    """For each parameter path of the model, the checkpoint's tensors: one, or one per layer of a stack."""
    names = {}
    for path, _ in jax.tree_util.tree_flatten_with_path(model)[0]:
        ours = param_path(path)
        stacked = re.fullmatch(r"groups\.(\d+)\.blocks\.(\d+)\.(.+)", ours)
        if stacked is None:
            names[ours] = [_TOP_NAMES[ours]]
        else:
            layers = model.groups[int(stacked[1])].layer_indices(int(stacked[2]))
            names[ours] = [f"model.layers.{layer}.{_BLOCK_NAMES[stacked[3]]}" for layer in layers]
    return names


# ----------------------------------------------------------------------------------------------------------- reading


class TensorFiles:
    """The safetensors of a folder, sharded or not, as one lazy mapping from name to numpy array."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = sorted(set(weight_map.values()))
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index}: not a safetensors index: {error}") from None
            for name in files:
                if not isinstance(name, str) or Path(name).name != name:
                    raise CheckpointError(f"{index}: shard {name!r} is not a plain file name")
        else:
            files = ["model.safetensors"]
        self._files, self._where = {}, {}
        for name in files:
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"checkpoint {folder}: {name} is missing (only safetensors are read, never pickles)")
            try:
                handle = safe_open(path, framework="numpy")
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from None
            self._files[name] = handle
            for tensor in handle.keys():  # noqa: SIM118 (a safe_open is not iterable)
                if tensor in self._where:
                    raise CheckpointError(f"checkpoint {folder}: tensor {tensor} is in two files")
                self._where[tensor] = name

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[self._where[name]].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        return self._files[self._where[name]].get_tensor(name)


def load_hf(folder: str | Path, runtime: Runtime | None = None, *, dtype: str = "float32") -> Transformer:
    """Read a Hugging Face folder into a `Transformer`.

    Args:
      folder: holds config.json and model.safetensors (or shards with an index).
      runtime: how to compute; None computes in float32.
      dtype: dtype of the parameters; training wants float32.

    Raises: ConfigError for an unsupported architecture; CheckpointError listing the tensors that are missing, that the
      model has no place for, or whose shape differs.
    """
    cfg = read_config(folder)
    files = TensorFiles(folder)
    abstract = jax.eval_shape(lambda: Transformer(cfg, runtime or Runtime(), key=jax.random.key(0)))
    check_tensors(abstract, files, str(folder))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract)
    return fill(abstract, files.read)


def load_hf_into(abstract: Transformer, folder: str | Path, *, key: jax.Array) -> Transformer:
    """Read a folder into the places (dtype and sharding) of an abstract model, which may have more TTT layers.

    TTT parameters that the folder lacks get the initialisation of continual training (section 4): the convolution is
    zero and W_target diagonal with entries N(0, init_std^2), so the model starts exactly at its pretrained function.
    """
    files = TensorFiles(folder)
    fresh = {name for names in tensor_names(abstract).values() for name in names if ".mlp.ttt_" in name} - set(files)
    check_tensors(abstract, files, str(folder), optional=fresh)
    D, std = abstract.config.d_model, abstract.config.init_std

    def read(name: str) -> np.ndarray:
        if name not in fresh:
            return files.read(name)
        if name.endswith("ttt_conv.weight"):
            return np.zeros((D, 1, KERNEL), np.float32)
        seed = np.frombuffer(np.asarray(jax.random.key_data(key)).tobytes() + name.encode(), np.uint8)
        return np.diag(np.random.default_rng(seed).normal(0, std, D).astype(np.float32))

    return fill(abstract, read)


def check_tensors(abstract: Transformer, files: TensorFiles, where: str, optional: Set[str] = frozenset()) -> None:
    """Every tensor of the model is there with its shape (but for the optional ones), and nothing else is."""
    shapes = {}
    leaves = {param_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]}
    for ours, theirs in tensor_names(abstract).items():
        shape = leaves[ours].shape[2:] if ours.startswith("groups.") else leaves[ours].shape
        shapes |= dict.fromkeys(theirs, tuple(shape))
    ignored = {"lm_head.weight"} if abstract.head is None else set()  # a tied head is sometimes written out
    ignored |= {name for name in files if name.endswith("rotary_emb.inv_freq")}  # a constant that old exports carry
    missing = sorted(set(shapes) - set(files) - optional)
    extra = sorted(set(files) - set(shapes) - ignored)
    shared = [(name, files.shape(name), shapes[name]) for name in sorted(set(shapes) & set(files))]
    wrong = [f"{name} {found} (expected {wanted})" for name, found, wanted in shared if found != wanted]
    kinds = {"missing": missing, "unknown": extra, "wrong shape": wrong}
    problems = [f"{kind} {', '.join(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError(f"checkpoint {where}: its tensors do not fit its config.json: {'; '.join(problems)}")


def fill(abstract: Transformer, read: Callable[[str], np.ndarray]) -> Transformer:
    """Put tensors in the places of an abstract model, stacking the repeats of scanned layers."""
    names = tensor_names(abstract)

    def leaf(path, struct):
        ours = param_path(path)
        arrays = [read(name).astype(struct.dtype) for name in names[ours]]
        return jax.device_put(np.stack(arrays).reshape(struct.shape), struct.sharding)

    return jax.tree_util.tree_map_with_path(leaf, abstract)
