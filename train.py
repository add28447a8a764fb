"""The training job: config -> mesh -> data -> model -> step loop -> checkpoint -> report.

    python train.py                                            # the default run: no arguments, no downloads
    python train.py configs/500m.yaml --steps 1000             # a preset and dotted overrides
    python train.py configs/default.yaml --model.ttt.chunk_size 128 --name chunk128
    python train.py --help                                     # every field

Run the same command again to continue an interrupted run. A preset's first field worth changing is `name`: it is the folder
below `runs/` that receives checkpoints, metrics and the report.
"""

from __future__ import annotations

import functools
import signal
import sys
import time
from pathlib import Path

from ttt_jax.config import Config, fields_help, load_config
from ttt_jax.errors import TrainingError, UserError

DEFAULT = Path(__file__).parent / "configs" / "default.yaml"


def main(argv: list[str]) -> int:
    """Exit code: 0 done (or stopped by SIGTERM with everything saved), 1 failed, 2 wrong arguments, data or checkpoint."""
    if "-h" in argv or "--help" in argv:
        print(__doc__)
        for name, kind, default in fields_help():
            print(f"  --{name:38} {default}   ({kind})")
        return 0
    try:
        has_preset = bool(argv) and not argv[0].startswith("-")
        config = load_config(argv[0] if has_preset else DEFAULT, argv[1:] if has_preset else argv)
        train(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, TrainingError) else 2
    return 0


