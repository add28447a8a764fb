"""Jobs of several processes on CPUs with gloo: one training curve, whatever the processes and
meshes it is computed on.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.awake import new_target
from support.compilation import CHEAP
from support.jobs import TINY, curve, few_devices, one_of_several, wait_for_step, write_corpus
from support.tolerance import assert_close

import train
from ttt_jax import generate, load_pretrained
from ttt_jax.errors import ConfigError
from ttt_jax.model import ttt_mlp
from ttt_jax.process.multihost import initialize, read_explicit

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8


@pytest.fixture
def words(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    size = [
        "--data.batch_size=4",
        f"--steps={STEPS}",
        "--checkpoint.every=4",
        "--optimizer.schedule=constant",
    ]
    return [*TINY, *size, f"--data.train={corpus}", f"--runs_dir={tmp_path / 'runs'}"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(words, processes=1, devices=2, **environment):
    """`python train.py` as a job of so many processes."""
    port, jobs = free_port(), []
    for index in range(processes):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("TTT_JAX_", "SLURM_"))}
        env |= {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{CHEAP} --xla_force_host_platform_device_count={devices}",
        }
        if processes > 1:
            env |= one_of_several(index, processes, port)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        jobs.append(
            subprocess.Popen(
                [sys.executable, "train.py", *words], cwd=ROOT, env=env | environment, **pipes
            )
        )
    return jobs


def finish(jobs, code=0):
    try:
        outputs = [job.communicate(timeout=300)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [code] * len(jobs), "\n-----\n".join(outputs)
    return outputs


def numbers(run_dir):
    """[steps, losses and gradient norms]."""
    rows = curve(run_dir)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return np.array([[row["loss"], row["grad_norm"]] for row in rows])


def test_two_processes_train_as_one_and_one_goes_on(words, tmp_path, monkeypatch):
    """Two processes stop half-way, one goes on with another mesh: the curve of one process."""
    monkeypatch.setattr(ttt_mlp, "initial_target", new_target)  # as those processes start
    runs, half = tmp_path / "runs", f"--steps={STEPS // 2}"
    samples = [f"--sample.every={STEPS // 2}", "--sample.tokens=8"]
    outputs = finish(start([*words, "--name=two", "--mesh.context=2", half, *samples], processes=2))
    assert "4 x cpu in 2 processes" in outputs[0]
    assert "step 1/" in outputs[0]
    assert "step " not in outputs[1], "only process 0 reports"
    lines = (runs / "two" / "samples.jsonl").read_text().splitlines()
    written = {sample["ttt"]: sample for sample in map(json.loads, lines)}
    assert len(lines) == len(written) == 2
    model = load_pretrained(runs / "two")
    for mode, sample in written.items():
        (again,) = generate(model, sample["prompt"], max_new_tokens=8, ttt=mode == "on")
        assert sample["text"] == again.text, "of the weights of both processes"
    assert numbers(runs / "two").shape == (STEPS // 2, 2)
    for devices, more in ((2, ["--name=two", "--mesh.tensor=2"]), (1, ["--name=one"])):
        with few_devices(devices):
            assert train.main([*words, *more]) == 0
    assert numbers(runs / "one").shape == (STEPS, 2)
    assert_close("losses and norms", numbers(runs / "two"), numbers(runs / "one"), 1e-5)


@pytest.mark.slow
def test_two_processes_resume_together(words, tmp_path):
    runs, two = tmp_path / "runs", [*words, "--name=two", "--mesh.context=2"]
    finish(start([*two, f"--steps={STEPS // 2}"], processes=2))
    outputs = finish(start(two, processes=2))
    assert f"from step {STEPS // 2}" in outputs[0]
    finish(start([*words, "--name=one"], devices=1))
    assert_close("losses and norms", numbers(runs / "two"), numbers(runs / "one"), 1e-5)
    assert json.loads((runs / "two" / "report.json").read_text())["steps"] == STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [["--mesh.context=4"], ["--mesh.data=2", "--mesh.tensor=2"], ["--mesh.fsdp=8"]],
    ids=" ".join,
)
def test_every_axis_may_span_processes(mesh, words, tmp_path):
    """Context over both processes: they hold the same rows. fsdp 8 with 4 rows: rows do not split
    at all.
    """
    devices = 4 if "--mesh.fsdp=8" in mesh else 2
    finish(start([*words, "--name=two", *mesh], processes=2, devices=devices))
    finish(start([*words, "--name=one"], devices=1))
    assert_close(
        "losses and norms", numbers(tmp_path / "runs/two"), numbers(tmp_path / "runs/one"), 1e-5
    )


@pytest.mark.slow
def test_another_number_of_data_hosts_continues_exactly(words, tmp_path):
    """Four processes read a row each, then two read two, then one reads all."""
    for stop, processes in ((3, 4), (6, 2), (STEPS, 1)):
        devices = 4 // processes
        finish(
            start([*words, "--name=many", f"--steps={stop}"], processes=processes, devices=devices)
        )
    finish(start([*words, "--name=one"], devices=1))
    assert_close(
        "losses and norms", numbers(tmp_path / "runs/many"), numbers(tmp_path / "runs/one"), 1e-5
    )


def test_a_signal_to_one_process_stops_all(words, tmp_path):
    run = tmp_path / "runs/two"
    jobs = start([*words, "--name=two", "--steps=4000"], processes=2)
    try:
        wait_for_step(run, 5, jobs[0])
        time.sleep(0.1)
        jobs[1].send_signal(signal.SIGTERM)
    except AssertionError:
        for job in jobs:
            job.kill()
        raise
    outputs = finish(jobs)
    assert "stopped by another process after step" in outputs[0]
    steps = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal()]
    assert max(steps) == curve(run)[-1]["step"], "the last step is saved"


def test_a_missing_host_is_one_line(words, tmp_path):
    """The other process never comes."""
    begin, jobs = time.monotonic(), []
    for index in ("0", "1"):
        env = {
            "TTT_JAX_COORDINATOR": f"127.0.0.1:{free_port()}",
            "TTT_JAX_NUM_PROCESSES": "2",
            "TTT_JAX_TIMEOUT": "3",
        }
        jobs += start([*words, "--name=alone"], TTT_JAX_PROCESS_ID=index, **env)
    for output in finish(jobs, code=1):
        error = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(error) == 1, output
        assert "not all of 2 processes" in error[0]
        assert "TTT_JAX_TIMEOUT" in error[0]
        assert "Traceback" not in output
    assert time.monotonic() - begin < 60
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"TTT_JAX_COORDINATOR": "a:1"}, "TTT_JAX_NUM_PROCESSES: missing"),
        (
            {"TTT_JAX_COORDINATOR": "a", "TTT_JAX_NUM_PROCESSES": "2", "TTT_JAX_PROCESS_ID": "0"},
            "write HOST:PORT",
        ),
        (
            {"TTT_JAX_COORDINATOR": "a:1", "TTT_JAX_NUM_PROCESSES": "0", "TTT_JAX_PROCESS_ID": "0"},
            "from 1",
        ),
        (
            {"TTT_JAX_COORDINATOR": "a:1", "TTT_JAX_NUM_PROCESSES": "2", "TTT_JAX_PROCESS_ID": "2"},
            "0 to TTT_JAX_NUM",
        ),
        (
            {"TTT_JAX_COORDINATOR": "a:1", "TTT_JAX_NUM_PROCESSES": "2", "TTT_JAX_PROCESS_ID": "x"},
            "whole number",
        ),
    ],
)
def test_malformed_variables(env, words):
    with pytest.raises(ConfigError, match=words):
        initialize(env)


def test_one_process_stays_alone():
    assert read_explicit({}) is None
    assert not initialize({})
    assert not initialize({"SLURM_NTASKS": "4"}), "an allocation's shell, not a task"
    assert not initialize({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"})
