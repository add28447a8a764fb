"""Watches a run: skipped steps, fast weights out of their range, and when to give up.

The step itself skips an update that is not finite (step.py). Here the host learns of it, names
the batch's documents, and says when the run has to go back to a checkpoint or stop. It looks at a
step while the next one runs, so that the device never waits for the host.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ttt_jax.config import Config
from ttt_jax.config.inner_rate import inner_rate
from ttt_jax.errors import ConfigError, TrainingError
from ttt_jax.files.text import atomic_write_text
from ttt_jax.process.multihost import from_all_processes
from ttt_jax.run.logs import EventLog, read_events

ROLLBACKS_FILE = "rollbacks.json"
FAILURE_FILE = "failure.md"
_NAMED = 4  # documents in a line on the terminal; events.jsonl has all


@dataclasses.dataclass(frozen=True)
class Rollback:
    """After `step` batches the run went back to the weights of step `restored` (0: those it began
    with).

    The data did not go back: the batches in between are the window that is skipped. `data_state` is
    where it stood, so that a start from `restored` after a kill goes on at `step`, and the curve is
    the same.
    """

    step: int
    restored: int
    data_state: dict[str, Any]


class Guard:
    """Follows the steps of one run. All processes call every method in the same order.

    Args:
      describe: pieces of a batch -> its documents (`Loader.documents`).
      in_a_row: steps skipped just before the start.
    """

    def __init__(
        self,
        config: Config,
        events: EventLog,
        describe: Callable[[Any], list[Any]],
        in_a_row: int = 0,
    ) -> None:
        self._config, self._events, self._describe = config.guard, events, describe
        self._fix_explosion = _smaller_state(config)
        self.in_a_row = in_a_row
        self._unseen: tuple[int, Any, Any] | None = None
        # layer -> where its ratio was last: "in", "below" or "above" its range
        self._place: dict[str, str] = {}

    def watch(self, step: int, metrics: dict[str, jax.Array], pieces: Any) -> None:
        """Note a step that has been dispatched, and look at the one before."""
        self.settle()
        scalars = {name: metrics[name] for name in ("skipped", "loss", "grad_norm")}
        self._unseen = (step, scalars, pieces)

    def settle(self) -> None:
        """Look at the last step, waiting for it."""
        if self._unseen is None:
            return
        (step, scalars, pieces), self._unseen = self._unseen, None
        if not float(scalars["skipped"]):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        loss, norm = float(scalars["loss"]), float(scalars["grad_norm"])
        documents = self._documents(pieces)
        named = ", ".join(f"{file} #{index}" for _, file, index, _, _ in documents[:_NAMED])
        more = f" and {len(documents) - _NAMED} more" if len(documents) > _NAMED else ""
        self._events(
            f"step {step} skipped: loss {loss:g}, gradient norm {norm:g} ({self.in_a_row} in a "
            "row); weights unchanged; "
            f"its documents: {named}{more}",
            kind="step_skipped",
            step=step,
            loss=str(loss),
            grad_norm=str(norm),
            in_a_row=self.in_a_row,
            documents=documents,
        )

    def _documents(self, pieces: Any) -> list[list[Any]]:
        """List [row, file, index in the file, first token, tokens] of all processes' rows, each
        once.
        """
        mine = [list(dataclasses.astuple(piece)) for piece in self._describe(pieces)]
        unique = {tuple(piece) for share in from_all_processes(mine) for piece in share}
        return [list(piece) for piece in sorted(unique)]

    @property
    def must_roll_back(self) -> bool:
        return self.in_a_row >= self._config.skips

    def rolled_back(self) -> None:
        """Note that the weights are those of a good checkpoint again."""
        self.in_a_row, self._unseen = 0, None

    def check_fast_weights(self, step: int, scalars: dict[str, float]) -> None:
        """Warn when ||S||/||W|| of a layer leaves its range, once for each time.

        A ratio that has been below the range from the start is no collapse: targets may be
        initialised with zeros. Nor is one of exactly 0: the last documents of all rows are shorter
        than a chunk. One that is not a number is above.
        """
        low, high = self._config.min_state_ratio, self._config.max_state_ratio
        for name, ratio in scalars.items():
            if not name.endswith("/state_ratio") or ratio <= 0:
                continue
            place = "in" if low <= ratio <= high else "below" if ratio < low else "above"
            before, self._place[name] = self._place.get(name, "below"), place
            if place == before or place == "in":
                continue
            verdict, fix = (
                (f"above guard.max_state_ratio = {high:g}: it explodes", self._fix_explosion)
                if place == "above"
                else (
                    f"below guard.min_state_ratio = {low:g}: it collapses",
                    "raise model.ttt.lr or train its target",
                )
            )
            layer = name.split("/")[1]
            text = (
                f"fast weights of {layer}: ||S||/||W|| = {ratio:.3g} at step {step}, "
                f"{verdict}; {fix}"
            )
            self._events(
                text, kind="fast_weights", step=step, layer=layer, ratio=ratio, low=low, high=high
            )


def _smaller_state(config: Config) -> str:
    """Say what to do about S that is too large."""
    ttt, fixes = config.model.ttt, []
    try:
        rule = inner_rate(config)
    except ConfigError:  # there is no rule for this model
        rule = ttt.lr
    if rule < ttt.lr:
        fixes.append(f"set model.ttt.lr auto ({rule:g} here, now {ttt.lr:g})")
    else:
        fixes.append(f"lower model.ttt.lr (now {ttt.lr:g})")
    if ttt.write != "ridge":
        fixes.append("set model.ttt.write ridge with lr 1 (docs/writes.md)")
    if ttt.clip_norm is None:
        fixes.append("set model.ttt.clip_norm, which limits each chunk's update")
    return ", or ".join(fixes)


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """Read the rollbacks of a run, by step. Raises TrainingError when the file is damaged."""
    path = run_dir / ROLLBACKS_FILE
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        return [
            Rollback(int(r["step"]), int(r["restored"]), dict(r["data_state"])) for r in records
        ]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise TrainingError(
            f"{path}: damaged ({type(error).__name__}); restore it from a copy, or start another "
            "run"
        ) from None


def write_rollbacks(run_dir: Path, rollbacks: list[Rollback]) -> None:
    """Write `rollbacks.json` atomically. Raises OSError."""
    atomic_write_text(
        run_dir / ROLLBACKS_FILE, json.dumps([dataclasses.asdict(r) for r in rollbacks])
    )


def write_failure(run_dir: Path, config: Config, reason: str) -> Path:
    """Write `failure.md`: what happened before the run gave up, from its events."""
    lines = [f"# Run {config.name} stopped", "", reason, ""]
    texts = ("time", "text", "loss", "grad_norm")
    events = [
        {**dict.fromkeys(texts, "?"), "step": "?", "kind": "", "documents": [], **e}
        for e in read_events(run_dir)
    ]
    went_back = [event for event in events if event["kind"] == "rolled_back"]
    lines += [
        "## Rollbacks",
        "",
        *(f"- {event['time']}: {event['text']}" for event in went_back),
        "",
    ]
    skipped = [event for event in events if event["kind"] == "step_skipped"][-50:]
    lines += [
        "## Skipped steps (the last 50 at most)",
        "",
        "| step | loss | gradient norm | documents |",
    ]
    lines += ["|---:|---:|---:|---|"]
    for event in skipped:
        named = [
            piece for piece in event["documents"] if isinstance(piece, list) and len(piece) == 5
        ]
        documents = "; ".join(
            f"{file} #{index} from token {start}" for _, file, index, start, _ in named
        )
        lines.append(f"| {event['step']} | {event['loss']} | {event['grad_norm']} | {documents} |")
    others = [event for event in events if event["kind"] not in ("rolled_back", "step_skipped")][
        -20:
    ]
    lines += [
        "",
        "## Other warnings",
        "",
        *(f"- step {event['step']}: {event['text']}" for event in others),
        "",
    ]
    lines += [
        "## What to try",
        "",
        "- The same documents each time: look at them, leave them out. Others each time: lower "
        "`optimizer.lr` (now "
        f"{config.optimizer.lr:g}) or `model.ttt.lr` (now {config.model.ttt.lr:g}) in a run with "
        "another `name` and "
        f"`init_from: {run_dir}`; its checkpoints hold finite weights.",
        "- To go on as it is: raise `guard.rollbacks` or `guard.skips` and run the same command "
        "again.",
        "",
    ]
    path = run_dir / FAILURE_FILE
    atomic_write_text(path, "\n".join(lines))
    return path
