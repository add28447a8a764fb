"""Inference looks at its numbers: ids outside the vocabulary, NaN, norms of fast weights, targets
that are zero.
"""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import V, config, make
from support.streams import ZERO, C, changed, one_layer_model, prompts, with_nan_at

from ttt_jax import Session, generate, score
from ttt_jax.config import GuardConfig
from ttt_jax.errors import CheckpointError, NotFiniteError, UserError
from ttt_jax.eval.answers import Judge
from ttt_jax.files.sealed import is_finite
from ttt_jax.inference.watch import HIGH, LOW, Watch, one_warning

# ---------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize(
    "ids", [[[1, V]], [[-1, 2]], np.array([[0, 2**31 - 1]], np.int64)], ids=str
)
def test_ids_outside_the_vocabulary_of_an_eager_call(ids):
    """Before: NaN for the first, the last token of the vocabulary for the second."""
    for array in (np.asarray(ids), jnp.asarray(np.asarray(ids), jnp.int32)):
        with pytest.raises(
            UserError, match=rf"ids: hold id .*; the model's vocabulary has ids 0 to {V - 1}"
        ):
            one_layer_model()(array)


def test_traced_ids_are_not_looked_at():
    text = " ".join(one_layer_model().__call__.__doc__.split())
    assert "outside the vocabulary then give NaN" in text
    shape = jax.eval_shape(
        lambda ids: one_layer_model()(ids)[0], jax.ShapeDtypeStruct((1, 3), jnp.int32)
    ).shape
    assert shape == (1, 3, V)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: generate(m, [[1, 2]], eos_ids=[V]), "eos_ids: row 0 holds id"),
        (lambda m: generate(m, [[1, 2]], eos_ids=-1), "eos_ids: row 0 holds id -1"),
        (lambda m: generate(m, [[1, [2]]]), "nested unevenly"),
        (lambda m: generate(m, 5), "prompts = 5: give a text"),
        (lambda m: generate(m, [[1, 2]], max_new_tokens=1.5), "max_new_tokens = 1.5: must be a "
                                                              "whole number"),
        (lambda m: generate(m, [[1, 2]], seed=["x"]), "seed = 'x': must be a whole number"),
        (lambda m: generate(m, [[1, 2]], stop=5), "stop = 5: must be a string"),
        (lambda m: score(m, [[1, -7]]), "holds id -7"),
        (lambda m: Session(m).read([[V]]), f"holds id {V}"),
    ],
)  # fmt: skip
def test_arguments_are_refused_in_one_line(call, match):
    with pytest.raises(UserError, match=match) as error:
        call(one_layer_model())
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------- zero targets


@pytest.mark.parametrize("name", ["conv", "proj"])
@pytest.mark.parametrize(
    "act",
    [
        lambda m: generate(m, [[1, 2]], max_new_tokens=1),
        lambda m: score(m, [[1, 2]]),
        lambda m: Session(m).read([[1, 2]]),
    ],
    ids=["generate", "score", "session"],
)
def test_a_model_that_was_converted_and_never_trained(name, act):
    model = changed(one_layer_model(), name, jnp.zeros_like)
    with pytest.warns(
        UserWarning, match=f"{ZERO}: .*converted, never trained.*TTT on will equal TTT off"
    ) as caught:
        act(model)
    assert len(caught) == 1


def test_only_layers_that_are_zero_are_named():
    model = make(config(**{"ttt.chunk_size": C, "ttt.layers": (0, 1, 3)}), "float32")
    at = lambda x: x.at[0].set(0) if x.shape[0] == 1 else x  # the stacks that hold one TTT layer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Session(model)
    with pytest.warns(UserWarning, match="stay zero: their targets") as caught:
        Session(changed(model, "conv", lambda x: x.at[:, :1].set(0) if x.shape[1] > 1 else at(x)))
    assert "of TTT layers" in str(caught[0].message)
    assert "TTT off" not in str(caught[0].message)


def test_without_ttt_nothing_is_said():
    model = changed(one_layer_model(), "conv", jnp.zeros_like)
    Session(model, ttt=False)
    score(model, [[1, 2]], ttt=False)


def test_an_inner_learning_rate_of_zero():
    with pytest.warns(UserWarning, match="model.ttt.lr is 0"):
        Session(one_layer_model(**{"ttt.lr": 0.0}))


# -------------------------------------------------------------------------------------------- norms


def test_the_range_is_that_of_the_guard():
    assert (
        (LOW, HIGH) == (GuardConfig().min_state_ratio, GuardConfig().max_state_ratio) == (1e-6, 3.0)
    )


