"""The strict mode: the fast weights stay, everything else of the text before is dropped."""

import functools
import json

import jax
import numpy as np
import pytest
from support.models import RIDGE, config, hidden, make

from ttt_jax import score
from ttt_jax.errors import UserError
from ttt_jax.eval.documents import open_documents
from ttt_jax.eval.perplexity import evaluate, tokens_to_read
from ttt_jax.eval.reader import Reader, only_fast_weights, score_frozen_piece
from ttt_jax.eval.run import Options, check
from ttt_jax.eval.statistics import mean_with_interval
from ttt_jax.eval.tables import tables
from ttt_jax.inference.prefill import Frozen
from ttt_jax.model.param_path import param_path

C, L, K = 4, 32, 8
# without decay, which S has and W has not
KINDS = [{}, {"sliding_window": 3, **RIDGE, "ttt.decay": 1.0}]


@functools.cache
def model_of(window=False):
    changes = KINDS[window] | {"ttt.chunk_size": C, "num_layers": 2, "ttt.layers": (1,)}
    return make(config(**changes), "float32")


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).integers(0, 31, (3, L + 1)).astype(np.int32)


def read(model, ids):
    """The state behind the tokens."""
    return hidden(model, ids, keep_state=True)[1]


def with_fast_weights(model, S_BDF):
    """A model whose slow weights of the adapting layer are W + S, for one document."""

    def leaf(path, x):
        adapts = param_path(path) == "groups.1.blocks.0.mlp.down"
        return x + S_BDF.reshape(x.shape) if adapts else x

    return jax.tree_util.tree_map_with_path(leaf, model)


@pytest.mark.parametrize("window", [False, True], ids=["full", "window, ridge"])
def test_cold_is_off_of_the_block_alone(rows, window):
    cold = Reader(model_of(window), 8).cold_losses(rows, K)
    off = -score(model_of(window), rows[:, -K - 1 :], ttt=False, piece=8).logprobs_BT
    np.testing.assert_allclose(cold, off, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [False, True], ids=["full", "window, ridge"])
@pytest.mark.parametrize("before", [0, 1, C - 1])
def test_less_than_a_chunk_read_is_cold_to_the_bit(rows, before, window):
    """No chunk is complete, so S is zero; the pending tokens, keys and values are gone."""
    ids, reader = rows[:, : before + K + 1], Reader(model_of(window), 8)
    np.testing.assert_array_equal(reader.strict_losses(ids, K), reader.cold_losses(ids, K))


@pytest.mark.parametrize("before", [2 * C, 3 * C - 1], ids=["whole chunks", "a pending chunk"])
@pytest.mark.parametrize("window", [False, True], ids=["full", "window, ridge"])
def test_strict_is_a_fresh_start_with_slow_weights_W_plus_S(rows, before, window):
    """Each document alone, TTT off, on a model into whose weights its S was added. A pending chunk
    changes nothing: S is that of the whole chunks.
    """
    model, ids = model_of(window), rows[:, : before + K + 1]
    found = Reader(model, 8).strict_losses(ids, K)
    for b, row in enumerate(ids):
        S_BDF = read(model, row[None, : before // C * C]).layers[1][0].ttt.S_BDF
        frozen = with_fast_weights(model, S_BDF)
        expected = -score(frozen, row[None, -K - 1 :], ttt=False, piece=8).logprobs_BT[0]
        np.testing.assert_allclose(found[b], expected, rtol=1e-4, atol=1e-4)
    cold = Reader(model, 8).cold_losses(ids, K)
    assert np.abs(found - cold).max() > 1e-2


def test_scoring_writes_nothing(rows):
    model = model_of()
    state = read(model, rows[:, : L - 1])  # three tokens are pending
    S_BDF = np.asarray(state.layers[1][0].ttt.S_BDF)
    kept = only_fast_weights(model, state, 3, K)
    assert not kept.position_B.any()
    for runs in kept.layers:
        assert not any(np.asarray(x).any() for layer in runs for x in layer.cache)
    ttt = kept.layers[1][0].ttt
    assert not np.asarray(ttt.z_BCF).any()
    assert not np.asarray(ttt.source_BCX).any()
    lengths_B = np.full(3, K, np.int32)
    after, *_ = score_frozen_piece(Frozen(model), kept, rows[:, :K], rows[:, 1 : K + 1], lengths_B)
    np.testing.assert_array_equal(after.layers[1][0].ttt.S_BDF, S_BDF)
    assert np.abs(S_BDF).max() > 1e-3


def test_evaluate_and_tables(rows, tmp_path):
    np.save(tmp_path / "ids.npy", rows)
    corpus = open_documents(model_of(), tmp_path / "ids.npy")
    seen, modes = [], ("off", "on", "strict")
    part = evaluate(
        model_of(),
        corpus,
        [0, 1, 2],
        lengths=[16, L],
        block=K,
        modes=modes,
        batch_size=2,
        piece=8,
        on_progress=seen.append,
    )
    assert part["modes"] == ["off", "on", "strict", "cold"]
    assert seen[-1] == part["tokens_read"] == 3 * tokens_to_read([16, L], K, modes)
    reader = Reader(model_of(), 8)
    for entry in part["lengths"]:
        strict = reader.strict_losses(rows[:, L - entry["length"] :], K).mean(1)
        cold = reader.cold_losses(rows, K).mean(1)
        np.testing.assert_allclose(entry["per_document"]["strict"], strict, rtol=1e-5)
        np.testing.assert_allclose(entry["per_document"]["cold"], cold, rtol=1e-5)
        gain = np.subtract(*(entry["per_document"][name] for name in ("cold", "strict")))
        assert entry["gain_strict"] == mean_with_interval(gain)
    assert set(part["positions"][0]["per_document"]) == {"off", "on"}
    by_length, by_position = tables({"perplexity": part})
    assert by_length.headings[-1] == "cold - strict"
    assert "strict" not in " ".join(by_position.headings)
    json.dumps(part, allow_nan=False)


def test_refusals():
    for changes in ({"perplexity": "d", "ttt": "on"}, {"tasks": ("synthetic",)}):
        with pytest.raises(UserError, match="--strict: is a mode of --perplexity with --ttt both"):
            check(Options(model="m", strict=True, **changes))
