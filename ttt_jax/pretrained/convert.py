"""`ttt-jax convert`: a model from one format to another, block by block.

Sources are Hugging Face folders, run folders of train.py and converted folders (model_folder.py),
all seen as a mapping from Hugging Face tensor names to rows. No more than a block of one tensor is
held at a time, so the peak of host memory is a fraction of a shard. The output appears complete or
not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ttt_jax.checkpoint.checksums import CHECKPOINT_FOLDER, write_checksums
from ttt_jax.checkpoint.parameters import find_checkpoint, load_model_params
from ttt_jax.config import ModelConfig, TTTConfig, from_dict, replace, to_dict, validate_model
from ttt_jax.data.tokenizer import load_tokenizer
from ttt_jax.errors import CheckpointError, ConfigError, VerificationError
from ttt_jax.files.reading import find_companion, list_names
from ttt_jax.files.text import sync, sync_tree
from ttt_jax.model.transformer import Transformer, abstract_transformer
from ttt_jax.pretrained.export import copy_companions, write_config
from ttt_jax.pretrained.hf_config import config_from_hf, config_to_hf, read_raw_config
from ttt_jax.pretrained.hf_weights import (
    abstract_model,
    check_tensors,
    fill,
    fresh_ttt_rows,
    tensor_names,
)
from ttt_jax.pretrained.orbax_folder import (
    Description,
    OrbaxTensors,
    OrbaxWriter,
    check_layout,
    is_model_folder,
    read_description,
    tensor_spec,
    write_description,
)
from ttt_jax.pretrained.safetensors_io import (
    TensorFiles,
    TensorSource,
    TensorSpec,
    all_finite,
    row_blocks,
    tensor_file_names,
    write_tensors,
)
from ttt_jax.progress import progress
from ttt_jax.run.folder import CONFIG_FILE, read_run_config

VERIFY_LIMIT = 1e-5  # relative RMS of the logits, when the dtype has not changed
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_VERIFY_CHUNK = 64


class Conversion(NamedTuple):
    """What a conversion did. `relative_rms` is None without `verify`."""

    tensors: int
    nbytes: int
    fresh: int  # TTT tensors that were initialised
    seconds: float
    relative_rms: float | None


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on disk, opened: its config and headers are read and checked, its tensors are not
    read yet.
    """

    kind: str  # "Hugging Face folder", "converted folder", "run folder"
    folder: Path
    model: ModelConfig
    hf_config: dict[str, Any] | None
    tensors: TensorSource
    abstract: Transformer
    block: int  # bytes to hold at once
    tokenizer: str | None  # "bytes", or where the tokenizer is


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: str,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    ttt: dict[str, Any] | None = None,
    seed: int = 0,
    verify: bool = False,
    overwrite: bool = False,
) -> Conversion:
    """Convert a model.

    Args:
      source: Hugging Face folder, converted folder, or run folder of train.py (or one of its
        checkpoints/STEP).
      output: folder to write; must not exist, unless `overwrite`.
      to: "orbax" (a folder for `load_pretrained` and `train.py --init_from`) or "hf".
      dtype: "float32" or "bfloat16"; None keeps every tensor's own.
      max_shard_bytes: of the safetensors files.
      ttt: fields of `TTTConfig`; a plain model gets these TTT layers, with the parameters of
        `fresh_ttt_rows`.
      seed: of those parameters.
      verify: compare the logits of both sides before the output appears. Needs memory for the whole
        model.

    Raises:
      ConfigError, CheckpointError: one line; the output is as it was before.
      VerificationError: the logits differ by more than `VERIFY_LIMIT` although the dtype is the
        same.
    """
    begin, output = time.monotonic(), Path(output)
    _check_output(output, Path(source), overwrite)
    if to not in ("hf", "orbax"):
        raise ConfigError(f"--to {to}: expected hf or orbax")
    if max_shard_bytes < 1:
        raise ConfigError(f"shard size = {max_shard_bytes} bytes: must be positive")
    opened = open_source(source)
    model = equip(opened.model, ttt, str(source))
    abstract = abstract_model(model, opened.tensors, str(source))
    names = [name for theirs in tensor_names(abstract).values() for name in theirs]
    fresh = {name for name in names if ".mlp.ttt_" in name} if model != opened.model else set()
    if any(name in opened.tensors for name in fresh):
        fresh = set()  # the tensors are there, only config.json does not say so
    # new targets need not follow the official code
    if fresh and "normalize_source" not in (ttt or {}):
        model = replace(model, {"ttt.normalize_source": True})
    check_tensors(abstract, opened.tensors, str(source), optional=fresh)
    tensors = _Equipped(opened.tensors, fresh, model, jax.random.key(seed))
    tied_head = abstract.head is None and _HEAD in opened.tensors
    if tied_head:
        _check_tied_head(opened)
    wanted = set(names) | ({_HEAD} if tied_head else set())
    specs = [tensor_spec(tensors, name, dtype) for name in tensors if name in wanted]
    _check_dtypes(specs, str(source))
    block = opened.block
    total = sum(spec.nbytes for spec in specs)
    raw = (
        _hf_config(opened, model, dtype or _common_dtype(specs))
        if to == "hf" or opened.hf_config is not None
        else None
    )
    rms = None
    with (
        _new_folder(output) as folder,
        progress(f"converting {opened.folder.name}", total, "bytes") as show,
    ):
        read = _Counter(show)
        rows = lambda spec: _blocks(tensors, spec, block, read, str(source))
        if to == "hf":
            assert raw is not None
            write_config(folder, raw)
            write_tensors(
                folder, specs, lambda spec: (array for _, array in rows(spec)), max_shard_bytes
            )
        else:
            stored = [spec for spec in specs if not (tied_head and spec.name == _HEAD)]
            dtypes = _stack_dtypes(abstract, stored)
            own = {
                spec.name: spec.dtype.name
                for spec in specs
                if spec.dtype != dtypes.get(spec.name, dtypes[_EMBED])
            }
            writer = OrbaxWriter(folder, abstract, dtypes, block)
            for spec in stored:
                for start, array in rows(spec):
                    writer.write(spec.name, start, array.astype(dtypes[spec.name], copy=False))
            tokenizer = "bytes" if opened.tokenizer == "bytes" else None
            write_description(folder, Description(model, raw, own, tied_head, tokenizer))
        write_checksums(folder, tensor_file_names(folder) if to == "hf" else None)
        if opened.tokenizer != "bytes":
            # without checksums, like config.json: people change them by hand
            copy_companions(opened.tokenizer, folder)
        if verify:
            rms = compare_logits(opened, open_source(folder))
            changed = any(spec.dtype != tensors.dtype(spec.name) for spec in specs)
            if not changed and not rms <= VERIFY_LIMIT:
                raise VerificationError(
                    f"output {output}: its logits differ from the source's by {rms:.1e} relative "
                    f"RMS (limit {VERIFY_LIMIT:g}); "
                    "not written; please report this"
                )
    return Conversion(len(specs), total, len(fresh), time.monotonic() - begin, rms)


