"""What a run measures beside its loss: where the time goes, memory, and what TTT gives on fixed held-out rows.

The train step is left as it is: times are taken on the host, and the probe runs the program that the closing evaluation
needs anyway. docs/telemetry.md lists the names and says what measuring costs.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.parallel.mesh import Mesh, batch_sharding
from ttt_jax.run.folder import ENVIRONMENT_FILE, atomic_write_text
from ttt_jax.run.report import provenance
from ttt_jax.run.resume_changes import (
    append_environment,
    changed_environment,
    numeric_settings,
    read_environment,
)

T = TypeVar("T")


class StepTimer:
    """Seconds of a run that are not the device's: waiting for data, saving, and everything before the first step."""

    def __init__(self) -> None:
        self._begin = self._since = time.perf_counter()
        self._waited = 0.0
        self._first: float | None = None
        self._previous: Any = None

    def fetch(self, produce: Callable[[], T]) -> T:
        """`produce()`, the next batch. It counts as waited for when the device has finished the step before by then."""
        start = time.perf_counter()
        batch = produce()
        if self._previous is None or self._previous.is_ready():
            self._waited += time.perf_counter() - start
        return batch

    def dispatched(self, result: jax.Array) -> None:
        """A step is under way, and `result` will come of it. The first one has been compiled by now."""
        self._previous = result
        if self._first is None:
            self._first = time.perf_counter() - self._begin

    def scalars(self) -> dict[str, float]:
        """Of the steps since the last call: `time/input_wait`, a share; once `time/to_first_step`, seconds."""
        now = time.perf_counter()
        found = {"time/input_wait": min(self._waited / max(now - self._since, 1e-9), 1.0)}
        if self._first:
            found["time/to_first_step"] = self._first
            self._first = 0.0
        self.restart()
        return found

    def save(self, save: Callable[[], None]) -> dict[str, float]:
        """`time/checkpoint`: the seconds for which `save()` holds training up, without what goes on in the background."""
        start = time.perf_counter()
        save()
        return {"time/checkpoint": time.perf_counter() - start}

    def restart(self) -> None:
        """Begin the next interval now: what went before, an evaluation for instance, is no step."""
        self._since, self._waited = time.perf_counter(), 0.0


def host_memory_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def make_probe(
    position_nll: Callable[..., Any], rows: dict[str, np.ndarray], mesh: Mesh, batch_size: int
) -> Callable[[Any], dict[str, float]]:
    """A function of the model that gives, on the first `batch_size` held-out rows (always the same ones):

      probe/ttt_on, probe/ttt_off     loss in nats per token, fast weights on and off on the same slow weights
      probe/gain                      off minus on
      probe/layer_XX/state_ratio      ||S||/||W|| at the end of a row
      probe/layer_XX/update_cosine    mean cosine between the updates of successive chunks

    Args:
      position_nll: `training.make_position_nll`; with the evaluation's batch size it is compiled once for both.
    """
    index = np.arange(batch_size) % len(rows["ids"])
    rows = {name: x[index] for name, x in rows.items()}
    batch = {name: jax.device_put(x, batch_sharding(mesh, x.shape)) for name, x in rows.items()}
    weights_BT = rows["weights"].astype(np.float64)
    total = max(float(weights_BT.sum()), 1.0)

    def probe(model: Any) -> dict[str, float]:
        measured = {}
        for name, scale in (("ttt_off", 0.0), ("ttt_on", 1.0)):
            nll_BT, stats = position_nll(model, batch, jnp.asarray(scale, jnp.float32))
            nll_BT = np.where(weights_BT > 0, np.asarray(nll_BT, np.float64), 0)  # padding may hold anything
            measured[f"probe/{name}"] = float((nll_BT * weights_BT).sum() / total)
        measured["probe/gain"] = measured["probe/ttt_off"] - measured["probe/ttt_on"]
        return measured | {f"probe/{name}": float(x) for name, x in jax.device_get(stats).items()}

    return probe


def write_environment(run_dir: str | Path, **facts: Any) -> list[str]:
    """`environment.json`: date, commit, hardware, versions and switches of this start, and `facts`.

    It replaces that of an earlier start; `environments.jsonl` keeps them all.

    Returns: warnings: what is not as it was at the last start, and what could not be written; a
      full disk does not keep a run from starting.
    """
    path = Path(run_dir) / ENVIRONMENT_FILE
    now = {**provenance(), "settings": numeric_settings(), **facts}
    before = read_environment(run_dir)
    warnings = changed_environment(run_dir, before, now)
    try:
        atomic_write_text(path, json.dumps(now, indent=2) + "\n")
        append_environment(run_dir, before, now)
    except OSError as error:
        warnings.append(f"{path}: not written ({error.strerror})")
    return warnings
