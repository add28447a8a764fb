"""Configuration: frozen dataclasses, YAML presets, dotted overrides, validation.

A run is described by one `Config`. It is read from a YAML file (`load_config`), changed by dotted overrides
(`--model.ttt.chunk_size 512`) and checked completely before anything is compiled. pydantic does the type checks; rules
that span several fields are in the `validate` functions. This module imports no jax, so that `--help` is instant.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ttt_jax.config.yaml_text import MAX_YAML_BYTES as MAX_YAML_BYTES
from ttt_jax.config.yaml_text import NULLS
from ttt_jax.config.yaml_text import parse_yaml as parse_yaml
from ttt_jax.errors import ConfigError

T = typing.TypeVar("T")
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _as_list(value: Any) -> Any:
    """Let a command line write a list as `0,6,12` or as its only item."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")] if value else []
    return [value] if isinstance(value, int | float) else value


Layers = Annotated[tuple[NonNegative, ...], BeforeValidator(_as_list)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_list)]

REMAT_NAMES = ("attention", "qkv", "attention_out", "mlp_gate", "mlp_up", "mlp_hidden", "ttt_target")


@dataclass(frozen=True, config=_STRICT)
class TTTConfig:
    """In-Place TTT (arXiv 2604.06169, section 3): which layers adapt, and how."""

    layers: Layers = ()  # indices of the layers whose down-projection is a fast weight
    chunk_size: Positive = 4096  # C, tokens between two updates; packed documents start at its multiples, also without layers
    lr: float = 3.0  # inner learning rate
    target: Literal["hidden_states", "input_embed"] = "hidden_states"  # source of the target: MLP input or embeddings
    proj: bool = True  # multiply the convolved source by W_target
    normalize_source: bool = False  # divide the source by its rms, so that lr means the same for every model
    write: Literal["sum", "ridge", "spectral"] = "sum"  # what a chunk writes for its targets (docs/writes.md)
    ridge: PositiveFloat = 1.0  # lambda of the ridge write, relative to the mean squared norm of a chunk's keys
    clip_norm: PositiveFloat | None = None  # rescale each chunk's update to this Frobenius norm when it exceeds it
    implementation: Literal["reference", "xla", "pallas_tpu", "pallas_gpu", "triton"] | None = None  # None: the fastest


@dataclass(frozen=True, config=_STRICT)
class RopeConfig:
    """Rotary position embedding; the scaled kinds follow Hugging Face's `rope_scaling` fields."""

    kind: Literal["default", "llama3", "yarn"] = "default"
    base: PositiveFloat = 10000.0
    factor: PositiveFloat = 1.0
    original_max_positions: Positive | None = None  # context length of the unscaled model (llama3, yarn)
    low_freq_factor: PositiveFloat = 1.0  # llama3
    high_freq_factor: PositiveFloat = 4.0  # llama3
    beta_fast: PositiveFloat = 32.0  # yarn
    beta_slow: PositiveFloat = 1.0  # yarn
    attention_factor: PositiveFloat | None = None  # yarn; None: 0.1 ln(factor) + 1


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """A decoder-only Transformer of the LLaMA / Qwen family with In-Place TTT on some layers."""

    vocab_size: Positive = 257
    d_model: Positive = 256
    num_layers: Positive = 4
    num_heads: Positive = 4
    num_kv_heads: Positive = 4
    head_dim: Positive = 64
    d_ff: Positive = 768
    norm_eps: PositiveFloat = 1e-6
    max_positions: Positive = 32768
    rope: RopeConfig = RopeConfig()
    qk_norm: bool = False  # Qwen3: RMSNorm on every query and key head
    qkv_bias: bool = False  # Qwen2.5
    o_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = True
    sliding_window: Positive | None = None  # tokens a query sees, itself included
    full_attention_layers: Layers = ()  # layers that ignore `sliding_window`
    init_std: PositiveFloat = 0.02
    ttt: TTTConfig = TTTConfig()

    @property
    def known_positions(self) -> int:
        """Positions that the model was made for. With scaled RoPE a checkpoint may state the length before it (Qwen3 does)."""
        return max(self.max_positions, int(self.rope.factor * (self.rope.original_max_positions or 0)))


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """Where the tokens come from and how they become [batch_size, seq_len] rows."""

    train: Names = ("stdlib",)  # files or folders; "stdlib": Python's own source
    heldout: Names = ()  # (): hold out documents of `train`
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    format: Literal["auto", "text", "jsonl", "parquet", "arrayrecord", "npy"] = "auto"
    text_field: str = "text"  # field or column that holds the text (JSONL, Parquet)
    tokenizer: str = "bytes"  # "bytes", or a tokenizer.json / a folder that holds one
    eos: bool = True  # end every text with the tokenizer's end-of-text token; token ids are taken as they are
    seq_len: Positive = 2048  # T
    batch_size: Positive = 8  # B, rows per step over all hosts
    min_document: NonNegative = 0  # shorter documents (tokens) are dropped
    pack: bool = True  # several documents per row, each starting on a chunk boundary; False: one document per row
    shuffle: bool = True
    workers: NonNegative = 0  # grain worker processes
    max_bad_records: Fraction = 0.01  # share of malformed records that are left out and listed; more of them stop the run
    max_record_bytes: Positive = 1 << 30  # a longer record is malformed


