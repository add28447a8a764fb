"""Each config field on a resume: refused, accepted and said once, or free; and changed data."""

import json
import re
import shutil
import time
import typing
from pathlib import Path

import pytest

from ttt_jax.config import Config, field_names, replace, resume_fields
from ttt_jax.config.resume_fields import FIELDS, FREE, MEASURED, RAISED, REFUSED, ROUNDING
from ttt_jax.errors import CheckpointError, DataError
from ttt_jax.run.folder import prepare_run_dir, read_run_config
from ttt_jax.training.optimizer import learning_rate
from ttt_jax.training.resume_check import changed_fields, check_resume, raised_steps

FIELD_NAMES = field_names()
# A schedule on which every field of it counts, and steps enough for a warm-up that differs.
BASE = replace(Config(), {"optimizer.schedule": "wsd", "steps": 1000})


def value_of(config, field):
    for part in field.split("."):
        config = getattr(config, part)
    return config


def hint_of(field):
    kind: typing.Any = Config
    for part in field.split("."):
        kind = typing.get_type_hints(kind)[part]
    return kind


def another_value(field):
    """A value of the field's type that is not the base's."""
    now = value_of(BASE, field)
    if field == "optimizer.groups":
        return [{"pattern": "x"}]
    hint = hint_of(field)
    options = [hint, *typing.get_args(hint)]
    choices = [
        c for o in options if typing.get_origin(o) is typing.Literal for c in typing.get_args(o)
    ]
    if choices:
        return next(choice for choice in choices if choice != now)
    if isinstance(now, bool):
        return not now
    if isinstance(now, float):
        return now / 2 if now else 0.5
    if isinstance(now, int):
        return now + 1
    if isinstance(now, str):
        return now + "x"
    if isinstance(now, tuple):
        return [0] if field.endswith("layers") else ["x"]
    return "x" if str in options else 0.5 if field.endswith(("norm", "factor")) else 7


def test_every_field_is_in_the_table_once():
    assert sorted(FIELDS) == sorted(FIELD_NAMES)
    named = [name for names in resume_fields._NAMES.values() for name in names.split()]
    assert len(named) == len(set(named))
    assert resume_fields.on_resume("a.new.field") == REFUSED


@pytest.mark.parametrize("field", FIELD_NAMES)
def test_a_changed_field_is_refused_said_or_free(tmp_path, field):
    config = replace(BASE, {"runs_dir": str(tmp_path / "runs")})
    prepare_run_dir(config)
    value = str(tmp_path / "elsewhere") if field == "runs_dir" else another_value(field)
    changed = replace(config, {field: value})
    assert changed != config
    if field in ("name", "runs_dir"):  # the folder is moved along
        changed.run_dir.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(config.run_dir, changed.run_dir)
    if FIELDS[field] == RAISED:
        assert len(raised_steps(config, changed, 7)) == 1
        assert prepare_run_dir(changed) is True
        changed, config = config, changed  # and back again
    if FIELDS[field] in (RAISED, REFUSED):
        with pytest.raises(CheckpointError) as error:
            prepare_run_dir(changed)
        shown = field.replace("warmup_ratio", "warmup_steps")
        assert str(error.value).startswith(f"config field {shown} = ")
        assert read_run_config(config.run_dir) == config
        return
    said = changed_fields(read_run_config(changed.run_dir), changed)
    assert prepare_run_dir(changed) is True
    if FIELDS[field] == FREE:
        assert said == []
    else:
        (line,) = said
        assert line.startswith(f"changed since the last start: {field} ")
        assert ("rounding" in line) == (FIELDS[field] == ROUNDING)
        assert ("held-out" in line) == (FIELDS[field] == MEASURED)
        assert "\n" not in line
    assert changed_fields(read_run_config(changed.run_dir), changed) == []  # said once


