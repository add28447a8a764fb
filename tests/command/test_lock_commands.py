"""Commands that write the same output: the second one is refused in a line, before it loads a
model.
"""

import os

import numpy as np
import pytest
from conftest import GOLDEN

from ttt_jax.command.cli import main
from ttt_jax.process.output_lock import one_writer

MODEL = str(GOLDEN / "model_qwen3_hidden_states")
COMMANDS = {
    "output": ["convert", MODEL, "OUT", "--to", "orbax", "--overwrite"],
    "--out": ["score", "--model", MODEL, "--ids", "IDS", "--out", "OUT", "--overwrite"],
    "--session": ["generate", "--model", MODEL, "--prompt", "x", "--session", "OUT"],
    "--out ": ["eval", "--model", MODEL, "--perplexity", "stdlib", "--out", "OUT", "--overwrite"],
}


@pytest.mark.parametrize("what", COMMANDS)
def test_the_second_command_is_refused(what, tmp_path, capsys):
    np.save(tmp_path / "ids.npy", np.arange(8))
    places = {"OUT": str(tmp_path / "out"), "IDS": str(tmp_path / "ids.npy")}
    words = [places.get(word, word) for word in COMMANDS[what]]
    with one_writer(tmp_path / "out", what):
        before = sorted(os.listdir(tmp_path))
        assert main(words) == 2
        assert sorted(os.listdir(tmp_path)) == before
    error = capsys.readouterr().err
    assert error.startswith(f"error: {what.strip()} {tmp_path / 'out'}: process {os.getpid()} on ")
    assert error.endswith("is writing it; wait for it, stop it, or choose another one\n")
    assert error.count("\n") == 1


def test_a_session_that_is_only_asked_may_be_asked_by_many(tmp_path, capsys):
    """It is not written, so nothing is locked; this one is refused for what it is."""
    (tmp_path / "out").write_text("no session")
    asked = [
        "generate",
        "--model",
        MODEL,
        "--ids",
        "/nowhere",
        "--session",
        str(tmp_path / "out"),
        "--keep-session",
    ]
    with one_writer(tmp_path / "out", "--session"):
        assert main(asked) == 2
    assert "is writing it" not in capsys.readouterr().err


def test_what_a_killed_conversion_left_goes_with_the_next_one(tmp_path, capsys):
    for name in (".out.tmp-77", ".out.old-77"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard").write_text("half")
    (tmp_path / ".out.tmp.npz").write_text("half")
    assert main(["convert", MODEL, str(tmp_path / "out"), "--to", "hf"]) == 2, (
        "what was moved away came back, and is no model"
    )
    assert "exists already" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "out" / "shard").unlink()
    assert main(["convert", MODEL, str(tmp_path / "out"), "--to", "hf", "--overwrite"]) == 0
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").exists()
