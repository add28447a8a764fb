"""`config.json` of Hugging Face folders, both ways, with the official `ttt_*` fields."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from ttt_jax.config import ModelConfig, TTTConfig, from_dict, validate_model
from ttt_jax.config.fields import ROPE_FIELDS
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.files.reading import find_companion, read_json_object
from ttt_jax.files.text import one_line, shorten

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mistral": "MistralForCausalLM",
}
# Beyond these a config is damaged or hostile; the shapes are compared with the files' headers
# before anything is allocated.
_LIMITS = {
    "num_hidden_layers": 4096,
    "hidden_size": 2**24,
    "intermediate_size": 2**24,
    "vocab_size": 2**28,
    "head_dim": 2**16,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
}
_TTT_FIELDS = {
    "ttt_layers": "layers",
    "ttt_chunk": "chunk_size",
    "ttt_lr": "lr",
    "ttt_target": "target",
    "ttt_proj": "proj",
}
# Fields that the official code does not know: absent means what it does.
_OWN_TTT_FIELDS = {
    "ttt_last_target": "last_target",
    "ttt_read_cap": "read_cap",
    "ttt_normalize_source": "normalize_source",
    "ttt_write": "write",
    "ttt_ridge": "ridge",
    "ttt_decay": "decay",
}
_TTT_NOTES = ("ttt_mode", "ttt_calibration")  # neither is a field of `TTTConfig`


# ------------------------------------------------------------------------------------------ reading


def read_config(folder: str | Path) -> ModelConfig:
    """Translate `config.json`, as transformers 4 and 5 and the official In-Place TTT code write it.

    Raises: ConfigError naming the field when the architecture or a value is not supported.
    """
    return config_from_hf(read_raw_config(folder), where=str(Path(folder) / "config.json"))


def read_raw_config(folder: str | Path) -> dict[str, Any]:
    """Read the fields of `config.json` as they are. Raises CheckpointError (no such file) or
    ConfigError (no JSON object).
    """
    path = find_companion(Path(folder), "config.json")
    if path is None:
        raise CheckpointError(
            f"checkpoint {folder}: no config.json; give a Hugging Face model folder"
        )
    return read_json_object(path, ConfigError)


def config_from_hf(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Translate the fields of a `config.json`. Raises: ConfigError naming `where`, the field and
    its value.
    """
    family = _check_supported(raw, where)
    size, flag = functools.partial(_size, raw, where), functools.partial(_flag, raw, where)
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
        "ttt": _ttt(raw, where) if flag("ttt_mode") else {},
    }
    try:
        model = from_dict(ModelConfig, tree)
        validate_model(model)
    except ConfigError as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None
    return model


def _check_supported(raw: dict[str, Any], where: str) -> str:
    """Return the model type. Raises ConfigError for what no part of a model can express."""
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise ConfigError(
            f"{where}: model_type = {_quoted(family)} is not supported; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    act = raw.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise ConfigError(
            f"{where}: hidden_act = {_quoted(act)} is not supported; only silu (SwiGLU) is"
        )
    for name, plain in (("partial_rotary_factor", 1.0), ("quantization_config", None)):
        if raw.get(name) not in (None, plain):
            raise ConfigError(f"{where}: {name} = {_quoted(raw[name])} is not supported")
    return family


def _size(raw: dict[str, Any], where: str, name: str, default: int | None = None) -> int:
    value, limit = raw.get(name), _LIMITS.get(name, 2**31 - 1)
    if value is None and default is None:
        raise ConfigError(f"{where}: field {name} is missing")
    value = default if value is None else value
    if type(value) is not int or not 0 < value <= limit:
        shown = one_line(str(value)[:100], 60)
        raise ConfigError(f"{where}: {name} = {shown}: expected a whole number from 1 to {limit}")
    return value


def _flag(raw: dict[str, Any], where: str, name: str) -> bool:
    value = raw.get(name)
    if value is not None and type(value) is not bool:
        raise ConfigError(f"{where}: {name} = {_quoted(value)}: expected true or false")
    return bool(value)


def _quoted(value: Any) -> str:
    return shorten(repr(value), 60)