def test_the_table_in_the_documentation_says_the_same():
    text = (Path(__file__).parents[2] / "docs" / "resume.md").read_text(encoding="utf-8")
    section = text.partition("## Settings that change between two starts")[2].partition("\n## ")[0]
    table = {}
    for line in section.splitlines():
        if match := re.match(r"\| (raised|refused|said once|free)[^|]*\|([^|]*)\|", line):
            for name in re.findall(r"`([a-z0-9_.]+)`", match[2]):
                table[name] = match[1]
    shown = {ROUNDING: "said once", MEASURED: "said once"}
    assert table == {name: shown.get(kind, kind) for name, kind in FIELDS.items()}


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_what_more_steps_do_to_the_learning_rate_is_said(schedule):
    before = replace(
        Config(),
        {"optimizer.schedule": schedule, "optimizer.lr": 1e-3, "optimizer.warmup_steps": 10},
    )
    now = replace(before, {"steps": 200})
    (line,) = raised_steps(before, now, 100)
    rate = learning_rate(now.optimizer, 200)(100)
    if schedule == "constant":
        assert line == "steps 100 -> 200: the learning rate goes on with 0.001"
    else:
        assert line == (
            "steps 100 -> 200: from step 100 on the learning rate is that of a run of 200 steps "
            f"({schedule}), {rate:.3g} where it would be 0.0001"
        )
        assert float(rate) == pytest.approx(1e-3 if schedule == "wsd" else 5.84e-4, rel=1e-2)
    assert raised_steps(before, before, 100) == raised_steps(now, before, 100) == []


class StubLoader:
    """A loader whose data are those of a state that says so."""

    def check_state(self, state):
        if state["data"] != "mine":
            raise DataError("data state: changed")
        return []


def checkpoint(config, step, state):
    folder = config.run_dir / "checkpoints" / str(step) / "data_state"
    folder.mkdir(parents=True)
    (folder / "metadata").write_text(state if isinstance(state, str) else json.dumps(state))


def contents(folder):
    return {
        str(p): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in Path(folder).rglob("*")
        if p.is_file()
    }


def test_a_refusal_for_changed_data_comes_before_anything_is_written(tmp_path):
    config = replace(BASE, {"runs_dir": str(tmp_path)})
    loader = typing.cast(typing.Any, StubLoader())
    assert check_resume(config, loader) == []
    assert list(tmp_path.iterdir()) == []
    prepare_run_dir(config)
    changed = replace(config, {"remat_save": None})
    (line,) = check_resume(changed, loader)
    assert "remat_save [] -> null" in line
    checkpoint(config, 5, {"data": "other"})
    checkpoint(config, 20, {"data": "mine"})
    assert check_resume(config, loader) == []
    checkpoint(config, 100, {"data": "other"})
    before = contents(tmp_path)
    with pytest.raises(DataError, match="data state: changed"):
        check_resume(changed, loader)
    assert check_resume(replace(config, {"seed": 9}), loader) == []  # `prepare_run_dir` refuses it
    assert contents(tmp_path) == before
    checkpoint(config, 101, "[" * 10)  # damaged: the restore finds an older one
    assert check_resume(config, loader) == []


def test_a_start_on_changed_data_leaves_the_run_folder_as_it_is(tmp_path):
    """The whole job: killed behind a checkpoint, its text upper-cased, started again."""
    from support.jobs import TINY, start

    corpus, runs = tmp_path / "corpus", tmp_path / "runs"
    corpus.mkdir()
    for i in range(40):
        (corpus / f"{i}.txt").write_text(f"text number {i} of the corpus " * 5)
    words = [*TINY, f"--data.train={corpus}", f"--runs_dir={runs}", "--name=a", "--steps=100000"]
    job = start([*words, "--log.probe_every=0", "--checkpoint.every=1"])
    steps, deadline = runs / "a" / "checkpoints", time.monotonic() + 120
    while not (steps.is_dir() and any(step.name.isdecimal() for step in steps.iterdir())):
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.kill()
    job.communicate()
    before = contents(runs)
    (corpus / "7.txt").write_text((corpus / "7.txt").read_text().upper())
    job = start(words)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 2, output
    (line,) = output.splitlines()
    assert line.startswith("error: data state: the content of training documents changed since")
    before.pop(str(runs / "a" / ".lock"), None)  # the killed job's, taken over
    assert contents(runs) == before