@dataclass(frozen=True, config=_STRICT)
class ParamGroup:
    """Settings for the parameters whose path matches `pattern` (re.search); the first matching group counts."""

    pattern: str
    lr_multiplier: NonNegativeFloat = 1.0
    frozen: bool = False
    weight_decay: bool | None = None  # None: decay matrices, not vectors


@dataclass(frozen=True, config=_STRICT)
class OptimizerConfig:
    """optax AdamW on float32 master weights."""

    lr: PositiveFloat = 3e-4
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: NonNegative | None = None  # None: warmup_ratio * steps
    warmup_ratio: Fraction = 0.02
    decay_ratio: Fraction = 0.2  # wsd: share of the steps in the final decay
    final_lr_ratio: Fraction = 0.1
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    clip_norm: PositiveFloat | None = 1.0  # global gradient norm
    accumulate: Positive = 1  # micro-batches per step; divides data.batch_size
    ttt_lr_warmup_steps: NonNegative = 0  # raise the inner learning rate linearly from 0 over these steps
    ttt_drop: Fraction = 0.0  # share of the steps, at random, that train with TTT off: a model that works both ways
    groups: tuple[ParamGroup, ...] = ()

    def warmup(self, steps: int) -> int:
        """Length of the learning rate's warm-up in a run of `steps` steps."""
        return round(self.warmup_ratio * steps) if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True, config=_STRICT)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 (what is left)."""

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1


@dataclass(frozen=True, config=_STRICT)
class CheckpointConfig:
    every: NonNegative = 500  # steps between checkpoints; 0: only at the end
    keep: Positive = 2
    async_save: bool = True
    wait_for_space: NonNegative = 600  # seconds for which the end of a run waits for disk space


@dataclass(frozen=True, config=_STRICT)
class GuardConfig:
    """What happens when a step is not finite, and when fast weights leave their range (docs/robustness.md)."""

    skips: Positive = 5  # skipped steps in a row after which the run goes back to its last good checkpoint
    rollbacks: NonNegative = 3  # times that a run goes back before it stops; raise it to let a stopped run go on
    min_state_ratio: NonNegativeFloat = 1e-6  # warn when ||S||/||W|| of a TTT layer falls below it (collapse)
    max_state_ratio: PositiveFloat = 3.0  # warn when it exceeds this (explosion); model.ttt.clip_norm limits each update


@dataclass(frozen=True, config=_STRICT)
class LogConfig:
    every: Positive = 10
    documents: bool = False  # write which documents each step held to documents.jsonl
    probe_every: NonNegative = 100  # steps between two measurements of TTT on held-out rows (docs/telemetry.md); 0: never
    tensorboard: bool = True
    wandb: str | None = None  # project name; None: off


@dataclass(frozen=True, config=_STRICT)
class EvalConfig:
    """Held-out loss by position, TTT on and off on the same weights, at the end (and every `every` steps)."""

    every: NonNegative = 0
    rows: Positive = 16  # held-out rows used
    buckets: Positive = 8  # position buckets of equal length


@dataclass(frozen=True, config=_STRICT)
class Config:
    """One training run."""

    name: str = "default"
    runs_dir: str = "runs"
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    steps: Positive = 100
    compile_cache: str | None = "run"  # where compiled programs are kept: "run": in the run folder; a folder; null: nowhere
    init_from: str | None = None  # Hugging Face folder or run folder to start from; None: from scratch
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    # Which activations the backward pass keeps (see REMAT_NAMES); () recomputes all, None keeps all.
    remat_save: Names | None = ()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name


# --------------------------------------------------------------------------------------------------------- reading


def load_config(path: str | Path | None = None, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML preset, apply dotted overrides, validate.

    Args:
      path: YAML file; None takes `configs/default.yaml`'s place with the dataclass defaults.
      overrides: command-line words, `--a.b value` or `--a.b=value`. A text field takes the word as
        it is written (`off`, `123`), without quotes around it; other values are YAML (`[0,6,12]`,
        `null`, `1e-4`). Of two for one field the last counts.

    Raises:
      ConfigError: one line naming the field, the value and the fix.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read_yaml(Path(path))
    for key, value in parse_overrides(overrides):
        _assign(tree, key, value)
    config = from_dict(Config, tree)
    validate(config)
    return config


def from_dict(cls: type[T], tree: dict[str, Any]) -> T:
    """Build a config dataclass from nested dictionaries; a wrong field is a one-line `ConfigError`."""
    _refuse_switches(cls, tree, "")
    try:
        return _adapter(cls).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(_explain(cls, error)) from None


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_dict`: plain dictionaries, lists and scalars that YAML and JSON can hold."""
    return _adapter(type(config)).dump_python(config, mode="json")


