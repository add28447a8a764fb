"""What `ttt-jax convert` reads: Hugging Face folders, run folders of train.py and converted
folders, all seen as a mapping from Hugging Face tensor names to rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ttt_jax.checkpoint.checksums import CHECKPOINT_FOLDER
from ttt_jax.checkpoint.parameters import find_checkpoint
from ttt_jax.config import ModelConfig, TTTConfig, from_dict, replace, to_dict, validate_model
from ttt_jax.data.tokenizer import load_tokenizer
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.files.reading import find_companion
from ttt_jax.model.transformer import Transformer, abstract_transformer
from ttt_jax.pretrained.companions import tokenizer_of_run
from ttt_jax.pretrained.hf_config import config_from_hf, read_raw_config
from ttt_jax.pretrained.hf_weights import abstract_model, fresh_ttt_rows
from ttt_jax.pretrained.orbax_folder import OrbaxTensors
from ttt_jax.pretrained.orbax_layout import check_layout, is_model_folder, read_description
from ttt_jax.pretrained.safetensors_io import TensorFiles, TensorSource, row_blocks
from ttt_jax.run.folder import CONFIG_FILE, read_run_config

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on disk, opened: its config and headers are read and checked, its tensors are not
    read yet.
    """

    folder: Path
    model: ModelConfig
    hf_config: dict[str, Any] | None
    tensors: TensorSource
    abstract: Transformer
    block: int  # bytes to hold at once
    tokenizer: str | None  # "bytes", or where the tokenizer is


def open_source(path: str | Path) -> Source:
    """Open a Hugging Face, converted or run folder. Raises CheckpointError or ConfigError, one
    line.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(
            f"model {path}: no such folder; give a Hugging Face folder, a converted folder or a "
            "run folder"
        )
    if is_model_folder(folder):
        return _open_converted(folder)
    if find_companion(folder, "config.json") is not None:
        return _open_hugging_face(folder)
    return _open_run(path)


def _open_converted(folder: Path) -> Source:
    about = read_description(folder)
    abstract = abstract_transformer(about.model)
    check_layout(folder, abstract)
    stored = OrbaxTensors(find_checkpoint(folder), abstract, about.dtypes, about.tied_head)
    return Source(
        folder,
        about.model,
        about.hf_config,
        stored,
        abstract,
        _block(stored.block_bytes),
        about.tokenizer or str(folder),
    )


def _open_hugging_face(folder: Path) -> Source:
    raw = read_raw_config(folder)
    model = config_from_hf(raw, str(folder / "config.json"))
    files = TensorFiles(folder)
    abstract = abstract_model(model, files, str(folder))
    block = _block(files.largest_file // 16)
    return Source(folder, model, raw, files, abstract, block, str(folder))


def _open_run(path: str | Path) -> Source:
    run = folder = Path(path)
    if not (run / CONFIG_FILE).is_file() and folder.absolute().parent.name == CHECKPOINT_FOLDER:
        run = folder.absolute().parent.parent
    if not (run / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"model {path}: holds no config.json, ttt_jax.json or {CONFIG_FILE}; give a model or "
            "run folder"
        )
    config = read_run_config(run)
    validate_model(config.model)
    abstract = abstract_transformer(config.model)
    stored = OrbaxTensors(find_checkpoint(folder), abstract)
    tokenizer = tokenizer_of_run(run, config)
    load_tokenizer(tokenizer)  # said now rather than after the conversion
    block = _block(stored.block_bytes)
    return Source(folder, config.model, None, stored, abstract, block, tokenizer)


def _block(nbytes: int) -> int:
    return max(1 << 18, min(64 << 20, nbytes))


def equip(model: ModelConfig, ttt: dict[str, Any] | None, where: str) -> ModelConfig:
    """Add TTT layers to the config. Fields that are not named are `TTTConfig`'s own, whatever the
    config of a model without TTT layers says. Raises ConfigError when it has others already, or
    none are named.
    """
    if not ttt:
        return model
    fields = to_dict(from_dict(TTTConfig, ttt))
    if model.ttt.layers:
        has = to_dict(model.ttt)
        for name in ttt:
            if fields[name] != has[name]:
                raise ConfigError(
                    f"--ttt.{name} {fields[name]}: {where} has TTT parameters already, with "
                    f"ttt.{name} = {has[name]}; "
                    "leave the option out, or start from the plain checkpoint"
                )
        return model
    if not fields["layers"]:
        raise ConfigError(
            f"--ttt.{next(iter(ttt))}: {where} has no TTT layers; name them with --ttt.layers "
            "0,6,12"
        )
    equipped = replace(model, {"ttt": fields})
    validate_model(equipped)
    return equipped


class EquippedTensors:
    """A source with fresh TTT tensors beside its own, in the dtype of their layer's
    down-projection.
    """

    def __init__(self, source: TensorSource, fresh: set[str], model: ModelConfig, key: jax.Array):
        self._source, self._fresh, self._model, self._key = source, fresh, model, key
        self._values: dict[str, np.ndarray] = {}

    def with_values(self, values: dict[str, np.ndarray]) -> EquippedTensors:
        """The same with these values of fresh tensors, in place of those of `fresh_ttt_rows`."""
        new = EquippedTensors(self._source, self._fresh, self._model, self._key)
        new._values = values
        return new

    def __iter__(self) -> Iterator[str]:
        yield from self._source
        yield from sorted(self._fresh)

    def __contains__(self, name: object) -> bool:
        return name in self._fresh or name in self._source

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._fresh:
            return self._source.shape(name)
        rows = fresh_ttt_rows(name, self._model.d_model, 0.0, self._key, 0, 1)
        return (self._model.d_model, *rows.shape[1:])

    def dtype(self, name: str) -> np.dtype | None:
        if name in self._fresh:
            name = name.rpartition(".ttt_")[0] + ".down_proj.weight"
        return self._source.dtype(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        if name not in self._fresh:
            return self._source.read(name, start, stop)
        dtype = self.dtype(name)
        assert dtype is not None
        if name in self._values:
            return self._values[name][start:stop].astype(dtype)
        rows = fresh_ttt_rows(
            name, self._model.d_model, self._model.init_std, self._key, start, stop
        )
        return rows.astype(dtype)


def check_tied_head(source: Source) -> None:
    """Check that a tied head that is written out is the embedding: the model has one array for
    both.
    """
    tensors = source.tensors
    same = tensors.shape(HEAD) == tensors.shape(EMBED) and tensors.dtype(HEAD) is not None
    if same:
        for start, stop in row_blocks(tensors.shape(EMBED), 4, source.block // 2):
            if not np.array_equal(
                tensors.read(EMBED, start, stop), tensors.read(HEAD, start, stop)
            ):
                same = False
                break
    if not same:
        raise CheckpointError(
            f"checkpoint {source.folder}: tie_word_embeddings is true, but {HEAD} is not {EMBED}; "
            "correct config.json or remove the tensor"
        )
