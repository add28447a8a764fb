"""The copy of a run folder: what is copied, what comes back, what is refused. No job runs."""

import shutil
import threading

import pytest
from support.stores import REMOTE, bucket, files_of, listed, serving

from ttt_jax.checkpoint import run_copy
from ttt_jax.checkpoint.checksums import CHECKSUMS, write_checksums
from ttt_jax.checkpoint.run_copy import RunCopy, fetch_run
from ttt_jax.checkpoint.run_place import Place
from ttt_jax.config import Config, dump_yaml, replace, validate
from ttt_jax.errors import CheckpointError, ConfigError, TrainingError

# ------------------------------------------------------------------------------------ without a job


@pytest.fixture
def run(tmp_path):
    """A run folder with steps of a few files, and its config with a copy in another folder."""
    config = replace(
        Config(),
        {
            "name": "a",
            "runs_dir": str(tmp_path / "runs"),
            "checkpoint.copy_to": str(tmp_path / "copies"),
        },
    )
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(dump_yaml(config))
    (config.run_dir / ".lock").write_text("held")
    (config.run_dir / "compile_cache").mkdir()
    (config.run_dir / "compile_cache" / "x").write_text("x")
    (config.run_dir / "tokenizer").mkdir()
    (config.run_dir / "tokenizer" / "tokenizer.json").write_text("{}")
    (config.run_dir / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    return config


def write_step(config, step, text=None):
    folder = config.run_dir / "checkpoints" / str(step)
    for name in ("model/d/0", "model/d/1", "extra/metadata"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text or f"{name} of {step}")
    write_checksums(folder)
    return folder


def copy(config):
    events = []
    with RunCopy(config, lambda text, **details: events.append(text)) as copier:
        copier.finish()
    return events


def lose(config):
    shutil.rmtree(config.run_dir)
    config.run_dir.mkdir()


def test_what_is_copied_and_what_comes_back(run, tmp_path):
    for step in (4, 8, 12):
        write_step(run, step)
        copy(run)
    there = files_of(tmp_path / "copies" / "a")
    assert {name.split("/")[1] for name in there if name.startswith("checkpoints")} == {"8", "12"}
    assert {name for name in there if not name.startswith("checkpoints")} == {
        *("config.yaml", "metrics.jsonl", "tokenizer/tokenizer.json"),
    }
    assert there["metrics.jsonl"] == b'{"step": 1}\n{"step": 2}\n', "whole lines only"
    step = files_of(run.run_dir / "checkpoints" / "12")
    lose(run)
    (line,) = fetch_run(run)
    assert line.endswith(f"fetched step 12, which {run.run_dir} did not have")
    assert files_of(run.run_dir) == {
        **{name: data for name, data in there.items() if not name.startswith("checkpoints")},
        **{f"checkpoints/12/{name}": data for name, data in step.items()},
    }
    assert fetch_run(run) == [], "nothing is newer there"


@pytest.mark.parametrize("scheme", REMOTE)
def test_what_is_copied_comes_back_from_a_store(run, scheme, monkeypatch):
    monkeypatch.setattr(run_copy, "_AT_ONCE", 1)
    with serving(scheme):
        run = replace(run, {"checkpoint.copy_to": f"{bucket(scheme)}/runs", "checkpoint.keep": 1})
        assert fetch_run(run) == []
        for step in (4, 8):
            write_step(run, step)
            copy(run)
        step = files_of(run.run_dir / "checkpoints" / "8")
        assert {
            name.removeprefix("checkpoints/8/"): data
            for name, data in listed(run.checkpoint.copy_to).items()
            if name.startswith("checkpoints")
        } == step
        lose(run)
        (line,) = fetch_run(run)
        assert line.endswith(f"fetched step 8, which {run.run_dir} did not have")
        assert files_of(run.run_dir / "checkpoints" / "8") == step
        assert (run.run_dir / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_the_last_file_of_a_step_says_that_it_is_complete(run, tmp_path, monkeypatch):
    write_step(run, 4)
    copy(run)
    write_step(run, 8)
    put = Place.put

    def until_the_last(place, source, name):
        if name.endswith(CHECKSUMS):
            raise OSError("killed")
        put(place, source, name)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "put", until_the_last)
        with pytest.raises(TrainingError, match=r"step 8 is in .* could not be copied \(killed\)"):
            copy(run)
    assert (tmp_path / "copies/a/checkpoints/8/model/d/1").exists()
    kept = tmp_path / "kept"
    shutil.copytree(run.run_dir, kept)
    lose(run)
    assert "fetched step 4" in fetch_run(run)[0]
    shutil.rmtree(run.run_dir)
    shutil.copytree(kept, run.run_dir)
    copy(run)
    lose(run)
    assert "fetched step 8" in fetch_run(run)[0]


def test_a_removal_that_is_cut_short_leaves_no_half_of_a_step(run, tmp_path, monkeypatch):
    run = replace(run, {"checkpoint.keep": 1})
    write_step(run, 4)
    copy(run)
    write_step(run, 8)

    def killed(place, name):
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Place, "remove_folder", killed)
        with pytest.raises(TrainingError, match="killed"):
            copy(run)
    assert not (tmp_path / "copies/a/checkpoints/4" / CHECKSUMS).exists()
    assert (tmp_path / "copies/a/checkpoints/4/model/d/0").exists()
    copy(run)
    assert [path.name for path in (tmp_path / "copies/a/checkpoints").iterdir()] == ["8"]


