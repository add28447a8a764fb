"""`ttt-jax convert`: a model from one format to another, block by block.

No more than a block of one tensor is held at a time, so the peak of host memory is a fraction of a
shard. The output appears complete or not at all.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ttt_jax.checkpoint.checksums import write_checksums
from ttt_jax.config import ModelConfig, TTTConfig, replace, to_dict
from ttt_jax.display.progress import progress
from ttt_jax.errors import CheckpointError, ConfigError, VerificationError
from ttt_jax.files.new_folder import new_folder
from ttt_jax.files.reading import list_names
from ttt_jax.model.transformer import Transformer, abstract_transformer
from ttt_jax.pretrained.calibration import OPTION, Calibration, calibrate, calibrated_fields
from ttt_jax.pretrained.companions import copy_companions, write_byte_tokenizer
from ttt_jax.pretrained.hf_config import config_from_hf, config_to_hf, write_config
from ttt_jax.pretrained.hf_weights import (
    abstract_model,
    check_tensors,
    fill,
    tensor_names,
    tensor_shapes,
)
from ttt_jax.pretrained.orbax_folder import OrbaxWriter
from ttt_jax.pretrained.orbax_layout import Description, is_model_folder, write_description
from ttt_jax.pretrained.safetensors_io import (
    DTYPES,
    TensorSpec,
    all_finite,
    row_blocks,
    tensor_file_names,
    write_tensors,
)
from ttt_jax.pretrained.source import (
    EMBED,
    HEAD,
    EquippedTensors,
    Source,
    check_tied_head,
    equip,
    open_source,
)
from ttt_jax.pretrained.verification import compare_logits

VERIFY_LIMIT = 1e-5  # relative RMS of the logits, when the dtype has not changed


class Conversion(NamedTuple):
    """What a conversion did. `relative_rms` is None without `verify`, `calibration` without a text.

    Fields:
      ttt: the fields of `TTTConfig` in the output.
      left: those that the source, which has no TTT layers, has otherwise without any use.
    """

    tensors: int
    nbytes: int
    fresh: int  # TTT tensors that were initialised
    seconds: float
    relative_rms: float | None
    ttt: TTTConfig
    calibration: Calibration | None = None
    left: dict[str, Any] = {}  # noqa: RUF012  (a NamedTuple's default)


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: str,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    ttt: dict[str, Any] | None = None,
    seed: int = 0,
    text: str | None = None,
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
      text: of `--ttt.calibrate`: the last layer gets TTT, with parameters that gain on this text
        (calibration.py); `to` must be "hf". Needs memory for the whole model.
      verify: compare the logits of both sides before the output appears. Needs memory for the whole
        model.

    Raises:
      ConfigError, CheckpointError: one line; the output is as it was before.
      UserError: likewise, for a text that is too short or that nothing gains on.
      VerificationError: the logits differ by more than `VERIFY_LIMIT` although the dtype is the
        same.
    """
    begin, output = time.monotonic(), Path(output)
    _check_output(output, Path(source), overwrite)
    if to not in ("hf", "orbax"):
        raise ConfigError(f"--to {to}: expected hf or orbax")
    if max_shard_bytes < 1:
        raise ConfigError(f"shard size = {max_shard_bytes} bytes: must be positive")
    if text is not None:
        _check_calibration(to, verify)
    work = _prepare(source, to, dtype, ttt, seed, calibrated=text is not None)
    found = None
    if text is not None:
        work, found = _calibrated(work, text, (ttt or {}).get("lr"))
    total = sum(spec.nbytes for spec in work.specs)
    title = f"converting {work.source.folder.name}"
    try:
        with new_folder(output, overwrite) as folder, progress(title, total, "bytes") as show:
            if to == "hf":
                _write_hf(work, folder, max_shard_bytes, _Counter(show))
            else:
                _write_orbax(work, folder, _Counter(show))
            if work.source.tokenizer != "bytes":
                # Without checksums, like config.json: people change them by hand.
                copy_companions(work.source.tokenizer, folder)
            elif to == "hf":
                write_byte_tokenizer(folder, work.model.vocab_size)
            rms = _verify(work, folder, output) if verify else None
    except OSError as error:
        raise CheckpointError(
            f"output {output.absolute()}: could not be written ({error.strerror or str(error)}); "
            "free space or choose another"
        ) from None
    seconds = time.monotonic() - begin
    has = work.model.ttt
    left = _left(work.source.model.ttt, has, ttt or {})
    return Conversion(len(work.specs), total, work.fresh, seconds, rms, has, found, left)


