"""Checks the rules that span several fields of a config, before anything is compiled."""

from __future__ import annotations

import dataclasses
import re

from ttt_jax.config.fields import (
    OPEN_REMAT,
    REMAT_NAMES,
    ROPE_FIELDS,
    Config,
    MeshConfig,
    ModelConfig,
    RopeConfig,
    TTTConfig,
)
from ttt_jax.errors import ConfigError


def validate(config: Config) -> None:
    """Check every rule that spans several fields. Raises `ConfigError`; returns nothing."""
    validate_model(config.model)
    model, data, ttt = config.model, config.data, config.model.ttt
    if config.remat_save is not None and config.remat_save != OPEN_REMAT:
        for name in config.remat_save:
            if name not in REMAT_NAMES:
                raise ConfigError(
                    f"config field remat_save: unknown activation {name!r}; known: "
                    f"{', '.join(REMAT_NAMES)}, or auto alone"
                )
    if not re.fullmatch(r"[A-Za-z0-9._-]+", config.name) or config.name.startswith("."):
        raise ConfigError(
            f"config field name = {config.name!r}: use letters, digits, '.', '_' and '-' only"
        )
    _refuse_urls(config)
    _validate_mesh(config.mesh)
    if data.batch_size % config.optimizer.accumulate:
        raise ConfigError(
            f"config field optimizer.accumulate = {config.optimizer.accumulate}: "
            f"must divide data.batch_size = {data.batch_size}"
        )
    if ttt.layers and data.pack and data.seq_len % ttt.chunk_size:
        raise ConfigError(
            f"config field data.seq_len = {data.seq_len}: packed rows hold whole chunks; make it "
            "a multiple of "
            f"model.ttt.chunk_size = {ttt.chunk_size}, or set data.pack false"
        )
    validate_context(config, max(config.mesh.context, 1))
    if data.seq_len > model.max_positions:
        raise ConfigError(
            f"config field data.seq_len = {data.seq_len}: longer than model.max_positions = "
            f"{model.max_positions}; "
            "raise it (and scale model.rope) or shorten the rows"
        )
    if data.seq_len < 2:
        raise ConfigError(
            f"config field data.seq_len = {data.seq_len}: at least 2 tokens are needed to predict "
            "one"
        )
    guard = config.guard
    if guard.min_state_ratio >= guard.max_state_ratio:
        raise ConfigError(
            f"config field guard.min_state_ratio = {guard.min_state_ratio:g}: must be below "
            "guard.max_state_ratio = "
            f"{guard.max_state_ratio:g}"
        )
    opt = config.optimizer
    if opt.warmup_steps is not None and opt.warmup_steps >= config.steps:
        raise ConfigError(
            f"config field optimizer.warmup_steps = {opt.warmup_steps}: must be below steps = "
            f"{config.steps}"
        )
    for group in opt.groups:
        try:
            re.compile(group.pattern)
        except re.error as error:
            raise ConfigError(
                f"config field optimizer.groups pattern {group.pattern!r}: {error}"
            ) from None


def _refuse_urls(config: Config) -> None:
    """Raise ConfigError for paths on an object store in the fields that need a disk."""
    if config.checkpoint.copy_to == "":
        raise ConfigError(
            "config field checkpoint.copy_to = '': names no place; name a folder or a URL, or null"
        )
    local = "copy it to a disk, and name it there"
    for field, value, fix in (
        (
            "runs_dir",
            config.runs_dir,
            "a run folder holds a lock and files that grow, so it needs a disk; set "
            "checkpoint.copy_to to this place, and runs_dir to a folder",
        ),
        ("init_from", config.init_from, local),
        ("data.tokenizer", config.data.tokenizer, local),
        ("compile_cache", config.compile_cache, "name a folder on a disk, run, or null"),
    ):
        if value is not None and "://" in value:
            raise ConfigError(f"config field {field} = {value!r}: is a URL; {fix}")


def _validate_mesh(mesh: MeshConfig) -> None:
    sizes = dataclasses.asdict(mesh)
    for axis, size in sizes.items():
        if size == 0 or size < -1:
            raise ConfigError(
                f"config field mesh.{axis} = {size}: must be positive, or -1 for what is left"
            )
    if sum(size == -1 for size in sizes.values()) > 1:
        raise ConfigError(f"config field mesh: only one axis may be -1, got {sizes}")


