"""What a session file holds bit for bit, what tells one model from another, and damaged files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.streams import model_of, prompts

from ttt_jax.config import replace
from ttt_jax.errors import CheckpointError
from ttt_jax.inference.generation import Session
from ttt_jax.model.param_path import param_path
from ttt_jax.model.stack import Runtime
from ttt_jax.pretrained.fingerprint import fingerprint


def test_the_state_comes_back_bit_for_bit_under_bfloat16(tmp_path):
    """S is float32 whatever the compute dtype: rounded on disk, a small update would be lost by
    saving.
    """
    model = jax.tree.map(lambda x: x, model_of())
    model.runtime = Runtime(dtype="bfloat16")
    session = Session(model, 2)
    session.read(prompts([21, 14]))
    session.save(tmp_path / "s.safetensors")
    again = Session.load(tmp_path / "s.safetensors", model)
    fast = [run.ttt.S_BDF for runs in session.state.layers for run in runs if run.ttt is not None]
    loaded = [run.ttt.S_BDF for runs in again.state.layers for run in runs if run.ttt is not None]
    assert fast
    for S, T in zip(fast, loaded, strict=True):
        assert (np.asarray(S) != np.asarray(S.astype(jnp.bfloat16).astype(jnp.float32))).any()
        np.testing.assert_array_equal(S, T)


def test_values_that_change_places_make_another_model():
    """Two elements of a matrix exchanged, two layers exchanged: sums over all bits stay, the
    fingerprint does not.
    """
    model = model_of()
    first = fingerprint(model)
    assert first == fingerprint(jax.tree.map(lambda x: x + 0, model))

    def exchange(name):
        def one(path, x):
            if param_path(path) != name:
                return x
            flat = x.reshape(-1)
            return flat.at[0].set(flat[-1]).at[-1].set(flat[0]).reshape(x.shape)

        return jax.tree_util.tree_map_with_path(one, model)

    names = [param_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(model)[0]]
    for name in ("embed", next(name for name in names if name.endswith("mlp.down"))):
        assert fingerprint(exchange(name)) != first, name


def test_another_decay_is_another_model():
    model, other = model_of(), jax.tree.map(lambda x: x, model_of())
    for change in (
        {"ttt.decay": 0.5},
        {"ttt.last_target": "prediction_error"},
        {"ttt.read_cap": 0.1},
    ):
        other.config = replace(model.config, change)
        assert fingerprint(other) != fingerprint(model), change


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("session") / "s.safetensors"
    session = Session(model_of(), 2)
    session.read(prompts([10, 7]))
    session.save(path)
    return path


def test_a_session_of_another_model_is_refused(saved, tmp_path):
    other = jax.tree.map(lambda x: x, model_of())
    other.norm.scale = type(other.norm.scale)(
        other.norm.scale[...].at[3].add(1e-3), axes=("embed",)
    )
    with pytest.raises(CheckpointError, match="written by another model"):
        Session.load(saved, other)
    with pytest.raises(CheckpointError, match="no such file"):
        Session.load(tmp_path / "none", model_of())
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="not a session of ttt_jax"):
        Session.load(tmp_path / "weights.safetensors", model_of())


def test_damage_is_found(saved, tmp_path):
    """Any flipped bit, any truncation: an error, never another answer."""
    data, path, rng = saved.read_bytes(), tmp_path / "s.safetensors", np.random.default_rng(0)
    places = sorted(
        {
            0,
            7,
            8,
            9,
            len(data) - 1,
            *rng.integers(0, len(data), 60).tolist(),
            *rng.integers(0, 900, 40).tolist(),
        }
    )
    for place in places:
        bad = bytearray(data)
        bad[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            Session.load(path, model_of())
    for size in (0, 1, 7, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            Session.load(path, model_of())


def test_tensors_that_do_not_fit_are_refused(saved, tmp_path):
    """A file with valid checksums and other contents: what does not fit the model is named."""
    import json
    import zlib

    with safe_open(saved, "numpy") as file:
        manifest = json.loads(file.metadata()["manifest"])
    tensors = load_file(saved)

    def write(change):
        changed = change(dict(tensors))
        crc = {name: zlib.crc32(np.ascontiguousarray(x).tobytes()) for name, x in changed.items()}
        text = json.dumps(manifest | {"crc32": crc}, sort_keys=True)
        metadata = {"manifest": text, "manifest_crc32": str(zlib.crc32(text.encode()))}
        save_file(changed, tmp_path / "s.safetensors", metadata=metadata)
        return tmp_path / "s.safetensors"

    Session.load(write(lambda t: t), model_of())
    S = (
        "layers.0.S"
        if "layers.0.S" in tensors
        else sorted(name for name in tensors if name.endswith(".S"))[0]
    )
    for change, match in [
        (lambda t: t | {S: t[S] * np.float32("nan")}, "not finite"),
        (lambda t: t | {S: t[S][:1]}, "tensor layers"),
        (lambda t: t | {S: t[S].astype(np.float64)}, "float64"),
        (lambda t: t | {"position": t["position"] + np.int32(1000)}, "positions lie behind"),
        (lambda t: t | {"position": -t["position"]}, "negative"),
        (lambda t: t | {"unread.0": np.array([99], np.int32)}, "outside the vocabulary"),
        (lambda t: t | {"extra": np.zeros(1, np.float32)}, "extra is unknown"),
        (lambda t: {name: x for name, x in t.items() if name != S}, "is missing"),
        (lambda t: {name: x for name, x in t.items() if name != "unread.1"}, "not as many streams"),
    ]:
        with pytest.raises(CheckpointError, match=match):
            Session.load(write(change), model_of())


def test_a_failed_save_leaves_the_old_file(saved, tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    path.write_bytes(saved.read_bytes())

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ttt_jax.files.sealed.save_file", full)
    session = Session.load(path, model_of())
    with pytest.raises(CheckpointError, match="could not be written"):
        session.save(path)
    assert path.read_bytes() == saved.read_bytes()
    assert list(tmp_path.iterdir()) == [path]
