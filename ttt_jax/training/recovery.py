"""Which weights and which data a run goes on with: at its start, and when the guard sends it
back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ttt_jax.checkpoint.checkpointer import Checkpointer
from ttt_jax.config import Config
from ttt_jax.data import Loader
from ttt_jax.errors import TrainingError
from ttt_jax.process.multihost import from_first_process
from ttt_jax.run.logs import EventLog
from ttt_jax.training.guard import (
    FAILURE_FILE,
    Rollback,
    read_rollbacks,
    write_failure,
    write_rollbacks,
)
from ttt_jax.training.step import TrainState

_IN_A_ROW = "skipped_in_a_row"


@dataclasses.dataclass
class Recovery:
    """Restores states of one run. All processes call every method in the same order.

    Attributes:
      fresh: makes the state that the run began with.
      events: gets every rollback.
    """

    config: Config
    checkpointer: Checkpointer
    abstract: TrainState
    loader: Loader
    fresh: Callable[[], TrainState]
    events: EventLog

    def resume(self) -> tuple[TrainState, int, int]:
        """Return the state to start with, its step (finished batches; 0: from the beginning), and
        steps skipped just before it.

        The loader is put where the step is.

        Raises: CheckpointError, DataError: what is there cannot be continued.
        """
        restored = self._restore(None)
        rollback = self._rollback_after(restored[0] if restored else 0)
        if rollback is not None and rollback.restored and not restored:
            rollback = None  # its checkpoint was deleted: the run starts anew
        if rollback is not None and restored and restored[0] > rollback.restored:
            restored = self._restore(rollback.restored + 1) if rollback.restored else None
        if rollback is not None:
            self._place_loader(rollback.data_state, rollback.step)
            return self._placed(restored, rollback.step), rollback.step, 0
        if restored is None:
            return self.fresh(), 0, 0
        step, state = restored[0], restored[1]
        self._place_loader(state.data_state, step)
        return self._placed(restored, step), step, int(state.extra.get(_IN_A_ROW, 0))

    def notes(self, in_a_row: int) -> dict[str, Any]:
        """Return what a checkpoint has to remember besides the state (its `extra`)."""
        return {_IN_A_ROW: in_a_row}

    def roll_back(self, state: TrainState, step: int) -> TrainState:
        """Take the weights of the last good checkpoint and go on with the data where it stands;
        `state` is deleted.

        When this happens again without a new checkpoint in between, an older one is taken.

        Raises:
          TrainingError: the run has gone back `guard.rollbacks` times already; `failure.md` is
            written.
        """
        good = [
            saved
            for saved in self.checkpointer.steps()
            if not self.checkpointer.extra(saved).get(_IN_A_ROW)
        ]
        newest = good[-1] if good else 0
        done = self._read()
        # a checkpoint at that very step holds older weights
        recent = sum(rollback.step >= newest for rollback in done)
        skips, limit = self.config.guard.skips, self.config.guard.rollbacks
        if len(done) >= limit:
            self._give_up(step, newest, len(done))
        wanted = good[max(0, len(good) - 1 - recent)] if good else 0
        for leaf in jax.tree.leaves((state.model, state.opt_state)):
            leaf.delete()  # two states may not fit into memory
        restored = self._restore(wanted + 1) if wanted else None
        rollback = Rollback(step, restored[0] if restored else 0, self.loader.get_state())
        error = None
        if jax.process_index() == 0:
            try:
                write_rollbacks(self.config.run_dir, [*done, rollback])
            except OSError as failure:
                error = failure.strerror
        self.events(
            f"{skips} steps in a row were not finite up to step {step}: back to the weights of "
            f"step {rollback.restored}; the "
            f"data of steps {rollback.restored + 1} to {step} is left out (rollback "
            f"{len(done) + 1} of {limit})"
            + (
                f"; not recorded ({error}), so a start before the next checkpoint repeats it"
                if error
                else ""
            ),
            kind="rolled_back",
            step=step,
            restored=rollback.restored,
        )
        return self._placed(restored, step)

    def _give_up(self, step: int, newest: int, rollbacks: int) -> None:
        config = self.config
        reason = (
            f"loss or gradient not finite in {config.guard.skips} steps in a row up to step "
            f"{step}, after {rollbacks} "
            f"rollback(s); the last good checkpoint is that of step {newest}; lower optimizer.lr "
            f"= {config.optimizer.lr:g} or "
            f"model.ttt.lr = {config.model.ttt.lr:g} and use another name"
        )
        self.events(reason, kind="gave_up", step=step)
        if jax.process_index() == 0:
            try:
                reason += f"; see {write_failure(config.run_dir, config, reason)}"
            except OSError as error:  # of a full disk; the events are on the terminal
                reason += f"; no {FAILURE_FILE} ({error.strerror})"
        raise TrainingError(from_first_process(reason))

    def _place_loader(self, data_state: dict[str, Any], step: int) -> None:
        for remark in self.loader.set_state(data_state):
            self.events(remark, kind="resumed", step=step)

    def _restore(self, before: int | None) -> Any:
        return self.checkpointer.restore_newest(
            model=self.abstract.model, opt_state=self.abstract.opt_state, before=before
        )

    def _placed(self, restored: Any, step: int) -> TrainState:
        base = (
            self.fresh()
            if restored is None
            else TrainState(restored[1].model, restored[1].opt_state, None)
        )
        return base._replace(step=jax.device_put(np.int32(step), self.abstract.step.sharding))

    def _read(self) -> list[Rollback]:
        records = read_rollbacks(self.config.run_dir) if jax.process_index() == 0 else []
        return [
            Rollback(**record)
            for record in from_first_process([dataclasses.asdict(r) for r in records])
        ]

    def _rollback_after(self, step: int) -> Rollback | None:
        """Find the last rollback that the checkpoint of `step` knows nothing of."""
        return max((r for r in self._read() if r.step > step), key=lambda r: r.step, default=None)
