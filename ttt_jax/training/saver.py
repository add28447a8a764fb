"""When a run saves, and what happens when a save fails: training goes on, and is saved as soon as
there is space again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any

import jax

from ttt_jax.checkpoint.checkpointer import Checkpointer
from ttt_jax.errors import CheckpointError, TrainingError
from ttt_jax.process.multihost import any_process
from ttt_jax.training.step import TrainState

_PAUSE = 1.0  # seconds between two looks at the disk, at least
_OVERHEAD = 1 << 20  # bytes for metadata, for each process
# a failed save is tried again after this many times as long as it took: at most a tenth of the time
# is lost
_SHARE = 10


class Saver:
    """Saves through a `Checkpointer` and outlives its failures. All processes call every method in
    the same order.

    Of several processes all look for room before they save; one whose write fails all the same
    stops (TrainingError).

    Args:
      every: steps between checkpoints; 0: only those that are asked for.
      warn: an `EventLog`.
    """

    def __init__(self, checkpointer: Checkpointer, every: int, warn: Callable[..., None]) -> None:
        self._checkpointer, self._every, self._warn = checkpointer, every, warn
        self._failed = False
        self._in_flight: int | None = None
        self._try_again = self._began = 0.0
        self._bytes = 0

    def due(self, step: int) -> bool:
        """Say whether a regular checkpoint is due after `step`."""
        return bool(self._every) and step % self._every == 0

    def retry_due(self) -> bool:
        """Say whether a save has failed and another attempt could succeed; the same answer on all
        processes.
        """
        if self._in_flight is not None and not self._checkpointer.saving():
            self._wait()
        ready = self._failed and self._in_flight is None and time.monotonic() >= self._try_again
        return any_process(ready) and not any_process(not self._has_space())

    def save(
        self, step: int, state: TrainState, data_state: dict[str, Any], extra: dict[str, Any]
    ) -> None:
        """Save, asynchronously if so configured. A failure, now or later, is a warning and a reason
        for `retry_due`.
        """
        self._wait()
        trees = {"model": state.model, "opt_state": state.opt_state}
        self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        failed = any_process(self._failed)
        if (failed or jax.process_count() > 1) and any_process(not self._has_space()):
            # One process alone finds out by trying. Of several, one that fails inside a save leaves
            # the others waiting.
            if not failed:
                self._began = time.monotonic()
                self._fail(
                    step,
                    CheckpointError(
                        f"checkpoint folder {self._checkpointer.directory}: no space for step "
                        f"{step}"
                    ),
                )
            return
        self._began = time.monotonic()
        try:
            self._checkpointer.save(step, **trees, data_state=data_state, extra=extra)
        except CheckpointError as error:
            self._fail(step, error)
            self._stop_of_several(step)
        else:
            self._in_flight = step
            if not self._checkpointer.saving():
                self._wait()

    def save_surely(
        self,
        step: int,
        state: TrainState,
        data_state: dict[str, Any],
        extra: dict[str, Any],
        *,
        patience: float,
        give_up: Callable[[], bool],
    ) -> None:
        """Save and wait until it is on disk: what a run does last.

        Args:
          patience: seconds for which failed saves are tried again; `give_up` is asked in between.

        Raises:
          TrainingError: it could not be written in that time.
        """
        deadline = time.monotonic() + patience
        while True:
            self.save(step, state, data_state, extra)
            self._wait()
            if not any_process(self._failed):
                return
            if any_process(time.monotonic() > deadline or give_up()):
                newest = self._checkpointer.latest_step()
                raise TrainingError(
                    f"checkpoint folder {self._checkpointer.directory}: step {step} could not be "
                    "written, and what was learnt "
                    f"after step {newest or 0} is lost; free space and run the same command again"
                )
            time.sleep(min(_PAUSE, patience))

    def settle(self) -> None:
        """Wait for a save in flight; its failure is a warning."""
        self._wait()

    def _wait(self) -> None:
        step, self._in_flight = self._in_flight, None
        if step is None:
            return
        try:
            self._checkpointer.wait()
        except CheckpointError as error:
            self._fail(step, error)
            self._stop_of_several(step)
            return
        if self._failed:
            self._failed = False
            self._warn(f"checkpoint of step {step} written: saving works again", kind="saved_again")

    def _fail(self, step: int, error: CheckpointError) -> None:
        took = time.monotonic() - self._began
        self._failed, self._try_again = True, time.monotonic() + max(_PAUSE, _SHARE * took)
        newest = self._checkpointer.latest_step()
        self._warn(
            f"{error}; training goes on unsaved since step {newest or 0} and saves as soon as it "
            "can",
            kind="save_failed",
            unsaved_step=step,
            newest=newest,
        )

    def _stop_of_several(self, step: int) -> None:
        """End a job of several processes: after a failure inside a save they may wait for one
        another in Orbax for good: better to start again.
        """
        if jax.process_count() > 1:
            raise TrainingError(
                f"checkpoint folder {self._checkpointer.directory}: writing step {step} failed "
                "half-way on process "
                f"{jax.process_index()}, and the processes of this job cannot agree on saves any "
                "more; free space and run the "
                "same command again"
            )

    def _has_space(self) -> bool:
        """Say whether there is room for another checkpoint, as far as the file system tells (it
        does not know of quotas).
        """
        try:
            return (
                shutil.disk_usage(self._checkpointer.directory).free
                > self._bytes + _OVERHEAD * jax.process_count()
            )
        except OSError:
            return False
