"""A training job without a model: the step is a sum, and loader, held-out rows, signal and lock
note how they are used. Checkpoints, logs and guard are the real ones.
"""

from __future__ import annotations

import json
import types

import jax
import jax.numpy as jnp

from ttt_jax.config import Config, from_dict
from ttt_jax.data import ByteTokenizer, Piece
from ttt_jax.process.signals import StopSignal
from ttt_jax.run.positions import position_scalars
from ttt_jax.run.timing import StepTimer
from ttt_jax.training.hooks import Hook, Seen
from ttt_jax.training.job import Parts, open_job
from ttt_jax.training.step import TrainState

STEPS = 13
SETTINGS = {
    "steps": STEPS,
    "compile_cache": None,
    "data": {"seq_len": 128, "batch_size": 2},
    "optimizer": {"warmup_steps": 0},
    "log": {"every": 3, "probe_every": 6, "tensorboard": False},
    "sample": {"every": 2},
    "checkpoint": {"every": 4, "keep": 9, "async_save": False},
    "guard": {"skips": 2},
}
LOGGED = [1, 2, 3, 4, 6, 8, 9, 10, 12, 13]
EVALUATED = [2, 4, 6, 8, 10, 12]
REPORT = {"positions": [[0, 64], [64, 128]], "ttt_on": [1.0, 2.0], "ttt_off": [2.0, 4.0]}


class Signal(StopSignal):
    """A signal that is set by hand, and counts how often it is read."""

    reads = 0

    @property
    def requested(self):
        self.reads += 1
        return self._requested

    @requested.setter
    def requested(self, value):
        self._requested = value


class Counter:
    """A loader of numbers: the batch of step n is n."""

    def __init__(self):
        self.batches = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.batches += 1
        return self.batches

    @property
    def pieces(self):
        return self.batches

    def documents(self, pieces):
        return [Piece(0, "a.txt", pieces, 0, 9)]

    def get_state(self):
        return {"batches": self.batches}

    def set_state(self, state):
        self.batches = state["batches"]
        return []


class Setting:
    """Everything that a job is opened with; `calls` has what was done to it, in order."""

    def __init__(self, tmp_path, skipped=()):
        corpus = tmp_path / "corpus"
        corpus.mkdir(exist_ok=True)
        for i in range(40):
            (corpus / f"{i}.txt").write_text(f"text number {i} of the corpus")
        data = SETTINGS["data"] | {"train": str(corpus)}
        runs = {"runs_dir": str(tmp_path / "runs"), "name": "a"}
        self.config = from_dict(Config, SETTINGS | {"data": data} | runs)
        self.calls, self.skipped = [], set(skipped)
        self.stop, self.loader = Signal(), Counter()
        self.lock = types.SimpleNamespace(check=lambda: self.calls.append("lock"))
        self.heldout = types.SimpleNamespace(
            place=lambda: self.calls.append("place"),
            by_position=self.by_position,
            measured=lambda step: None,
            remarks=[],
        )
        self.hooks = [Hook(6, self.probe), Hook(2, self.evaluate)]

    def probe(self, step, model):
        self.calls.append("probe")
        return Seen({"probe/gain": float(model["w"])})

    def evaluate(self, step, model):
        """As Heldout does it, on losses that are given."""
        return Seen(position_scalars(REPORT), f"losses of step {step}", ({"text": f"at {step}"},))

    def by_position(self, model, before_each=None):
        for _ in range(2):
            if before_each is not None:
                before_each()
        return REPORT

    def fresh(self):
        self.calls.append("fresh")
        return TrainState({"w": jnp.zeros(())}, {"m": jnp.zeros(())}, jnp.int32(0))

    def open(self, changes=()):
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), self.fresh()
        )
        self.calls.clear()
        parts = Parts(
            self.config,
            self.stop,
            self.lock,
            StepTimer(),
            tokenizer=ByteTokenizer(),
            loader=self.loader,
            heldout=self.heldout,
            hooks=self.hooks,
            abstract=abstract,
            fresh=self.fresh,
            changes=changes,
        )
        return open_job(parts)

    def step(self, state, batch):
        """Add the batch's number to the only weight; a step that is skipped adds nothing."""
        skip = batch in self.skipped
        added = 0.0 if skip else float(batch)
        metrics = {
            "loss": jnp.float32("nan" if skip else batch),
            "grad_norm": jnp.float32(1),
            "learning_rate": jnp.float32(0.5),
            "skipped": jnp.float32(skip),
            "skipped_steps": jnp.float32(0),
        }
        model = {"w": state.model["w"] + added}
        return TrainState(model, state.opt_state, state.step + 1), metrics

    def train(self, job, steps=STEPS, before=lambda step: None):
        """The loop of train.py; returns the state, and what was due at each step."""
        state, dues, batches = job.resume(), {}, iter(self.loader)
        while job.step < steps:
            before(job.step + 1)
            state, metrics = self.step(state, job.fetch(batches))
            due = dues[job.step] = job.after_step(metrics)
            if due.roll_back:
                state = job.roll_back(state)
            if due.anything:
                job.log(due, metrics, state.model)
                job.save(due, state)
            if due.stop:
                job.say_stopped()
                break
        return state, dues

    @property
    def run_dir(self):
        return self.config.run_dir

    @property
    def rows(self):
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def saved(self):
        return sorted(int(path.name) for path in (self.run_dir / "checkpoints").iterdir())

    def steps_with(self, key):
        return [row["step"] for row in self.rows if key in row]