@pytest.mark.parametrize("damage", ["changed", "missing", "checksums"])
def test_a_damaged_step_there_is_left_out(run, tmp_path, damage):
    for step in (4, 8):
        write_step(run, step)
        copy(run)
    there = tmp_path / "copies/a/checkpoints/8"
    if damage == "changed":
        (there / "model/d/0").write_text("model/d/0 of 9")
    elif damage == "missing":
        (there / "model/d/0").unlink()
    else:
        (there / CHECKSUMS).write_text("{")
    lose(run)
    left_out, fetched = fetch_run(run)
    assert "step 8 there is damaged (" in left_out
    assert "fetched step 4" in fetched
    assert [path.name for path in (run.run_dir / "checkpoints").iterdir()] == ["4"]
    lose(run)
    (tmp_path / "copies/a/checkpoints/4/model/d/0").write_text("x")
    with pytest.raises(CheckpointError, match="no older one is intact") as error:
        fetch_run(run)
    assert "\n" not in str(error.value)
    assert not (run.run_dir / "config.yaml").exists()


def test_another_run_there_is_refused(run, tmp_path):
    write_step(run, 4)
    copy(run)
    lose(run)
    with pytest.raises(CheckpointError, match=r"field seed = 1: the copy in .*copies/a was start"):
        fetch_run(replace(run, {"seed": 1}))
    (tmp_path / "copies" / "b").mkdir()
    (tmp_path / "copies" / "b" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"b holds 'notes.txt' there but no config.yaml"):
        fetch_run(replace(run, {"name": "b"}))
    assert files_of(run.run_dir) == {}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("https://x.org/runs", "https:// is not supported"),
        ("s3://", "names no bucket"),
        ("{runs}", "is where the run itself lies"),
        ("{runs}/a", "is where the run itself lies"),
        ("{runs}/a/copy", "is where the run itself lies"),
        ("/proc/nowhere", "cannot be used|check the place"),
        ("{runs}/a/config.yaml/x", "is where the run itself lies"),
    ],
)
def test_a_place_that_cannot_take_a_copy_is_refused_before_anything_starts(run, target, message):
    target = target.format(runs=run.runs_dir)
    before = files_of(run.run_dir)
    with pytest.raises(CheckpointError, match=message) as error:
        fetch_run(replace(run, {"checkpoint.copy_to": target}))
    assert str(error.value).startswith(f"config field checkpoint.copy_to = '{target}': ")
    assert "\n" not in str(error.value)
    assert files_of(run.run_dir) == before