def train(config: Config) -> None:
    import jax
    import numpy as np

    from ttt_jax.checkpoint import Checkpointer, prepare_run_dir
    from ttt_jax.compile_cache import open_cache
    from ttt_jax.data import heldout_rows, load_tokenizer, make_loader, rejected_records, write_quarantine
    from ttt_jax.distributed import any_process, initialize
    from ttt_jax.metrics import MetricsLogger, device_memory_bytes, model_flops_per_token, peak_flops, read_metrics
    from ttt_jax.pretrained import initial_model
    from ttt_jax.report import bucket_losses, print_report, write_report
    from ttt_jax.sharding import make_mesh
    from ttt_jax.telemetry import StepTimer, host_memory_bytes, make_probe, write_environment
    from ttt_jax.training import (
        TrainState,
        abstract_state,
        evaluate_by_position,
        init_state,
        local_rows,
        make_position_nll,
        make_train_step,
        put_batch,
    )

    timer = StepTimer()
    initialize()  # before jax looks at its devices
    processes, main_process = jax.process_count(), jax.process_index() == 0
    mesh = make_mesh(config.mesh)
    tokenizer = load_tokenizer(config.data.tokenizer)
    batch_shape = (config.data.batch_size, config.data.seq_len)
    loader = make_loader(config, tokenizer=tokenizer, rows=local_rows(mesh, batch_shape))
    rows = heldout_rows(config, tokenizer=tokenizer, rows=config.eval.rows)
    abstract, tx = abstract_state(config, mesh)
    # Asked of all processes: one may have created it before another one looks.
    first = None if any_process(config.run_dir.exists()) else initial_model(config, abstract.model)
    prepare_run_dir(config)  # nothing is written before everything has been checked
    cache, warnings = open_cache(config)
    if main_process:
        write_environment(config.run_dir, parameters=sum(leaf.size for leaf in jax.tree.leaves(abstract.model)))
        warnings += write_quarantine(config.run_dir, rejected_records(config, tokenizer))

    with Checkpointer(config.run_dir / "checkpoints", config.checkpoint) as checkpointer:
        step = checkpointer.latest_step() or 0
        if step:
            restored = checkpointer.restore(step, model=abstract.model, opt_state=abstract.opt_state)
            finished = jax.device_put(np.int32(step), abstract.step.sharding)
            state = TrainState(restored.model, restored.opt_state, finished)
            loader.set_state(restored.data_state)
        else:
            state = init_state(config, abstract, tx, first or initial_model(config, abstract.model))

        train_step, position_nll = make_train_step(config, tx), make_position_nll(mesh)
        tokens_per_step = config.data.batch_size * config.data.seq_len
        flops_per_step = tokens_per_step * model_flops_per_token(config.model, config.data.seq_len, training=True)
        peak = peak_flops(jax.devices()[0])
        stop = StopSignal()

        def save(step: int) -> None:
            checkpointer.save(step, model=state.model, opt_state=state.opt_state, data_state=loader.get_state())

        batch_size = min(config.data.batch_size, len(rows["ids"]))
        probe = make_probe(position_nll, rows, mesh, batch_size)

        def heldout() -> dict:
            on, off = evaluate_by_position(position_nll, state.model, rows, mesh, batch_size)
            positions, losses_on = bucket_losses(on, rows["weights"], config.eval.buckets)
            _, losses_off = bucket_losses(off, rows["weights"], config.eval.buckets)
            return {"positions": positions, "ttt_on": losses_on, "ttt_off": losses_off}

        with MetricsLogger(
            config, config.run_dir, total_steps=config.steps, start_step=step, enabled=main_process
        ) as logger:
            for text in warnings:
                logger.message(f"warning: {text}")
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
                # Read once: a signal that comes later is for the next step. Signals reach processes at different steps, so
                # several stop together where they wait for the device anyway.
                stopping = stop.requested if processes == 1 else step % config.log.every == 0 and any_process(stop.requested)
                periodic = config.checkpoint.every and step % config.checkpoint.every == 0
                due_save = periodic or stopping or step == config.steps
                due_probe = config.log.probe_every and step % config.log.probe_every == 0
                if not (due_save or due_probe or step % config.log.every == 0 or step == 1):
                    logger.advance(step)
                    continue
                scalars = {name: float(value) for name, value in jax.device_get(metrics).items()}
                if not (np.isfinite(scalars["loss"]) and np.isfinite(scalars["grad_norm"])):
                    raise TrainingError(
                        f"loss = {scalars['loss']} and gradient norm = {scalars['grad_norm']} at step {step}: not finite; "
                        f"lower optimizer.lr = {config.optimizer.lr:g} or model.ttt.lr = {config.model.ttt.lr:g} and use "
                        f"another name (the last checkpoint, step {checkpointer.latest_step()}, is untouched)"
                    )
                seconds, steps_done = time.perf_counter() - clock, step - clock_step
                if clock_step > start_step:  # the first interval holds the compilation
                    trained_tokens += steps_done * tokens_per_step
                    trained_seconds += seconds
                    scalars["tokens_per_second"] = steps_done * tokens_per_step / seconds
                    if peak:
                        scalars["mfu"] = steps_done * flops_per_step / seconds / (peak * jax.device_count())
                if memory := device_memory_bytes():
                    scalars["memory_bytes"] = memory
                scalars |= {**timer.scalars(), "host_memory_bytes": host_memory_bytes()}
                if due_probe:
                    scalars |= probe(state.model)
                if config.eval.every and step % config.eval.every == 0:
                    by_position = heldout()
                    scalars |= {f"heldout/{name}": float(np.mean(by_position[name])) for name in ("ttt_on", "ttt_off")}
                logger.log(step, scalars)
                if due_save:
                    logger.log(step, timer.save(functools.partial(save, step)))
                if stopping and step < config.steps:
                    by = stop.name or "another process"
                    logger.message(f"stopped by {by} after step {step}; run the same command again to continue")
                    return
                clock, clock_step = time.perf_counter(), step
                timer.restart()
            logger.message("evaluating held-out loss by position, TTT on and off")
            by_position = heldout()
            if cache:
                cache.seal()

    if main_process:
        curve = [row for row in read_metrics(config.run_dir / "metrics.jsonl") if "loss" in row]
        rate = trained_tokens / trained_seconds if trained_seconds else curve[-1].get("tokens_per_second")
        summary = {"steps": step, "tokens_per_second": rate, "loss_first": curve[0]["loss"], "loss_last": curve[-1]["loss"]}
        report = write_report(config.run_dir, config=config, heldout=by_position, curve=curve, summary=summary)
        print_report(report, config.run_dir)


class StopSignal:
    """SIGTERM and SIGINT ask for a checkpoint and a clean exit; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.requested, self.name = False, ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested, self.name = True, signal.Signals(number).name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
