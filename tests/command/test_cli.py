"""`ttt-jax score` and `ttt-jax generate`: outputs, exit codes and one-line errors (convert has
tests of its own).
"""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import GOLDEN
from support.tolerance import assert_close

from ttt_jax.command.cli import cli, main

MODEL = GOLDEN / "model_qwen3_hidden_states"


@pytest.fixture(scope="module")
def io():
    with np.load(MODEL / "io.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(autouse=True)
def _usual_promotion():
    """As a command runs, outside of the tests' strict modes."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def run(capsys, *words):
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_score_writes_what_the_official_code_computes(capsys, tmp_path, io):
    np.save(tmp_path / "ids.npy", io["input_ids"])
    out = tmp_path / "new" / "scores.npz"
    code, text, _ = run(
        capsys, "score", "--model", MODEL, "--ids", tmp_path / "ids.npy", "--logits", "--out", out
    )
    assert (code, len(text.splitlines())) == (0, 1)
    with np.load(out, allow_pickle=False) as scores:
        assert sorted(scores) == ["logits", "logprobs"]
        assert scores["logprobs"].dtype == scores["logits"].dtype == np.float32
        assert_close("logits", scores["logits"], io["logits"], 1e-4)
        logits = io["logits"].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = np.take_along_axis(logprobs[:, :-1], io["input_ids"][:, 1:, None], axis=2)[:, :, 0]
        assert_close("logprobs", scores["logprobs"], picked, 1e-5)
        assert float(-picked.mean()) == pytest.approx(float(io["loss"]), rel=1e-5)
    before = out.read_bytes()
    words = ("score", "--model", MODEL, "--ids", tmp_path / "ids.npy", "--out", out, "--no-ttt")
    code, _, err = run(capsys, *words)
    assert (code, err) == (
        2,
        f"error: --out {out}: exists already; choose another file or pass --overwrite\n",
    )
    assert out.read_bytes() == before
    assert run(capsys, *words, "--overwrite")[0] == 0
    with np.load(out, allow_pickle=False) as off:
        assert sorted(off) == ["logprobs"]
        assert np.abs(off["logprobs"] - picked).max() > 1e-3
    assert sorted(p.name for p in out.parent.iterdir()) == ["scores.npz"]


def test_generate_with_a_session(capsys, tmp_path, io):
    """A prompt read once, then continued in two calls: the official decoding."""
    prompt, ids = io["decode_prompt"], io["decode_ids"]
    np.save(tmp_path / "ids.npy", prompt[0])
    session, words = (
        tmp_path / "s.safetensors",
        ("generate", "--model", MODEL, "--json", "--ignore-eos"),
    )
    first = run(
        capsys, *words, "--ids", tmp_path / "ids.npy", "--max-new-tokens", 20, "--session", session
    )
    again = run(capsys, *words, "--max-new-tokens", 19, "--session", session, "--keep-session")
    before = session.read_bytes()
    once_more = run(capsys, *words, "--max-new-tokens", 19, "--session", session, "--keep-session")
    assert session.read_bytes() == before
    assert [code for code, _, _ in (first, again, once_more)] == [0, 0, 0]
    first, again, once_more = (json.loads(out) for _, out, _ in (first, again, once_more))
    assert first["token_ids"] + again["token_ids"] == ids[0, prompt.shape[1] :].tolist()
    assert again["token_ids"] == once_more["token_ids"]
    assert first["text"] is None
    assert first["timings"]["read_tokens"] == prompt.shape[1]
    code, _, err = run(capsys, *words, "--session", session, "--no-ttt")
    assert (code, "was not read with TTT off; drop --no-ttt" in err) == (2, True)
    code, _, err = run(
        capsys, "generate", "--model", GOLDEN / "model_llama_hidden_states", "--session", session
    )
    assert (code, "written by another model" in err) == (2, True)


def test_errors_are_one_line(capsys, tmp_path):
    text, ids, big, pickled = (tmp_path / name for name in ("t.txt", "i.npy", "b.npy", "p.npy"))
    text.write_bytes(b"\xff\xfe")
    np.save(ids, np.zeros(3))
    np.save(big, np.array([1, 2, 5000]))
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    broken = tmp_path / "broken"
    shutil.copytree(MODEL, broken)
    (broken / "model.safetensors").write_bytes((MODEL / "model.safetensors").read_bytes()[:-10])
    out = ("--out", tmp_path / "o.npz")
    for words, match in [
        (("nothing",), "No such command 'nothing'"),
        (("score", "--model", MODEL), "Missing option '--out'"),
        (("score", "--model", MODEL, *out), "--ids FILE.npy or by --text FILE"),
        (("score", "--model", MODEL, "--ids", ids, "--text", text, *out), "one of them"),
        (("score", "--model", MODEL, "--ids", ids, *out), "must be an integer array"),
        (("score", "--model", MODEL, "--ids", big, *out), "holds id 5000"),
        (("score", "--model", MODEL, "--ids", pickled, *out), "not an integer array in .npy"),
        (("score", "--model", MODEL, "--ids", text, *out), "not an integer array in .npy"),
        (("score", "--model", MODEL, "--ids", tmp_path / "none.npy", *out), "none.npy"),
        (("score", "--model", MODEL, "--text", text, *out), "not UTF-8 at byte 0"),
        (("score", "--model", tmp_path / "none", "--ids", big, *out), "no such folder"),
        (("score", "--model", broken, "--ids", big, *out), "model.safetensors"),
        (("generate", "--model", MODEL), "no prompt"),
        (("generate", "--model", MODEL, "--prompt", "x", "--ids", big), "one of them"),
        (("generate", "--model", MODEL, "--prompt", "x"), "needs a tokenizer"),
        (("generate", "--model", MODEL, "--prompt", "x", "--keep-session"), "needs --session"),
        (("generate", "--model", MODEL, "--ids", big, "--temperature", -1), "temperature = -1"),
        (("generate", "--model", MODEL, "--ids", big, "--top-p", 7), "top_p = 7"),
        (("generate", "--model", MODEL, "--ids", big, "--max-new-tokens", 0), "--max-new-tokens"),
        (("generate", "--model", MODEL, "--ids", big, "--session", text), "damaged"),
    ]:
        code, stdout, err = run(capsys, *words)
        assert (code, stdout, len(err.splitlines())) == (2, "", 1), (words, err)
        assert err.startswith("error: "), err
        assert match in err, (match, err)
    assert not (tmp_path / "o.npz").exists()


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_explains_itself(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert "Examples" in out
    assert f"ttt-jax {command}" in out


def test_as_a_module_and_without_waiting_for_jax():
    code = (
        "import sys; from ttt_jax.command.cli import main; main(['--help']); sys.exit('jax' in "
        "sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-m", "ttt_jax", "--version"], check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("ttt-jax, version")
