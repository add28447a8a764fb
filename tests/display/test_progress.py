"""The progress bar: on a terminal, after two seconds, gone before anything else prints."""

import sys

import pytest
from rich.progress import Progress

from ttt_jax.display import progress as progress_module
from ttt_jax.display.progress import progress


@pytest.fixture
def calls(monkeypatch):
    """What happens to bars, with a clock that the test moves."""
    calls = []
    monkeypatch.setattr(Progress, "start", lambda self: calls.append("start"))
    monkeypatch.setattr(Progress, "stop", lambda self: calls.append("stop"))
    monkeypatch.setattr(Progress, "update", lambda self, task, completed: calls.append(completed))
    return calls


def advance(monkeypatch, seconds, terminal=True):
    clock = {"now": 0.0}
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with progress("reading", 100, "tokens") as advance_to:
        for clock["now"], done in seconds:
            advance_to(done)


def test_it_waits_two_seconds(monkeypatch, calls):
    advance(monkeypatch, [(1.0, 10), (1.9, 20), (2.1, 30), (2.5, 60)])
    assert calls == [10, 20, 30, "start", 60, "stop"]


def test_it_is_gone_when_the_work_is_done(monkeypatch, calls):
    """Inside the block still: what follows may print."""
    advance(monkeypatch, [(3.0, 50), (4.0, 100)])
    assert calls[:4] == [50, "start", 100, "stop"]


def test_quick_work_shows_nothing(monkeypatch, calls):
    advance(monkeypatch, [(0.5, 50), (1.0, 100)])
    assert "start" not in calls


def test_without_a_terminal_there_is_none(monkeypatch, calls):
    advance(monkeypatch, [(5.0, 50)], terminal=False)
    assert calls == []