def _as_written(cls: type, field: str, word: str) -> bool:
    """Whether a word is a text field's value. `off` of a field that may be null is not: it could
    mean either.
    """
    hint = _hint(cls, field)
    switched = (
        _takes(hint, type(None))
        and not _takes(hint, tuple)
        and word.lower() in ("off", "no", "false")
    )
    return _takes(hint, str) and not switched


def _refuse_switches(kind: Any, value: Any, name: str) -> None:
    """Raise ConfigError for a boolean (`yes`, `on`) in the place of a number, which pydantic would
    take for 1 or 0.
    """
    if isinstance(value, bool) and not _takes(kind, bool):
        fix = (
            "write null for none, or the word in quotes"
            if _takes(kind, type(None))
            else "the field is none"
        )
        raise ConfigError(
            f"config field {name} = {str(value).lower()}: a switch (yes, no, on, off, true, "
            f"false); {fix}"
        )
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        for key, item in value.items():
            _refuse_switches(
                _hint(typing.cast(type, kind), str(key)),
                item,
                f"{name}.{key}" if name else str(key),
            )
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            group = next((k for k in _kinds(kind) if dataclasses.is_dataclass(k)), kind)
            _refuse_switches(group, item, f"{name}.{number}")


def _hint(cls: type, field: str) -> Any:
    """The type of a dotted field below `cls`, items of a list under the list's name; None when
    there is no such field.
    """
    kind: Any = cls
    for part in field.split("."):
        group = next((k for k in _kinds(kind) if dataclasses.is_dataclass(k)), None)
        kind = _hints(group).get(part) if group is not None else None
    return kind


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _takes(kind: Any, wanted: type) -> bool:
    """Whether a field of this type holds a `wanted`, by itself or in a list."""
    return wanted in _kinds(kind)


@functools.cache
def _kinds(kind: Any) -> frozenset[Any]:
    """The classes that a type is made of: `tuple[str, ...] | None` is tuple, str and NoneType; a
    Literal, its values' types.
    """
    if typing.get_origin(kind) is Literal:
        return frozenset(type(value) for value in typing.get_args(kind))
    found = {typing.get_origin(kind) or kind}
    for part in typing.get_args(kind):
        found |= _kinds(part)
    return frozenset(found - {types.UnionType, typing.Union, Ellipsis})


