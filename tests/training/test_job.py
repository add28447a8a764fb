"""The job around a step, without a model: the step is a sum, and loader, held-out rows, signal and
lock note how they are used. Checkpoints, logs and guard are the real ones.
"""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.config import Config, from_dict, replace
from ttt_jax.data import ByteTokenizer, Piece
from ttt_jax.errors import CheckpointError, TrainingError
from ttt_jax.process.signals import Stopped, StopSignal
from ttt_jax.run.logs import read_events
from ttt_jax.run.positions import position_scalars
from ttt_jax.run.timing import StepTimer
from ttt_jax.training import job as job_module
from ttt_jax.training import throughput as throughput_module
from ttt_jax.training.guard import Guard
from ttt_jax.training.hooks import Hook, Seen
from ttt_jax.training.job import open_job
from ttt_jax.training.recovery import Recovery
from ttt_jax.training.saver import Saver
from ttt_jax.training.step import TrainState
from ttt_jax.training.throughput import Throughput

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
            place=lambda: self.calls.append("place"), by_position=self.by_position
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
        return open_job(
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
            changes=list(changes),
        )

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


@pytest.fixture
def setting(tmp_path):
    return Setting(tmp_path)


# ---------------------------------------------------------------------------------------- beginning


def test_nothing_is_written_before_the_job_is_opened(setting):
    opened = setting.open()
    assert not setting.run_dir.exists()
    with opened:
        assert (setting.run_dir / "config.yaml").exists()
        assert (setting.run_dir / "environment.json").exists()
    assert not setting.calls, "no state was made"


