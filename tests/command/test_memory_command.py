"""`ttt-jax memory` from texts to other engines, and `--memory` of the other commands."""

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.byte_models import byte_model
from support.hf_folders import read_folder
from support.tolerance import relative_rms

from ttt_jax import Session, load_pretrained, save_pretrained, score
from ttt_jax.command.cli import main
from ttt_jax.inference.conversation import Conversation, render_plain
from ttt_jax.memory.memory import Memory
from ttt_jax.pretrained import source

pytestmark = pytest.mark.usefixtures("usual_promotion")
TEXTS = {"a.txt": "the cat sat on the mat", "b.txt": "naïve words of another text", "c.txt": "ab"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_model(tmp_path_factory.mktemp("memory") / "model")


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capsys):
    """Run `ttt-jax` in a folder with three texts and the model: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TTT_JAX_CACHE", str(tmp_path / "cache"))
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    tokenizer = load_pretrained(folder).tokenizer
    np.save("a.npy", np.array(tokenizer.encode(TEXTS["a.txt"]), np.uint16))
    (tmp_path / "model").symlink_to(folder)

    def call(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def taught(folder, text):
    session = Session(load_pretrained(folder))
    session.read([text])
    return session.memory()


def test_texts_become_memories_that_add_up(run, folder):
    code, out, err = run("memory", "read", "model", *TEXTS, "--out", "all", "--batch-size", 2)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("a.txt: 22 tokens, 20 of them in whole chunks; largest ||dW||/||W||")
    assert "c.txt: 2 tokens, 0 of them in whole chunks; shorter than a chunk" in lines[2]
    assert lines[3].startswith("52 tokens in ")
    assert lines[3].endswith(" tokens/s with compilation: all")
    memory = Memory.load("all")
    assert [source.name for source in memory.without("c.txt").without("b.txt").sources] == ["a.txt"]
    files = {source.name: source.file for source in memory.sources}
    assert files == {n: hashlib.sha256(t.encode()).hexdigest() for n, t in TEXTS.items()}
    expected = taught(folder, TEXTS["a.txt"]) + taught(folder, TEXTS["b.txt"])
    assert relative_rms(memory.dW(0), expected.dW(0)) < 1e-6
    assert run("memory", "read", "model", "a.npy", *TEXTS, "--each", "--out", "each")[0] == 0
    each = sorted(path.name for path in Path("each").iterdir())
    assert each == ["0000-a.npy.memory", *(f"000{i}-{n}.memory" for i, n in enumerate(TEXTS, 1))]
    long = Path("ä" * 125 + ".txt")
    long.write_text(TEXTS["a.txt"])
    assert run("memory", "read", "model", long, "--each", "--out", "long")[0] == 0
    (found,) = Path("long").iterdir()
    assert Memory.load(found).sources[0].name == long.name
    again = ("memory", "read", "model", *TEXTS, "--each", "--out", "each")
    assert run(*again)[0] == 2
    assert len(list(Path("each").iterdir())) == 4
    from_ids, from_text = (Memory.load(f"each/{name}") for name in each[:2])
    assert relative_rms(from_ids.dW(0), from_text.dW(0)) < 1e-6
    assert from_ids.sources[0].ids == from_text.sources[0].ids
    words = ("memory", "add", *(f"each/{name}" for name in each[1:]), "--out")
    assert run(*words, "sum")[0] == 0
    assert relative_rms(Memory.load("sum").dW(0), memory.dW(0)) < 1e-6
    assert run(*words, "one", "--collapse")[0] == 0
    assert len(Memory.load("one").terms) == 1
    words = ("memory", "read", "model", *TEXTS, "--collapse", "--out", "small", "--piece", 4)
    code, out, _ = run(*words)
    assert code == 0
    assert out.endswith(" after the first piece: small\n")
    assert len(Memory.load("small").terms) == 1
    assert relative_rms(Memory.load("small").dW(0), memory.dW(0)) < 1e-6


@pytest.fixture
def saved(run, folder):
    """`run`, with the memories of two texts in a.m and b.m."""
    for name in "ab":
        taught(folder, TEXTS[f"{name}.txt"]).save(f"{name}.m")
    return run


def test_memories_are_changed_exactly(saved):
    a, b = Memory.load("a.m"), Memory.load("b.m")
    assert saved("memory", "add", "a.m", "b.m", "--out", "ab")[0] == 0
    assert Memory.load("ab") == a + b
    assert saved("memory", "sub", "ab", "b.m", "--out", "again")[1].count("\n") == 1
    assert Memory.load("again") == a
    assert saved("memory", "sub", "ab", "--source", a.sources[0].ids[:16], "--out", "b2")[0] == 0
    assert Memory.load("b2") == b
    code, out, _ = saved("memory", "sub", "a.m", "b.m", "--out", "difference")
    assert code == 0
    assert out.startswith("note: b.m is not among the terms of a.m: it is subtracted as numbers")
    assert Memory.load("difference") == a - b
    (a - a).save("nothing")
    for factor, expected in [("-0.5", -0.5 * a), ("1/3", a - a + a * 1), ("0", a - a)]:
        words = ("memory", "scale", "a.m", factor, "--out", "scaled", "--overwrite")
        assert saved(*words)[0] == 0
        found = Memory.load("scaled")
        assert (3 * found if factor == "1/3" else found) == expected
    assert saved("memory", "truncate", "ab", "--rank", 2, "--out", "short")[0] == 0
    assert Memory.load("short") == (a + b).truncate(2)
    assert saved("memory", "merge", "model", "a.m", "merged")[0] == 0
    code, out, _ = saved("memory", "lora", "a.m", "adapter", "--rank", 9)
    assert code == 0
    assert "vLLM: --enable-lora --max-lora-rank 16\n" in out
    assert "without model.ttt.read_cap, if the model" in out
    assert saved("memory", "base", "model", "base")[0] == 0
    assert saved("memory", "merge", "model", "nothing", "as_base")[0] == 0
    assert read_folder(Path("base")).keys() == read_folder(Path("as_base")).keys()
    for name, x in read_folder(Path("base")).items():
        np.testing.assert_array_equal(x, read_folder(Path("as_base"))[name])
    assert not [name for name in json.loads(Path("base/config.json").read_text()) if "ttt" in name]


def test_a_read_cap_is_named_where_other_engines_do_not_have_it(run, folder, monkeypatch):
    """The model is opened once for it and for the tensors."""
    opened, read = [], source.read_raw_config
    monkeypatch.setattr(source, "read_raw_config", lambda path: opened.append(path) or read(path))
    shutil.copytree(folder, "capped")
    raw = json.loads(Path("capped/config.json").read_text())
    Path("capped/config.json").write_text(json.dumps(raw | {"ttt_read_cap": 0.1}))
    taught(folder, TEXTS["a.txt"]).save("a.m")
    for words in (("base", "capped", "base"), ("merge", "capped", "a.m", "merged")):
        code, out, _ = run("memory", *words)
        assert (code, opened) == (0, [Path("capped")])
        assert "read_cap 0.1 of capped is not part of the base architecture" in out
        assert "(ttt-jax memory scale M 1/2)" in out
        opened.clear()
    assert "read_cap" not in run("memory", "base", "model", "without")[1]


def test_info_and_diff(saved):
    a, b = Memory.load("a.m"), Memory.load("b.m")
    (a + 2 * b).save("ab")
    code, out, _ = saved("memory", "info", "ab", "--json")
    about = json.loads(out)
    assert code == 0
    (layer,) = about["layers"]
    exact = (a + 2 * b).dW(0).astype(np.float64)
    values = np.linalg.svd(exact, compute_uv=False) ** 2
    assert layer["norm"] == pytest.approx(np.linalg.norm(exact), rel=1e-6)
    assert layer["ratio"] == pytest.approx(np.linalg.norm(exact) / a.slow_norms[0], rel=1e-5)
    kept = np.cumsum(values) / values.sum()
    assert layer["ranks"] == {str(s): int(np.argmax(kept >= s)) + 1 for s in (0.5, 0.9, 0.99)}
    assert sorted(source["weight"] for source in about["sources"]) == ["1", "2"]
    code, out, _ = saved("memory", "info", "ab")
    assert code == 0
    assert "effective rank" in out
    assert "can be taken out bit for bit." in out
    assert "of a term cannot" not in out
    (a + 2 * b).collapse().save("one")
    assert "of a term cannot" in " ".join(saved("memory", "info", "one")[1].split())
    assert "session" in out
    code, out, _ = saved("memory", "diff", "a.m", "ab", "--json")
    about = json.loads(out)
    apart = np.linalg.norm(2 * b.dW(0).astype(np.float64))
    assert about["layers"][0]["apart"] == pytest.approx(apart, rel=1e-5)
    assert (about["same"], about["only_a"], len(about["only_b"])) == (False, [], 1)
    assert json.loads(saved("memory", "diff", "a.m", "a.m", "--json")[1])["same"] is True
    assert "apart" in saved("memory", "diff", "a.m", "ab")[1]


def test_what_is_wrong_is_one_line_and_nothing_is_written(saved, folder, tmp_path):
    other = byte_model(tmp_path / "other", d_ff=16)
    taught(other, TEXTS["a.txt"]).save("other.m")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe not text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    out = ("--out", "out")
    for words, line in [
        (("memory", "read", "model", "none.txt", *out), "FILE none.txt"),
        (("memory", "read", "none", "a.txt", *out), "model none: no such folder"),
        (("memory", "read", "model", "bad.txt", *out), "bad.txt"),
        (("memory", "read", "model", "empty.txt", *out), "or more; give longer documents"),
        (("memory", "read", "model", "a.txt", "--context", 3, *out), "context = 3: must be a mult"),
        (("memory", "read", "model", "a.txt", "--each", "--collapse", *out), "--collapse is for"),
        (("memory", "read", "model", "a.txt", "--out", "taken"), "--out taken: exists already"),
        (
            ("memory", "read", "model", "a.txt", "--out", "full", "--overwrite"),
            "is a folder; choos",
        ),
        (
            ("memory", "read", "model", "a.txt", "--each", "--out", "full", "--overwrite"),
            "replaces",
        ),
        (("memory", "add", "a.m", "none", *out), "memory none: no such file"),
        (("memory", "add", "a.m", "a.txt", *out), "memory a.txt: damaged"),
        (("memory", "add", "a.m", "other.m", *out), "memories of two models"),
        (("memory", "sub", "a.m", *out), "nothing to subtract"),
        (("memory", "sub", "a.m", "--source", "x", *out), "source x: the memory does not come fro"),
        (("memory", "scale", "a.m", "x", *out), "FACTOR x: must be a number such as"),
        (("memory", "scale", "a.m", "1/0", *out), "FACTOR 1/0: must be a number such as"),
        (("memory", "truncate", "a.m", "--rank", 99, *out), "rank 99: must be from 1 to 16"),
        (("memory", "merge", "other", "a.m", "out"), "memory: was not read by other"),
        (("memory", "merge", "model", "a.m", "taken"), "output taken: exists already"),
        (("memory", "lora", "a.m", "out", "--rank", 99), "rank 99: must be from 1 to 16"),
        (("memory", "diff", "a.m", "other.m"), "memories of two models"),
        (("score", "--model", "other", "--ids", "a.npy", "--memory", "a.m", *out), "another model"),
        (("generate", "--model", "other", "--ids", "a.npy", "--memory", "a.m"), "another model"),
        (
            ("generate", "--model", "model", "--ids", "a.npy", "--memory", "a.m,"),
            "a name is empty",
        ),
        (("eval", "--model", "other", "--perplexity", "a.npy", "--memory", "a.m", *out), "another"),
        (("eval", "--model", "model", "--tasks", "synthetic", "--memory", "a.m", *out), "--memory"),
    ]:
        code, _, err = saved(*words)
        assert code == 2, words
        assert line in err, words
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "taken").read_text() == "mine"


def test_score_generate_and_chat_begin_with_memories(saved, folder, monkeypatch):
    model, ids = load_pretrained(folder), np.load("a.npy")
    both = Memory.load("a.m") + Memory.load("b.m")
    for words, ttt in [((), True), (("--no-ttt",), False)]:
        base = ("score", "--model", "model", "--ids", "a.npy", "--memory", "a.m,b.m")
        assert saved(*base, *words, "--out", "o.npz", "--overwrite")[0] == 0
        expected = score(model, [ids], ttt=ttt, memory=both).logprobs_BT
        with np.load("o.npz") as found:
            np.testing.assert_allclose(found["logprobs"], expected, rtol=1e-5, atol=1e-5)
        session = Session(model, ttt=ttt, memory=both)
        session.extend(["the dog"])
        text = session.generate(8, eos_ids=())[0].text
        base = ("generate", "--model", "model", "--prompt", "the dog", "--max-new-tokens", 8)
        code, out, _ = saved(*base, "--ignore-eos", "--memory", "a.m,b.m", "--json", *words)
        assert code == 0
        assert json.loads(out)["text"] == text
    for command in ("generate", "chat"):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        first = ("--prompt", "x") if command == "generate" else ()
        words = (command, "--model", "model", "--memory", "a.m", "--session", f"{command}.s")
        assert saved(*words, *first, "--max-new-tokens", 2)[0] == 0
        code, _, err = saved(*words, *first)
        assert code == 2
        assert f"--memory a.m: {command}.s has its own fast weights" in err


def test_ttt_off_in_a_chat_puts_the_memory_away(saved, folder):
    """The last question is answered again with neither the memory nor what was learnt since."""
    model, memory = load_pretrained(folder), Memory.load("a.m")
    for ttt in (True, False):
        talk = Conversation(Session(model, ttt=ttt, memory=memory), render_plain)
        talk.ask("hello", max_new_tokens=2)
        copy, question = talk.again(False)
        again = copy.ask(question, max_new_tokens=4)
        plain = Conversation(Session(model, ttt=False), render_plain)
        assert again.text == plain.ask("hello", max_new_tokens=4).text
        assert talk.session.adapts == (ttt or "frozen")


def test_eval_has_a_mode_for_memories(saved, folder, tmp_path):
    rows = np.random.default_rng(0).integers(0, 257, (3, 33))
    np.save("rows.npy", rows)
    words = ("eval", "--model", "model", "--perplexity", "rows.npy", "--lengths", "16,32")
    words = (*words, "--block", 8, "--memory", "a.m,b.m", "--piece", 16)
    assert saved(*words, "--out", "r")[0] == 0
    part = json.loads((tmp_path / "r" / "results.json").read_text())
    assert [source["weight"] for source in part["memory"]] == ["1", "1"]
    part = part["perplexity"]
    assert part["modes"] == ["off", "memory", "on", "shuffled"]
    both = Memory.load("a.m") + Memory.load("b.m")
    model = load_pretrained(folder)
    for n, L in enumerate((16, 32)):
        found = score(model, rows[:, 32 - L :], ttt=False, memory=both, piece=16).logprobs_BT
        losses = -found[:, -8:].mean(axis=1)
        np.testing.assert_allclose(
            part["lengths"][n]["per_document"]["memory"], losses, rtol=1e-4, atol=1e-5
        )
        gain = part["lengths"][n]["off"]["mean"] - part["lengths"][n]["memory"]["mean"]
        assert part["lengths"][n]["gain_memory"]["mean"] == pytest.approx(gain, abs=1e-6)
        assert abs(gain) > 1e-3
    assert "off - memory" in (tmp_path / "r" / "report.html").read_text()
    assert saved(*words, "--ttt", "off", "--out", "off")[0] == 0
    part = json.loads((tmp_path / "off" / "results.json").read_text())["perplexity"]
    assert part["modes"] == ["off", "memory"]


@pytest.mark.filterwarnings("ignore")  # the model itself is warned of, too
def test_a_memory_of_zeros_is_said(run, folder, tmp_path):
    """As a model gives that was never trained with TTT, or a kernel that loses what it writes."""
    model = load_pretrained(folder)
    for block in model.groups[0].blocks:
        if block.mlp.target is not None:
            block.mlp.target.conv[...] = 0 * block.mlp.target.conv[...]
    save_pretrained(model, tmp_path / "idle", dtype="float32")
    Path("idle/tokenizer.json").write_bytes(Path("model/tokenizer.json").read_bytes())
    code, out, _ = run("memory", "read", "idle", "a.txt", "--out", "zero")
    assert code == 0
    assert "NOTHING WAS WRITTEN, every dW is zero" in out
