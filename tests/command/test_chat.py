"""`ttt-jax chat` by pipe and on a terminal of its own, and `generate` with a template."""

import contextlib
import functools
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
import types

import pytest
from support.byte_models import byte_model

from ttt_jax import Session, load_pretrained
from ttt_jax.command import chat_loop
from ttt_jax.command.cli import main
from ttt_jax.files.text import atomic_write_text

pytestmark = pytest.mark.usefixtures("interruptible", "usual_promotion")
CHATML = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Hugging Face folder with a tokenizer of bytes and a chat template."""
    path = byte_model(tmp_path_factory.mktemp("chat") / "model")
    settings = {"eos_token": "<|end|>", "chat_template": CHATML}
    atomic_write_text(path / "tokenizer_config.json", json.dumps(settings))
    return path


@functools.cache
def loaded_once(folder, dtype, *, decodes=True, mesh=None):
    """Load a model once, so that its programs are compiled once."""
    assert dtype is None
    return load_pretrained(folder, dtype="float32")


@pytest.fixture
def chat(folder, capsys, monkeypatch, tmp_path):
    """Run `chat` with lines on its standard input: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ttt_jax.pretrained.load.load_model", loaded_once)

    def run(lines, *words, model=folder):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        limit = ("--max-new-tokens", "6")
        code = main(["chat", "--model", str(model), *limit, *map(str, words)])
        return code, *capsys.readouterr()

    run.read = capsys.readouterr
    return run


def test_one_turn_a_line(chat, tmp_path):
    """Answers alone on stdout; the same as one conversation in two processes."""
    code, out, err = chat("hello\n\nand more\n", "--session", "whole")
    assert code == 0
    assert "stopped after 6 tokens" in err
    first = chat("hello\n", "--session", "parts")
    second = chat("and more", "--session", "parts")
    assert (first[0], second[0]) == (0, 0)
    assert out == first[1] + second[1]
    assert first[1].strip()
    (tmp_path / "book.txt").write_text("a book of things\n" * 3)
    code, read, err = chat("hello\n", "--read", "book.txt")
    assert (code, read != first[1]) == (0, True)
    assert re.search(r"read book\.txt: 51 tokens, [\d,]+ tokens/s", err)
    assert chat("/read book.txt\nhello\n")[1] == read
    assert not [name for name in os.listdir() if name.startswith(".")]


def test_commands(chat, tmp_path):
    lines = "/stats\nhello\n/stats\n/ttt off\n/branch b\n/branch\n/undo\nhello\n"
    code, out, err = chat(lines + "/save s\n/html page.html\n/help\n/quit\nnever\n")
    assert code == 0
    alone = chat("hello\n")[1]
    assert out.startswith(alone)
    assert out.endswith(alone)
    for text in ("tokens read 0", "no fast weights", "layer   0  ||S||/||W||", "new branch b",
                 "  main\n* b\n", "back to 0 tokens", "saved s", "written page.html",
                 "/read FILE", "TTT off, the conversation stays as it is: hello"):  # fmt: skip
        assert text in err
    page = (tmp_path / "page.html").read_text()
    assert page.count("nats (on") > 20
    assert "[user]" in re.sub("<[^>]*>", "", page)
    code, _, err = chat("/html later.html\n", "--session", "s")
    assert (code, "written later.html" in err) == (0, True)
    assert (tmp_path / "later.html").read_text() == page, "a loaded session knows its tokens"
    code, out, err = chat("and more\n", "--session", "s")
    assert (code, out) == (0, chat("hello\nand more\n")[1][len(alone) :])


def test_forget(chat, tmp_path):
    """What was read is gone but for its memory, which `memory read` would make, too."""
    (tmp_path / "book.txt").write_text("a book of things\n" * 8)
    code, out, err = chat("/read book.txt\n/forget 1/2\nhello\n/ttt off\n")
    assert code == 0
    assert "136 tokens are out of the context; what was learnt stays, times 1/2\n" in err
    on, off = out.splitlines()
    _, never, told = chat("hello\n/stats\n", "--no-ttt")
    assert off == never.rstrip("\n")
    assert "no fast weights: --no-ttt" in told.splitlines()
    assert chat("/read book.txt\nhello\n/forget\nhello\n")[1].splitlines()[1] != on
    assert on != off


