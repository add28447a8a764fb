"""`ttt-jax generate --read FILE [--context N]`: texts that are read before the prompts."""

import functools
import json

import pytest
from support.byte_models import byte_model

from ttt_jax import Session
from ttt_jax.command.cli import main
from ttt_jax.pretrained.load import load_pretrained

pytestmark = pytest.mark.usefixtures("interruptible", "usual_promotion")
BOOK = "a book of things\n" * 8 + "!"
CONTEXT = ("--read", "book.txt", "--context", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_model(tmp_path_factory.mktemp("reads") / "model")


@functools.cache
def loaded_once(folder, dtype=None, *, decodes=True, mesh=None):
    """Load a model once, so that its programs are compiled once."""
    return load_pretrained(folder, dtype="float32")


@pytest.fixture
def generate(folder, tmp_path, monkeypatch, capsys):
    """Run `generate` beside the text: (exit code, the rows' tokens, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ttt_jax.pretrained.load.load_model", loaded_once)
    (tmp_path / "book.txt").write_text(BOOK)

    def run(*words):
        capsys.readouterr()
        start = ["generate", "--model", str(folder), "--max-new-tokens", "6", "--json"]
        code = main([*start, *map(str, words)])
        out, err = capsys.readouterr()
        return code, [json.loads(line)["token_ids"] for line in out.splitlines()], err

    return run


def prompts(*texts):
    return [word for text in texts for word in ("--prompt", text)]


def test_it_begins_as_from_the_memory_of_the_text(generate, folder):
    code, found, err = generate(*CONTEXT, *prompts("hello", "to be, or"))
    assert code == 0
    assert err.startswith("read book.txt: 137 tokens, ")
    told = "136 of them in whole chunks are in the fast weights (attention anew every 8 tokens)"
    assert f"\n{told}, none in the context\n" in err
    read = ["memory", "read", str(folder), "book.txt", "--context", "8", "--out", "m"]
    assert main(read) == 0
    assert found == generate("--memory", "m", *prompts("hello", "to be, or"))[1]
    none = generate(*prompts("hello", "to be, or"))[1]
    assert [a != b for a, b in zip(found, none, strict=True)] == [True, True]


def test_without_a_context_it_stands_before_each_prompt(generate):
    code, found, err = generate("--read", "book.txt", *prompts("hello", "to be, or"))
    assert (code, err) == (0, "")
    assert found == generate(*prompts(f"{BOOK}hello", f"{BOOK}to be, or"))[1]
    assert found != generate(*CONTEXT, *prompts("hello", "to be, or"))[1]


def test_a_session_learns_and_several_prompts_may_follow(generate, folder, tmp_path):
    """As `Session.learn`, in a new stream and in the middle of one; nothing else is saved."""
    path, expected = tmp_path / "s", Session(loaded_once(folder))
    learn = lambda: expected.learn(BOOK, 8, "book.txt")
    assert generate(*CONTEXT, "--prompt", "hello", "--session", path)[0] == 0
    learn()
    expected.extend(["hello"])
    expected.generate(6, eos_ids=())
    saved = path.read_bytes()
    words = (*CONTEXT, *prompts("to be, or", "so"), "--session", path)
    code, found, _ = generate(*words, "--keep-session")
    assert (code, path.read_bytes() == saved) == (0, True)
    learn()
    rows = expected.branch(2)
    rows.extend(["to be, or", "so"])
    assert found == [row.token_ids for row in rows.generate(6, eos_ids=())]
    code, found, err = generate(*words)
    assert (code, found, path.read_bytes() == saved) == (2, [], True)
    assert err.startswith("error: --context: 2 prompts for the one stream of --session ")


def test_an_interrupt_leaves_the_session_as_it_was(generate, tmp_path, monkeypatch):
    path = tmp_path / "s"
    assert generate("--prompt", "hello", "--session", path)[0] == 0
    saved = path.read_bytes()

    def interrupted(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "learn", interrupted)
    code, found, _ = generate(*CONTEXT, "--prompt", "more", "--session", path)
    assert (code, found, path.read_bytes() == saved) == (130, [], True)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--context", "8"), "ttt-jax generate: --context: is for the texts of --read FILE"),
        ((*CONTEXT, "--no-ttt"), "ttt-jax generate: --context: --no-ttt learns nothing"),
        (("--read", "book.txt", "--context", "6"), "context = 6: must be a multiple of"),
        (("--read", "short", "--context", "8"), "learn: 2 tokens are less than a chunk of 4"),
        (("--read", "nowhere"), "--read nowhere: No such file"),
        (("--read", "empty"), "--read: the text is empty"),
    ],
)
def test_refusals_are_one_line(generate, tmp_path, words, line):
    (tmp_path / "short").write_text("ab")
    (tmp_path / "empty").write_text("")
    code, found, err = generate(*words, "--prompt", "hello", "--session", "s")
    assert (code, found, err.count("\n")) == (2, [], 1)
    assert err.startswith(f"error: {line}")
    assert not (tmp_path / "s").exists()
