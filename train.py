"""The training job: config -> mesh -> data -> model -> step loop -> checkpoint -> report.

    python train.py                                            # the default run: no arguments, no downloads
    python train.py configs/500m.yaml --steps 1000             # a preset and dotted overrides
    python train.py configs/default.yaml --model.ttt.chunk_size 128 --name chunk128
    python train.py --help                                     # every field

Run the same command again to continue an interrupted run. A preset's first field worth changing is
`name`: it is the folder below `runs/` that receives checkpoints, metrics and the report.
"""

from __future__ import annotations

# First, so that a signal finds a handler: the other imports take seconds, and are made below it.
from ttt_jax.process.signals import Stopped, StopSignal, end_process  # isort: split

import functools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ttt_jax.config import Config
    from ttt_jax.process.lock import RunLock
    from ttt_jax.run.timing import StepTimer

DEFAULT = Path(__file__).parent / "configs" / "default.yaml"


def main(argv: list[str], signals: StopSignal | None = None) -> int:
    """Exit code: 0 done (or stopped by a signal with everything saved), 1 failed, 2 wrong
    arguments, data or checkpoint.
    """
    with signals or StopSignal() as stop:
        from ttt_jax.errors import TrainingError, UserError
        from ttt_jax.process.failure import failures_in_one_line
        from ttt_jax.process.lost_terminal import quiet_background, unbreakable_output

        with unbreakable_output(), quiet_background():
            try:
                with failures_in_one_line(None):
                    return _command(argv, stop)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1 if isinstance(error, TrainingError) else 2


def _command(argv: list[str], stop: StopSignal) -> int:
    from ttt_jax.config import fields_help, load_config

    if "-h" in argv or "--help" in argv:
        print(__doc__)
        for name, kind, default in fields_help():
            print(f"  --{name:38} {default}   ({kind})")
        return 0
    has_preset = bool(argv) and not argv[0].startswith("-")
    config = load_config(argv[0] if has_preset else DEFAULT, argv[1:] if has_preset else argv)
    try:
        train(config, stop)
    except Stopped:
        print(f"stopped by {stop.name}; run the same command again to continue", flush=True)
    return 0


def train(config: Config, stop: StopSignal) -> None:
    """Train in `config.run_dir`, as its only writer; a finished run shows its report and changes
    nothing.
    """
    import jax

    from ttt_jax.process.failure import failures_in_one_line
    from ttt_jax.process.lock import RunLock
    from ttt_jax.process.multihost import initialize, on_first_process
    from ttt_jax.run.finished import show_if_finished
    from ttt_jax.run.timing import StepTimer

    timer = StepTimer()
    initialize()  # before jax looks at its devices
    main_process = jax.process_index() == 0
    if on_first_process(lambda: show_if_finished(config)):
        return
    with RunLock(config.run_dir, main_process) as lock:
        stop.before_leaving.append(lock.release)
        # by the process that had the lock until now
        if on_first_process(lambda: show_if_finished(config)):
            return
        with failures_in_one_line(config.run_dir if main_process else None):
            _train(config, stop, lock, timer)