@dataclasses.dataclass(frozen=True)
class _Work:
    """A conversion whose source has been checked.

    Fields:
      where: the source, as the user names it.
      model: the config of the output; its TTT layers may be new.
      abstract: its structure.
      tensors: what is read, fresh tensors among them.
      specs: what is written.
      fresh: how many tensors are fresh.
      tied_head: the source holds its tied head as a tensor of its own.
      raw: the output's config.json; None: it has none.
    """

    where: str
    source: Source
    model: ModelConfig
    abstract: Transformer
    tensors: EquippedTensors
    specs: list[TensorSpec]
    fresh: int
    tied_head: bool
    raw: dict[str, Any] | None


def _prepare(
    path: str | Path,
    to: str,
    dtype: str | None,
    ttt: dict[str, Any] | None,
    seed: int,
    calibrated: bool = False,
) -> _Work:
    """Open the source and check everything that can be checked without reading its tensors, but for
    a tied head.

    Raises: ConfigError, CheckpointError.
    """
    where, source = str(path), open_source(path)
    if calibrated:
        ttt = calibrated_fields(ttt or {}, source.model, where)
    model = equip(source.model, ttt, where)
    abstract = abstract_model(model, source.tensors, where)
    names = tensor_shapes(abstract).keys()
    fresh = {name for name in names if ".mlp.ttt_" in name} if model != source.model else set()
    if any(name in source.tensors for name in fresh):
        fresh = set()  # the tensors are there, only config.json does not say so
    # New targets need not follow the official code.
    if fresh and "normalize_source" not in (ttt or {}):
        model = replace(model, {"ttt.normalize_source": True})
    check_tensors(abstract, source.tensors, where, optional=fresh)
    tensors = EquippedTensors(source.tensors, fresh, model, jax.random.key(seed))
    tied_head = abstract.head is None and HEAD in source.tensors
    if tied_head:
        check_tied_head(source)
    wanted = names | ({HEAD} if tied_head else set())
    specs = [_spec(tensors, name, dtype) for name in tensors if name in wanted]
    _check_dtypes(specs, where)
    raw = None
    if to == "hf" or source.hf_config is not None:
        raw = _hf_config(source, model, dtype or _common_dtype(specs))
    return _Work(where, source, model, abstract, tensors, specs, len(fresh), tied_head, raw)


def _left(had: TTTConfig, has: TTTConfig, named: Collection[str]) -> dict[str, Any]:
    """Fields that a source without TTT layers has otherwise than its output, though nobody has
    named them; those that are as they are by default are no news.
    """
    if had.layers or not has.layers:
        return {}
    was, now, default = to_dict(had), to_dict(has), to_dict(TTTConfig())
    return {k: v for k, v in was.items() if k not in named and v not in (now[k], default[k])}


def _check_calibration(to: str, verify: bool) -> None:
    """Raise ConfigError for what a calibrated start cannot be written as, or compared with."""
    if to != "hf":
        raise ConfigError(f"--to {to}: {OPTION} writes --to hf; convert its result once more")
    if verify:
        raise ConfigError(f"--verify: {OPTION} changes what the model computes; drop one of them")


def _calibrated(work: _Work, text: str, lr: float | None) -> tuple[_Work, Calibration]:
    """Find the new tensors and the inner learning rate on a text.

    Raises: UserError, see `calibrate`; CheckpointError when the tensors are in the source.
    """
    if not work.fresh:
        raise CheckpointError(f"{OPTION}: {work.where} has TTT tensors; start from the plain one")
    unit = abstract_transformer(replace(work.model, {"ttt.lr": 1.0}))
    dtypes = {spec.name: spec.dtype for spec in work.specs}
    name = f"model.layers.{work.model.num_layers - 1}.mlp.ttt_proj.weight"
    found = calibrate(
        lambda: fill(unit, work.tensors.read),
        work.model,
        text,
        work.source.tokenizer,
        lr,
        dtypes[name],
    )
    model = replace(work.model, {"ttt.lr": found.lr})
    values = {name: found.target_DD, name.replace("_proj", "_conv"): found.conv_D1K}
    assert work.raw is not None
    raw = work.raw | {"ttt_lr": found.lr, "ttt_calibration": found.provenance()}
    tensors = work.tensors.with_values(values)
    return dataclasses.replace(work, model=model, tensors=tensors, raw=raw), found


def _spec(tensors: EquippedTensors, name: str, dtype: str | None) -> TensorSpec:
    """Return name, shape and dtype of a tensor once it is cast to `dtype` (None: as it is)."""
    cast = tensors.dtype(name) if dtype is None else DTYPES[dtype]
    return TensorSpec(name, tensors.shape(name), cast)  # pyright: ignore[reportArgumentType]


