"""Hugging Face folders: config.json (with the official `ttt_*` fields) and safetensors into our model.

The name map is one table, `tensor_names`; a checkpoint must hold exactly the tensors that it lists. Tensors are read one
at a time through safetensors, never unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ttt_jax.config.fields import ModelConfig, from_dict, validate_model
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.files.companions import find_companion, read_json_object
from ttt_jax.model.param_path import param_path
from ttt_jax.model.transformer import Runtime, Transformer, abstract_transformer
from ttt_jax.model.ttt_mlp import KERNEL
from ttt_jax.pretrained.safetensors_io import TensorFiles, TensorSource, list_names

FAMILIES = ("llama", "qwen3", "qwen2", "mistral")
# Beyond these a config is damaged or hostile; the shapes are compared with the files' headers before anything is allocated.
_LIMITS = {"num_hidden_layers": 4096, "hidden_size": 2**24, "intermediate_size": 2**24, "vocab_size": 2**28, "head_dim": 2**16,
           "num_attention_heads": 2**16, "num_key_value_heads": 2**16}  # fmt: skip
_TTT_FIELDS = {"ttt_layers": "layers", "ttt_chunk": "chunk_size", "ttt_lr": "lr", "ttt_target": "target", "ttt_proj": "proj"}
# Fields that the official code does not know: absent means what it does.
OWN_TTT_FIELDS = {"ttt_normalize_source": "normalize_source", "ttt_write": "write", "ttt_ridge": "ridge"}


# ------------------------------------------------------------------------------------------------------------ config


def read_config(folder: str | Path) -> ModelConfig:
    """Translate `config.json`, as transformers 4 and 5 and the official In-Place TTT code write it.

    Raises: ConfigError naming the field when the architecture or a value is not supported.
    """
    return config_from_hf(read_raw_config(folder), where=str(Path(folder) / "config.json"))


def read_raw_config(folder: str | Path) -> dict[str, Any]:
    """The fields of `config.json` as they are. Raises CheckpointError (no such file) or ConfigError (no JSON object)."""
    path = find_companion(Path(folder), "config.json")
    if path is None:
        raise CheckpointError(f"checkpoint {folder}: no config.json; give a Hugging Face model folder")
    return read_json_object(path, ConfigError)


def config_from_hf(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """The fields of a `config.json`. Raises: ConfigError naming `where`, the field and its value."""
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(f"{where}: model_type = {_short(family)} is not supported; supported: {', '.join(FAMILIES)}")

    def size(name: str, default: int | None = None) -> int:
        value = raw.get(name)
        if value is None and default is None:
            raise ConfigError(f"{where}: field {name} is missing")
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= _LIMITS.get(name, 2**31 - 1):
            fix = f"expected a whole number from 1 to {_LIMITS.get(name, 2**31 - 1)}"
            raise ConfigError(f"{where}: {name} = {_short(value, quote=False)}: {fix}")
        return value

    def flag(name: str) -> bool:
        value = raw.get(name)
        if value is not None and type(value) is not bool:
            raise ConfigError(f"{where}: {name} = {_short(value)}: expected true or false")
        return bool(value)

    act = raw.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise ConfigError(f"{where}: hidden_act = {_short(act)} is not supported; only silu (SwiGLU) is")
    for name, plain in (("partial_rotary_factor", 1.0), ("quantization_config", None)):
        if raw.get(name) not in (None, plain):
            raise ConfigError(f"{where}: {name} = {_short(raw[name])} is not supported")
    layers, heads = size("num_hidden_layers"), size("num_attention_heads")
    window, full_layers = _windows(raw, family, layers, flag("use_sliding_window"), where)
    bias = flag("attention_bias")
    tree = {
        "vocab_size": size("vocab_size"),
        "d_model": size("hidden_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": size("num_key_value_heads", heads),
        "head_dim": size("head_dim", max(1, size("hidden_size") // heads)),
        "d_ff": size("intermediate_size"),
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "max_positions": size("max_position_embeddings", 32768),
        "rope": _rope(raw, where),
        "qk_norm": family == "qwen3",
        "qkv_bias": family == "qwen2" or bias,
        "o_bias": family != "qwen2" and bias,
        "mlp_bias": flag("mlp_bias"),
        "tie_embeddings": flag("tie_word_embeddings"),
        "sliding_window": window,
        "full_attention_layers": full_layers,
        "init_std": raw.get("initializer_range", 0.02),
        "ttt": _ttt(raw) if flag("ttt_mode") else {},
    }
    try:
        model = from_dict(ModelConfig, tree)
        validate_model(model)
    except ConfigError as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None
    return model


def _short(value: Any, quote: bool = True) -> str:
    text = repr(value) if quote else " ".join(str(value)[:100].split())
    return text if len(text) <= 60 else text[:57] + "..."


def _ttt(raw: dict[str, Any]) -> dict[str, Any]:
    return {ours: raw[theirs] for theirs, ours in (_TTT_FIELDS | OWN_TTT_FIELDS).items() if raw.get(theirs) is not None}


def _windows(raw: dict[str, Any], family: str, layers: int, used: bool, where: str) -> tuple[int | None, list[int]]:
    # transformers gives Mistral a window unless config.json says null.
    window = raw.get("sliding_window", 4096 if family == "mistral" else None)
    if window is None or (family != "mistral" and not used):
        return None, []
    types = raw.get("layer_types")
    if types:
        if not isinstance(types, list) or len(types) != layers:
            raise ConfigError(f"{where}: layer_types = {_short(types)}: expected a list, one kind for each of {layers} layers")
        unknown = [kind for kind in types if kind not in ("full_attention", "sliding_attention")]
        if unknown:
            raise ConfigError(f"{where}: layer_types: kind {_short(unknown[0])} is not supported")
        full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    else:  # older Qwen configs: the first `max_window_layers` layers see everything
        first = raw.get("max_window_layers", layers)
        if type(first) is not int or first < 0:
            raise ConfigError(f"{where}: max_window_layers = {_short(first)}: expected a whole number")
        full = [] if family == "mistral" else list(range(min(first, layers)))
    return (None, []) if len(full) == layers else (window, full)


def _rope(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """`rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        raise ConfigError(f"{where}: rope_parameters = {_short(scaling)}: expected one set of fields for all layers")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    base = scaling.get("rope_theta", raw.get("rope_theta", 10000.0))
    if kind not in ("default", "llama3", "yarn"):
        raise ConfigError(f"{where}: rope type {_short(kind)} is not supported; supported: default, llama3, yarn")
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


def load_hf(folder: str | Path, runtime: Runtime | None = None, *, dtype: str = "float32") -> Transformer:
    """Read a Hugging Face folder into a `Transformer`.

    Args:
      folder: holds config.json and model.safetensors (or shards with an index).
      runtime: how to compute; None computes in float32.
      dtype: dtype of the parameters; training wants float32.

    Raises: ConfigError for an unsupported architecture; CheckpointError listing the tensors that are missing, that the
      model has no place for, or whose shape differs, or naming one that holds NaN.
    """
    cfg = read_config(folder)
    files = TensorFiles(folder)
    abstract = abstract_model(cfg, files, str(folder), runtime)
    check_tensors(abstract, files, str(folder))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract)
    return fill(abstract, files.read)


def abstract_model(cfg: ModelConfig, source: TensorSource, where: str, runtime: Runtime | None = None) -> Transformer:
    """The model's structure without arrays. Raises CheckpointError when the source has too few tensors for its layers."""
    count = sum(1 for _ in source)
    if cfg.num_layers > count:  # before anything is built for each layer
        raise CheckpointError(f"checkpoint {where}: its config has {cfg.num_layers} layers, but it holds {count} tensors")
    return abstract_transformer(cfg, runtime or Runtime())


def load_hf_into(abstract: Transformer, folder: str | Path, *, key: jax.Array) -> Transformer:
    """`load_into` from a Hugging Face folder."""
    return load_into(abstract, TensorFiles(folder), str(folder), key=key)


def load_into(abstract: Transformer, source: TensorSource, where: str, *, key: jax.Array) -> Transformer:
    """Read tensors into the places (dtype and sharding) of an abstract model, which may have more TTT layers.

    TTT parameters that the source lacks get the initialisation of continual training, see `fresh_ttt_rows`.
    """
    fresh = {name for names in tensor_names(abstract).values() for name in names if ".mlp.ttt_" in name} - set(source)
    check_tensors(abstract, source, where, optional=fresh)
    D, std = abstract.config.d_model, abstract.config.init_std
    return fill(abstract, lambda name: fresh_ttt_rows(name, D, std, key) if name in fresh else source.read(name))


def fresh_ttt_rows(name: str, D: int, std: float, key: jax.Array, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows of a TTT tensor as continual training initialises it, float32; they depend on the key and the name alone.

    The convolution is zero and W_target diagonal with entries N(0, std^2), so the model starts exactly at its pretrained
    function (docs/design.md).
    """
    start, stop, _ = slice(start, stop).indices(D)
    if name.endswith("ttt_conv.weight"):
        return np.zeros((stop - start, 1, KERNEL), np.float32)
    seed = np.frombuffer(np.asarray(jax.random.key_data(key)).tobytes() + name.encode(), np.uint8)
    diagonal_D = np.random.default_rng(seed).normal(0, std, D).astype(np.float32)
    rows = np.zeros((stop - start, D), np.float32)
    rows[np.arange(stop - start), np.arange(start, stop)] = diagonal_D[start:stop]
    return rows


def tensor_shapes(abstract: Transformer) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the model needs, under the checkpoint's names."""
    shapes = {}
    leaves = {param_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]}
    for ours, theirs in tensor_names(abstract).items():
        shape = leaves[ours].shape[2:] if ours.startswith("groups.") else leaves[ours].shape
        shapes |= dict.fromkeys(theirs, tuple(shape))
    return shapes


def check_tensors(abstract: Transformer, source: TensorSource, where: str, optional: Set[str] = frozenset()) -> None:
    """Every tensor of the model is there with its shape (but for the optional ones), and nothing else is.

    Raises: CheckpointError listing what is missing, unknown, of the wrong shape or not made of floats.
    """
    shapes = tensor_shapes(abstract)
    ignored = {"lm_head.weight"} if abstract.head is None else set()  # a tied head is sometimes written out
    ignored |= {name for name in source if name.endswith("rotary_emb.inv_freq")}  # a constant that old exports carry
    missing = sorted(set(shapes) - set(source) - optional)
    extra = sorted(set(source) - set(shapes) - ignored)
    both = sorted(set(shapes) & set(source))
    shared = [(name, source.shape(name), shapes[name]) for name in both]
    wrong = [f"{name} {found} (expected {wanted})" for name, found, wanted in shared if found != wanted]
    integers = [name for name in both if source.dtype(name) is None]
    kinds = {"missing": missing, "unknown": extra, "wrong shape": wrong, "not of floats (quantised?)": integers}
    problems = [f"{kind} {list_names(names)}" for kind, names in kinds.items() if names]
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
