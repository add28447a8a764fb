"""What train.py does with its folder when it is finished, held, taken away, or when the machine
gives out: one line each.
"""

import json
import shutil

import jax
import pytest
from support.jobs import TINY, curve, one_device

import train
from ttt_jax.config import OptimizerConfig
from ttt_jax.data import Loader
from ttt_jax.errors import TrainingError
from ttt_jax.process import failure
from ttt_jax.process.lock import RunLock
from ttt_jax.run.folder import read_run_config
from ttt_jax.training import step as training
from ttt_jax.training.optimizer import learning_rate

WORDS = [
    *TINY,
    "--steps=3",
    "--checkpoint.every=2",
    "--optimizer.schedule=constant",
    "--optimizer.warmup_steps=1",
    "--remat_save=auto",
]


@pytest.fixture(scope="module", autouse=True)
def alone():
    with one_device():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(overrides, folder) of a run of three steps that is finished."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "corpus").mkdir()
    for i in range(40):
        (folder / "corpus" / f"{i:02d}.txt").write_text(f"fast weight chunk {i} update apply " * 8)
    words = [
        *WORDS,
        f"--data.train={folder / 'corpus'}",
        f"--runs_dir={folder / 'runs'}",
        "--name=done",
    ]
    assert train.main(words) == 0
    return words, folder / "runs" / "done"


@pytest.fixture
def copied(finished, tmp_path):
    """The same in a folder that may be changed."""
    words, run = finished
    shutil.copytree(run, tmp_path / "runs" / "done")
    return [*words, f"--runs_dir={tmp_path / 'runs'}"], tmp_path / "runs" / "done"


def snapshot(folder):
    """Everything that could change, folders and times included."""
    paths = sorted([folder.parent, folder, *folder.rglob("*")])
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in paths
    }


def refusal(words, capsys, code):
    capsys.readouterr()
    assert train.main(words) == code
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1, said.err
    return said


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ([], ""),
        (
            ["--eval.rows=2", "--log.every=2", "--steps=2"],
            "without effect on a finished run: steps = 2 (was 3), log.every = 2 (was 1), "
            "eval.rows = 2 (was 3); for another "
            "closing evaluation delete ",
        ),
    ],
)
def test_a_finished_run_that_is_run_again_changes_nothing(finished, capsys, extra, said):
    words, run = finished
    before = snapshot(run)
    capsys.readouterr()
    assert train.main([*words, *extra]) == 0
    out = capsys.readouterr().out
    assert snapshot(run) == before
    assert f"run folder {run}: finished (3 steps); nothing is done" in out
    assert "Held-out loss by position" in out
    assert out.endswith(f"report: {run / 'report.html'}\n")
    assert said in out if said else "without effect" not in out


def test_what_is_kept_of_activations_is_written_down(finished):
    """Not `auto`, which another device would take otherwise."""
    _, run = finished
    assert read_run_config(run).remat_save == ("attention", "ttt_target"), "on a CPU, the least"


def test_more_steps_than_a_finished_run_has_are_said_and_done(copied, capsys):
    words, run = copied
    assert train.main([*words, "--steps=4"]) == 0
    said = f"run folder {run}: was finished with 3 steps and goes on to 4; the report is then made"
    assert capsys.readouterr().out.count(said) == 1
    assert json.loads((run / "report.json").read_text())["steps"] == 4
    assert train.main([*words, "--steps=4", "--name=whole"]) == 0
    assert curve(run) == curve(run.parent / "whole"), "a constant rate"


def test_more_steps_of_a_schedule_that_falls(copied, capsys):
    """The first steps stay, the others have the rates of a run that was started with so many."""
    words, run = copied
    words = [*words, "--name=cosine", "--optimizer.schedule=cosine", "--optimizer.lr=0.01"]
    run = run.parent / "cosine"
    assert train.main([*words, "--steps=2"]) == 0
    first = curve(run)
    capsys.readouterr()
    assert train.main([*words, "--steps=5"]) == 0
    out = capsys.readouterr().out
    rates = learning_rate(OptimizerConfig(lr=0.01, warmup_steps=1), 5)
    said = f"that of a run of 5 steps (cosine), {rates(2):.3g} where it would be 0.001\n"
    assert f"warning: steps 2 -> 5: from step 2 on the learning rate is {said}" in out
    rows = [row for row in curve(run) if "learning_rate" in row]
    assert rows[:2] == [row for row in first if "learning_rate" in row]
    assert [row["learning_rate"] for row in rows[2:]] == [float(rates(n)) for n in (2, 3, 4)]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert sum(event["text"].startswith("steps 2 -> 5") for event in events) == 1


