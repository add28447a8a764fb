"""A training job beside its steps: where it resumes, what is due after a step, what is logged and
saved, how it stops, and its report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from ttt_jax.checkpoint.checkpointer import Checkpointer
from ttt_jax.checkpoint.checksums import CHECKPOINT_FOLDER
from ttt_jax.checkpoint.run_copy import RunCopy
from ttt_jax.config import Config
from ttt_jax.config.inner_rate import describe_rate
from ttt_jax.data import (
    Loader,
    Tokenizer,
    data_remarks,
    heldout_remarks,
    rejected_records,
    write_quarantine,
)
from ttt_jax.flops import device_memory_bytes
from ttt_jax.parallel.mesh import Batch
from ttt_jax.pretrained.companions import keep_companions
from ttt_jax.pretrained.load import training_tokenizer
from ttt_jax.process.lock import RunLock
from ttt_jax.process.multihost import any_process, on_first_process
from ttt_jax.process.signals import Stopped, StopSignal
from ttt_jax.run.compile_cache import CompileCache, open_cache
from ttt_jax.run.folder import METRICS_FILE, prepare_run_dir
from ttt_jax.run.logs import DocumentLog, EventLog, SampleLog
from ttt_jax.run.metrics import MetricsLogger, read_curve
from ttt_jax.run.provenance import write_environment
from ttt_jax.run.report import print_report, write_report
from ttt_jax.run.timing import StepTimer, host_memory_bytes
from ttt_jax.terminal import printable
from ttt_jax.training.banner import banner, pace
from ttt_jax.training.guard import Guard
from ttt_jax.training.heldout import Heldout
from ttt_jax.training.hooks import Hook
from ttt_jax.training.recovery import Recovery
from ttt_jax.training.saver import Saver
from ttt_jax.training.step import TrainState
from ttt_jax.training.throughput import Throughput


class Due(NamedTuple):
    """What has to be done after a step, decided once.

    Attributes:
      anything: whether `Job.log` and `Job.save` are to be called.
      hooks: those that look at this step.
      stopping: a signal has come, to this process or to another one.
      last: no step follows.
    """

    anything: bool
    log: bool
    save: bool
    hooks: tuple[Hook, ...]
    roll_back: bool
    stopping: bool
    last: bool

    @property
    def stop(self) -> bool:
        """Whether the job ends here, before its last step."""
        return self.stopping and not self.last


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a job is made of, all of it checked.

    Fields:
      stop: is asked after each step.
      lock: of the run folder, held.
      timer: runs since the process began.
      hooks: look at the model while it trains.
      abstract: shapes, dtypes and shardings of the state.
      fresh: makes the state that the run begins with.
      changes: lines for the user, see `check_resume`.
    """

    config: Config
    stop: StopSignal
    lock: RunLock
    timer: StepTimer
    tokenizer: Tokenizer
    loader: Loader
    heldout: Heldout
    hooks: Sequence[Hook]
    abstract: TrainState
    fresh: Callable[[], TrainState]
    changes: Sequence[str]


@contextlib.contextmanager
def open_job(parts: Parts) -> Iterator[Job]:
    """Write the run folder, after everything has been checked, and close it when the block is left.

    Raises: CheckpointError, one line: the folder holds another run, or cannot be written.
    """
    config, tokenizer = parts.config, parts.tokenizer
    source = training_tokenizer(config)
    prepare_run_dir(config)
    on_first_process(lambda: keep_companions(source, config.run_dir, tokenizer))
    cache, warnings = open_cache(config)
    warnings += parts.changes
    if jax.process_index() == 0:
        for line in describe_rate(config):
            print(line, flush=True)
        parameters = sum(x.size for x in jax.tree.leaves(parts.abstract.model))
        remarks = data_remarks(config, tokenizer) + parts.heldout.remarks
        print("\n".join(map(printable, remarks)), end="\n" if remarks else "", flush=True)
        warnings += write_environment(config.run_dir, parameters=parameters, data=remarks)
        warnings += write_quarantine(config.run_dir, rejected_records(config, tokenizer))
        warnings += heldout_remarks(config, tokenizer)
    with contextlib.ExitStack() as stack:
        yield Job(parts, cache, warnings, stack)