def validate_context(config: Config, shards: int) -> None:
    """Check that rows split into `shards` equal parts of whole chunks. Raises `ConfigError`."""
    seq_len, ttt = config.data.seq_len, config.model.ttt
    if shards > 1 and ttt.layers and seq_len % (shards * ttt.chunk_size):
        raise ConfigError(
            f"config field mesh.context = {shards}: each context shard must hold whole chunks, but "
            f"data.seq_len = {seq_len} gives {seq_len / shards:g} tokens a shard and "
            f"model.ttt.chunk_size = {ttt.chunk_size}"
        )
    if seq_len % shards:
        raise ConfigError(
            f"config field mesh.context = {shards}: does not divide data.seq_len = {seq_len}; "
            f"make data.seq_len a multiple of {shards} or change mesh.context"
        )


def validate_model(model: ModelConfig) -> None:
    """Check the rules inside `ModelConfig`, shared by training, conversion and inference. Raises
    `ConfigError`.
    """
    if model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"config field model.num_kv_heads = {model.num_kv_heads}: must divide model.num_heads "
            f"= {model.num_heads}"
        )
    if model.head_dim % 2:
        raise ConfigError(
            f"config field model.head_dim = {model.head_dim}: rotary embedding needs an even size"
        )
    for name, layers in (
        ("ttt.layers", model.ttt.layers),
        ("full_attention_layers", model.full_attention_layers),
    ):
        for layer in layers:
            if layer >= model.num_layers:
                raise ConfigError(
                    f"config field model.{name}: layer {layer} does not exist in a model of "
                    f"{model.num_layers} layers "
                    f"(0 to {model.num_layers - 1})"
                )
        if len(set(layers)) != len(layers):
            raise ConfigError(
                f"config field model.{name} = {list(layers)}: a layer is listed twice"
            )
    if model.full_attention_layers and model.sliding_window is None:
        raise ConfigError(
            "config field model.full_attention_layers: has no effect without "
            "model.sliding_window; set one"
        )
    _refuse_without_effect(model)
    _validate_read_cap(model.ttt)
    _validate_rope(model.rope)


def _validate_read_cap(ttt: TTTConfig) -> None:
    """Check that a limit on the read can be computed with in float32, and has an effect."""
    if ttt.read_cap is None:
        return
    if not 1e-6 <= ttt.read_cap <= 1e6:
        raise ConfigError(
            f"config field model.ttt.read_cap = {ttt.read_cap:g}: must be from 1e-6 to 1e6; leave "
            "it out for no limit"
        )
    if ttt.apply != "split":
        raise ConfigError(
            f"config field model.ttt.apply = {ttt.apply}: has no effect with model.ttt.read_cap, "
            "which reads S by itself; leave one of them out"
        )
    if ttt.implementation == "triton":
        raise ConfigError(
            "config field model.ttt.implementation = triton: does not read S by itself, which "
            "model.ttt.read_cap needs; leave one of them out"
        )


def _validate_rope(rope: RopeConfig) -> None:
    if rope.base <= 1:
        raise ConfigError(f"config field model.rope.base = {rope.base:g}: must be above 1")
    if rope.kind == "default":
        return
    if rope.original_max_positions is None:
        raise ConfigError(
            f"config field model.rope.original_max_positions: required for rope kind {rope.kind!r}"
        )
    if rope.factor < 1:
        raise ConfigError(
            f"config field model.rope.factor = {rope.factor:g}: must be at least 1; it lengthens "
            "the context"
        )
    if rope.kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise ConfigError(
            f"config field model.rope.low_freq_factor = {rope.low_freq_factor:g}: must be below "
            f"model.rope.high_freq_factor = {rope.high_freq_factor:g}"
        )
    if rope.kind == "yarn" and rope.beta_slow > rope.beta_fast:
        raise ConfigError(
            f"config field model.rope.beta_slow = {rope.beta_slow:g}: must not be above "
            f"model.rope.beta_fast = {rope.beta_fast:g}"
        )


def _refuse_without_effect(model: ModelConfig) -> None:
    """Raise ConfigError for fields that were set, and that another field leaves without effect."""
    rope, ttt = model.rope, model.ttt
    for field in dataclasses.fields(rope):
        name, value = field.name, getattr(rope, field.name)
        used = name in ("kind", "base", *ROPE_FIELDS[rope.kind])
        if not used and value != field.default:
            using = " or ".join(kind for kind in ("yarn", "llama3") if name in ROPE_FIELDS[kind])
            raise ConfigError(
                f"config field model.rope.{name} = {value}: has no effect with "
                f"model.rope.kind = {rope.kind}; set that to {using}, or leave this out"
            )
    if ttt.layers and ttt.write != "ridge" and ttt.ridge != type(ttt).ridge:
        raise ConfigError(
            f"config field model.ttt.ridge = {ttt.ridge:g}: has no effect with model.ttt.write = "
            f"{ttt.write}; set that to ridge, or leave this out"
        )
