"""Configuration: frozen dataclasses, YAML presets, dotted overrides, validation.

A run is described by one `Config`. It is read from a YAML file (`load_config`), changed by dotted
overrides (`--model.ttt.chunk_size 512`) and checked completely before anything is compiled.
pydantic does the type checks; rules that span several fields are in the `validate` functions. This
module imports no jax, so that `--help` is instant.

`--help` shows the comment of each field, beside it or in the lines above it (describe.py).
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
    "ttt_states",
)
OPEN_REMAT = ("auto",)  # `remat_save: auto`
TargetSource = Literal["hidden_states", "input_embed", "prediction_error"]


@dataclass(frozen=True, config=_STRICT)
class TTTConfig:
    """In-Place TTT (arXiv 2604.06169, section 3): which layers adapt, and how."""

    # indices of the layers whose down-projection is a fast weight; "auto": every sixth
    layers: Layers = ()
    # C, tokens between two updates; packed documents start at its multiples, also without layers
    chunk_size: Positive = 4096
    # inner learning rate, the size of what a chunk writes; in a file or an override also `auto`: by
    # a rule (docs/writes.md)
    lr: float = 3.0
    # source of the target: MLP input, embeddings, or what the model did not predict of a token
    target: TargetSource = "hidden_states"
    # the same of the last TTT layer, whose prediction is the model's; None: as the others
    last_target: TargetSource | None = None
    proj: bool = True  # multiply the convolved source by W_target
    # divide the source by its rms, so that lr means the same for every model
    normalize_source: bool = False
    # what a chunk writes for its targets (docs/writes.md)
    write: Literal["sum", "ridge"] = "sum"
    # lambda of the ridge write, relative to the mean squared norm of a chunk's keys
    ridge: PositiveFloat = 1.0
    # factor on what is there before a chunk is written: 0.9 remembers about ten chunks
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    # rescale each chunk's update to this Frobenius norm when it exceeds it
    clip_norm: PositiveFloat | None = None
    # softly limit what a token reads from S, by rms, to this times its layer's output without S
    read_cap: PositiveFloat | None = None
    # apply W and S in two products, or W + S, rounded once a chunk, in one (docs/numerics.md)
    apply: Literal["split", "fused"] = "split"
    # None: the fastest
    implementation: Literal["reference", "xla", "pallas_tpu", "pallas_gpu", "triton"] | None = None

    def target_of(self, layer: int) -> TargetSource | None:
        """The source of a layer's targets; None for a layer that does not adapt."""
        if layer not in self.layers:
            return None
        return self.last_target or self.target if layer == max(self.layers) else self.target

    @property
    def error_layers(self) -> tuple[int, ...]:
        """The layers whose targets are prediction errors."""
        return tuple(i for i in self.layers if self.target_of(i) == "prediction_error")