def test_a_second_job_is_refused_and_writes_nothing(finished, capsys):
    words, run = finished
    name = run.parent / "held"
    shutil.copytree(run, name)
    (name / "report.json").unlink()
    with RunLock(name, main=True):
        before = snapshot(name)
        error = refusal([*words, "--name=held"], capsys, 2).err
        assert snapshot(name) == before
    assert error.startswith(f"error: run folder {name}: process ")
    assert error.endswith("is writing it; wait for it, stop it, or choose another name\n")


@pytest.mark.parametrize("damage", ["damaged report", "no metrics"])
def test_what_a_finished_run_lost_is_said(copied, capsys, damage):
    """Its closing evaluation is done again."""
    words, run = copied
    before = json.loads((run / "report.json").read_text())
    if damage == "no metrics":
        (run / "report.json").unlink()
        (run / "metrics.jsonl").unlink()
    else:
        (run / "report.json").write_text('{"heldout": {"positions": 7}}')
    assert train.main(words) == 0
    said = (
        "metrics.jsonl is missing; the curve begins after step 3"
        if damage == "no metrics"
        else "report.json: not readable"
    )
    assert capsys.readouterr().out.count(said) == 1
    after = json.loads((run / "report.json").read_text())
    assert after["heldout"] == before["heldout"]
    assert after["loss_last"] == (None if damage == "no metrics" else before["loss_last"])


def test_a_run_folder_that_vanishes_stops_the_run(copied, capsys, monkeypatch, tmp_path):
    """One line; nothing is written where it was."""
    words, run = copied
    read = Loader.__next__

    def take_away(self):
        if self.batches_done == 3:
            run.rename(tmp_path / "away")
        return read(self)

    monkeypatch.setattr(Loader, "__next__", take_away)
    said = refusal([*words, "--steps=9"], capsys, 1)
    assert said.err.startswith(
        f"error: run folder {run}: it has vanished; stopped, because what is learnt cannot be saved"
    )
    assert not run.exists()
    assert "step 4/9" not in said.out


def test_metrics_that_are_removed_from_a_running_job(copied, capsys, monkeypatch):
    words, run = copied
    read = Loader.__next__

    def remove(self):
        if self.batches_done == 4:
            (run / "metrics.jsonl").unlink()
        return read(self)

    monkeypatch.setattr(Loader, "__next__", remove)
    assert train.main([*words, "--steps=6"]) == 0
    assert (
        "warning: metrics.jsonl was removed; the steps before 5 are missing from the curve"
        in capsys.readouterr().out
    )
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[0] == 5
    assert steps[-1] == 6


def test_a_device_without_memory_is_one_line_and_keeps_the_details(copied, capsys, monkeypatch):
    words, run = copied
    text = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.\nmore"

    def step(state, batch):
        raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(training, "make_train_step", lambda *args: step)
    error = refusal([*words, "--steps=9"], capsys, 1).err
    assert error.startswith(f"error: out of memory: {text.replace(chr(10), ' ')}; ")
    assert "lower data.batch_size" in error
    assert error.endswith(f"(details: {run / 'traceback.txt'})\n")
    assert "JaxRuntimeError" in (run / "traceback.txt").read_text()


def deep():
    return deep()


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (lambda: bytearray(1 << 62), "out of memory; lower data.batch_size"),
        (lambda: 1 // 0, "ZeroDivisionError in test_train_folder.py, line "),
        (deep, "RecursionError in test_train_folder.py, line "),
        (
            lambda: open("/nowhere/x"),  # noqa: SIM115
            "the system failed: /nowhere/x: No such file or directory; mend that",
        ),
    ],
)
def test_what_is_no_bug_of_a_setting_is_one_line(fault, line):
    with pytest.raises(TrainingError) as error, failure.failures_in_one_line(None):
        fault()
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError), failure.failures_in_one_line(None):
        {}["x"]
