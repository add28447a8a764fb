"""Which runs may be continued in a folder, and that a refusal changes nothing in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ttt_jax.config import Config, load_config, replace
from ttt_jax.errors import CheckpointError
from ttt_jax.files.text import atomic_write_text
from ttt_jax.run.folder import prepare_run_dir, read_run_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path):
    return Config(name="a", runs_dir=str(tmp_path / "runs"))


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def refusal(config):
    before = contents(config.runs_dir)
    with pytest.raises(CheckpointError) as error:
        prepare_run_dir(config)
    assert "\n" not in str(error.value)
    assert contents(config.runs_dir) == before
    return str(error.value)


def test_new_run_then_the_same_again(config):
    assert prepare_run_dir(config) is False
    assert contents(config.run_dir).keys() == {"config.yaml"}
    assert load_config(config.run_dir / "config.yaml") == read_run_config(config.run_dir) == config
    (config.run_dir / "metrics.jsonl").write_text("{}\n")
    assert prepare_run_dir(config) is True


@pytest.mark.parametrize(
    ("field", "value", "before"),
    [
        ("seed", 1, "0"),
        ("steps", 50, "100"),
        ("compute_dtype", "bfloat16", '"float32"'),
        ("init_from", "x", "null"),
        ("model.ttt.layers", [1, 3], "[]"),
        ("model.rope.base", 5e5, "10000.0"),
        ("data.seq_len", 1024, "2048"),
        ("data.heldout", ["f"], "[]"),
        ("optimizer.lr", 1e-4, "0.0003"),
        ("optimizer.warmup_steps", 5, "2"),
        ("optimizer.groups", [{"pattern": "x"}], "[]"),
    ],
)
def test_another_curve_is_refused(config, field, value, before):
    prepare_run_dir(config)
    message = refusal(replace(config, {field: value}))
    assert message.startswith(f"config field {field} = ")
    assert f"was started with {before}; choose another --name, or delete that folder" in message


@pytest.mark.parametrize(
    "changes",
    [
        {
            "log.every": 3,
            "checkpoint.keep": 5,
            "eval.rows": 4,
            "mesh.data": 2,
            "data.workers": 2,
            "remat_save": None,
        },
        {"model.ttt.implementation": "xla", "optimizer.accumulate": 2},
        {"optimizer.warmup_steps": 2},  # what the default ratio comes to
        {"optimizer.decay_ratio": 0.5},  # of the wsd schedule, which is not used
    ],
)
def test_what_does_not_shape_the_curve_may_change(config, changes):
    prepare_run_dir(config)
    changed = replace(config, changes)
    assert prepare_run_dir(changed) is True
    assert read_run_config(config.run_dir) == changed


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [None, 5])
def test_steps_may_grow(config, schedule, warmup):
    """Also where the warm-up grows with them; another warm-up that somebody writes is refused."""
    config = replace(config, {"optimizer.schedule": schedule, "optimizer.warmup_steps": warmup})
    prepare_run_dir(config)
    more = replace(config, {"steps": 500})
    message = refusal(replace(more, {"optimizer.warmup_steps": 7}))
    assert message.startswith("config field optimizer.warmup_steps = 7: ")
    assert "model.d_ff" in refusal(replace(more, {"model.d_ff": 7}))
    assert prepare_run_dir(more) is True
    assert read_run_config(config.run_dir).steps == 500
    if schedule != "constant":
        assert refusal(config).startswith("config field steps = 100: ")


def test_the_warm_up_that_was_done_may_be_kept(config):
    prepare_run_dir(config)
    assert config.optimizer.warmup(config.steps) == 2
    kept = replace(config, {"steps": 500, "optimizer.warmup_steps": 2})
    assert prepare_run_dir(kept) is True


def test_folders_that_are_not_ours(config, tmp_path):
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "thesis.tex").write_text("years of work")
    assert (
        "holds 'thesis.tex' but no config.yaml, so it is not a run; choose another name"
        in refusal(config)
    )
    (config.run_dir / "config.yaml").write_text("a: [b")
    assert "config.yaml is damaged" in refusal(config)
    (config.run_dir / "config.yaml").write_text("model:\n  depth: 3\n")
    assert "config.yaml is not of this version: config field model.depth: unknown" in refusal(
        config
    )
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(replace(config, {"runs_dir": str(tmp_path), "name": "file"}))
    assert "choose another runs_dir" in refusal(
        replace(config, {"runs_dir": str(tmp_path / "file")})
    )


def test_a_kill_inside_the_first_write_is_forgiven(config):
    config.run_dir.mkdir(parents=True)
    (config.run_dir / ".config.yaml.tmp").write_text("model:")
    assert prepare_run_dir(config) is False
    assert contents(config.run_dir).keys() == {"config.yaml"}


def test_atomic_write_text(tmp_path, monkeypatch):
    path = tmp_path / "x"
    atomic_write_text(path, "old")

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"


_PROCESS = """
import sys
sys.path.insert(0, {root!r})
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("localhost:{port}", 2, int(sys.argv[1]))
from ttt_jax.config import Config
from ttt_jax.run.folder import prepare_run_dir
def attempt(**fields):
    try:
        return prepare_run_dir(Config(runs_dir={runs!r}, **fields))
    except ValueError as error:
        return str(error)
print([attempt(), attempt(), attempt(seed=3)])
"""


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    script = _PROCESS.format(root=str(ROOT), port=29000 + os.getpid() % 1000, runs=str(tmp_path))
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(i)], stdout=subprocess.PIPE, text=True, env=env
        )
        for i in range(2)
    ]
    outputs = [child.communicate(timeout=120)[0].splitlines()[-1] for child in children]
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("[False, True, 'config field seed = 3: run folder")