@functools.cache
def _adapter(cls: type) -> TypeAdapter:
    return TypeAdapter(cls)


def dump_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def replace(config: Any, changes: dict[str, Any]) -> Any:
    """A copy of a config with dotted fields replaced, e.g. `replace(cfg, {"model.ttt.lr": 1.0})`."""
    tree = to_dict(config)
    for key, value in changes.items():
        _assign(tree, key, value)
    return from_dict(type(config), tree)


def parse_overrides(words: typing.Sequence[str], cls: type = Config) -> list[tuple[str, Any]]:
    """`["--a.b", "1", "--c=x"]` -> `[("a.b", 1), ("c", "x")]`, with the fields of `cls` for what is
    a text.
    """
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"argument {word!r}: overrides are written --field.name VALUE (see --help)")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"argument {word!r} has no value: write {word} VALUE")
            value = rest.pop(0)
        key = key.replace("-", "_")
        pairs.append((key, _scalar(key, value, cls)))
    return pairs


def fields_help(cls: type = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """`(dotted name, type, default)` for every field below `cls`, for `--help`."""
    rows = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            rows += fields_help(hints[field.name], name + ".")
        else:
            rows.append((name, str(field.type), repr(field.default)))
    return rows


def _scalar(key: str, word: str, cls: type) -> Any:
    """The value of a word of the command line: of a text field the word itself, else YAML."""
    hint = _hint(cls, key)
    if _takes(hint, str):
        quoted = len(word) > 1 and word[0] == word[-1] and word[0] in "'\""
        optional = _takes(hint, type(None)) and word in NULLS
        listed = _takes(hint, tuple) and word.startswith("[")
        if not quoted and not optional and not listed and _as_written(cls, key, word):
            return word
    try:
        return parse_yaml(
            word, lambda field, word: _as_written(cls, f"{key}.{field}" if field else key, word)
        )
    except yaml.YAMLError as error:
        twice = str(error).partition(": ")[2] if "given twice" in str(error) else ""
        raise ConfigError(
            f"--{key} {word[:60]!r}: {twice or 'not a YAML value; quote it or check its brackets'}"
        ) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if not os.path.isfile(path):  # False, not an error, for names that no file system takes
        presets = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))) or f"no YAML file in {path.parent}"
        raise ConfigError(f"config {path}: no such file (there: {presets})")
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"config {path}: more than {MAX_YAML_BYTES} bytes; give a config")
        tree = parse_yaml(
            path.read_text(encoding="utf-8"), lambda *place: _as_written(Config, *place)
        )
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"config {path}: not valid YAML: {' '.join(str(error).split())}"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"config {path}: cannot be read ({error.strerror}); give a YAML file"
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path}: the top level must be a mapping of fields, not {type(tree).__name__}")
    return tree


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--{key}: {'.'.join(parents[: depth + 1])} is a single value, it has no fields")
    tree[last] = value


def _explain(cls: type, error: ValidationError) -> str:
    """The first pydantic error as one line; unknown fields get the nearest known name."""
    errors = error.errors(include_url=False, include_context=False)
    unknown = ("unexpected_keyword_argument", "extra_forbidden")
    first = min(errors, key=lambda item: item["type"] not in unknown)  # a misspelt name also misses its field
    # pydantic puts the alternatives of a union into the location; only names and indices help a reader.
    where = [str(part) for part in first["loc"] if isinstance(part, int) or re.fullmatch(r"[a-z_][a-z_0-9]*", str(part))]
    name = ".".join(where) or cls.__name__
    if first["type"] in unknown:
        known = [row[0] for row in fields_help(cls)]
        groups = sorted({row.rpartition(".")[0] for row in known} - {""})
        near = difflib.get_close_matches(name, known + groups, n=1, cutoff=0.5)
        fix = f"did you mean {near[0]}?" if near else "see --help for the known fields"
        return f"config field {name}: unknown; {fix}"
    value = str(first["input"])
    value = value if len(value) <= 60 else value[:57] + "..."
    return f"config field {name} = {value}: {first['msg'].lower()}"