def test_a_folder_of_something_else_is_refused_as_it_is(setting):
    setting.run_dir.mkdir(parents=True)
    (setting.run_dir / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds 'thesis\.tex'"), setting.open():
        raise AssertionError("the block must not be entered")
    assert [path.name for path in setting.run_dir.iterdir()] == ["thesis.tex"]


def test_what_has_changed_is_said_once_the_logs_are_open(setting, capsys, monkeypatch):
    """In the order: cache, config, then what else the folder's files are about."""
    monkeypatch.setattr(job_module, "open_cache", lambda config: (None, ["cache off"]))
    written = {}

    def write_environment(run_dir, **facts):
        written.update(facts)
        return ["environment"]

    monkeypatch.setattr(job_module, "write_environment", write_environment)
    with setting.open(changes=["field changed"]) as job:
        assert not read_events(setting.run_dir)
        assert not setting.stop._deferred, "until there is something to save a signal ends it"
        job.resume()
        assert setting.stop._deferred
    said = ["cache off", "field changed", "environment"]
    assert [event["text"] for event in read_events(setting.run_dir)] == said
    assert [event["kind"] for event in read_events(setting.run_dir)] == ["start"] * 3
    read, held_out = written["data"]
    assert read.endswith("reads 40 files (40 .txt); skips none")
    assert held_out.startswith("data.heldout_fraction = 0.05: holds out ")
    assert written["parameters"] == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [read, held_out, *(f"warning: {text}" for text in said)]
    assert [line.split()[0] for line in lines[5:]] == ["model", "devices", "work", "memory", "kept"]
    assert setting.calls == ["fresh", "place"]


def test_a_stopped_job_goes_on_where_it_was(setting, capsys):
    def stop(step):
        setting.stop.requested = step == 5

    with setting.open() as job:
        _, dues = setting.train(job, before=stop)
    assert list(dues) == [1, 2, 3, 4, 5]
    assert dues[5].stop
    setting.stop.name = ""
    assert "stopped by another process after step 5; run the same" in capsys.readouterr().out
    assert setting.saved == [4, 5]
    again = Setting(setting.run_dir.parents[1])
    with again.open() as job:
        state, dues = again.train(job)
        assert next(iter(dues)) == 6
    assert again.calls[:1] == ["place"], "nothing fresh"
    assert float(state.model["w"]) == sum(range(1, STEPS + 1))
    assert f"continuing {setting.run_dir} from step 5" in capsys.readouterr().out
    assert again.steps_with("loss") == sorted({*LOGGED, 5})


# -------------------------------------------------------------------------------------- what is due


def test_what_is_due_and_what_is_recorded(setting):
    with setting.open() as job:
        state, dues = setting.train(job)
    true = lambda name: [step for step, due in dues.items() if getattr(due, name)]
    assert true("log") == [3, 6, 9, 12]
    assert true("save") == [4, 8, 12, 13]
    assert [step for step, due in dues.items() if setting.hooks[0] in due.hooks] == [6, 12]
    assert [step for step, due in dues.items() if setting.hooks[1] in due.hooks] == EVALUATED
    assert true("anything") == LOGGED
    assert true("last") == [13]
    assert not true("roll_back")
    assert not true("stopping")
    assert setting.steps_with("loss") == LOGGED
    assert setting.steps_with("tokens_per_second") == LOGGED[1:], "the first one compiles"
    assert setting.steps_with("time/to_first_step") == [1]
    assert setting.steps_with("time/input_wait") == LOGGED
    assert setting.steps_with("host_memory_bytes") == LOGGED
    assert setting.steps_with("probe/gain") == [6, 12]
    assert setting.steps_with("heldout/ttt_on") == EVALUATED
    assert setting.steps_with("time/checkpoint") == setting.saved == [4, 8, 12, 13]
    sixth = next(row for row in setting.rows if row["step"] == 6)
    assert sixth["loss"] == 6
    assert sixth["probe/gain"] == 21, "of the weights after the step"
    assert (sixth["heldout/ttt_on"], sixth["heldout/ttt_off"]) == (1.5, 3.0)
    assert (sixth["heldout/000-063/ttt_off"], sixth["heldout/064-127/ttt_on"]) == (2.0, 2.0)
    assert not {"skipped", "mfu", "memory_bytes"} & set(sixth)
    assert int(state.step) == STEPS


def test_what_a_run_shows_while_it_trains(setting, capsys, monkeypatch):
    """The banner, how long compiling takes, each row before its hooks' texts, once the pace."""
    now = [0.0]
    monkeypatch.setattr(job_module, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(
        throughput_module, "time", types.SimpleNamespace(perf_counter=lambda: now[0])
    )

    class Slow(Counter):
        def __next__(self):
            now[0] += 7.0  # reading is not compiling
            return super().__next__()

    setting.loader, step = Slow(), setting.step

    def compiles(state, batch):
        now[0] += 30.0 if batch == 1 else 600.0
        return step(state, batch)

    setting.step = compiles
    with setting.open() as job:
        setting.train(job, steps=4)
    read, held_out, *lines = capsys.readouterr().out.splitlines()
    assert "reads 40 files" in read
    assert "holds out" in held_out
    assert lines[:7] == [
        "model     1 parameters; none of 4 layers adapts",
        f"devices   {jax.device_count()} x cpu, computing in float32",
        "work      256 tokens a step (2 rows of 128), 13 steps, 3,328 tokens",
        "memory    weights 0.0 MiB and optimizer state 0.0 MiB on each device",
        "kept      no activations for the backward pass; the rest is computed again (remat_save)",
        "compiling the train step ...",
        "compiled in 30.0 s",
    ]
    assert [line.split("  ")[0] for line in lines[7:]] == [
        "step 1/13",
        "step 2/13",
        "losses of step 2",
        lines[10],
        "step 3/13",
        "step 4/13",
        "losses of step 4",
    ]
    assert lines[10].startswith(
        "607 s a step, about 1.9 hours to go (without evaluations and saves)"
    )
    assert "memory" in lines[10]
    samples = (setting.run_dir / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in samples] == [
        {"step": 2, "text": "at 2"},
        {"step": 4, "text": "at 4"},
    ]


def test_samples_after_the_checkpoint_are_written_again(setting):
    def stop(step):
        setting.stop.requested = step == 5

    with setting.open() as job:
        setting.train(job, before=stop)
    path = setting.run_dir / "samples.jsonl"
    with path.open("a") as file:
        file.write('{"step": 6, "text": "of a start that was killed"}\n')
    again = Setting(setting.run_dir.parents[1])
    with again.open() as job:
        again.train(job)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == EVALUATED
    assert "of a start" not in path.read_text()


def test_documents_are_noted_at_every_step(setting):
    setting.config = replace(setting.config, {"log.documents": True})
    with setting.open() as job:
        setting.train(job, steps=3)
    lines = (setting.run_dir / "documents.jsonl").read_text().splitlines()
    noted = [(line["step"], line["documents"]) for line in map(json.loads, lines)]
    assert noted == [(step, [["a.txt", step, 0, 9]]) for step in (1, 2, 3)]


def test_a_folder_that_is_gone_is_noticed_before_anything_is_recorded(setting):
    def gone():
        setting.calls.append("lock")
        if job.step == 4:
            raise TrainingError("gone")

    setting.lock.check = gone
    setting.hooks = [Hook(5, setting.probe)]
    with pytest.raises(TrainingError, match="gone"), setting.open() as job:
        setting.train(job)
    assert setting.steps_with("loss") == [1, 3]
    assert setting.calls.count("lock") == 2, "steps 3 and 4: what is logged, what is saved"
    assert not setting.saved


# ------------------------------------------------------------------------------------------ signals


def test_the_signal_is_read_once_a_step(setting):
    """One that comes while a step is being recorded is for the next step."""

    def probe(step, model):
        setting.stop.requested = True
        return Seen({})

    read = []

    def before(step):
        read.append(setting.stop.reads)

    setting.hooks = [Hook(6, probe)]
    with setting.open() as job:
        _, dues = setting.train(job, before=before)
    assert list(dues)[-1] == 7
    assert [step for step, due in dues.items() if due.stopping] == [7]
    assert np.diff([*read, setting.stop.reads]).tolist() == [1] * 7
    assert setting.saved == [4, 7]


def test_several_processes_ask_one_another_where_they_log(setting, monkeypatch):
    asked = []

    def any_process(flag):
        asked.append(job.step)
        return not flag

    with setting.open() as job:
        state, batches = job.resume(), iter(setting.loader)
        monkeypatch.setattr(
            job_module, "jax", types.SimpleNamespace(process_count=lambda: 2, Array=jax.Array)
        )
        monkeypatch.setattr(job_module, "any_process", any_process)
        for _ in range(6):
            state, metrics = setting.step(state, job.fetch(batches))
            due = job.after_step(metrics)
            assert due.stopping == (job.step in (3, 6))
    assert asked == [3, 6]


@pytest.mark.parametrize("stopped_at", [None, 5])
def test_only_the_last_step_waits_for_space(setting, monkeypatch, stopped_at):
    saves = {}

    def save_surely(self, step, *what, patience, give_up):
        setting.stop.requested = True
        saves[step] = patience, give_up()

    def stop(step):
        setting.stop.requested = step == stopped_at

    monkeypatch.setattr(Saver, "save_surely", save_surely)
    with setting.open() as job:
        setting.train(job, before=stop)
    patience = setting.config.checkpoint.wait_for_space
    assert patience > 0
    assert saves == ({5: (0, True)} if stopped_at else {STEPS: (patience, True)})


def test_a_signal_at_the_last_step_ends_the_closing_evaluation(setting):
    def stop(step):
        setting.stop.requested = step == STEPS

    with setting.open() as job:
        state, dues = setting.train(job, before=stop)
        assert dues[STEPS].stopping
        assert not dues[STEPS].stop
        with pytest.raises(Stopped):
            job.closing_evaluation(state.model)
    assert setting.saved[-1] == STEPS


# --------------------------------------------------------------------------- skipped steps, retries


def test_a_roll_back_takes_older_weights_and_goes_on_with_the_data(tmp_path, monkeypatch):
    setting = Setting(tmp_path, skipped=[5, 6])

    def note(owner, name):
        call = getattr(owner, name)

        def noted(*args):
            setting.calls.append(name)
            return call(*args)

        monkeypatch.setattr(owner, name, noted)

    note(Saver, "settle")
    note(Recovery, "roll_back")
    note(Guard, "rolled_back")
    with setting.open() as job:
        state, dues = setting.train(job)
    assert [step for step, due in dues.items() if due.roll_back] == [6], "known at a logged step"
    calls = [call for call in setting.calls if call not in ("lock", "probe")]
    assert calls == ["fresh", "place", "settle", "roll_back", "rolled_back"]
    assert setting.calls.index("rolled_back") < setting.calls.index("probe")
    sixth = next(row for row in setting.rows if row["step"] == 6)
    assert sixth["probe/gain"] == 10, "of the weights of step 4"
    assert float(state.model["w"]) == sum(range(1, STEPS + 1)) - 5 - 6
    assert setting.loader.batches == STEPS


def test_no_checkpoint_is_made_among_skipped_steps(tmp_path):
    setting = Setting(tmp_path, skipped=[8])
    with setting.open() as job:
        setting.train(job)
    assert setting.saved == [4, 12, 13]
    assert setting.steps_with("loss") == LOGGED


def test_a_failed_save_is_tried_again_where_a_step_is_logged(setting, monkeypatch):
    asked, saved = [], []

    def retry_due(self):
        asked.append(job.step)
        return True

    monkeypatch.setattr(Saver, "retry_due", retry_due)
    monkeypatch.setattr(Saver, "save", lambda self, step, *what: saved.append(step))
    monkeypatch.setattr(Saver, "save_surely", lambda self, step, *what, **how: saved.append(step))
    with setting.open() as job:
        setting.train(job)
    assert asked == [3, 6, 9], "not where a save is due anyway"
    assert saved == [3, 4, 6, 8, 9, 12, 13]


# ---------------------------------------------------------------------------------------------- end


def test_compiled_programs_are_sealed_after_the_first_step_and_the_evaluation(setting, monkeypatch):
    sealed = []
    cache = types.SimpleNamespace(seal=lambda: sealed.append(job.step))
    monkeypatch.setattr(job_module, "open_cache", lambda config: (cache, []))
    with setting.open() as job:
        state, _ = setting.train(job)
        assert sealed == [0, 2, 6], "the step is under way; the first call of each hook"
        assert job.closing_evaluation(state.model) == REPORT
    assert sealed == [0, 2, 6, STEPS]


def test_the_report_makes_a_run_a_finished_one(setting, capsys):
    with setting.open() as job:
        state, _ = setting.train(job)
        by_position = job.closing_evaluation(state.model)
        assert not (setting.run_dir / "report.json").exists()
    setting.calls.clear()
    job.report(by_position)
    assert setting.calls == ["lock"]
    report = json.loads((setting.run_dir / "report.json").read_text())
    assert report["steps"] == STEPS
    assert report["heldout"]["ttt_on"] == REPORT["ttt_on"]
    assert (report["loss_first"], report["loss_last"]) == (1, 13)
    assert report["tokens_per_second"] == job._throughput.mean > 0
    assert "evaluating held-out loss by position" in capsys.readouterr().out


def test_a_report_after_a_restart_takes_its_speed_from_the_curve(setting):
    with setting.open() as job:
        setting.train(job)
    speed = [row["tokens_per_second"] for row in setting.rows if "tokens_per_second" in row][-1]
    again = Setting(setting.run_dir.parents[1])
    with again.open() as job:
        state, dues = again.train(job)
        assert not dues
        by_position = job.closing_evaluation(state.model)
    job.report(by_position)
    report = json.loads((setting.run_dir / "report.json").read_text())
    assert report["tokens_per_second"] == speed


def test_no_report_is_written_into_a_folder_that_is_gone(setting):
    def gone():
        raise TrainingError("gone")

    with setting.open() as job:
        state, _ = setting.train(job)
        by_position = job.closing_evaluation(state.model)
    setting.lock.check = gone
    with pytest.raises(TrainingError, match="gone"):
        job.report(by_position)
    assert not (setting.run_dir / "report.json").exists()


def test_what_is_measured_beside_the_steps_is_no_training_time(setting, monkeypatch):
    now = [0.0]

    def takes(seconds):
        now[0] += seconds

    fake = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(throughput_module, "time", fake)
    setting.hooks = [Hook(2, lambda step, model: takes(1000) or Seen({}))]
    with setting.open() as job:
        setting.train(job, before=lambda step: takes(2))
    speeds = [row["tokens_per_second"] for row in setting.rows if "tokens_per_second" in row]
    assert speeds == [2 * 128 / 2] * len(LOGGED[1:])


def test_throughput(setting, monkeypatch):
    """The first interval compiles, and what lies between an interval and the next is no step."""
    now = [100.0]
    fake = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(throughput_module, "time", fake)
    monkeypatch.setattr(throughput_module, "peak_flops", lambda device: 1e9)
    monkeypatch.setattr(throughput_module, "model_flops_per_token", lambda *args, **kw: 1e6)
    throughput = Throughput(setting.config, 7)
    now[0] += 50
    assert throughput.scalars(8) == {}
    assert throughput.mean is None
    now[0] += 1000  # an evaluation
    throughput.restart(8)
    now[0] += 4
    tokens = 2 * 128
    share = pytest.approx(2 * tokens * 1e6 / 4 / (1e9 * jax.device_count()))
    assert throughput.scalars(10) == {"tokens_per_second": 2 * tokens / 4, "mfu": share}
    throughput.restart(10)
    now[0] += 1
    throughput.scalars(11)
    assert throughput.mean == 3 * tokens / 5
