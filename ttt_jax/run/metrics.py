"""What a training run tells: terminal, `metrics.jsonl`, TensorBoard, wandb; and the counts behind tokens/s and MFU.

The JSON lines are the record: floats are written in full, so two runs can be compared bit for bit. A run resumed from
step k first drops the lines after k, so the file reads like that of a run that was never interrupted. jax, tensorboardX
and wandb are imported only when they are needed.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ttt_jax.config.fields import Config, ModelConfig, to_dict
from ttt_jax.errors import ConfigError
from ttt_jax.run.folder import METRICS_FILE, atomic_write_text
from ttt_jax.run.logs import LineFile, truncate_metrics
from ttt_jax.terminal import printable

# key of the scalar -> how the terminal shows it
_SHOWN = {
    "loss": "loss {:.4f}",
    "grad_norm": "grad norm {:.3f}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "MFU {:.1%}",
}


class MetricsLogger:
    """Writes scalars to every sink that the config asks for. A context manager; on exit everything is flushed.

    The terminal shows the keys `loss`, `grad_norm`, `learning_rate`, `tokens_per_second` and `mfu` (a fraction) where
    they are given. Keys may be nested by slashes, such as `ttt/layer_03/state_ratio`.
    """

    def __init__(self, config: Config, run_dir: str | Path, *, total_steps: int, start_step: int, enabled: bool = True) -> None:
        """Args:
          total_steps, start_step: the run's last step, and the finished steps (0: a fresh start, old lines go).
          enabled: False on every process but the first: then nothing is written and nothing is printed.

        Raises:
          ConfigError: a sink that the config asks for is not installed.
          CheckpointError: an existing `metrics.jsonl` cannot be read.
        """
        self._enabled = enabled
        self._total, self._start, self._missing = total_steps, start_step, False
        self._live: Live | None = None
        self._jsonl = self._tensorboard = self._wandb = None
        if not enabled:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        self._missing = bool(start_step) and not path.exists()
        truncate_metrics(path, start_step)
        if config.log.tensorboard:
            self._tensorboard = _open_tensorboard(run_dir / "tensorboard", start_step)
        if config.log.wandb is not None:
            self._wandb = _open_wandb(config, run_dir)
        self._jsonl = LineFile(path)
        if sys.stdout.isatty():
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._task = self._progress.add_task("", total=total_steps, completed=start_step)
            # Two lines, so that 80 columns are enough.
            self._live = Live(self._display("compiling"), console=Console(), refresh_per_second=4)

    def __enter__(self) -> MetricsLogger:
        if self._live is not None:
            self._live.start()
        if self._missing:
            self.message(f"warning: {METRICS_FILE} is missing; the curve begins after step {self._start}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
        if self._jsonl is not None:
            self._jsonl.close()
        if self._tensorboard is not None:
            with contextlib.suppress(OSError):  # a full disk; metrics.jsonl has it all
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record the scalars of a finished step. Not-a-number and infinity become null in the JSON lines."""
        if self._jsonl is None:  # not the process that writes
            return
        values = {key: float(value) for key, value in scalars.items()}
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._jsonl.append({"step": step, **finite})
        if self._jsonl.lost_now():
            self.message(f"warning: {METRICS_FILE} was removed; the steps before {step} are missing from the curve")
        if self._tensorboard is not None:
            self._to_tensorboard(step, values)
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        text = "  ".join(form.format(values[key]) for key, form in _SHOWN.items() if key in values)
        if self._live is not None:
            self.advance(step)
            if text:  # a step that only brings, say, an evaluation keeps the text of the last training step
                self._live.update(self._display(text))
        elif text:
            print(f"step {step}/{self._total}  {text}", flush=True)

    def _to_tensorboard(self, step: int, values: Mapping[str, float]) -> None:
        """tensorboardX writes in a thread; when a full disk kills it, its queue fills up and the next call never returns."""
        assert self._tensorboard is not None
        try:
            if not self._tensorboard.file_writer.event_writer._worker.is_alive():
                raise OSError("its writer has died, probably of a full disk")
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)
        except OSError as error:
            self._tensorboard.file_writer.event_writer._closed = True  # nothing is left to do at exit
            self._tensorboard = None
            self.message(f"warning: TensorBoard is switched off until the next start ({error}); metrics.jsonl goes on")

    def advance(self, step: int) -> None:
        """Move the progress bar to a finished step that is not logged."""
        if self._live is not None:
            self._progress.update(self._task, completed=step)

    def message(self, text: str) -> None:
        """Print a line without tearing the progress display."""
        text = printable(text, "\n\t")  # it may name documents
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False)
        elif self._enabled:
            print(text, flush=True)

    def _display(self, text: str) -> Group:
        return Group(self._progress, Text(text, no_wrap=True, overflow="ellipsis"))