@pytest.mark.parametrize("scheme", REMOTE)
def test_a_bucket_that_is_not_there_is_refused(run, scheme):
    target = f"{scheme}://no-such-bucket/runs"
    with serving(scheme), pytest.raises(CheckpointError) as error:
        fetch_run(replace(run, {"checkpoint.copy_to": target}))
    assert str(error.value).startswith(f"config field checkpoint.copy_to = '{target}': ")
    assert "\n" not in str(error.value)


def test_a_copy_that_fails_is_said_once_and_tried_again(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run_copy, "_PAUSE", 0.0)
    write_step(run, 4)
    (tmp_path / "copies").write_text("a file in the way")
    events = []
    with RunCopy(run, lambda text, **details: events.append(text)) as copier:
        for _ in range(3):
            copier.follow()
            copier._pending.exception(timeout=60)
        copier.follow()
        assert len(events) == 1
        assert "step 4 is in " in events[0]
        assert events[0].endswith("training goes on, and it is tried again")
        copier._pending.exception(timeout=60)
        (tmp_path / "copies").unlink()
        copier.follow()
        copier._pending.result(timeout=60)
        copier.follow()
    assert events[1:] == ["step 4 is copied: copying works again"]
    assert (tmp_path / "copies/a/checkpoints/4" / CHECKSUMS).exists()


def test_a_step_that_the_run_removes_is_copied_all_the_same(run, tmp_path, monkeypatch):
    """An upload may take longer than the run keeps a step."""
    run = replace(run, {"checkpoint.keep": 1})
    source = write_step(run, 4)
    expected = files_of(source)
    put, began, removed = Place.put, threading.Event(), threading.Event()

    def slowly(place, path, name):
        began.set()
        assert removed.wait(60)
        put(place, path, name)

    monkeypatch.setattr(Place, "put", slowly)
    with RunCopy(run, lambda text, **details: pytest.fail(text)) as copier:
        copier.follow()
        assert began.wait(60)
        write_step(run, 8)
        shutil.rmtree(source)
        removed.set()
        copier._pending.result(timeout=60)
        assert files_of(tmp_path / "copies/a/checkpoints/4") == expected
        copier.finish()
    assert [path.name for path in (tmp_path / "copies/a/checkpoints").iterdir()] == ["8"]
    assert not (run.run_dir / ".copy").exists()


def test_a_part_of_a_step_is_not_copied(run, tmp_path, monkeypatch):
    write_step(run, 4)
    copy(run)
    write_step(run, 8)
    link = run_copy._link

    def fails(source, target):
        if source.endswith("d/1"):
            raise OSError(28, "No space left on device")
        link(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(run_copy, "_link", fails)
        with pytest.raises(TrainingError, match="could not be kept for the copy"):
            copy(run)
    assert [path.name for path in (tmp_path / "copies/a/checkpoints").iterdir()] == ["4"]


def test_names_that_leave_the_folder_are_not_fetched(run, tmp_path, monkeypatch):
    write_step(run, 4)
    copy(run)
    lose(run)
    names = Place.names
    monkeypatch.setattr(
        Place,
        "names",
        lambda place, below="": [
            *names(place, below),
            *(["4/../../../x"] if below else ["a/../../x"]),
        ],
    )
    with pytest.raises(CheckpointError, match="it names files outside of itself"):
        fetch_run(run)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("field", "fix"),
    [
        ("runs_dir", "set checkpoint.copy_to to this place"),
        ("init_from", "copy it to a disk"),
        ("data.tokenizer", "copy it to a disk"),
        ("compile_cache", "name a folder on a disk"),
    ],
)
def test_fields_that_need_a_disk_refuse_a_url(field, fix):
    with pytest.raises(ConfigError, match=f"{field} = 's3://b/x': is a URL; .*{fix}"):
        validate(replace(Config(), {field: "s3://b/x"}))


def test_no_place_is_refused():
    with pytest.raises(ConfigError, match="copy_to = '': names no place"):
        validate(replace(Config(), {"checkpoint.copy_to": ""}))