def test_texts_are_read_into_the_fast_weights_alone(chat, folder, tmp_path):
    """As `memory read --context` and `--memory`, from the beginning and in the middle."""
    (tmp_path / "book.txt").write_text("a book of things\n" * 8 + "!")
    code, out, err = chat("hello\n", "--context", "8", "--read", "book.txt")
    assert code == 0
    told = "136 of them in whole chunks are in the fast weights (attention anew every 8 tokens)"
    assert f"{told}, none in the context\n" in err
    read = ["memory", "read", str(folder), "book.txt", "--context", "8", "--out", "m"]
    assert main(read) == 0
    chat.read()
    assert out == chat("hello\n", "--memory", "m")[1]
    assert out != chat("hello\n", "--read", "book.txt")[1]
    lines = "/read book.txt\nhello\n/stats\n/html page\n/ttt off\n"
    code, again, err = chat(lines, "--context", "8", "--session", "s")
    assert (code, again.startswith(out)) == (0, True)
    assert again[len(out) :] == chat("hello\n", "--no-ttt")[1]
    assert "written page" in err
    read = len("[user]hello<|end|>\n[assistant]") + 5 - len("<|end|>") + 1
    assert f"tokens read {read}, waiting 1, in the context {read}\n" in err
    code, _, err = chat("/html later\n", "--session", "s")
    assert code == 2
    assert err.startswith("error: /html: the conversation has fast weights that none of its tokens")


def test_a_page_needs_the_memory_that_the_conversation_began_with(chat, tmp_path):
    """The file of the session holds the sum of it and of what was written since."""
    (tmp_path / "book.txt").write_text("a book of things\n" * 8)
    code, _, err = chat("/read book.txt\n/forget\nhello\n/html a.html\n", "--session", "s")
    assert (code, "written a.html" in err) == (0, True)
    code, _, err = chat("/html b.html\n", "--session", "s")
    assert (code, "/html: the conversation has fast weights that none" in err) == (2, True)
    assert not (tmp_path / "b.html").exists()


