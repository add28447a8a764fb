"""Models from disk: for inference (`load_pretrained`) and as the start of a training run (`initial_model`)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax

from ttt_jax.checkpoint import load_model_params, read_run_config
from ttt_jax.config import Config, ModelConfig
from ttt_jax.data.tokenizer import load_tokenizer
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.hf import load_hf, load_hf_into, read_config
from ttt_jax.model import Runtime, Transformer


def load_pretrained(path: str | Path, *, dtype: str = "float32", runtime: Runtime | None = None) -> Transformer:
    """Load a model for inference.

    Args:
      path: a Hugging Face folder (config.json, safetensors), or a run folder of `train.py` (its newest checkpoint).
      dtype: dtype of the parameters.
      runtime: how to compute; None computes in `dtype`.

    Returns: a `Transformer` with `.config` and `.tokenizer` (None when the folder has no tokenizer.json).
    Raises: CheckpointError or ConfigError, one line, when the folder is missing, incomplete or not supported.
    """
    path, runtime = Path(path), runtime or Runtime(dtype=dtype)
    if not path.is_dir():
        raise CheckpointError(f"model {path}: no such folder; give a Hugging Face folder or a run folder")
    if (path / "config.json").is_file():
        model = load_hf(path, runtime, dtype=dtype)
        model.tokenizer = load_tokenizer(str(path)) if (path / "tokenizer.json").is_file() else None
        model.eos_ids = read_eos_ids(path)
        return model
    config = read_run_config(path)
    abstract = jax.eval_shape(lambda: Transformer(config.model, runtime, key=jax.random.key(0)))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract)
    model = load_model_params(path, abstract)
    model.tokenizer = load_tokenizer(config.data.tokenizer)
    return model


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """The end tokens of `generation_config.json`, else of `config.json`; none when neither names one.

    Raises: CheckpointError when the file is not JSON or the field not a token id or a list of them.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            found = raw.get("eos_token_id") if isinstance(raw, dict) else None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not readable JSON ({error}); restore it or delete it") from None
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise CheckpointError(f"{path}: eos_token_id = {found!r}: must be a token id or a list of them")
        return tuple(ids)
    return ()


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
