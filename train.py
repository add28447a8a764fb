"""Trains a model: config -> mesh -> data -> model -> step loop -> checkpoint -> report.

Examples:

    python train.py                                  # the default run: no arguments, no downloads
    python train.py configs/500m.yaml --steps 1000   # a YAML file and dotted overrides
    python train.py default --model.ttt.chunk_size 128 --name chunk128   # a preset by its name
    python train.py --init_from checkpoints/X --data.train book.txt      # go on from a checkpoint
    python train.py runs/NAME                        # go on with a run, wherever its folder is
    python train.py --help                           # every field, and what the default run sets
    python train.py books --help                     # the same with what books.yaml sets

`ttt-jax train` is the same job, started in any folder. Run the same command again to continue an
interrupted run. A preset's first field worth changing is `name`: it is the folder below `runs/`
that receives checkpoints, metrics and the report.
"""

from __future__ import annotations

# First, so that a signal finds a handler: the other imports take seconds, and are made below it.
from ttt_jax.process.signals import Stopped, StopSignal, end_process  # isort: split

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ttt_jax.pretrained.start_config import Start


def main(argv: list[str], signals: StopSignal | None = None) -> int:
    """Run the command line; the exit code: 0 done (or stopped by a signal with everything saved), 1
    failed, 2 wrong arguments, data or checkpoint.
    """
    with signals or StopSignal() as stop:
        from ttt_jax.errors import TrainingError, UserError
        from ttt_jax.process.failure import failures_in_one_line
        from ttt_jax.process.lost_terminal import quiet_background, unbreakable_output

        with unbreakable_output(), quiet_background(stop.last):
            try:
                with failures_in_one_line(None):
                    return _command(argv, stop)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1 if isinstance(error, TrainingError) else 2


def _command(argv: list[str], stop: StopSignal) -> int:
    from ttt_jax.config import help_text, preset_names
    from ttt_jax.pretrained.start_config import config_to_show, load_start

    words = [word for word in argv if word not in ("-h", "--help")]
    has_preset = bool(words) and not words[0].startswith("-")
    preset, overrides = (words[0], words[1:]) if has_preset else (None, words)
    if words != argv:
        fields = help_text(config_to_show(preset or "default"))
        print(f"{__doc__}\npresets: {', '.join(preset_names())}")
        print(f"\nThe fields, with the values of {preset or 'default'}:\n\n{fields}")
        return 0
    start = load_start(preset, overrides)
    try:
        train(start, stop)
    except Stopped:
        print(f"stopped by {stop.name}; run the same command again to continue", flush=True)
    return 0


def train(start: Start, stop: StopSignal) -> None:
    """Train in the run's folder, as its only writer; a finished run shows its report and changes
    nothing.
    """
    from ttt_jax.process.multihost import initialize, say_on_first_process
    from ttt_jax.run.finished import only_writer
    from ttt_jax.run.timing import StepTimer

    timer = StepTimer()
    initialize()  # before jax looks at its devices
    start = start.here()
    config = start.config
    with only_writer(config, stop) as lock:
        if lock is None:  # finished
            return
        from ttt_jax.checkpoint.run_copy import fetch_run
        from ttt_jax.data import load_tokenizer, make_loader
        from ttt_jax.inference.samples import sample_hooks
        from ttt_jax.parallel.mesh import local_rows, make_mesh, put_batch
        from ttt_jax.pretrained.load import training_tokenizer
        from ttt_jax.training.heldout import Heldout
        from ttt_jax.training.job import Parts, open_job
        from ttt_jax.training.measured_rate import settled
        from ttt_jax.training.resume_check import check_resume
        from ttt_jax.training.start_check import checked_beginning
        from ttt_jax.training.step import abstract_state, make_train_step
        from ttt_jax.training.step_memory import settled_remat

        say_on_first_process(start.remarks)
        fetched = fetch_run(config)
        mesh = make_mesh(config.mesh)
        tokenizer = load_tokenizer(training_tokenizer(config))
        batch_shape = config.data.batch_size, config.data.seq_len
        loader = make_loader(config, tokenizer=tokenizer, rows=local_rows(mesh, batch_shape))
        batches = (put_batch(batch, mesh, config.data.batch_size) for batch in loader)
        heldout = Heldout(config, mesh, tokenizer)
        config = settled_remat(settled(start, heldout.rows), mesh)
        abstract, optimizer = abstract_state(config, mesh)
        fresh = checked_beginning(config, abstract, optimizer, heldout.rows, mesh)
        changes = fetched + check_resume(config, loader)
        hooks = heldout.hooks(config) + sample_hooks(config, tokenizer, heldout.rows, abstract)
        train_step = make_train_step(config, optimizer)
        parts = Parts(
            config, stop, lock, timer, tokenizer, loader, heldout, hooks, abstract, fresh, changes
        )
        with open_job(parts) as job:  # the first write: everything has been checked
            state = job.resume()
            while job.step < config.steps:
                state, metrics = train_step(state, job.fetch(batches))
                due = job.after_step(metrics)
                if due.roll_back:
                    state = job.roll_back(state)
                if due.anything:
                    job.log(due, metrics, state.model)
                    job.save(due, state)
                if due.stop:
                    job.say_stopped()
                    return
            by_position = job.closing_evaluation(state.model)
        job.report(by_position)


if __name__ == "__main__":
    end_process(main(sys.argv[1:], StopSignal(last=True)))
