"""What a session file holds bit for bit, and what tells one model from another."""

import jax
import jax.numpy as jnp
import numpy as np
from support.streams import model_of, prompts

from ttt_jax.inference.generation import Session
from ttt_jax.inference.session_file import fingerprint
from ttt_jax.model.param_path import param_path
from ttt_jax.model.stack import Runtime


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
