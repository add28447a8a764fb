"""Configuration: frozen dataclasses, YAML presets, dotted overrides, validation.

A run is described by one `Config`. It is read from a YAML file (`load_config`), changed by dotted
overrides (`--model.ttt.chunk_size 512`) and checked completely before anything is compiled.
pydantic does the type checks; rules that span several fields are in the `validate` functions. This
module imports no jax, so that `--help` is instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

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

REMAT_NAMES = (
    "attention",
    "qkv",
    "attention_out",
    "mlp_gate",
    "mlp_up",
    "mlp_hidden",
    "ttt_target",
)


@dataclass(frozen=True, config=_STRICT)
class TTTConfig:
    """In-Place TTT (arXiv 2604.06169, section 3): which layers adapt, and how."""

    layers: Layers = ()  # indices of the layers whose down-projection is a fast weight
    # C, tokens between two updates; packed documents start at its multiples, also without layers
    chunk_size: Positive = 4096
    lr: float = 3.0  # inner learning rate; in a file or an override also `auto`: by the shape
    # source of the target: MLP input or embeddings
    target: Literal["hidden_states", "input_embed"] = "hidden_states"
    proj: bool = True  # multiply the convolved source by W_target
    # divide the source by its rms, so that lr means the same for every model
    normalize_source: bool = False
    # what a chunk writes for its targets (docs/writes.md)
    write: Literal["sum", "ridge", "spectral"] = "sum"
    # lambda of the ridge write, relative to the mean squared norm of a chunk's keys
    ridge: PositiveFloat = 1.0
    # factor on what is there before a chunk is written: 0.9 remembers about ten chunks
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    # rescale each chunk's update to this Frobenius norm when it exceeds it
    clip_norm: PositiveFloat | None = None
    # None: the fastest
    implementation: Literal["reference", "xla", "pallas_tpu", "pallas_gpu", "triton"] | None = None


@dataclass(frozen=True, config=_STRICT)
class RopeConfig:
    """Rotary position embedding; the scaled kinds follow Hugging Face's `rope_scaling` fields."""

    kind: Literal["default", "llama3", "yarn"] = "default"
    base: PositiveFloat = 10000.0
    factor: PositiveFloat = 1.0
    # context length of the unscaled model (llama3, yarn)
    original_max_positions: Positive | None = None
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
        """Count the positions that the model was made for. With scaled RoPE a checkpoint may state
        the length before it (Qwen3 does).
        """
        return max(
            self.max_positions, int(self.rope.factor * (self.rope.original_max_positions or 0))
        )


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """Where the tokens come from and how they become [batch_size, seq_len] rows."""

    train: Names = ("stdlib",)  # files or folders; "stdlib": Python's own source
    heldout: Names = ()  # (): hold out documents of `train`
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    format: Literal["auto", "text", "jsonl", "parquet", "arrayrecord", "npy"] = "auto"
    text_field: str = "text"  # field or column that holds the text (JSONL, Parquet)
    tokenizer: str = "bytes"  # "bytes", or a tokenizer.json / a folder that holds one
    # end every text with the tokenizer's end-of-text token; token ids are taken as they are
    eos: bool = True
    seq_len: Positive = 2048  # T
    batch_size: Positive = 8  # B, rows per step over all hosts
    min_document: NonNegative = 0  # shorter documents (tokens) are dropped
    # several documents per row, each starting on a chunk boundary; False: one document per row
    pack: bool = True
    shuffle: bool = True
    workers: NonNegative = 0  # grain worker processes
    # share of malformed records that are left out and listed; more of them stop the run
    max_bad_records: Fraction = 0.01
    max_record_bytes: Positive = 1 << 30  # a longer record is malformed


@dataclass(frozen=True, config=_STRICT)
class ParamGroup:
    """Settings for the parameters whose path matches `pattern` (re.search); the first matching
    group counts.
    """

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
    # raise the inner learning rate linearly from 0 over these steps
    ttt_lr_warmup_steps: NonNegative = 0
    # share of the steps, at random, that train with TTT off: a model that works both ways
    ttt_drop: Fraction = 0.0
    groups: tuple[ParamGroup, ...] = ()

    def warmup(self, steps: int) -> int:
        """Return the length of the learning rate's warm-up in a run of `steps` steps."""
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
    """What happens when a step is not finite, and when fast weights leave their range
    (docs/robustness.md).
    """

    # skipped steps in a row after which the run goes back to its last good checkpoint
    skips: Positive = 5
    # times that a run goes back before it stops; raise it to let a stopped run go on
    rollbacks: NonNegative = 3
    # warn when ||S||/||W|| of a TTT layer falls below it (collapse)
    min_state_ratio: NonNegativeFloat = 1e-6
    # warn when it exceeds this (explosion); model.ttt.clip_norm limits each update
    max_state_ratio: PositiveFloat = 3.0


@dataclass(frozen=True, config=_STRICT)
class LogConfig:
    every: Positive = 10
    documents: bool = False  # write which documents each step held to documents.jsonl
    # steps between two measurements of TTT on held-out rows (docs/telemetry.md); 0: never
    probe_every: NonNegative = 100
    tensorboard: bool = True
    wandb: str | None = None  # project name; None: off


@dataclass(frozen=True, config=_STRICT)
class EvalConfig:
    """Held-out loss by position, TTT on and off on the same weights, at the end (and every `every`
    steps).
    """

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
    # where compiled programs are kept: "run": in the run folder; a folder; null: nowhere
    compile_cache: str | None = "run"
    # Hugging Face folder or run folder to start from; None: from scratch
    init_from: str | None = None
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    # Which activations the backward pass keeps (see REMAT_NAMES); () recomputes all, None keeps
    # all.
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


# ------------------------------------------------------------------------------------------ reading


# --------------------------------------------------------------------------------------- validation
