"""The training job as its users see it: exit codes, one-line errors, the report, and resuming bit
for bit.
"""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from support.jobs import TINY, curve, one_device, start, wait_for_step, write_corpus

import train
from ttt_jax.config import load_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def words(tmp_path):
    """Overrides of a job of seconds on a corpus of its own."""
    corpus = write_corpus(tmp_path / "corpus")
    return [*TINY, f"--data.train={corpus}", f"--runs_dir={tmp_path / 'runs'}", "--name=tiny"]


@pytest.fixture
def alone():
    with one_device():
        yield


def finish(words):
    process = start(words)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def test_an_interrupted_job_continues_bit_for_bit(words, tmp_path):
    """Uninterrupted, killed without warning (kill -9), and stopped by SIGTERM: one loss curve."""
    runs = tmp_path / "runs"
    finish([*words, "--name=whole"])
    report = json.loads((runs / "whole" / "report.json").read_text())
    assert {"heldout", "steps", "tokens_per_second", "loss_first", "loss_last"} <= set(report)
    heldout = report["heldout"]
    assert heldout["positions"] == [[0, 16], [16, 32]]
    assert len(heldout["ttt_on"]) == len(heldout["ttt_off"]) == 2
    assert report["steps"] == 16
    assert report["loss_last"] < report["loss_first"]
    assert report["tokens_per_second"] > 0
    assert (runs / "whole" / "report.md").is_file()
    assert (runs / "whole" / "loss_by_position.png").read_bytes().startswith(b"\x89PNG")
    whole = curve(runs / "whole")
    assert [row["step"] for row in whole] == list(range(1, 17))

    step = int(np.random.default_rng().integers(5, 15))
    process = start([*words, "--name=killed"])
    wait_for_step(runs / "killed", step, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finish([*words, "--name=killed"])
    assert curve(runs / "killed") == whole, f"killed at step {step}"

    process = start([*words, "--name=stopped"], sleep=0.3)
    wait_for_step(runs / "stopped", 6, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "stopped by SIGTERM" in output
    assert not (runs / "stopped" / "report.json").exists()
    last = curve(runs / "stopped")[-1]["step"]
    assert last < 16
    assert (runs / "stopped" / "checkpoints" / str(last)).is_dir()
    output = finish([*words, "--name=stopped"])
    assert curve(runs / "stopped") == whole
    again = json.loads((runs / "stopped" / "report.json").read_text())["heldout"]
    assert again == heldout


BAD = {
    "unknown field": (
        ["--model.ttt.chunk=8"],
        "model.ttt.chunk: unknown; did you mean model.ttt.chunk_size",
    ),
    "layer out of range": (
        ["--model.ttt.layers=0,2"],
        "layer 2 does not exist in a model of 2 layers",
    ),
    "context shard": (
        ["--mesh.context=8"],
        "mesh.context = 8: each context shard must hold whole chunks",
    ),
    "free context axis": (
        ["--mesh.context=-1", "--mesh.fsdp=1"],
        "mesh.context = 8: each context shard must hold whole",
    ),
    "whole chunks": (["--data.seq_len=33"], "data.seq_len = 33: packed rows hold whole chunks"),
    "missing data": (["--data.train=/nowhere/x.jsonl"], "data.train"),
    "missing tokenizer": (["--data.tokenizer=/nowhere"], "data.tokenizer"),
    "vocabulary": (["--model.vocab_size=100"], "vocab_size"),
    "mesh": (["--mesh.data=3"], "mesh"),
    "init_from": (["--init_from=/nowhere"], "init_from"),
    "no value": (["--steps"], "has no value"),
    "preset": (["configs/nothing.yaml"], "no such file"),
    "batch and accumulation": (["--optimizer.accumulate=3"], "must divide data.batch_size"),
    "optimizer group": (["--optimizer.groups=[{pattern: nothing}]"], "matches no parameter"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_no_trace(case, words, tmp_path, capsys):
    extra, message = BAD[case]
    argv = [*extra, *words] if extra[0].endswith(".yaml") else [*words, *extra]
    assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert message in error
    assert not (tmp_path / "runs").exists()


def test_empty_corpus(words, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert train.main([*words, f"--data.train={tmp_path / 'empty'}"]) == 2
    assert "data.train" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("alone")
def test_a_run_of_another_model_is_not_continued(words, tmp_path, capsys):
    assert train.main([*words, "--steps=3"]) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert train.main([*words, "--steps=3", "--model.d_ff=32"]) == 2
    error = capsys.readouterr().err
    assert "model.d_ff" in error
    assert error.count("\n") == 1
    assert before == {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()}


@pytest.mark.usefixtures("alone")
def test_a_loss_that_is_not_finite_stops_the_job(words, tmp_path, capsys):
    limits = ["--guard.skips=2", "--guard.rollbacks=1"]
    assert (
        train.main([*words, *limits, "--optimizer.lr=1e30", "--optimizer.schedule=constant"]) == 1
    )
    error = capsys.readouterr().err
    assert "not finite" in error
    assert "optimizer.lr" in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("alone")
def test_init_from_a_run_and_from_a_hugging_face_folder(words, tmp_path, capsys):
    assert train.main([*words, "--steps=3"]) == 0
    source = tmp_path / "runs" / "tiny"
    assert train.main([*words, "--steps=3", "--name=second", f"--init_from={source}"]) == 0
    first, second = curve(source), curve(tmp_path / "runs" / "second")
    assert second[0]["loss"] < first[0]["loss"]
    assert (
        train.main(
            [*words, "--name=third", f"--init_from={ROOT / 'tests/golden/model_qwen3_input_embed'}"]
        )
        == 2
    )
    assert "config field model.d_model = 16: " in capsys.readouterr().err


def test_help_lists_every_field(capsys):
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "--model.ttt.chunk_size" in text
    assert "python train.py configs/" in text


def test_the_default_run_needs_no_arguments():
    """Validates; the run itself is `test_default_run`."""
    config = load_config("default")
    assert config.data.train == ("stdlib",)
    assert config.model.ttt.layers


@pytest.mark.slow
def test_default_run(tmp_path):
    """README's main line: under three minutes on two quiet cores; adapting helps, and helps more
    further on.
    """
    begin = time.time()
    finish([f"--runs_dir={tmp_path}"])
    assert time.time() - begin < 180
    heldout = json.loads((tmp_path / "default" / "report.json").read_text())["heldout"]
    on, off = np.array(heldout["ttt_on"]), np.array(heldout["ttt_off"])
    assert on[-1] < off[-1]
    assert on[0] - on[-1] > off[0] - off[-1]
