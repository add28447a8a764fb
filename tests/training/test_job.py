"""The job around a step, without a model (support/job_setting.py): how it begins, what is due after
a step and what is recorded, and how a signal stops it.
"""

import json
import types

import jax
import numpy as np
import pytest
from support.job_setting import EVALUATED, LOGGED, STEPS, Counter, Setting

from ttt_jax.config import replace
from ttt_jax.data import ByteTokenizer
from ttt_jax.errors import CheckpointError, TrainingError
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.process.signals import Stopped
from ttt_jax.run.logs import read_events
from ttt_jax.training import job as job_module
from ttt_jax.training import throughput as throughput_module
from ttt_jax.training.heldout import Heldout
from ttt_jax.training.hooks import Hook, Seen
from ttt_jax.training.saver import Saver


@pytest.fixture
def setting(tmp_path):
    return Setting(tmp_path)


# ---------------------------------------------------------------------------------------- beginning


def test_nothing_is_written_before_the_job_is_opened(setting):
    setting.heldout.remarks = ["eval.rows = 9: of 2"]
    opened = setting.open()
    assert not setting.run_dir.exists()
    with opened:
        assert (setting.run_dir / "config.yaml").exists()
        told = json.loads((setting.run_dir / "environment.json").read_text())["data"]
        assert told[-1] == "eval.rows = 9: of 2"
    assert not setting.calls, "no state was made"


def test_fewer_held_out_rows_than_asked_are_said(setting, tmp_path):
    """Those of 150 and 50 tokens, in rows of 128."""
    (tmp_path / "b.jsonl").write_text(f'{{"text": "{"y" * 150}"}}\n{{"text": "{"z" * 50}"}}\n')
    changes = {"data.heldout": [str(tmp_path / "b.jsonl")], "data.eos": False}
    mesh = make_mesh(setting.config.mesh, jax.devices()[:1])
    for asked, told in (3, []), (9, ["eval.rows = 9: the held-out documents make 3 of 128 tokens"]):
        heldout = Heldout(
            replace(setting.config, changes | {"eval.rows": asked}), mesh, ByteTokenizer()
        )
        assert heldout.remarks == told


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
