"""How commands end: exit codes, one line for every error, Ctrl-C, a reader that is gone; what
sessions keep then.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
from support.streams import one_layer_model, prompts

from ttt_jax import Session, generate
from ttt_jax.command.cli import main
from ttt_jax.command.running import CLOSED, TRACEBACK, run
from ttt_jax.data.tokenizer import ByteTokenizer
from ttt_jax.errors import DataError, NotFiniteError, TrainingError, UserError, VerificationError
from ttt_jax.process.interrupts import HeldBack

pytestmark = pytest.mark.usefixtures("interruptible", "usual_promotion")


class PanicException(BaseException):
    """As Rust code raises it."""


class Broken:
    """What `jinja2` and others stumble over."""

    def __str__(self):
        return "two\nlines \x1b[2J"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("field x = 1: wrong"), 2, "field x = 1: wrong"),
        (DataError("d"), 2, "d"),
        (TrainingError("t"), 1, "t"),
        (NotFiniteError("n"), 1, "n"),
        (VerificationError("v"), 1, "v"),
        (MemoryError(), 1, "out of memory (MemoryError); read less at a time"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\n allocating"), 1, "out of memory "
                                                                            "(RuntimeError: "
                                                                            "RESOURCE_"),
        (RecursionError("maximum"), 1, "something is nested too deeply (RecursionError: maximum)"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero; this is "
                                                   "a bug, or"),
        (TypeError(Broken()), 1, r"TypeError: two lines \x1b[2J; this is a bug"),
        (PanicException("regex"), 1, "PanicException: regex; this is a bug"),
        (OSError(28, "No space left on device"), 1, "OSError: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("saved"), 130, "interrupted; saved"),
        (click.Abort(), 130, "interrupted"),
        (click.UsageError("no such\nthing"), 2, "x: no such thing"),
        (BrokenPipeError(32, "Broken pipe"), CLOSED, ""),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "",
)  # fmt: skip
def test_every_end_is_one_line(error, code, line, capsys, monkeypatch):
    @click.command()
    def fail():
        raise error

    monkeypatch.delenv(TRACEBACK, raising=False)
    monkeypatch.setattr("os.dup2", lambda *arguments: None)  # the output of this process stays
    assert run(fail, "x", []) == code
    out, shown = capsys.readouterr()
    assert out == ""
    assert shown.count("\n") == bool(line)
    assert shown.startswith(f"error: {line}" if line else "")
    expected = isinstance(
        error, (UserError, KeyboardInterrupt, click.Abort, click.ClickException, BrokenPipeError)
    )
    assert (TRACEBACK in shown) == (not expected)
    monkeypatch.setenv(TRACEBACK, "1")
    assert run(fail, "x", []) == code
    assert ("Traceback" in capsys.readouterr().err) == bool(line)


# -------------------------------------------------------------------------------- signals held back


def send(number):
    signal.raise_signal(number)


def test_the_first_signal_waits_for_the_end_of_the_block():
    done = []

    def block(signals=1):
        with HeldBack() as held:
            for _ in range(signals):
                send(signal.SIGINT)
            assert held.requested
            done.append(signals)

    for signals in (1, 2):  # the second one does not wait
        with pytest.raises(KeyboardInterrupt):
            block(signals)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_blocks_inside_blocks():
    """What came before the inner block is requested in it; SIGTERM is not lost behind Ctrl-C."""

    class Ended(Exception):
        pass

    def end(*arguments):
        raise Ended

    done = []

    def blocks(number):
        with HeldBack() as outer:
            send(signal.SIGINT)
            try:
                with HeldBack() as inner:
                    done.append((outer.requested, inner.requested))
            finally:
                send(number)  # held
                done.append("in order")

    end.interrupts = True
    before = signal.signal(signal.SIGTERM, end)
    try:
        for number, raised in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Ended)):
            with pytest.raises(raised):
                blocks(number)
        assert signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done == [(False, True), "in order"] * 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_that_do_something_else_are_left_alone():
    """Those that only note a signal, as a training loop's, and signals that are ignored or the
    system's.
    """
    seen = []
    before = signal.signal(signal.SIGINT, lambda *arguments: seen.append(1))
    try:
        with HeldBack() as signals:
            send(signal.SIGINT)
            assert seen == [1]
            assert not signals.requested
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_of_the_main_thread_nothing_happens():
    found = []

    def work():
        with HeldBack() as signals:
            found.append(signals.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_ctrl_c_while_reading_leaves_a_whole_session(tmp_path):
    """After any piece: what was read is read, the rest waits, and the file goes on to the same
    tokens.
    """
    model, (ids,) = one_layer_model(), prompts([41])
    expected = generate(model, [ids], max_new_tokens=5, eos_ids=())[0].token_ids
    for stop_at in (8, 24):
        session = Session(model, piece=8)
        session.extend([ids])
        session.on_read = lambda tokens, stop_at=stop_at: (
            send(signal.SIGINT) if tokens == stop_at else None
        )
        with pytest.raises(KeyboardInterrupt):
            session.generate(5, eos_ids=())
        assert session.position_B.tolist() == [stop_at]
        assert session.unread[0].tolist() == ids[stop_at:].tolist()
        session.save(tmp_path / "s.safetensors")
        again = Session.load(tmp_path / "s.safetensors", model, piece=8)
        assert again.generate(5, eos_ids=())[0].token_ids == expected


@pytest.mark.parametrize("raised", [KeyboardInterrupt, BrokenPipeError, RuntimeError])
def test_an_end_while_writing_leaves_a_whole_session(raised):
    """A signal, or an error of whoever shows the text: tokens on their way belong to the stream,
    which goes on from there.
    """
    model = one_layer_model(vocab_size=257)
    model.tokenizer = ByteTokenizer()
    whole = generate(model, "Once", max_new_tokens=30, temperature=2.0, eos_ids=(), seed=3)[0]
    from ttt_jax.inference.sampling import Sampling

    shown = []

    def show(row, text):
        shown.append(text)
        if len(shown) == 4:
            if raised is not KeyboardInterrupt:
                raise raised("gone")
            send(signal.SIGINT)

    session = Session(model)
    session.extend(["Once"])
    with pytest.raises(raised):
        session.generate(20, Sampling(2.0), eos_ids=(), seed=3, on_text=show)
    n = int(session.position_B[0]) - 4
    assert 4 <= n + 1 < 20
    assert session.unread[0].tolist() == [whole.token_ids[n]]
    rest = session.generate(29 - n, Sampling(2.0), eos_ids=(), seed=3)[0]
    assert whole.token_ids[: n + 1] + rest.token_ids == whole.token_ids


# ---------------------------------------------------------------------------------------- processes


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs `generate` on a small model, with its session, and does something at a number of tokens
    read.
    """
    model, (ids,) = one_layer_model(vocab_size=257), prompts([100])
    monkeypatch.setattr("ttt_jax.pretrained.load.load_model", lambda *arguments, **options: model)
    np.save(tmp_path / "ids.npy", ids)
    session = tmp_path / "s.safetensors"

    def generate(*words, at=None, act=None):
        @contextlib.contextmanager
        def progress(*arguments):
            yield lambda done: act() if done == at else None

        monkeypatch.setattr("ttt_jax.display.progress.progress", progress)
        words = (
            "--session",
            session,
            "--max-new-tokens",
            4,
            "--piece",
            8,
            "--ignore-eos",
            "--json",
            *words,
        )
        code = main(["generate", "--model", "m", *map(str, words)])
        return code, *capsys.readouterr()

    return generate, model, session, tmp_path / "ids.npy", ids