def read_curve(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl` that have a loss, oldest first; none when the file is not there."""
    return [row for row in read_metrics(path) if row.get("loss") is not None] if Path(path).exists() else []


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, oldest first."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _open_tensorboard(folder: Path, start_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ConfigError(
            "config field log.tensorboard = true: tensorboardX is missing; pip install tensorboardX, or set it false"
        ) from None
    # purge_step hides what an interrupted run has written after the step from which this one goes on.
    return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else 0, max_queue=10_000)


def _open_wandb(config: Config, run_dir: Path) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]  (optional, the user installs it)
    except ImportError:
        raise ConfigError(
            f"config field log.wandb = {config.log.wandb}: wandb is not installed; pip install wandb, or set it null"
        ) from None
    id_file = run_dir / "wandb_id"  # lives and dies with the folder, so a run started anew is a new one there, too
    if not id_file.exists():
        atomic_write_text(id_file, secrets.token_hex(4))
    return wandb.init(
        project=config.log.wandb,
        name=config.name,
        id=id_file.read_text(encoding="utf-8"),
        resume="allow",
        dir=str(run_dir),
        config=to_dict(config),
    )


# ---------------------------------------------------------------------------------------------- memory and arithmetic


def device_memory_bytes() -> int | None:
    """Peak memory in use on the fullest local device so far; None where the backend does not count it (CPU)."""
    import jax

    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)


def model_flops_per_token(model: ModelConfig, seq_len: int, training: bool) -> float:
    """Floating-point operations that the model needs for one token of a row of `seq_len` (a multiply-add is two).

    Forward, with D, F, N, K, H, V as in the design and L layers:

        projections     2 D (2 N H + 2 K H)          q and o, k and v
        attention       4 N H mean_t min(t + 1, W)   scores and values, causal, W the window of the layer
        MLP             6 D F                        gate, up and down; a TTT layer's apply takes the place of down
        TTT             2 D F + 10 D (+ 2 D D)       update v^T z, convolution of 5 taps (and W_target)
        logits          2 D V                        whether or not the embedding is tied; the look-up is free

    The backward pass takes twice the forward: each of these is bilinear, and has two products of the same size in it.
    That holds for TTT too: apply and update are 4 D F, their backward is dz = do (W + S), dz += v G, dv = z G^T and
    G += do^T z, 8 D F (dW is the sum of the same do^T z). What rematerialisation computes again, the closed-form
    backward's second scan over S included, does not count: this is the model's work, for MFU.
    """
    heads = model.num_heads * model.head_dim
    kv_heads = model.num_kv_heads * model.head_dim
    total = 2.0 * model.d_model * model.vocab_size
    for layer in range(model.num_layers):
        window = None if layer in model.full_attention_layers else model.sliding_window
        total += 2 * model.d_model * (2 * heads + 2 * kv_heads)
        total += 4 * heads * _mean_context(seq_len, window)
        total += 6 * model.d_model * model.d_ff
        if layer in model.ttt.layers:
            total += 2 * model.d_model * model.d_ff + 10 * model.d_model
            total += 2 * model.d_model**2 if model.ttt.proj else 0
    return total * (3 if training else 1)


def _mean_context(seq_len: int, window: int | None) -> float:
    """Mean over t < seq_len of min(t + 1, window)."""
    window = min(window or seq_len, seq_len)
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


# Dense bfloat16 peak of one jax device, in TFLOP/s (vendors' data sheets). The first name in `device_kind` counts.
_PEAK_TFLOPS = (
    ("TPU v4 lite", 138.0),
    ("TPU v4", 275.0),
    ("TPU v5 lite", 197.0),
    ("TPU v5e", 197.0),
    ("TPU v5", 459.0),  # v5p
    ("TPU v6", 918.0),
    ("TPU7x", 1153.5),  # half a chip: jax sees its two chiplets as two devices
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.5),
    ("H100", 989.4),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("MI300X", 1307.4),
)


def peak_flops(device: Any) -> float | None:
    """Dense bfloat16 peak of a `jax.Device` in FLOP/s; None for one that is not in the table, such as a CPU."""
    kind = device.device_kind
    return next((tflops * 1e12 for name, tflops in _PEAK_TFLOPS if name in kind), None)