class Job:
    """What happens around the steps of one start of a run; `open_job` makes it.

    All processes call every method in the same order: `resume`; then for each step `fetch`,
    `after_step`, and what is due; at last `closing_evaluation` and, outside of the block, `report`.

    Attributes:
      step: finished steps.
    """

    def __init__(
        self,
        parts: Parts,
        cache: CompileCache | None,
        warnings: list[str],
        stack: contextlib.ExitStack,
    ) -> None:
        config = self._config = parts.config
        self._stop, self._lock, self._timer = parts.stop, parts.lock, parts.timer
        self._loader, self._heldout, self._hooks = parts.loader, parts.heldout, parts.hooks
        self._abstract, self._cache = parts.abstract, cache
        self._warnings, self._stack = warnings, stack
        self._main = jax.process_index() == 0
        self._show: Callable[[str], None] = functools.partial(print, flush=True)
        self.step = self._start = 0
        self._compiling_since = 0.0
        self._unsealed = set(parts.hooks)  # not called yet: what they compile has no seal
        self._pace_said = False
        self._events = stack.enter_context(EventLog(config.run_dir, self._tell, enabled=self._main))
        self._checkpointer = stack.enter_context(
            Checkpointer(config.run_dir / CHECKPOINT_FOLDER, config.checkpoint, self._events)
        )
        self._copy = stack.enter_context(RunCopy(config, self._events))
        self._recovery = Recovery(
            config, self._checkpointer, parts.abstract, parts.loader, parts.fresh, self._events
        )

    def _tell(self, text: str) -> None:
        """Print a line, by the logger as soon as there is one."""
        self._show(text)

    # ------------------------------------------------------------------------------------ beginning

    def resume(self) -> TrainState:
        """Restore the newest checkpoint, or make the state that the run begins with.

        From here on there is something to save: a signal waits for the end of a step.
        """
        state, self.step, in_a_row = self._recovery.resume()
        self._start = self.step
        self._saver = Saver(self._checkpointer, self._config.checkpoint.every, self._events)
        self._guard = Guard(self._config, self._events, self._loader.documents, in_a_row)
        self._heldout.place()
        self._stop.defer()
        self._open_logs()
        for text in self._warnings:
            self._events(text, kind="start", step=self.step)
        if self.step:
            self._tell(f"continuing {self._config.run_dir} from step {self.step}")
        if self.step < self._config.steps:
            for line in banner(self._config, self._abstract, self.step):
                self._tell(line)
        self._throughput = Throughput(self._config, self.step)
        return state

    def _open_logs(self) -> None:
        config = self._config
        self._metrics = self._stack.enter_context(
            MetricsLogger(
                config,
                config.run_dir,
                total_steps=config.steps,
                start_step=self.step,
                enabled=self._main,
            )
        )
        self._samples = self._stack.enter_context(
            SampleLog(config.run_dir, self.step, enabled=self._main and bool(config.sample.every))
        )
        self._documents = self._stack.enter_context(
            DocumentLog(
                config.run_dir, self.step, jax.process_index(), enabled=config.log.documents
            )
        )
        self._show = self._metrics.message

    # ------------------------------------------------------------------------------------ each step

    def fetch(self, batches: Iterator[Batch]) -> Batch:
        """Take the next batch, and count the time that the device waits for it."""
        batch = self._timer.fetch(lambda: next(batches))
        if self.step == self._start:
            self._tell("compiling the train step ...")
            self._compiling_since = time.perf_counter()
        return batch

    def after_step(self, metrics: dict[str, jax.Array]) -> Due:
        """Count a step that is under way, note its documents, look at the one before, and decide
        what is due.

        Raises: TrainingError: the run folder is gone, or another job's by now.
        """
        self._timer.dispatched(metrics["loss"])
        if self.step == self._start:
            self._tell(f"compiled in {time.perf_counter() - self._compiling_since:.1f} s")
            if self._cache:
                self._cache.seal()
        self.step += 1
        self._events.step = self.step
        if self._documents.enabled:
            self._documents.write(self.step, self._loader.documents(self._loader.pieces))
        self._guard.watch(self.step, metrics, self._loader.pieces)
        due = self._decide()
        if due.save or due.log or due.hooks:
            self._lock.check()
            self._guard.settle()
        if not due.anything:
            self._metrics.advance(self.step)
        return due._replace(roll_back=self._guard.must_roll_back)

    def _decide(self) -> Due:
        config, step = self._config, self.step
        log, last = _every(config.log.every, step), step == config.steps
        stopping = self._asked_to_stop(log)
        save = self._saver.due(step) or stopping or last
        hooks = tuple(hook for hook in self._hooks if _every(hook.every, step))
        anything = log or save or bool(hooks) or step == 1
        return Due(anything, log, save, hooks, False, stopping, last)

    def _asked_to_stop(self, log: bool) -> bool:
        """Read the signal, once a step: one that comes later is for the next step.

        Signals reach processes at different steps, so several stop together where they wait for
        the device anyway.
        """
        if jax.process_count() == 1:
            return self._stop.requested
        return log and any_process(self._stop.requested)

    def roll_back(self, state: TrainState) -> TrainState:
        """Go back to the weights of a good checkpoint; `state` is deleted.

        Raises: TrainingError: the run has gone back too often.
        """
        self._saver.settle()
        state = self._recovery.roll_back(state, self.step)
        self._guard.rolled_back()
        return state

    def log(self, due: Due, metrics: dict[str, jax.Array], model: Any) -> None:
        """Record the step's metrics, speed and memory, and what the hooks see."""
        scalars = {name: float(x) for name, x in jax.device_get(metrics).items()}
        del scalars["skipped"]
        scalars |= self._throughput.scalars(self.step)
        if memory := device_memory_bytes():
            scalars["memory_bytes"] = memory
        self._guard.check_fast_weights(self.step, scalars)
        scalars |= {**self._timer.scalars(), "host_memory_bytes": host_memory_bytes()}
        seen = [hook.look(self.step, model) for hook in due.hooks]
        for each in seen:
            scalars |= each.scalars
        self._metrics.log(self.step, scalars)
        for each in seen:
            if each.text:
                self._tell(each.text)
            for sample in each.samples:
                self._samples.append({"step": self.step, **sample})
        if not self._pace_said and "tokens_per_second" in scalars and not due.last:
            self._tell(pace(self._config, self.step, scalars["tokens_per_second"]))
            self._pace_said = True
        if self._cache and self._unsealed.intersection(due.hooks):
            self._unsealed.difference_update(due.hooks)
            self._cache.seal()

    def save(self, due: Due, state: TrainState) -> None:
        """Save if that is due, or if an earlier save failed and can be tried again."""
        notes = self._recovery.notes(self._guard.in_a_row)
        what = self.step, state, self._loader.get_state(), notes
        if due.stopping or due.last:
            save = functools.partial(
                self._saver.save_surely,
                *what,
                patience=0 if due.stopping else self._config.checkpoint.wait_for_space,
                give_up=lambda: self._stop.requested,
            )
            self._metrics.log(self.step, self._timer.save(save))
        elif (due.save and not self._guard.in_a_row) or (due.log and self._saver.retry_due()):
            save = functools.partial(self._saver.save, *what)
            self._metrics.log(self.step, self._timer.save(save))
        self._copy.follow()
        self._throughput.restart(self.step)
        self._timer.restart()

    def say_stopped(self) -> None:
        """Tell the user who stopped the job, and how to go on.

        Raises: TrainingError: the last step could not be copied to `checkpoint.copy_to`.
        """
        self._copy.finish()
        by = self._stop.name or "another process"
        self._tell(
            f"stopped by {by} after step {self.step}; run the same command again to continue"
        )

    # ------------------------------------------------------------------------------------------ end

    def closing_evaluation(self, model: Any) -> dict[str, list]:
        """Measure the held-out loss by position, see `Heldout.by_position`, or return what
        `eval.every` has just measured.

        Raises: Stopped: a signal has come; nothing is left to save. TrainingError: the last step
          could not be copied to `checkpoint.copy_to`.
        """
        self._copy.finish()
        by_position = self._heldout.measured(self.step)
        if by_position is None:
            both = ", TTT on and off" if self._config.model.ttt.layers else ""
            self._tell(f"evaluating held-out loss by position{both}")
            by_position = self._heldout.by_position(model, before_each=self._leave_if_asked)
        if self._cache:
            self._cache.seal()
        return by_position

    def _leave_if_asked(self) -> None:
        if any_process(self._stop.requested):
            raise Stopped

    def report(self, by_position: dict[str, list]) -> None:
        """Write and print the report, which makes the run a finished one; after the block."""
        self._lock.check()
        if not self._main:
            return
        run_dir = self._config.run_dir
        curve = read_curve(run_dir / METRICS_FILE)
        speed = self._throughput.mean or (curve or [{}])[-1].get("tokens_per_second")
        report = write_report(
            run_dir,
            config=self._config,
            heldout=by_position,
            curve=curve,
            summary={"steps": self.step, "tokens_per_second": speed},
        )
        print_report(report, run_dir)
        self._copy.files()


def _every(steps: int, step: int) -> bool:
    """Say whether something that is done every so many steps is due; 0: never."""
    return bool(steps) and step % steps == 0
