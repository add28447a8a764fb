"""Running a command: its exit code, and one line on stderr for everything that can end it early.

    0 done    1 failed    2 wrong arguments, config, data or checkpoint
    130 Ctrl-C (143 SIGTERM, 129 SIGHUP)    141 the reader of the output is gone (`| head`)

TTT_JAX_TRACEBACK=1 shows the traceback of every error before its line.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import click

from ttt_jax.errors import NotFiniteError, TrainingError, UserError, VerificationError
from ttt_jax.files.text import one_line
from ttt_jax.process.interrupts import SIGNALS
from ttt_jax.process.lost_terminal import quiet_background
from ttt_jax.terminal import printable

TRACEBACK = "TTT_JAX_TRACEBACK"
CLOSED = 128 + 13  # as a process that SIGPIPE ends
_FAILURES = (TrainingError, NotFiniteError, VerificationError)


class Ended(KeyboardInterrupt):
    """A signal has asked the command to end. Like KeyboardInterrupt, no `except Exception` catches
    it."""


def run(command: click.Command, name: str, argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; nothing that it raises comes out.

    Args:
      argv: words; None: those of this process, whose signals are then taken over.
    """
    if (
        argv is None and f"_{name.upper().replace('-', '_')}_COMPLETE" in os.environ
    ):  # the shell asks for completions
        return int(command.main(prog_name=name, standalone_mode=False) or 0)
    signals = _Signals() if argv is None else None
    quiet = quiet_background(last=signals is not None)
    with quiet, _one_line_warnings(), contextlib.nullcontext() if signals is None else signals:
        try:
            with command.make_context(
                name, list(sys.argv[1:] if argv is None else argv)
            ) as context:
                code = command.invoke(context)
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except click.exceptions.Exit as done:  # --help, --version
            return _flushed(done.exit_code)
        except click.exceptions.NoArgsIsHelpError as error:
            print(error.format_message())
            return _flushed(0)
        except SystemExit:
            raise
        except BaseException as error:
            if signals is not None:
                signals.release()  # one more Ctrl-C ends the process at once, without a traceback
            return _tell(error, signals)


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except OSError:
        return _closed()
    return code


def _tell(error: BaseException, signals: _Signals | None) -> int:
    """Print one line about the end of a command, and return its exit code."""
    if isinstance(error, BrokenPipeError):
        return _closed()
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    code, line = _described(error, signals)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed, too
        print(f"error: {printable(line)}", file=sys.stderr, flush=True)
    return code


def _described(error: BaseException, signals: _Signals | None) -> tuple[int, str]:
    """Return (exit code, line) of an error."""
    number = 0 if signals is None else signals.seen
    # Compiled modules turn a KeyboardInterrupt into errors of their own, such as an import that
    # failed.
    if number or isinstance(error, (KeyboardInterrupt, click.Abort)):
        number = number or signal.SIGINT
        verb = (
            "interrupted"
            if number == signal.SIGINT
            else f"stopped by {signal.Signals(number).name}"
        )
        more = str(error) if isinstance(error, KeyboardInterrupt) else ""
        return 128 + number, verb + (f"; {more}" if more else "")
    if isinstance(error, click.ClickException):
        where = (
            f"{error.ctx.command_path}: "
            if isinstance(error, click.UsageError) and error.ctx
            else ""
        )
        return 2, where + " ".join(error.format_message().split())
    if isinstance(error, UserError):
        return 1 if isinstance(error, _FAILURES) else 2, str(error)
    text = one_line(error, 300, end="")
    reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if (
        isinstance(error, MemoryError)
        or "RESOURCE_EXHAUSTED" in text
        or "out of memory" in text.lower()
    ):
        fix = "read less at a time (--piece, --batch-size), use --dtype bfloat16, or more memory"
        return 1, f"out of memory ({reason}); {fix}; {TRACEBACK}=1 shows where"
    if isinstance(error, RecursionError):
        fix = f"simplify the input; {TRACEBACK}=1 shows where"
        return 1, f"something is nested too deeply ({reason}); {fix}"
    if isinstance(error, OSError):
        return 1, f"{reason}; {TRACEBACK}=1 shows where"
    return 1, f"{reason}; this is a bug, or an input that is not checked: {TRACEBACK}=1 shows where"


def _closed() -> int:
    """Nobody reads the output any more: leave quietly, and let Python find nothing to flush when it
    exits."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    return CLOSED


def _importing(frame: Any) -> bool:
    """Tell whether the frame is one of an import, at any depth."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


class _Signals:
    """Takes over the signals of this process; `seen` is the number of the last one, 0 for none.

    After the block they have the system's own handlers: a second Ctrl-C while Python shuts down
    ends the process silently.
    """

    def __init__(self) -> None:
        self.seen = 0

    def __enter__(self) -> _Signals:
        for number in SIGNALS:
            if signal.getsignal(number) in (
                signal.SIG_DFL,
                signal.default_int_handler,
            ):  # ignored ones stay ignored
                signal.signal(number, self._handle)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
        sys.unraisablehook = self._hook

    def release(self) -> None:
        for number in SIGNALS:
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL)

    def _handle(self, number: int, frame: Any) -> None:
        self.seen = number
        if _importing(frame):  # compiled modules crash when their import is interrupted
            self._once_more()
            return
        raise Ended

    def _once_more(self) -> None:
        """Send the signal again in a moment."""
        timer = threading.Timer(0.05, os.kill, (os.getpid(), self.seen or signal.SIGINT))
        timer.daemon = True
        timer.start()

    _handle.interrupts = True  # pyright: ignore[reportFunctionMemberAccess]  (for HeldBack)

    def _unraisable(self, what: Any) -> None:
        if issubclass(
            what.exc_type, KeyboardInterrupt
        ):  # swallowed in a destructor: once more, when that is left
            self._once_more()
        elif not self.seen:
            self._hook(what)


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    before, warnings.formatwarning = warnings.formatwarning, _one_line_warning
    try:
        yield
    finally:
        warnings.formatwarning = before


_FORMAT_WARNING = warnings.formatwarning


def _one_line_warning(
    message: Warning | str, category: type[Warning], *where: Any, **options: Any
) -> str:
    """Warnings for users as errors are printed; those for programmers with the line that they are
    about."""
    if issubclass(category, UserWarning):
        return f"warning: {printable(' '.join(str(message).split()))}\n"
    return _FORMAT_WARNING(message, category, *where, **options)
