"""Compiled programs are kept in the run folder; nothing unsealed is run; the numbers stay the
same.
"""

import json
import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.jobs import TINY, curve, one_device

import train
from ttt_jax.config import Config, replace
from ttt_jax.run import compile_cache
from ttt_jax.run.logs import read_events


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("TTT_JAX_CACHE", str(tmp_path / "user"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)  # as a job begins
    compile_cache._forget_earlier_cache()
    yield replace(Config(), {"runs_dir": str(tmp_path / "runs"), "name": "a"})
    for name, value in before.items():
        jax.config.update(name, value)
    compile_cache._forget_earlier_cache()


SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_persistent_cache_enable_xla_caches",
    "jax_raise_persistent_cache_errors",
)


def compute():
    jax.clear_caches()
    return np.asarray(jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.arange(12.0).reshape(3, 4)))


def entries(cache):
    return {path.name: path.read_bytes() for path in cache.folder.glob("*-cache")}


def test_only_sealed_entries_are_used(config):
    cache, warnings = compile_cache.open_cache(config)
    assert warnings == []
    assert cache.folder.is_relative_to(config.run_dir.absolute() / "compile_cache")
    expected = compute()
    cache.seal()
    first = entries(cache)
    assert any(name.startswith("jit") for name in first)
    key = cache.folder.parents[3] / "user" / "compile_key"
    assert stat.S_IMODE(os.stat(key).st_mode) == 0o600

    # a bit flipped, an entry cut short by a kill, one from somebody else
    damaged = sorted(first)[0]
    (cache.folder / damaged).write_bytes(first[damaged][:-1])
    (cache.folder / "jit_foreign-cache").write_bytes(b"machine code")
    jax.config.update("jax_compilation_cache_dir", None)
    cache, warnings = compile_cache.open_cache(config)
    assert warnings == [
        "compile_cache: 2 entries without a valid seal were removed; compiling again"
    ]
    assert entries(cache) == {name: data for name, data in first.items() if name != damaged}
    np.testing.assert_array_equal(compute(), expected)
    cache.seal()
    assert sorted(entries(cache)) == sorted(first)

    key.write_bytes(b"x" * 32)  # another user
    assert cache.check() == []  # the key was read at the start
    jax.config.update("jax_compilation_cache_dir", None)
    cache, warnings = compile_cache.open_cache(config)
    assert warnings == [
        f"compile_cache: {len(first)} entries without a valid seal were removed; compiling again"
    ]
    assert entries(cache) == {}


def test_off_elsewhere_and_unusable(config, tmp_path, monkeypatch):
    assert compile_cache.open_cache(replace(config, {"compile_cache": None})) == (None, [])
    cache, _ = compile_cache.open_cache(
        replace(config, {"compile_cache": str(tmp_path / "shared")})
    )
    assert cache.folder.parent == tmp_path / "shared"
    assert compile_cache.open_cache(config) == (None, [])  # jax has been told of a folder already
    jax.config.update("jax_compilation_cache_dir", None)
    (tmp_path / "file").write_text("")
    cache, (warning,) = compile_cache.open_cache(
        replace(config, {"compile_cache": str(tmp_path / "file")})
    )
    assert cache is None
    assert warning.startswith("compile_cache: off, because ")
    assert jax.config.jax_compilation_cache_dir is None


def test_training_is_the_same_bit_for_bit(config, tmp_path, capsys):
    """Without the cache, with an empty one, and with a full one of which an entry is damaged. jax
    forgets what it has compiled before each. (In processes of their own: the harness of faults.)
    """
    (tmp_path / "text.txt").write_text("fast weights update chunk by chunk " * 60)
    (tmp_path / "heldout.txt").write_text("fast weights are read chunk by chunk " * 60)
    text, heldout, runs, cache = (
        tmp_path / name for name in ("text.txt", "heldout.txt", "runs", "c")
    )
    words = [
        *TINY,
        f"--data.train={text}",
        f"--data.heldout={heldout}",
        f"--runs_dir={runs}",
        f"--compile_cache={cache}",
    ]
    words += ["--steps=5", "--optimizer.warmup_steps=1", "--checkpoint.every=0"]

    def run(*more):
        jax.config.update("jax_compilation_cache_dir", None)
        compile_cache._forget_earlier_cache()
        jax.clear_caches()
        with one_device():
            assert train.main([*words, *more]) == 0
        return capsys.readouterr().out

    run("--name=without", "--compile_cache=null")
    run("--name=empty")
    seals = json.loads(next((tmp_path / "c").rglob("seals.json")).read_text())
    assert any(name.startswith("jit_train_step") for name in seals)
    victim = next((tmp_path / "c").rglob("jit_nll-*-cache"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert "warning: compile_cache: 1 entries without a valid seal were removed" in run(
        "--name=full"
    )
    (event,) = (event for event in read_events(runs / "full") if event["kind"] == "start")
    assert event["step"] == 0
    off, empty, full = (curve(tmp_path / "runs" / name) for name in ("without", "empty", "full"))
    assert off == empty == full
