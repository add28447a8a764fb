"""`ttt-jax train`: the job of train.py, as light until it trains and as deaf to no signal."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.compilation import CHEAP

import train
from ttt_jax.command.cli import main

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "ttt_jax", "train"]


def ask(words, folder):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([*COMMAND, *words], cwd=folder, env=env, capture_output=True, text=True)


def handles_sigterm(pid):
    """What the system says of the process."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_it_answers_as_the_script_does(tmp_path, capsys):
    for words in (["--help"], ["nothing"], ["--model.ttt.chunk=8"], ["--steps"]):
        code = train.main(words)
        out, err = capsys.readouterr()
        assert code == (0 if words == ["--help"] else 2)
        done = ask(words, tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (code, out, err)
        assert (main(["train", *words]), *capsys.readouterr()) == (code, out, err)
    assert list(tmp_path.iterdir()) == []


def test_help_waits_for_neither_jax_nor_click(tmp_path):
    code = (
        "import sys\nfrom ttt_jax.__main__ import main\nsys.argv[1:] = ['train', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "sys.exit(bool({'jax', 'numpy', 'click'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="asks Linux")
def test_a_signal_in_its_first_moments_is_one_line(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": CHEAP, "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(COMMAND, cwd=tmp_path, env=env, **pipes)
    while not handles_sigterm(process.pid) and process.poll() is None:
        time.sleep(0.001)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out == "stopped by SIGTERM; run the same command again to continue\n"
    assert list(tmp_path.iterdir()) == []
