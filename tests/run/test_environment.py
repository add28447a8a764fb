"""The environment of each start: a change is said once, and all starts are kept."""

import json
import typing

import pytest

from ttt_jax.run import provenance
from ttt_jax.run.environment import numeric_settings
from ttt_jax.run.provenance import write_environment

NOW: dict[str, typing.Any] = {
    "date": "d",
    "commit": "c",
    "hardware": {"platform": "gpu", "device": "h100", "device_count": 8, "cpus": 4},
    "versions": {"jax": "0.10.2"},
    "settings": {"jax_enable_x64": False},
    "parameters": 3,
}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Writes the environment of a start that differs from NOW in some places; returns its
    warnings.
    """

    def run(**groups):
        now = json.loads(json.dumps(NOW))
        for group, changes in groups.items():
            now[group] = {**now[group], **changes} if isinstance(changes, dict) else changes
        settings = now.pop("settings")
        monkeypatch.setattr(provenance, "provenance", lambda: now)
        monkeypatch.setattr(provenance, "numeric_settings", lambda: settings)
        return write_environment(tmp_path, parameters=3)

    return run


def history(folder):
    return [
        json.loads(line)
        for line in (folder / "environments.jsonl").read_text().splitlines()
        if line
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {"XLA_FLAGS": "--xla_a=1"}}, "XLA_FLAGS null -> --xla_a=1"),
        ({"settings": {"jax_enable_x64": True}}, "jax_enable_x64 false -> true"),
        ({"versions": {"jax": "0.11.2"}}, "jax 0.10.2 -> 0.11.2"),
        ({"hardware": {"device_count": 4}}, "device_count 8 -> 4"),
        ({"commit": "e"}, "commit c -> e"),
    ],
)
def test_a_changed_environment_is_said_once_and_kept(tmp_path, start, changes, said):
    assert start() == []
    assert start(date="later") == []
    (line,) = start(**changes)
    assert line.startswith(f"changed since the last start: {said}; ")
    assert "\n" not in line
    assert start(**changes) == []
    assert len(start()) == 1  # back again is another change
    starts = history(tmp_path)
    assert [entry == {**NOW} for entry in starts] == [True, False, False, False, True]
    assert json.loads((tmp_path / "environment.json").read_text()) == starts[-1]


def test_what_is_no_change(start):
    assert start() == []
    assert start(hardware={"cpus": 64}, date="later") == []  # the CPUs of a GPU host
    assert start(hardware={"platform": "cpu", "cpus": 64}) != []


def test_runs_of_older_versions_keep_their_environment(tmp_path, start):
    old = {key: value for key, value in NOW.items() if key != "settings"}
    (tmp_path / "environment.json").write_text(json.dumps(old))
    assert start(settings={"jax_enable_x64": True}) == []  # not known of the start before
    assert history(tmp_path)[0] == old
    assert len(history(tmp_path)) == 2
    with (tmp_path / "environments.jsonl").open("a") as file:
        file.write('{"cut')  # by a kill
    (tmp_path / "environment.json").write_text("damaged")
    assert start() == []
    lines = (tmp_path / "environments.jsonl").read_text().splitlines()
    assert lines[2] == '{"cut'
    assert json.loads(lines[3]) == NOW


def test_the_switches_are_those_in_effect(monkeypatch):
    import jax

    monkeypatch.setenv("XLA_FLAGS", "--xla_x")
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    found = numeric_settings()
    assert found["XLA_FLAGS"] == "--xla_x"
    assert "LIBTPU_INIT_ARGS" not in found
    assert found["jax_enable_x64"] is bool(jax.config.jax_enable_x64)
    with jax.default_matmul_precision("highest"):
        assert numeric_settings()["jax_default_matmul_precision"] == "highest"
    json.dumps(found, allow_nan=False)