def _ttt(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of `TTTConfig`. Raises ConfigError for a field that is not known: without
    it the weights may compute something else.
    """
    fields = _TTT_FIELDS | _OWN_TTT_FIELDS
    for name in raw:
        if name.startswith("ttt_") and name not in fields and name not in _TTT_NOTES:
            raise ConfigError(
                f"{where}: {shorten(name, 60)} = {_quoted(raw[name])} is not known; known: "
                f"{', '.join(fields)}; remove it if nothing depends on it"
            )
    return {ours: raw[theirs] for theirs, ours in fields.items() if raw.get(theirs) is not None}


def _windows(
    raw: dict[str, Any], family: str, layers: int, used: bool, where: str
) -> tuple[int | None, list[int]]:
    # transformers gives Mistral a window unless config.json says null.
    window = raw.get("sliding_window", 4096 if family == "mistral" else None)
    if window is None or (family != "mistral" and not used):
        return None, []
    types = raw.get("layer_types")
    if types:
        if not isinstance(types, list) or len(types) != layers:
            raise ConfigError(
                f"{where}: layer_types = {_quoted(types)}: expected a list, one kind for each of "
                f"{layers} layers"
            )
        unknown = [kind for kind in types if kind not in ("full_attention", "sliding_attention")]
        if unknown:
            raise ConfigError(f"{where}: layer_types: kind {_quoted(unknown[0])} is not supported")
        full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    else:  # older Qwen configs: the first `max_window_layers` layers see everything
        first = raw.get("max_window_layers", layers)
        if type(first) is not int or first < 0:
            raise ConfigError(
                f"{where}: max_window_layers = {_quoted(first)}: expected a whole number"
            )
        full = [] if family == "mistral" else list(range(min(first, layers)))
    return (None, []) if len(full) == layers else (window, full)


def _rope(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Read `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5)."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        raise ConfigError(
            f"{where}: rope_parameters = {_quoted(scaling)}: expected one set of fields for all "
            "layers"
        )
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    base = scaling.get("rope_theta", raw.get("rope_theta", 10000.0))
    if kind not in ("default", "llama3", "yarn"):
        raise ConfigError(
            f"{where}: rope type {_quoted(kind)} is not supported; supported: default, llama3, yarn"
        )
    rope: dict[str, Any] = {"kind": kind, "base": base}
    if kind == "default":
        return rope
    if scaling.get("factor") is None:
        raise ConfigError(f"{where}: rope_scaling.factor is missing")
    rope["factor"] = scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or raw.get(
        "original_max_position_embeddings"
    )
    rope["original_max_positions"] = original or raw.get("max_position_embeddings")
    if kind == "yarn" and (scaling.get("mscale") or scaling.get("truncate") is False):
        raise ConfigError(f"{where}: rope_scaling fields mscale and truncate are not supported")
    for name in ROPE_FIELDS[kind]:  # others mean nothing to this kind
        if name not in rope and scaling.get(name) is not None:
            rope[name] = scaling[name]
    return rope


# ------------------------------------------------------------------------------------------ writing


def write_config(folder: Path, raw: dict[str, Any]) -> None:
    (folder / "config.json").write_text(
        json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def config_to_hf(model: ModelConfig) -> dict[str, Any]:
    """Make the fields of `config.json`, as transformers 4 writes them. `config_from_hf` of the
    result is `model` again.

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
            kinds = [
                "full_attention" if i in full else "sliding_attention"
                for i in range(model.num_layers)
            ]
            raw |= {"use_sliding_window": True, "layer_types": kinds}
    ttt = model.ttt
    if ttt.layers:
        if ttt.clip_norm is not None:
            raise ConfigError(
                f"config field model.ttt.clip_norm = {ttt.clip_norm:g}: the official format has "
                "no field for it"
            )
        raw |= {
            "ttt_mode": True,
            "ttt_layers": list(ttt.layers),
            "ttt_chunk": ttt.chunk_size,
            "ttt_lr": ttt.lr,
        }
        raw |= {"ttt_target": ttt.target, "ttt_proj": ttt.proj}
        # Left out where they say what the official code does, so that its checkpoints stay as they
        # are.
        own = {
            theirs: (getattr(ttt, ours), getattr(TTTConfig(), ours))
            for theirs, ours in _OWN_TTT_FIELDS.items()
        }
        raw |= {name: value for name, (value, default) in own.items() if value != default}
    return raw


def _family(model: ModelConfig) -> str:
    """Find the architecture whose features are exactly the model's."""
    window = model.sliding_window is not None
    if model.qk_norm and model.qkv_bias == model.o_bias and not model.mlp_bias:
        return "qwen3"
    if not model.qk_norm and model.qkv_bias and not model.o_bias and not model.mlp_bias:
        return "qwen2"
    if not model.qk_norm and model.qkv_bias == model.o_bias and not window:
        return "llama"
    if not (
        model.qk_norm
        or model.qkv_bias
        or model.o_bias
        or model.mlp_bias
        or model.full_attention_layers
    ):
        return "mistral"
    raise ConfigError(
        "config field model: no Hugging Face architecture has this combination of qk_norm, biases "
        f"and sliding windows (qk_norm {model.qk_norm}, qkv_bias {model.qkv_bias}, o_bias "
        f"{model.o_bias}, mlp_bias {model.mlp_bias}, sliding_window {model.sliding_window}, "
        f"full_attention_layers {list(model.full_attention_layers)})"
    )


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    rope = model.rope
    if rope.kind == "default":
        return None
    raw: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    raw["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "llama3":
        return raw | {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
        }
    raw |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    return (
        raw if rope.attention_factor is None else raw | {"attention_factor": rope.attention_factor}
    )