def _write_hf(work: _Work, folder: Path, max_shard_bytes: int, read: _Counter) -> None:
    def rows(spec: TensorSpec) -> Iterator[np.ndarray]:
        return (array for _, array in _blocks(work, spec, read))

    assert work.raw is not None
    write_config(folder, work.raw)
    write_tensors(folder, work.specs, rows, max_shard_bytes)
    write_checksums(folder, tensor_file_names(folder))


def _write_orbax(work: _Work, folder: Path, read: _Counter) -> None:
    specs = [spec for spec in work.specs if not (work.tied_head and spec.name == HEAD)]
    dtypes = _stack_dtypes(work.abstract, specs)
    own = {
        spec.name: spec.dtype.name
        for spec in work.specs
        if spec.dtype != dtypes.get(spec.name, dtypes[EMBED])
    }
    writer = OrbaxWriter(folder, work.abstract, dtypes, work.source.block)
    for spec in specs:
        for start, array in _blocks(work, spec, read):
            writer.write(spec.name, start, array.astype(dtypes[spec.name], copy=False))
    tokenizer = "bytes" if work.source.tokenizer == "bytes" else None
    about = Description(work.model, work.raw, own, work.tied_head, tokenizer)
    write_description(folder, about)
    write_checksums(folder)


def _verify(work: _Work, folder: Path, output: Path) -> float:
    """Compare the logits of source and output. Raises VerificationError."""
    rms = compare_logits(work.source, open_source(folder))
    changed = any(spec.dtype != work.tensors.dtype(spec.name) for spec in work.specs)
    if not changed and not rms <= VERIFY_LIMIT:
        raise VerificationError(
            f"output {output}: its logits differ from the source's by {rms:.1e} relative "
            f"RMS (limit {VERIFY_LIMIT:g}); not written; please report this"
        )
    return rms


def _check_dtypes(specs: list[TensorSpec], where: str) -> None:
    wide = [spec.name for spec in specs if spec.dtype == np.float64]
    if wide:
        raise CheckpointError(
            f"checkpoint {where}: float64 tensors, choose --dtype float32 or bfloat16: "
            f"{list_names(wide)}"
        )


def _common_dtype(specs: list[TensorSpec]) -> str:
    """Return the dtype of most of the bytes, for config.json."""
    sizes: dict[str, int] = {}
    for spec in specs:
        sizes[spec.dtype.name] = sizes.get(spec.dtype.name, 0) + spec.nbytes
    return max(sizes, key=lambda name: sizes[name])


def _stack_dtypes(abstract: Transformer, specs: list[TensorSpec]) -> dict[str, np.dtype]:
    """Choose tensor -> dtype to store. A stack of layers has one: float32, which holds the others
    exactly, where they differ.
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


def _blocks(work: _Work, spec: TensorSpec, read: _Counter) -> Iterator[tuple[int, np.ndarray]]:
    """Read a tensor in the dtype to write: (first row, rows). Raises CheckpointError."""
    own = work.tensors.dtype(spec.name)
    assert own is not None
    itemsize = max(own.itemsize, spec.dtype.itemsize)
    for start, stop in row_blocks(spec.shape, itemsize, work.source.block):
        rows = work.tensors.read(spec.name, start, stop)
        if rows.dtype != spec.dtype:
            with np.errstate(over="ignore"):
                rows = rows.astype(spec.dtype)
            if not all_finite(rows):
                raise CheckpointError(
                    f"checkpoint {work.where}: tensor {spec.name} does not fit into "
                    f"{spec.dtype.name}"
                )
        yield start, rows
        read.add(rows.nbytes)


def _hf_config(source: Source, model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Make config.json: the source's own fields where it has them, ours otherwise."""
    ours = config_to_hf(model)
    if source.hf_config is None:
        return ours | {"dtype": dtype}
    # Code is not carried along.
    raw = {name: value for name, value in source.hf_config.items() if name != "auto_map"}
    if model != source.model:
        raw |= {name: value for name, value in ours.items() if name.startswith("ttt_")}
    for name in ("torch_dtype", "dtype"):  # transformers 4, 5
        if name in raw:
            raw[name] = dtype
    # A converted folder's config may have been given a clip norm, say, by hand.
    if config_from_hf(raw) != model:
        raise ConfigError(
            f"model {source.folder}: its hf_config does not describe its model; convert the "
            "original again"
        )
    return raw if "torch_dtype" in raw or "dtype" in raw else raw | {"dtype": dtype}


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