# ------------------------------------------------------------------------------------------ sources


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
        about = read_description(folder)
        abstract = abstract_transformer(about.model)
        check_layout(folder, abstract)
        stored = OrbaxTensors(find_checkpoint(folder), abstract, about.dtypes, about.tied_head)
        tokenizer = about.tokenizer or str(folder)
        block = _block(stored.block_bytes)
        return Source(
            "converted folder",
            folder,
            about.model,
            about.hf_config,
            stored,
            abstract,
            block,
            tokenizer,
        )
    if find_companion(folder, "config.json") is not None:
        raw = read_raw_config(folder)
        model = config_from_hf(raw, str(folder / "config.json"))
        files = TensorFiles(folder)
        abstract, block = (
            abstract_model(model, files, str(folder)),
            _block(files.largest_file // 16),
        )
        return Source(
            "Hugging Face folder", folder, model, raw, files, abstract, block, str(folder)
        )
    run = folder
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
    load_tokenizer(config.data.tokenizer)  # said now rather than after the conversion
    block = _block(stored.block_bytes)
    return Source(
        "run folder", folder, config.model, None, stored, abstract, block, config.data.tokenizer
    )


def _block(nbytes: int) -> int:
    return max(1 << 18, min(64 << 20, nbytes))


def equip(model: ModelConfig, ttt: dict[str, Any] | None, where: str) -> ModelConfig:
    """The config with TTT layers added. Raises ConfigError when it has others already, or none are
    named.
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
    equipped = replace(model, {f"ttt.{name}": fields[name] for name in ttt})
    validate_model(equipped)
    return equipped


class _Equipped:
    """A source with fresh TTT tensors beside its own, in the dtype of their layer's
    down-projection.
    """

    def __init__(self, source: TensorSource, fresh: set[str], model: ModelConfig, key: jax.Array):
        self._source, self._fresh, self._model, self._key = source, fresh, model, key

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
        rows = fresh_ttt_rows(
            name, self._model.d_model, self._model.init_std, self._key, start, stop
        )
        return rows.astype(dtype)


def _check_tied_head(source: Source) -> None:
    """A tied head that is written out must be the embedding: the model has one array for both."""
    tensors = source.tensors
    same = tensors.shape(_HEAD) == tensors.shape(_EMBED) and tensors.dtype(_HEAD) is not None
    if same:
        for start, stop in row_blocks(tensors.shape(_EMBED), 4, source.block // 2):
            if not np.array_equal(
                tensors.read(_EMBED, start, stop), tensors.read(_HEAD, start, stop)
            ):
                same = False
                break
    if not same:
        raise CheckpointError(
            f"checkpoint {source.folder}: tie_word_embeddings is true, but {_HEAD} is not "
            f"{_EMBED}; "
            "correct config.json or remove the tensor"
        )


def _check_dtypes(specs: list[TensorSpec], where: str) -> None:
    wide = [spec.name for spec in specs if spec.dtype == np.float64]
    if wide:
        raise CheckpointError(
            f"checkpoint {where}: float64 tensors, choose --dtype float32 or bfloat16: "
            f"{list_names(wide)}"
        )


def _common_dtype(specs: list[TensorSpec]) -> str:
    """The dtype of most of the bytes, for config.json."""
    sizes: dict[str, int] = {}
    for spec in specs:
        sizes[spec.dtype.name] = sizes.get(spec.dtype.name, 0) + spec.nbytes
    return max(sizes, key=lambda name: sizes[name])


def _stack_dtypes(abstract: Transformer, specs: list[TensorSpec]) -> dict[str, np.dtype]:
    """Tensor -> dtype to store. A stack of layers has one: float32, which holds the others exactly,
    where they differ.
    """
    own = {spec.name: spec.dtype for spec in specs}
    stored = {}
    for names in tensor_names(abstract).values():
        kinds = {own[name] for name in names}
        stored |= dict.fromkeys(names, kinds.pop() if len(kinds) == 1 else np.dtype(np.float32))
    return stored


class _Counter:
    """Adds up what has been read, for the progress bar."""

    def __init__(self, show: Callable[[int], None]) -> None:
        self.show, self.done = show, 0

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        self.show(self.done)


def _blocks(
    tensors: TensorSource, spec: TensorSpec, block: int, read: _Counter, where: str
) -> Iterator[tuple[int, np.ndarray]]:
    own = tensors.dtype(spec.name)
    assert own is not None
    for start, stop in row_blocks(spec.shape, max(own.itemsize, spec.dtype.itemsize), block):
        rows = tensors.read(spec.name, start, stop)
        if rows.dtype != spec.dtype:
            with np.errstate(over="ignore"):
                rows = rows.astype(spec.dtype)
            if not all_finite(rows):
                raise CheckpointError(
                    f"checkpoint {where}: tensor {spec.name} does not fit into {spec.dtype.name}"
                )
        yield start, rows
        read.add(rows.nbytes)


def _hf_config(source: Source, model: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json: the source's own fields where it has them, ours otherwise."""
    ours = config_to_hf(model)
    if source.hf_config is None:
        return ours | {"dtype": dtype}
    # code is not carried along
    raw = {name: value for name, value in source.hf_config.items() if name != "auto_map"}
    if model != source.model:
        raw |= {name: value for name, value in ours.items() if name.startswith("ttt_")}
    for name in ("torch_dtype", "dtype"):  # transformers 4, 5
        if name in raw:
            raw[name] = dtype
    # a clip norm, say, that a converted folder's config was given by hand
    if config_from_hf(raw) != model:
        raise ConfigError(
            f"model {source.folder}: its hf_config does not describe its model; convert the "
            "original again"
        )
    return raw if "torch_dtype" in raw or "dtype" in raw else raw | {"dtype": dtype}


# ------------------------------------------------------------------------------------------- verify


def compare_logits(a: Source, b: Source) -> float:
    """Relative RMS of the logits of two models on random ids, computed in float32.

    Both run with a chunk of at most 64 tokens, so that the fast weights are updated twice on the
    way.
    """
    chunk = min(
        [
            _VERIFY_CHUNK,
            *(source.model.ttt.chunk_size for source in (a, b) if source.model.ttt.layers),
        ]
    )
    ids_BT = jax.random.randint(
        jax.random.key(0), (2, 2 * chunk + 17), 0, a.model.vocab_size, np.int32
    )

    def logits_BTV(source: Source) -> np.ndarray:
        config = replace(source.model, {"ttt.chunk_size": chunk})
        abstract = abstract_transformer(config)
        if isinstance(source.tensors, OrbaxTensors):  # through Orbax's own reader
            model = load_model_params(source.folder, abstract)
        else:
            model = fill(abstract, source.tensors.read)
        return np.asarray(_logits_BTV(model, ids_BT), np.float64)

    x_BTV = logits_BTV(a)
    return float(np.sqrt(np.mean((logits_BTV(b) - x_BTV) ** 2) / np.mean(x_BTV**2)))


@jax.jit  # one function: compiled once when both sides are the same model
def _logits_BTV(model: Transformer, ids_BT: jax.Array) -> jax.Array:
    return model.logits(model.hidden(ids_BT)[0])


# ------------------------------------------------------------------------------------------- output


def _check_output(output: Path, source: Path, overwrite: bool) -> None:
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise CheckpointError(
            f"output {output}: exists already; choose another folder, or add --overwrite to "
            "replace it"
        )
    if output.is_symlink() or not output.is_dir():
        raise CheckpointError(
            f"output {output}: not a folder; --overwrite replaces model folders only"
        )
    if source.exists() and source.resolve().is_relative_to(output.resolve()):
        raise CheckpointError(
            f"output {output}: replacing it would delete the source {source}; choose another folder"
        )
    hugging_face = (output / "config.json").is_file() and any(output.glob("*.safetensors"))
    if not (hugging_face or is_model_folder(output) or not any(output.iterdir())):
        raise CheckpointError(
            f"output {output}: not a model folder; --overwrite replaces model folders only"
        )


@contextlib.contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A temporary sibling that takes the output's place when all went well, and is removed
    otherwise.
    """
    output = output.absolute()
    parts = output.with_name(f".{output.name}.tmp-{os.getpid()}")
    old = output.with_name(f".{output.name}.old-{os.getpid()}")
    try:
        parts.mkdir(parents=True)
        yield parts
        sync_tree(parts)
        if os.path.lexists(output):  # checked before: --overwrite
            output.rename(old)
            try:
                parts.rename(output)
            except BaseException:
                old.rename(output)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            parts.rename(output)
        sync(output.parent)
    except BaseException as error:
        shutil.rmtree(parts, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise CheckpointError(
                f"output {output}: could not be written ({reason}); free space or choose another"
            ) from None
        raise
