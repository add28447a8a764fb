"""Where a run's first parameters come from: random, a Hugging Face folder, or another run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from ttt_jax.checkpoint import load_model_params
from ttt_jax.config import Config, ModelConfig
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.hf import load_hf_into, read_config
from ttt_jax.model import Transformer


def initial_model(config: Config, abstract: Transformer) -> Transformer | None:
    """The parameters that `config.init_from` names, placed like `abstract`; None for a random start.

    A Hugging Face folder without TTT parameters gets those of continual training, which leave its function unchanged.

    Raises: CheckpointError or ConfigError, one line, when the source is missing or does not fit `config.model`.
    """
    if config.init_from is None:
        return None
    source = Path(config.init_from)
    if not source.exists():
        raise CheckpointError(f"config field init_from = {config.init_from!r}: no such file or folder")
    if (source / "config.json").is_file():
        _check_same_model(config.model, read_config(source), config.init_from)
        model = load_hf_into(abstract, source, key=jax.random.key(config.seed))
    else:
        model = load_model_params(source, abstract)
    return model


def _check_same_model(wanted: ModelConfig, found: ModelConfig, where: str) -> None:
    """TTT settings, rope scaling and length may change in continual training; everything else is the checkpoint's."""
    free = ("ttt", "rope", "max_positions", "sliding_window", "full_attention_layers", "init_std")
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(wanted, field.name), getattr(found, field.name)
        if field.name not in free and ours != theirs:
            raise ConfigError(
                f"config field model.{field.name} = {ours}: {where} has {theirs}; set model.{field.name} to {theirs}"
            )


__all__: list[Any] = ["initial_model"]