@pytest.mark.parametrize(
    ("lines", "words", "line"),
    [
        ("", ("--context", "6"), "context = 6: must be a multiple of model.ttt.chunk_size = 4"),
        ("", ("--context", "0"), "ttt-jax chat: Invalid value for '--context'"),
        ("", ("--context", "8", "--no-ttt"), "ttt-jax chat: --context: --no-ttt learns nothing"),
        ("/read there\n", ("--context", "8"), "learn: 1 tokens are less than a chunk of 4"),
        ("/forget\n", (), "forget: 0 tokens are less than a chunk of"),
        ("/forget twice\n", (), "FACTOR twice: must be a number such as 0.5"),
        ("/nothing\n", (), "/nothing: no such command; /help lists them"),
        ("/read\n", (), "/read FILE: name the file"),
        ("/read nowhere\n", (), "/read nowhere: No such file"),
        ("/undo\n", (), "undo: no state before a turn is kept"),
        ("/ttt maybe\n", (), "/ttt maybe: must be /ttt on or /ttt off"),
        ("/ttt off\n", (), "/ttt: nothing has been asked yet"),
        ("/save\n", (), "/save: no file"),
        ("/html page\n", (), "/html: there is nothing to show"),
        ("/save there\n", (), "/save there: exists already"),
        ("", ("--read", "nowhere"), "--read nowhere: No such file"),
        ("", ("--session", "there"), "session there: damaged"),
        ("", ("--temperature", "-1"), "temperature = -1"),
    ],
)
def test_refusals_are_one_line(chat, tmp_path, lines, words, line):
    (tmp_path / "there").write_text("x")
    code, out, err = chat(lines, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {line}")


def test_a_reader_that_is_gone(chat, folder, monkeypatch, tmp_path):
    """What has been written stays in the saved conversation."""

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("os.dup2", lambda *arguments: None)
    monkeypatch.setattr("sys.stdout", Gone())
    code, out, err = chat("hello\nnever\n", "--session", "s")
    assert (code, out) == (141, "")
    assert err.startswith("output closed; session s saved (")
    stored = Session.load(tmp_path / "s", loaded_once(folder, None, decodes=True)).conversation
    assert stored is not None
    assert [m["role"] for m in stored["messages"]] == ["user", "assistant"]


def test_without_a_template(chat, folder, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for path in folder.iterdir():
        if path.name != "tokenizer_config.json":
            (base / path.name).write_bytes(path.read_bytes())
    code, out, err = chat("hello\nmore\n", model=base)
    assert (code, err.count("no chat template in the model's folder")) == (0, 1)
    told = chat("hello\nmore\n", "--no-template")
    assert (told[0], told[1]) == (0, out)
    assert "no chat template" not in told[2]
    assert chat("hello\n")[1] != chat("hello\n", "--no-template")[1]
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{% if"}))
    code, out, err = chat("hello\n", model=base)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "chat template: cannot be rendered" in err


def test_generate_with_the_template(chat, folder, monkeypatch):
    """From standard input; the same text as the first answer of a chat, and why it stopped."""
    answer = chat("hello\n")[1]
    words = ("--model", str(folder), "--max-new-tokens", "6", "--prompt-file", "-")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))  # as echo has it
    assert main(["generate", *words, "--chat"]) == 0
    out, err = chat.read()
    assert (out.lstrip(), err) == (answer, "stopped: --max-new-tokens\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello")))
    assert main(["generate", *words]) == 0
    assert chat.read()[0] != out
    for data, line in (
        (b"\xff", "--prompt-file -: not UTF-8"),
        (b"", "--prompt-file: the text is"),
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert main(["generate", *words]) == 2
        assert line in chat.read()[1]


# ---------------------------------------------------------------------------------- on a terminal


# Standard input is the terminal of the session, so that Ctrl-C is a signal; none is ignored.
_START = """
import fcntl, runpy, signal, sys, termios
signal.signal(signal.SIGINT, signal.default_int_handler)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
runpy.run_module("ttt_jax", run_name="__main__", alter_sys=True)
"""


class Terminal:
    """A chat on a pseudo-terminal."""

    def __init__(self, *words, **environment):
        self.master, slave = pty.openpty()
        env = dict(os.environ) | {"JAX_PLATFORMS": "cpu", "TERM": "xterm-256color"} | environment
        self.job = subprocess.Popen(
            [sys.executable, "-c", _START, "chat", *map(str, words)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def until(self, text, seconds=60.0):
        """Read on until `text` comes; returns what came before it."""
        self._read(lambda: text in self.seen, text, seconds)
        before, _, self.seen = self.seen.partition(text)
        return before

    def until_there_are(self, characters):
        self._read(lambda: len(self.seen) >= characters, characters)

    def _read(self, done, what, seconds=60.0):
        end = time.monotonic() + seconds
        while not done():
            ready, _, _ = select.select([self.master], [], [], max(end - time.monotonic(), 0))
            assert ready, f"no {what!r} in {self.seen!r}"
            try:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                raise AssertionError(f"ended without {what!r}: {self.seen!r}") from None

    def type(self, text):
        os.write(self.master, text.encode())

    def end(self):
        with contextlib.suppress(OSError):
            while chunk := os.read(self.master, 65536):
                self.seen += chunk.decode(errors="replace")
        code = self.job.wait(60)
        os.close(self.master)
        return code


def test_on_a_terminal(folder, tmp_path):
    """Ctrl-C stops an answer, and the chat goes on; a second one at the prompt leaves and saves."""
    session = tmp_path / "s"
    words = ("--model", folder, "--session", session, "--max-new-tokens", 100_000)
    terminal = Terminal(*words, NO_COLOR="")
    assert "lists the commands" in terminal.until("you> ")
    terminal.type("first line \\\r")
    terminal.until("...> ")
    terminal.type("second line\r")
    terminal.until("model> ")
    terminal.until_there_are(200)  # it streams
    terminal.type("\x03")
    answer = terminal.until("stopped")
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f]", answer)
    assert not re.search(r"\x1b(?!\[[\d;]*m)", answer)
    terminal.until("you> ")
    terminal.type("/nothing\r")
    terminal.until("/nothing: no such command")
    terminal.until("you> ")
    terminal.type("/stats\r")
    assert "turns 1" in terminal.until("you> ")
    terminal.type("again\r")
    terminal.until("model> ")
    terminal.until_there_are(50)
    terminal.type("\x03\x03")  # twice by haste: the chat goes on
    terminal.until("stopped")
    for line in ("Ctrl-C once more leaves", "interrupted"):
        terminal.until("you> ")
        time.sleep(0.5)  # readline does not see a signal between its prompt and its wait
        terminal.type("\x03")
        terminal.until(line)
    assert terminal.end() == 130
    assert "; session" in terminal.seen
    stored = Session.load(session, load_pretrained(folder, dtype="float32")).conversation
    assert stored is not None
    assert stored["messages"][0]["content"] == "first line \nsecond line"


@pytest.mark.parametrize(
    ("waiting", "line"),
    [(1, "stopped"), (9_801, "stopped; 9,801 tokens are still to be read, before the next answer")],
)
def test_what_a_stop_leaves_is_said(monkeypatch, capsys, waiting, line):
    """Of a text that was being read; else the next answer would be silent for minutes."""
    talk = types.SimpleNamespace(tokens=(256, waiting))
    chat = chat_loop.Chat(talk, None, 8, 0, None, "m")
    typed = iter(["hello"])

    def stopped(*args):
        raise KeyboardInterrupt

    def type_in(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_in)
    monkeypatch.setattr(chat, "take", stopped)
    chat._interactive()
    assert line in capsys.readouterr().err.splitlines()


def test_no_colours(folder):
    terminal = Terminal("--model", folder, "--max-new-tokens", 4, NO_COLOR="1", TERM="dumb")
    terminal.until("you> ")
    terminal.type("/help\r")
    assert "\x1b[" not in terminal.until("you> ")
    terminal.type("\x04")
    assert terminal.end() == 0