# The fields of `RopeConfig` beside `base` that each kind makes use of.
ROPE_FIELDS = {
    "default": (),
    "llama3": ("factor", "original_max_positions", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_positions", "beta_fast", "beta_slow", "attention_factor"),
}


@dataclass(frozen=True, config=_STRICT)
class RopeConfig:
    """Rotary position embedding; the scaled kinds follow Hugging Face's `rope_scaling` fields."""

    kind: Literal["default", "llama3", "yarn"] = "default"  # how it is scaled; default: not
    base: PositiveFloat = 10000.0  # theta, of the wavelengths
    factor: PositiveFloat = 1.0  # by which the scaled kinds lengthen the context
    # context length of the unscaled model (llama3, yarn)
    original_max_positions: Positive | None = None
    # llama3: longer wavelengths than original_max_positions / this are scaled whole
    low_freq_factor: PositiveFloat = 1.0
    # llama3: shorter wavelengths than original_max_positions / this are left alone
    high_freq_factor: PositiveFloat = 4.0
    beta_fast: PositiveFloat = 32.0  # yarn: more turns than this within the context: left alone
    beta_slow: PositiveFloat = 1.0  # yarn: fewer turns than this within the context: scaled whole
    # yarn: factor on queries and keys; None: 0.1 ln(factor) + 1
    attention_factor: PositiveFloat | None = None


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """A decoder-only Transformer of the LLaMA / Qwen family with In-Place TTT on some layers."""

    vocab_size: Positive = 257  # token ids, at least the tokenizer's
    d_model: Positive = 256  # D, the hidden size: width of the residual stream
    num_layers: Positive = 4  # Transformer blocks
    num_heads: Positive = 4  # query heads
    num_kv_heads: Positive = 4  # key and value heads; divides num_heads
    head_dim: Positive = 64  # size of a head; even
    d_ff: Positive = 768  # F, the intermediate size: width of the MLP
    norm_eps: PositiveFloat = 1e-6  # epsilon of RMSNorm
    max_positions: Positive = 32768  # longest row that the model is made for, tokens
    rope: RopeConfig = RopeConfig()
    qk_norm: bool = False  # Qwen3: RMSNorm on every query and key head
    qkv_bias: bool = False  # Qwen2.5: biases of the query, key and value projections
    o_bias: bool = False  # bias of attention's output projection
    mlp_bias: bool = False  # biases of the MLP's projections
    tie_embeddings: bool = True  # the output matrix is the embedding
    sliding_window: Positive | None = None  # tokens a query sees, itself included; None: all
    full_attention_layers: Layers = ()  # layers that ignore `sliding_window`
    init_std: PositiveFloat = 0.02  # standard deviation of new weights
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

    # files, folders, or URLs of them on s3:// and gs://; "stdlib": Python's own source
    train: Names = ("stdlib",)
    # the same to evaluate on; (): hold out documents of `train`, or the end of a single one
    heldout: Names = ()
    # share of the documents of `train`, or of a single one, that is held out
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    # what the files hold; auto: by their names
    format: Literal["auto", "text", "jsonl", "parquet", "arrayrecord", "npy"] = "auto"
    text_field: str = "text"  # field or column that holds the text (JSONL, Parquet)
    # "bytes", a tokenizer.json or a folder that holds one, or a model of the Hugging Face Hub; with
    # init_from it is the checkpoint's unless another one is named
    tokenizer: str = "bytes"
    # end every text with the tokenizer's end-of-text token; token ids are taken as they are
    eos: bool = True
    seq_len: Positive = 2048  # context length of training: T, tokens of a row
    batch_size: Positive = 8  # B, rows per step over all hosts
    min_document: NonNegative = 0  # shorter documents (tokens) are dropped
    # several documents per row, each starting on a chunk boundary; False: one document per row
    pack: bool = True
    shuffle: bool = True  # documents in an order that `seed` makes; False: as they come
    workers: NonNegative = 0  # grain worker processes that read data; 0: this one
    # share of malformed records that are left out and listed; more of them stop the run
    max_bad_records: Fraction = 0.01
    max_record_bytes: Positive = 1 << 30  # a longer record is malformed


@dataclass(frozen=True, config=_STRICT)
class ParamGroup:
    """Settings for the parameters whose path matches `pattern` (re.search); the first matching
    group counts.
    """

    pattern: str  # regular expression, searched in dotted paths such as groups.0.blocks.1.mlp.down
    lr_multiplier: NonNegativeFloat = 1.0  # factor on the learning rate
    frozen: bool = False  # not trained, and without moments
    weight_decay: bool | None = None  # None: decay matrices, not vectors
    optional: bool = False  # it may match no parameter, as in presets for models of any kind


@dataclass(frozen=True, config=_STRICT)
class OptimizerConfig:
    """optax AdamW on float32 master weights."""

    lr: PositiveFloat = 3e-4  # learning rate after the warm-up, the highest
    # of the learning rate: falling from the warm-up on, only at the end (wsd), or not
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    # steps in which the learning rate rises from 0; None: warmup_ratio * steps; so is a preset's
    # that is not shorter than the run, or where you give warmup_ratio
    warmup_steps: NonNegative | None = None
    warmup_ratio: Fraction = 0.02  # share of the steps in the warm-up, without `warmup_steps`
    decay_ratio: Fraction = 0.2  # wsd: share of the steps in the final decay
    final_lr_ratio: Fraction = 0.1  # share of `lr` that the last step has
    b1: Fraction = 0.9  # decay of Adam's first moment
    b2: Fraction = 0.95  # decay of Adam's second moment
    eps: PositiveFloat = 1e-8  # epsilon of Adam
    weight_decay: NonNegativeFloat = 0.1  # decoupled, of matrices
    clip_norm: PositiveFloat | None = 1.0  # largest global norm of the gradients; None: any
    # gradient accumulation: micro-batches per step; divides data.batch_size
    accumulate: Positive = 1
    # raise the inner learning rate linearly from 0 over these steps
    ttt_lr_warmup_steps: NonNegative = 0
    # share of the steps, at random, that train with TTT off: a model that works both ways
    ttt_drop: Fraction = 0.0
    groups: tuple[
        ParamGroup, ...
    ] = ()  # other settings for some parameters; the first match counts

    def warmup(self, steps: int) -> int:
        """Return the length of the learning rate's warm-up in a run of `steps` steps."""
        return round(self.warmup_ratio * steps) if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True, config=_STRICT)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 (what is left)."""

    data: int = 1  # copies of the model, each on rows of its own
    fsdp: int = -1  # devices that share parameters and optimizer state, each on rows of its own
    context: int = 1  # devices that share the tokens of a row
    tensor: int = 1  # devices that share heads and MLP columns


@dataclass(frozen=True, config=_STRICT)
class CheckpointConfig:
    """When a run is saved, and how many of its checkpoints stay."""

    every: NonNegative = 500  # steps between checkpoints; 0: only at the end
    keep: Positive = 2  # checkpoints that stay, the newest ones
    async_save: bool = True  # write while training goes on
    wait_for_space: NonNegative = 600  # seconds for which the end of a run waits for disk space
    # where a copy of the run goes: s3://BUCKET/PATH, gs://BUCKET/PATH or a folder (docs/data.md)
    copy_to: str | None = None


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
    """What a run tells while it trains, and where."""

    every: Positive = 10  # steps between two rows of metrics
    documents: bool = False  # write which documents each step held to documents.jsonl
    # steps between two measurements of TTT on held-out rows (docs/telemetry.md); 0: never
    probe_every: NonNegative = 100
    tensorboard: bool = True  # write for TensorBoard, into the run folder
    wandb: str | None = None  # project name at Weights & Biases; None: off


@dataclass(frozen=True, config=_STRICT)
class EvalConfig:
    """Held-out loss by position, TTT on and off on the same weights, at the end (and every `every`
    steps).
    """

    every: NonNegative = 0  # steps between two evaluations; 0: only at the end
    rows: Positive = 16  # held-out rows used
    buckets: Positive = 8  # position buckets of equal length


@dataclass(frozen=True, config=_STRICT)
class SampleConfig:
    """Text that the model writes while it trains, with TTT on and off (docs/telemetry.md)."""

    every: NonNegative = 0  # steps between two samples; 0: never
    # text that is continued; None: the first half of the first held-out row
    prompt: str | None = None
    tokens: Positive = 64  # new tokens, at most
    temperature: NonNegativeFloat = 0.0  # 0: always the most likely token


@dataclass(frozen=True, config=_STRICT)
class Config:
    """One training run."""

    name: str = "default"  # folder of the run, below `runs_dir`
    runs_dir: str = "runs"  # folder of all runs
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0  # of new weights and of the data's order
    steps: Positive = 100  # updates of the run in all; a finished run goes on when it is raised
    # where compiled programs are kept: "run": in the run folder; a folder; null: nowhere
    compile_cache: str | None = "run"
    # Hugging Face, converted or run folder to start from, or a model of the Hugging Face Hub;
    # what of `model` is not written is its own, and its tokenizer. None: from scratch
    init_from: str | None = None
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # master weights are float32
    # activations that the backward pass keeps, of attention, qkv, attention_out, mlp_gate, mlp_up,
    # mlp_hidden, ttt_target, ttt_states (of `ttt.apply: fused` on Hopper GPUs); (): none, all are
    # computed again; None: all; "auto": what the device has room for
    remat_save: Names | None = ()
    # write a training step's layers out one after the other: nothing kept is copied into stacks of
    # layers and out of them, but compile time grows with depth (docs/performance.md)
    unroll_layers: bool = False
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name
