"""Models from disk: for inference (`load_pretrained`) and as the start of a training run (`initial_model`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from ttt_jax.checkpoint import find_checkpoint, load_model_params, read_run_config
from ttt_jax.config import Config, ModelConfig
from ttt_jax.data.tokenizer import load_tokenizer
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.hf import load_hf, load_hf_into, load_into, read_config, tensor_names
from ttt_jax.model import Runtime, Transformer
from ttt_jax.model_folder import OrbaxTensors, check_layout, is_model_folder, read_description


def load_pretrained(path: str | Path, *, dtype: str = "float32", runtime: Runtime | None = None) -> Transformer:
    """Load a model for inference.

    Args:
      path: a Hugging Face folder (config.json, safetensors), a folder that `ttt-jax convert --to orbax` wrote, or a run folder
        of `train.py` (its newest checkpoint).
      dtype: dtype of the parameters.
      runtime: how to compute; None computes in `dtype`.

    Returns: a `Transformer` with `.config` and `.tokenizer` (None when the folder has no tokenizer.json).
    Raises: CheckpointError or ConfigError, one line, when the folder is missing, incomplete or not supported.
    """
    path, runtime = Path(path), runtime or Runtime(dtype=dtype)
    if not path.is_dir():
        raise CheckpointError(f"model {path}: no such folder; give a Hugging Face, converted or run folder")
    has_tokenizer = (path / "tokenizer.json").is_file()
    if is_model_folder(path):
        about = read_description(path)
        cfg, tokenizer = about.model, about.tokenizer or (str(path) if has_tokenizer else None)
        check_layout(path, jax.eval_shape(lambda: Transformer(cfg, runtime, key=jax.random.key(0))))
    elif (path / "config.json").is_file():
        model = load_hf(path, runtime, dtype=dtype)
        model.tokenizer = load_tokenizer(str(path)) if has_tokenizer else None
        return model
    else:
        config = read_run_config(path)
        cfg, tokenizer = config.model, config.data.tokenizer
    abstract = jax.eval_shape(lambda: Transformer(cfg, runtime, key=jax.random.key(0)))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract)
    model = load_model_params(path, abstract)
    model.tokenizer = load_tokenizer(tokenizer) if tokenizer is not None else None
    return model


def initial_model(config: Config, abstract: Transformer) -> Transformer | None:
    """The parameters that `config.init_from` names, placed like `abstract`; None for a random start.

    A Hugging Face folder without TTT parameters gets those of continual training, which leave its function unchanged.

    Raises: CheckpointError or ConfigError, one line, when the source is missing or does not fit `config.model`.
    """
    if config.init_from is None:
        return None
    source = Path(config.init_from)
    if not source.is_dir():
        raise CheckpointError(
            f"config field init_from = {config.init_from!r}: no such folder; give a Hugging Face or run folder, or null"
        )
    if is_model_folder(source):
        about = read_description(source)
        _check_same_model(config.model, about.model, config.init_from)
        stored = jax.eval_shape(lambda: Transformer(about.model, key=jax.random.key(0)))
        check_layout(source, stored)
        if tensor_names(stored) == tensor_names(abstract):
            return load_model_params(source, abstract)
        # Other TTT layers or windows group the layers otherwise: tensor by tensor.
        tensors = OrbaxTensors(find_checkpoint(source), stored)
        return load_into(abstract, tensors, config.init_from, key=jax.random.key(config.seed))
    if (source / "config.json").is_file():
        _check_same_model(config.model, read_config(source), config.init_from)
        return load_hf_into(abstract, source, key=jax.random.key(config.seed))
    return load_model_params(source, abstract)


def _check_same_model(wanted: ModelConfig, found: ModelConfig, where: str) -> None:
    """TTT settings, rope scaling and length may change in continual training; everything else is the checkpoint's."""
    free = ("ttt", "rope", "max_positions", "sliding_window", "full_attention_layers", "init_std")
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(wanted, field.name), getattr(found, field.name)
        if field.name not in free and ours != theirs:
            raise ConfigError(
                f"config field model.{field.name} = {ours}: {where} has {theirs}; set model.{field.name} to {theirs}"
            )