def _train(config: Config, stop: StopSignal, lock: RunLock, timer: StepTimer) -> None:
    import jax
    import numpy as np
    from ttt_jax.training.resume_check import check_resume

    from ttt_jax.checkpoint.checkpointer import Checkpointer
    from ttt_jax.data import (
        heldout_remarks,
        heldout_rows,
        load_tokenizer,
        make_loader,
        rejected_records,
        write_quarantine,
    )
    from ttt_jax.flops import device_memory_bytes, model_flops_per_token, peak_flops
    from ttt_jax.parallel.mesh import local_rows, make_mesh, put_batch
    from ttt_jax.pretrained.load import initial_model
    from ttt_jax.process.multihost import any_process, on_first_process
    from ttt_jax.run.compile_cache import open_cache
    from ttt_jax.run.folder import check_run_dir, prepare_run_dir
    from ttt_jax.run.logs import DocumentLog, EventLog
    from ttt_jax.run.metrics import MetricsLogger, read_curve
    from ttt_jax.run.provenance import write_environment
    from ttt_jax.run.report import print_report, write_report
    from ttt_jax.run.timing import host_memory_bytes
    from ttt_jax.training.guard import Guard
    from ttt_jax.training.heldout import (
        bucket_losses,
        evaluate_by_position,
        make_position_nll,
        make_probe,
    )
    from ttt_jax.training.recovery import Recovery
    from ttt_jax.training.saver import Saver
    from ttt_jax.training.start_check import checked_start
    from ttt_jax.training.step import abstract_state, init_state, make_train_step

    processes, main_process = jax.process_count(), jax.process_index() == 0
    mesh = make_mesh(config.mesh)
    tokenizer = load_tokenizer(config.data.tokenizer)
    batch_shape = (config.data.batch_size, config.data.seq_len)
    loader = make_loader(config, tokenizer=tokenizer, rows=local_rows(mesh, batch_shape))
    rows = heldout_rows(config, tokenizer=tokenizer, rows=config.eval.rows)
    abstract, tx = abstract_state(config, mesh)
    running = on_first_process(lambda: check_run_dir(config))
    first = None if running else checked_start(config, abstract.model, rows, mesh)
    changes = check_resume(config, loader)
    prepare_run_dir(config)  # nothing is written before everything has been checked
    cache, warnings = open_cache(config)
    warnings += changes
    if main_process:
        warnings += write_environment(
            config.run_dir, parameters=sum(x.size for x in jax.tree.leaves(abstract.model))
        )
        warnings += write_quarantine(config.run_dir, rejected_records(config, tokenizer))
        warnings += heldout_remarks(config, tokenizer)

    def fresh():
        return init_state(config, abstract, tx, first or initial_model(config, abstract.model))

    tell = lambda text: print(text, flush=True)  # the logger's, as soon as there is one
    with (
        EventLog(config.run_dir, lambda text: tell(text), enabled=main_process) as events,
        Checkpointer(config.run_dir / "checkpoints", config.checkpoint, events) as checkpointer,
    ):
        recovery = Recovery(config, checkpointer, abstract, loader, fresh, events)
        state, step, in_a_row = recovery.resume()
        first = None  # its buffers are the state's
        saver = Saver(checkpointer, config.checkpoint.every, events)
        guard = Guard(config, events, loader.documents, in_a_row)

        train_step, position_nll = make_train_step(config, tx), make_position_nll(mesh)
        tokens_per_step = config.data.batch_size * config.data.seq_len
        flops_per_step = tokens_per_step * model_flops_per_token(
            config.model, config.data.seq_len, training=True
        )
        peak = peak_flops(jax.devices()[0])

        batch_size = min(config.data.batch_size, len(rows["ids"]))
        probe = make_probe(position_nll, rows, mesh, batch_size)

        def closing_nll(*batch):
            if any_process(stop.requested):
                raise Stopped
            return position_nll(*batch)

        def heldout(nll=position_nll) -> dict:
            on, off = evaluate_by_position(nll, state.model, rows, mesh, batch_size)
            positions, losses_on = bucket_losses(on, rows["weights"], config.eval.buckets)
            _, losses_off = bucket_losses(off, rows["weights"], config.eval.buckets)
            return {"positions": positions, "ttt_on": losses_on, "ttt_off": losses_off}

        stop.defer()  # from here on a signal waits for the end of a step
        with (
            MetricsLogger(
                config,
                config.run_dir,
                total_steps=config.steps,
                start_step=step,
                enabled=main_process,
            ) as logger,
            DocumentLog(
                config.run_dir, step, jax.process_index(), enabled=config.log.documents
            ) as document_log,
        ):
            tell = logger.message
            for text in warnings:
                events(text, kind="start", step=step)
            if step:
                logger.message(f"continuing {config.run_dir} from step {step}")
            if processes > 1:
                logger.message(f"{processes} processes, {jax.device_count()} devices")
            start_step = clock_step = step
            clock, trained_tokens, trained_seconds = time.perf_counter(), 0, 0.0
            while step < config.steps:
                batch = timer.fetch(lambda: put_batch(next(loader), mesh, config.data.batch_size))
                state, metrics = train_step(state, batch)
                timer.dispatched(metrics["loss"])
                if step == start_step and cache:
                    cache.seal()
                step += 1
                events.step = step
                if document_log.enabled:
                    document_log.write(step, loader.documents(loader.pieces))
                guard.watch(step, metrics, loader.pieces)
                # Read once: a signal that comes later is for the next step. Signals reach processes
                # at different steps, so several stop together where they wait for the device
                # anyway.
                logged = step % config.log.every == 0
                stopping = (
                    stop.requested if processes == 1 else logged and any_process(stop.requested)
                )
                due_save = saver.due(step) or stopping or step == config.steps
                due_probe = config.log.probe_every and step % config.log.probe_every == 0
                if due_save or logged:
                    lock.check()
                if due_save or due_probe or logged:
                    guard.settle()
                if guard.must_roll_back:
                    saver.settle()
                    state = recovery.roll_back(state, step)
                    guard.rolled_back()
                if not (due_save or due_probe or logged or step == 1):
                    logger.advance(step)
                    continue
                scalars = {
                    name: float(value)
                    for name, value in jax.device_get(metrics).items()
                    if name != "skipped"
                }
                seconds, steps_done = time.perf_counter() - clock, step - clock_step
                if clock_step > start_step:  # the first interval holds the compilation
                    trained_tokens += steps_done * tokens_per_step
                    trained_seconds += seconds
                    scalars["tokens_per_second"] = steps_done * tokens_per_step / seconds
                    if peak:
                        scalars["mfu"] = (
                            steps_done * flops_per_step / seconds / (peak * jax.device_count())
                        )
                if memory := device_memory_bytes():
                    scalars["memory_bytes"] = memory
                guard.check_fast_weights(step, scalars)
                scalars |= {**timer.scalars(), "host_memory_bytes": host_memory_bytes()}
                if due_probe:
                    scalars |= probe(state.model)
                if config.eval.every and step % config.eval.every == 0:
                    by_position = heldout()
                    scalars |= {
                        f"heldout/{name}": float(np.mean(by_position[name]))
                        for name in ("ttt_on", "ttt_off")
                    }
                logger.log(step, scalars)
                what = step, state, loader.get_state(), recovery.notes(guard.in_a_row)
                if stopping or step == config.steps:
                    patience = 0 if stopping else config.checkpoint.wait_for_space
                    save = functools.partial(
                        saver.save_surely, *what, patience=patience, give_up=lambda: stop.requested
                    )
                    logger.log(step, timer.save(save))
                elif (due_save and not guard.in_a_row) or (logged and saver.retry_due()):
                    logger.log(step, timer.save(functools.partial(saver.save, *what)))
                if stopping and step < config.steps:
                    by = stop.name or "another process"
                    logger.message(
                        f"stopped by {by} after step {step}; run the same command again to continue"
                    )
                    return
                clock, clock_step = time.perf_counter(), step
                timer.restart()
            both = ", TTT on and off" if config.model.ttt.layers else ""
            logger.message(f"evaluating held-out loss by position{both}")
            by_position = heldout(closing_nll)
            if cache:
                cache.seal()

    lock.check()
    if main_process:
        curve = read_curve(config.run_dir / "metrics.jsonl")
        rate = (
            trained_tokens / trained_seconds
            if trained_seconds
            else (curve or [{}])[-1].get("tokens_per_second")
        )
        summary = {"steps": step, "tokens_per_second": rate}
        report = write_report(
            config.run_dir, config=config, heldout=by_position, curve=curve, summary=summary
        )
        print_report(report, config.run_dir)


if __name__ == "__main__":
    end_process(main(sys.argv[1:], StopSignal(last=True)))