def test_one_warning_a_watch():
    """Layer, value and bound; exact zeros, and what is in the range, say nothing."""
    watch = Watch(one_layer_model(**{"num_layers": 4, "ttt.layers": (1, 3)}))
    watch.look(np.array([[0.0, 2.9], [1e-6, 3.0]]))
    with pytest.warns(
        UserWarning, match=r"fast weights of layer 3 of row 1: \|\|S\|\|/\|\|W\|\| = 3.01, above 3"
    ):
        watch.look(np.array([[1.0, 0.0], [1.0, 3.01]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.look(np.array([[1e9, 1.0], [1.0, 1e9]]))
    with pytest.warns(UserWarning, match=r"fast weights of layer 0: .* = 9e-07, below 1e-06"):
        Watch(one_layer_model()).look(np.array([[9e-7]]))
    with one_warning():
        with pytest.warns(UserWarning, match="above 3"):
            Watch(one_layer_model()).look(np.array([[5.0]]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Watch(one_layer_model()).look(np.array([[5.0]]))


RATIO = r"fast weights of layer 0.*: \|\|S\|\|/\|\|W\|\| = .*, above 3"


@pytest.mark.parametrize(
    "act",
    [
        lambda m, ids: score(m, [ids], piece=8),
        lambda m, ids: Session(m, piece=8).read([ids]),
        lambda m, ids: generate(m, [ids], max_new_tokens=1),
        lambda m, ids: generate(
            m, [ids[:2]], max_new_tokens=12, eos_ids=()
        ),  # the chunks end while it writes
        lambda m, ids: Judge(m, piece=8)([ids]),
    ],
    ids=["score", "read", "generate", "write", "judge"],
)
def test_norms_above_the_range_are_warned_of_once(act):
    model, (ids,) = one_layer_model(**{"ttt.lr": 50.0}), prompts([40])
    with pytest.warns(UserWarning, match=RATIO) as caught:
        act(model, ids)
    assert len(caught) == 1


def test_the_value_is_the_norm_of_the_state():
    """What is warned of is ||S||/||W|| of the state that the session holds."""
    model, (ids,) = one_layer_model(**{"ttt.lr": 50.0}), prompts([9])
    session = Session(model)
    with pytest.warns(UserWarning, match=RATIO) as caught:
        session.read([ids])
    layer, weight = session.state.layers[0][0], model.groups[0].blocks[0].mlp.down[...]
    expected = np.linalg.norm(layer.ttt.S_BDF) / np.linalg.norm(weight)
    assert f"= {expected:.3g}," in str(caught[0].message)


# ---------------------------------------------------------------------------------------------- NaN


def test_score_says_nan_and_keeps_what_was_computed():
    """The row that is lost does not touch the other one; in its own, NaN touches the whole piece (0
    x NaN under the mask).
    """
    rows = prompts([20, 20], vocab=V - 1)
    expected = score(one_layer_model(), rows, piece=8).logprobs_BT
    rows[1][10] = V - 1
    with pytest.raises(
        NotFiniteError, match="row 1 from token 8 on: numbers that are not finite"
    ) as error:
        score(with_nan_at(V - 1), rows, piece=8)
    kept = error.value.partial.logprobs_BT
    assert "\n" not in str(error.value)
    np.testing.assert_allclose(kept[0], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kept[1, :8], expected[1, :8], rtol=1e-4, atol=1e-5)
    assert not np.isfinite(kept[1, 8:]).any()


@pytest.mark.filterwarnings("ignore:overflow")
def test_fast_weights_that_overflow_are_no_gain():
    """An inner learning rate of 1e25: finite losses after the norm, which `eval` reported with an
    interval.
    """
    model, (ids,) = one_layer_model(**{"ttt.lr": 1e25}), prompts([24])
    for act in (
        lambda: Session(model, piece=8).read([ids]),
        lambda: generate(model, [ids], max_new_tokens=2),
    ):
        with pytest.raises(
            NotFiniteError,
            match=r"numbers that are not finite \(fast weights of layer 0: .* = (inf|nan)\)",
        ):
            act()


def test_generate_ends_the_row_and_gives_the_others():
    rows = prompts([6, 7], vocab=V - 1)
    expected = generate(one_layer_model(), rows[:1], max_new_tokens=5, eos_ids=())[0]
    rows[1][3] = V - 1
    session = Session(with_nan_at(V - 1), 2)
    session.extend(rows)
    with pytest.raises(NotFiniteError, match="row 1 after 0 new tokens") as error:
        session.generate(5, eos_ids=())
    good, lost = error.value.partial
    assert (good.token_ids, good.finish_reason) == (expected.token_ids, "length")
    assert (lost.token_ids, lost.finish_reason) == ([], "not_finite")


def test_a_lost_session_stays_lost(tmp_path):
    """It reads, writes and saves nothing more: a file with NaN in it would be believed."""
    session = Session(with_nan_at(V - 1))
    with pytest.raises(NotFiniteError, match="row 0"):
        session.read([[1, 2, V - 1, 3, 4, 5, 6, 7]])
    for act in (
        lambda: session.generate(1),
        lambda: session.read([[1]]),
        lambda: session.save(tmp_path / "s"),
    ):
        with pytest.raises(NotFiniteError):
            act()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38, -1e30])
def test_sessions_with_such_numbers_are_refused(value, tmp_path):
    """In any tensor, with valid checksums."""
    import zlib

    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "s.safetensors"
    session = Session(one_layer_model())
    session.read(prompts([10]))
    session.save(path)
    with safe_open(path, "numpy") as file:
        manifest = json.loads(file.metadata()["manifest"])
    tensors = load_file(path)
    for name in ("layers.0.k", "layers.0.v", "layers.0.S", "layers.0.z", "layers.0.source"):
        bad = {key: x.copy() for key, x in tensors.items()}
        bad[name].flat[3] = value
        crc = {key: zlib.crc32(np.ascontiguousarray(x).tobytes()) for key, x in bad.items()}
        text = json.dumps(manifest | {"crc32": crc}, sort_keys=True)
        save_file(
            bad, path, metadata={"manifest": text, "manifest_crc32": str(zlib.crc32(text.encode()))}
        )
        with pytest.raises(
            CheckpointError, match=f"tensor {name} holds numbers that are not finite, or too large"
        ):
            Session.load(path, one_layer_model())


def test_is_finite():
    assert is_finite(np.array([1e18, -1e18, 0]))
    assert is_finite(np.zeros(0))
    assert not any(is_finite(np.array([1.0, bad])) for bad in (np.nan, np.inf, -np.inf, 2e18))
