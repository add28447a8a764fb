"""Measures where a run's time goes, and its memory.

The train step is left as it is: times are taken on the host, and the probe runs the program that
the closing evaluation needs anyway. docs/telemetry.md lists the names and says what measuring
costs.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax

T = TypeVar("T")


class StepTimer:
    """Seconds of a run that are not the device's: waiting for data, saving, and everything before
    the first step.
    """

    def __init__(self) -> None:
        self._begin = self._since = time.perf_counter()
        self._waited = 0.0
        self._first: float | None = None
        self._previous: Any = None

    def fetch(self, produce: Callable[[], T]) -> T:
        """Return `produce()`, the next batch. It counts as waited for when the device has finished
        the step before by then.
        """
        start = time.perf_counter()
        batch = produce()
        if self._previous is None or self._previous.is_ready():
            self._waited += time.perf_counter() - start
        return batch

    def dispatched(self, result: jax.Array) -> None:
        """Note that a step is under way, and `result` will come of it. The first one has been
        compiled by now.
        """
        self._previous = result
        if self._first is None:
            self._first = time.perf_counter() - self._begin

    def scalars(self) -> dict[str, float]:
        """Measure the steps since the last call: `time/input_wait`, a share; once
        `time/to_first_step`, seconds.
        """
        now = time.perf_counter()
        found = {"time/input_wait": min(self._waited / max(now - self._since, 1e-9), 1.0)}
        if self._first:
            found["time/to_first_step"] = self._first
            self._first = 0.0
        self.restart()
        return found

    def save(self, save: Callable[[], None]) -> dict[str, float]:
        """Measure `time/checkpoint`: the seconds for which `save()` holds training up, without what
        goes on in the background.
        """
        start = time.perf_counter()
        save()
        return {"time/checkpoint": time.perf_counter() - start}

    def restart(self) -> None:
        """Begin the next interval now: what went before, an evaluation for instance, is no step."""
        self._since, self._waited = time.perf_counter(), 0.0


def host_memory_bytes() -> int:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