# ------------------------------------------------------------------------------------------------------ validation


def validate(config: Config) -> None:
    """Check every rule that spans several fields. Raises `ConfigError`; returns nothing."""
    validate_model(config.model)
    model, data, ttt = config.model, config.data, config.model.ttt
    if config.remat_save is not None:
        for name in config.remat_save:
            if name not in REMAT_NAMES:
                raise ConfigError(f"config field remat_save: unknown activation {name!r}; known: {', '.join(REMAT_NAMES)}")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", config.name) or config.name.startswith("."):
        raise ConfigError(f"config field name = {config.name!r}: use letters, digits, '.', '_' and '-' only")
    sizes = dataclasses.asdict(config.mesh)
    for axis, size in sizes.items():
        if size == 0 or size < -1:
            raise ConfigError(f"config field mesh.{axis} = {size}: must be positive, or -1 for what is left")
    if sum(size == -1 for size in sizes.values()) > 1:
        raise ConfigError(f"config field mesh: only one axis may be -1, got {sizes}")
    if data.batch_size % config.optimizer.accumulate:
        raise ConfigError(
            f"config field optimizer.accumulate = {config.optimizer.accumulate}: "
            f"must divide data.batch_size = {data.batch_size}"
        )
    if ttt.layers and data.pack and data.seq_len % ttt.chunk_size:
        raise ConfigError(
            f"config field data.seq_len = {data.seq_len}: packed rows hold whole chunks; make it a multiple of "
            f"model.ttt.chunk_size = {ttt.chunk_size}, or set data.pack false"
        )
    validate_context(config, max(config.mesh.context, 1))
    if data.seq_len > model.max_positions:
        raise ConfigError(
            f"config field data.seq_len = {data.seq_len}: longer than model.max_positions = {model.max_positions}; "
            "raise it (and scale model.rope) or shorten the rows"
        )
    if data.seq_len < 2:
        raise ConfigError(f"config field data.seq_len = {data.seq_len}: at least 2 tokens are needed to predict one")
    guard = config.guard
    if guard.min_state_ratio >= guard.max_state_ratio:
        raise ConfigError(
            f"config field guard.min_state_ratio = {guard.min_state_ratio:g}: must be below guard.max_state_ratio = "
            f"{guard.max_state_ratio:g}"
        )
    opt = config.optimizer
    if opt.warmup_steps is not None and opt.warmup_steps >= config.steps:
        raise ConfigError(f"config field optimizer.warmup_steps = {opt.warmup_steps}: must be below steps = {config.steps}")
    for group in opt.groups:
        try:
            re.compile(group.pattern)
        except re.error as error:
            raise ConfigError(f"config field optimizer.groups pattern {group.pattern!r}: {error}") from None


def validate_context(config: Config, shards: int) -> None:
    """Rows must split into `shards` equal parts of whole chunks. Raises `ConfigError`."""
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
    """Rules inside `ModelConfig`, shared by training, conversion and inference. Raises `ConfigError`."""
    if model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"config field model.num_kv_heads = {model.num_kv_heads}: must divide model.num_heads = {model.num_heads}"
        )
    if model.head_dim % 2:
        raise ConfigError(f"config field model.head_dim = {model.head_dim}: rotary embedding needs an even size")
    for name, layers in (("ttt.layers", model.ttt.layers), ("full_attention_layers", model.full_attention_layers)):
        for layer in layers:
            if layer >= model.num_layers:
                raise ConfigError(
                    f"config field model.{name}: layer {layer} does not exist in a model of {model.num_layers} layers "
                    f"(0 to {model.num_layers - 1})"
                )
        if len(set(layers)) != len(layers):
            raise ConfigError(f"config field model.{name} = {list(layers)}: a layer is listed twice")
    if model.full_attention_layers and model.sliding_window is None:
        raise ConfigError("config field model.full_attention_layers: has no effect without model.sliding_window; set one")
    rope = model.rope
    if rope.kind != "default" and rope.original_max_positions is None:
        raise ConfigError(f"config field model.rope.original_max_positions: required for rope kind {rope.kind!r}")
