"""`--mesh.*` of generate, score, eval and chat: what one device gives, or one line."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from support.byte_models import byte_model

from ttt_jax.command.cli import main

pytestmark = pytest.mark.usefixtures("usual_promotion", "interruptible")
MESH = ("--mesh.tensor", 2, "--mesh.fsdp", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_model(tmp_path_factory.mktemp("mesh") / "model", **{"ttt.lr": 0.1})


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capsys):
    """Run `ttt-jax` with the model in a folder with texts: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TTT_JAX_CACHE", str(tmp_path / "cache"))
    texts = ["the cat sat on the mat, and the dog beside it", "words of another text " * 3]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    np.save("ids.npy", np.random.default_rng(0).integers(0, 256, (2, 21)))

    def call(command, *words):
        code = main([command, "--model", str(folder), *map(str, words)])
        return code, *capsys.readouterr()

    return call


def test_generate_and_its_session(run):
    """A session that a mesh began goes on without one."""
    prompt = ("--prompt", "the cat sat", "--prompt", "a", "--max-new-tokens", 6, "--json")
    found, expected = ({}, {})
    for results, mesh in ((found, MESH), (expected, ())):
        name = f"s{len(mesh)}"
        code, out, err = run("generate", *prompt, "--session", name, *mesh)
        assert (code, err) == (0, "")
        results["first"] = [json.loads(line)["token_ids"] for line in out.splitlines()]
        code, out, err = run("generate", "--max-new-tokens", 3, "--json", "--session", name)
        assert (code, err) == (0, "")
        results["second"] = [json.loads(line)["token_ids"] for line in out.splitlines()]
    assert found == expected
    code, _, err = run("generate", "--session", "s4", "--mesh.data", 4)
    assert (code, err.count("\n")) == (2, 1), err
    assert "mesh.data = 4: does not divide the 2 streams of --session s4" in err


def test_generate_learns_a_text(run):
    """Into the fast weights alone; a session that a mesh began learns on without one."""
    Path("book.txt").write_text("a book of things\n" * 8)
    learn = ("--read", "book.txt", "--context", 8, "--max-new-tokens", 6, "--json")
    both, more = ("--prompt", "the cat sat", "--prompt", "a"), ("--prompt", "b", "--session")
    results = []
    for name, mesh in (("one", ()), ("mesh", (*MESH, "--mesh.data", 2))):
        found = []
        for words in ((*both, *mesh), (*more, name, *mesh[:4]), (*more, name)):
            code, out, err = run("generate", *learn, *words)
            assert code == 0, err
            found.append([json.loads(line)["token_ids"] for line in out.splitlines()])
        results.append(found)
    assert results[0] == results[1]
    plain = run("generate", *both, *learn[-3:])[1]
    assert [json.loads(line)["token_ids"] for line in plain.splitlines()] != results[0][0]


def test_score(run):
    for name, mesh in (("one", ()), ("mesh", (*MESH, "--mesh.data", 2))):
        assert run("score", "--ids", "ids.npy", "--out", f"{name}.npz", *mesh)[0] == 0
    found, expected = (np.load(f"{name}.npz")["logprobs"] for name in ("mesh", "one"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_eval(run):
    """Every mode of the perplexity, and the recall probe's two readings."""
    results = []
    for mesh in ((), MESH):
        out = f"r{len(mesh)}"
        words = ("--perplexity", "texts.jsonl", "--lengths", "16,32", "--strict", "--diagnostics")
        code, _, err = run("eval", *words, "--piece", 8, "--out", out, *mesh)
        assert code == 0, err
        results.append(json.loads(Path(out, "results.json").read_text()))
    expected, found = (r["perplexity"]["lengths"] for r in results)
    assert {"off", "on", "shuffled", "strict", "cold"} < set(expected[0])
    for entry, other in zip(expected, found, strict=True):
        for mode in set(entry) - {"length"}:
            for name, value in entry[mode].items():
                assert other[mode][name] == pytest.approx(value, abs=1e-5), (mode, name)


def test_chat(run, monkeypatch):
    answers = []
    for mesh in ((), MESH):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand more\n"))
        code, out, err = run("chat", "--max-new-tokens", 5, *mesh)
        assert code == 0, err
        answers.append(out)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--mesh.tensor", 4), "mesh.tensor 4: does not divide model.num_kv_heads = 2"),
        (("--mesh.fsdp", 5), "mesh.fsdp 5: does not divide model.d_model = 16"),
        (("--mesh.tensor", 16), "mesh.tensor 16: needs 16 devices, there are 8"),
        (("--mesh.context", 3), "mesh.context 3: does not divide model.d_model = 16"),
        (("--mesh.data", 3), "mesh.data = 3: does not divide the 1 prompts"),
    ],
)
def test_a_mesh_that_does_not_suit(run, words, line, monkeypatch):
    monkeypatch.setattr("ttt_jax.pretrained.hf_weights.fill", None)  # nothing is read
    code, out, err = run("generate", "--prompt", "a", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert line in err
