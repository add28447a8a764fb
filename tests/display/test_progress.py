"""The progress bar: on a terminal, after two seconds, gone before anything else prints."""

import sys

import pytest
from rich.progress import Progress

from ttt_jax.display import progress as progress_module
from ttt_jax.display.progress import progress


class Clock:
    """Stands for `threading.Timer`: calls back when the test moves the time."""

    def __init__(self):
        self.now, self.due = 0.0, []

    def timer(self, seconds, call):
        clock = self

        class Timer:
            daemon = False

            def start(self):
                clock.due.append((clock.now + seconds, self))

            def cancel(self):
                clock.due = [(at, timer) for at, timer in clock.due if timer is not self]

            def call(self):
                call()

        return Timer()

    def move_to(self, now):
        self.now = now
        for _, timer in [entry for entry in self.due if entry[0] <= now]:
            timer.cancel()
            timer.call()


@pytest.fixture
def calls(monkeypatch):
    """What happens to bars."""
    calls = []
    monkeypatch.setattr(Progress, "start", lambda self: calls.append("start"))
    monkeypatch.setattr(Progress, "stop", lambda self: calls.append("stop"))
    monkeypatch.setattr(Progress, "update", lambda self, task, completed: calls.append(completed))
    return calls


def advance(monkeypatch, seconds, terminal=True):
    """Go through (seconds, what is done by then, or None)."""
    clock = Clock()
    monkeypatch.setattr(progress_module.threading, "Timer", clock.timer)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with progress("reading", 100, "tokens") as advance_to:
        for now, done in seconds:
            clock.move_to(now)
            if done is not None:
                advance_to(done)
    clock.move_to(1e9)


def test_it_waits_two_seconds(monkeypatch, calls):
    advance(monkeypatch, [(1.0, 10), (1.9, 20), (2.1, 30), (2.5, 60)])
    assert calls == [10, 20, "start", 30, 60, "stop"]


def test_it_does_not_wait_for_the_first_advance(monkeypatch, calls):
    """A piece of a large model takes minutes on a CPU."""
    advance(monkeypatch, [(2.0, None), (60.0, 50)])
    assert calls == ["start", 50, "stop"]


def test_it_is_gone_when_the_work_is_done(monkeypatch, calls):
    """Inside the block still: what follows may print."""
    advance(monkeypatch, [(3.0, 50), (4.0, 100), (9.0, None)])
    assert calls == ["start", 50, 100, "stop"]


@pytest.mark.parametrize("done", [50, 100])
def test_quick_work_shows_nothing(monkeypatch, calls, done):
    """Nor later."""
    advance(monkeypatch, [(0.5, 10), (1.0, done)])
    assert calls == [10, done]


def test_work_that_fails_leaves_no_bar(monkeypatch, calls):
    def seconds():
        yield 3.0, 10
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        advance(monkeypatch, seconds())
    assert calls == ["start", 10, "stop"]


def test_without_a_terminal_there_is_none(monkeypatch, calls):
    advance(monkeypatch, [(5.0, 50)], terminal=False)
    assert calls == []