def test_ctrl_c_saves_the_session_of_generate(command):
    """In the middle of a prompt: one line; the file holds it all, and goes on without the prompt to
    the same tokens.
    """
    generate, model, session, path, ids = command
    code, out, error = generate("--ids", path, at=40, act=lambda: send(signal.SIGINT))
    assert (code, out, error.count("\n")) == (130, "", 1)
    assert (
        f"interrupted; session {session} saved (40 tokens read, 60 still to be read): go on with it"
        in error
    )
    assert [file.name for file in sorted(session.parent.iterdir())] == ["ids.npy", "s.safetensors"]
    kept = Session.load(session, model)
    assert (int(kept.position_B[0]), kept.unread[0].tolist()) == (40, ids[40:].tolist())
    code, out, error = generate()
    assert (code, error) == (0, "")
    session.unlink()
    assert json.loads(out)["token_ids"] == json.loads(generate("--ids", path)[1])["token_ids"]


def test_ctrl_c_leaves_a_session_that_is_to_be_kept(command):
    generate, _, session, path, _ = command
    generate("--ids", path)
    before = session.read_bytes()
    code, out, error = generate(
        "--ids", path, "--keep-session", at=40, act=lambda: send(signal.SIGINT)
    )
    assert (code, out, error) == (130, "", "error: interrupted\n")
    assert session.read_bytes() == before


