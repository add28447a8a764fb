"""Tells how a training run goes: terminal, `metrics.jsonl`, TensorBoard, wandb.

The JSON lines are the record: floats are written in full, so two runs can be compared bit for bit.
A run resumed from step k first drops the lines after k, so the file reads like that of a run that
was never interrupted. jax, tensorboardX and wandb are imported only when they are needed.
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
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ttt_jax.config import Config, to_dict
from ttt_jax.errors import ConfigError
from ttt_jax.files.text import LineFile, atomic_write_text
from ttt_jax.run.folder import METRICS_FILE
from ttt_jax.run.logs import truncate_metrics
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
    """Writes scalars to every sink that the config asks for. A context manager; on exit everything
    is flushed.

    The terminal shows the keys `loss`, `grad_norm`, `learning_rate`, `tokens_per_second` and `mfu`
    (a fraction) where they are given. Keys may be nested by slashes, such as
    `ttt/layer_03/state_ratio`.
    """

    def __init__(
        self,
        config: Config,
        run_dir: str | Path,
        *,
        total_steps: int,
        start_step: int,
        enabled: bool = True,
    ) -> None:
        """Args:
          total_steps, start_step: the run's last step, and the finished steps (0: a fresh start,
            old lines go).
          enabled: False on every process but the first: then nothing is written and nothing is
            printed.

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
            self.message(
                f"warning: {METRICS_FILE} is missing; the curve begins after step {self._start}"
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        """Record the scalars of a finished step. Not-a-number and infinity become null in the JSON
        lines.
        """
        if self._jsonl is None:  # not the process that writes
            return
        values = {key: float(value) for key, value in scalars.items()}
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._jsonl.append({"step": step, **finite})
        if self._jsonl.lost_now():
            self.message(
                f"warning: {METRICS_FILE} was removed; the steps before {step} are missing from "
                "the curve"
            )
        if self._tensorboard is not None:
            self._to_tensorboard(step, values)
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        text = "  ".join(form.format(values[key]) for key, form in _SHOWN.items() if key in values)
        if self._live is not None:
            self.advance(step)
            # a step that only brings, say, an evaluation keeps the text of the last training step
            if text:
                self._live.update(self._display(text))
        elif text:
            print(f"step {step}/{self._total}  {text}", flush=True)

    def _to_tensorboard(self, step: int, values: Mapping[str, float]) -> None:
        """Add scalars to TensorBoard. tensorboardX writes in a thread; when a full disk kills it,
        its queue fills up and the next call never returns.
        """
        assert self._tensorboard is not None
        try:
            if not self._tensorboard.file_writer.event_writer._worker.is_alive():
                raise OSError("its writer has died, probably of a full disk")
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)
        except OSError as error:
            # nothing is left to do at exit
            self._tensorboard.file_writer.event_writer._closed = True
            self._tensorboard = None
            self.message(
                f"warning: TensorBoard is switched off until the next start ({error}); "
                "metrics.jsonl goes on"
            )

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
    """Read the rows of a `metrics.jsonl` that have a loss, oldest first; none when the file is not
    there.
    """
    return (
        [row for row in read_metrics(path) if row.get("loss") is not None]
        if Path(path).exists()
        else []
    )


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a `metrics.jsonl`, oldest first."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _open_tensorboard(folder: Path, start_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ConfigError(
            "config field log.tensorboard = true: tensorboardX is missing; pip install "
            "tensorboardX, or set it false"
        ) from None
    # purge_step hides what an interrupted run has written after the step from which this one goes
    # on.
    return SummaryWriter(
        str(folder), purge_step=start_step + 1 if start_step else 0, max_queue=10_000
    )


def _open_wandb(config: Config, run_dir: Path) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]  (optional, the user installs it)
    except ImportError:
        raise ConfigError(
            f"config field log.wandb = {config.log.wandb}: wandb is not installed; pip install "
            "'ttt-jax[wandb]', or set it null"
        ) from None
    # lives and dies with the folder, so a run started anew is a new one there, too
    id_file = run_dir / "wandb_id"
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