def test_a_broken_pipe_saves_the_session_of_generate(command, monkeypatch):
    generate, model, session, path, ids = command
    monkeypatch.setattr("os.dup2", lambda *arguments: None)

    def gone():
        raise BrokenPipeError(32, "Broken pipe")

    code, out, error = generate("--ids", path, at=40, act=gone)
    assert (code, out, error.count("\n")) == (CLOSED, "", 1)
    assert error.startswith(f"output closed; session {session} saved (40 tokens read")
    assert Session.load(session, model).unread[0].tolist() == ids[40:].tolist()


def test_ctrl_c_while_the_session_is_saved(command, monkeypatch):
    """The file is finished first: it holds what was read."""
    generate, model, session, path, ids = command
    import ttt_jax.files.sealed as sealed

    original = sealed.save_file

    def slow(*arguments, **options):
        send(signal.SIGINT)
        return original(*arguments, **options)

    monkeypatch.setattr(sealed, "save_file", slow)
    code, out, error = generate("--ids", path)
    assert (code, out, error) == (130, "", "error: interrupted\n")
    assert int(Session.load(session, model).position_B[0]) == len(ids) + 3


def start(*words, **options):
    environment = dict(os.environ) | {"JAX_PLATFORMS": "cpu"}
    environment.pop(TRACEBACK, None)
    command = [sys.executable, "-m", "ttt_jax", *map(str, words)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def test_an_import_is_not_interrupted(tmp_path):
    """Compiled modules crash (seen: a segmentation fault): the signal waits until the import is
    done, and counts then.
    """
    (tmp_path / "slow_module.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), "
        "signal.SIGINT)\ntime.sleep(0.2)\nprint('whole')\n"
    )
    code = (
        "import sys, time, click\nfrom ttt_jax.command.running import run\n@click.command()\ndef "
        "x():\n"
        "    import slow_module\n    time.sleep(60)\nsys.argv = ['x']\nsys.exit(run(x, 'x'))"
    )
    environment = dict(os.environ) | {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "whole\n", "error: interrupted\n")


def test_a_reader_that_is_gone():
    """`ttt-jax ... | head -1`, and with nobody there at all."""
    job = start("--help")
    job.stdout.close()
    job.stdout = None
    assert (job.communicate(timeout=60)[1], job.returncode) == ("", CLOSED)


def test_the_console_script_is_light():
    """Nothing heavy is imported before a Ctrl-C finds somebody at home."""
    code = (
        "import sys, ttt_jax.__main__; sys.exit(any(m in sys.modules for m in ('click', "
        "'numpy', 'jax')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'ttt-jax = "ttt_jax.__main__:main"' in project


def test_what_libraries_say_of_a_failure_is_not_printed(capsys):
    """Tensorstore's callbacks and futures behind a write that has failed: the command says it."""

    @click.command()
    def command():
        closed = RuntimeError("Event loop is closed")
        sys.unraisablehook(SimpleNamespace(exc_type=RuntimeError, exc_value=closed))
        full = OSError(28, "No space left on device")
        text = "Future exception was never retrieved"
        logging.getLogger("asyncio").error(text, exc_info=(OSError, full, None))

    assert run(command, "test", []) == 0
    assert capsys.readouterr().err == ""
