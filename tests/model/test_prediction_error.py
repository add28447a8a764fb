"""Prediction errors as targets: the gradient that they are, where they come from, what they see.

Streams, packed rows, ragged batches, sessions and meshes with them are cases of the tests of those.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from support.models import (
    EMBED,
    ERRORS,
    LAST_ERRORS,
    RIDGE,
    C,
    config,
    make,
    run,
    tokens,
    transplant,
    without_ttt,
)

from ttt_jax.config import Config, TTTConfig, from_dict
from ttt_jax.config.inner_rate import inner_rate
from ttt_jax.errors import ConfigError
from ttt_jax.model import loss
from ttt_jax.model.layers import Head, RMSNorm
from ttt_jax.model.param_path import param_path
from ttt_jax.model.prediction_error import prediction_error, source

B, D, V = 2, 6, 37


def head_of(ids_BT):
    rng = np.random.default_rng(0)
    w_VD = jnp.asarray(rng.standard_normal((V, D)))
    norm = RMSNorm(D, "embed", 1e-6, key=jax.random.key(0))
    norm.scale.set_value(jnp.asarray(1 + 0.3 * rng.standard_normal(D)))
    h_BTD = jnp.asarray(rng.standard_normal((*ids_BT.shape, D)))
    return Head(norm, w_VD, w_VD[ids_BT]), h_BTD


def ids_of(T):
    return jnp.asarray(np.random.default_rng(1).integers(0, V, (B, T)), jnp.int32)


def test_an_error_is_the_gradient_of_the_loss_of_its_token(x64):
    """By autodiff, with respect to the hidden state behind the norm; the first token of a chunk has
    none.
    """
    T = 15
    ids_BT = ids_of(T)
    head, h_BTD = head_of(ids_BT)
    nll = lambda n_BTD: loss.token_nll(n_BTD[:, :-1], head.weight_VD, ids_BT[:, 1:]).sum()
    gradient_BTD = jit(jax.grad(nll))(head.norm(h_BTD))
    error_BTD = jit(lambda h: prediction_error(source(h, head), head, 5, False))(h_BTD)
    later = np.arange(T) % 5 > 0
    np.testing.assert_allclose(
        error_BTD[:, later], -np.roll(gradient_BTD, 1, axis=1)[:, later], rtol=0, atol=1e-13
    )
    assert not np.asarray(error_BTD[:, ~later]).any()


@pytest.mark.parametrize("normalize", [False, True])
def test_the_expected_row_in_blocks(normalize, x64, monkeypatch):
    """Of a number of tokens that no block divides; normalised rows do not change a prediction."""
    head, h_BTD = head_of(ids_of(13))
    h, w = np.asarray(h_BTD), np.asarray(head.weight_VD)
    p = np.exp(h @ w.T)
    p /= p.sum(-1, keepdims=True)
    rows = w / np.sqrt(np.mean(w**2, 1, keepdims=True)) if normalize else w
    monkeypatch.setattr(loss, "_LOGITS_BYTES", 4 * V * 8)
    got = jit(lambda h, w: loss.expected_row(h, w, normalize))(h_BTD, head.weight_VD)
    np.testing.assert_allclose(got, p @ rows, rtol=0, atol=1e-10)


def test_a_token_is_normalised_as_what_was_expected_of_it(x64):
    """An error is zero where the model is sure and right, normalised or not."""
    ids_BT = ids_of(8)
    head, _ = head_of(ids_BT)
    sure_BTD = 1e3 * head.weight_VD[jnp.roll(ids_BT, -1, axis=1)]
    both_BTX = jnp.concatenate([head.rows_BTD, sure_BTD], axis=2)
    _, top_BT = jax.lax.top_k(jnp.einsum("btd,vd->btv", sure_BTD, head.weight_VD), 1)
    right = np.asarray(top_BT[:, :-1, 0] == ids_BT[:, 1:]) & (np.arange(7) != 3)
    assert right.sum() > 5
    for normalize in (False, True):
        error_BTD = prediction_error(both_BTX, head, 4, normalize)
        assert np.abs(np.asarray(error_BTD[:, 1:])[right]).max() < 1e-8


def test_predictions_are_those_of_the_model_without_fast_weights(x64):
    """The last layer's, with S = 0, whatever S it holds; that makes chunks independent."""
    model = make(config(**ERRORS | RIDGE | {"ttt.layers": (3,)}))
    T = 3 * C + 2
    ids = tokens(2, T)
    logits, state = run(model, ids)
    plain = without_ttt(model)
    assert np.abs(np.asarray(logits - run(plain, ids)[0]))[:, 3 * C :].max() > 1e-2
    pending = np.asarray(state.layers[-1][-1].ttt.source_BCX[0, 0, :, :2])
    n_BTD = jit(lambda model, ids: model.hidden(ids)[0])(plain, ids)
    expected = np.concatenate([model.embed[...][ids], n_BTD], axis=2)[:, 3 * C :]
    np.testing.assert_allclose(pending, expected, rtol=0, atol=1e-12)


def test_a_token_changes_nothing_before_it(x64):
    """Gradients do not flow through errors, so tokens are changed one by one."""
    T = 3 * C + 1
    model = make(config(**ERRORS | RIDGE | {"sliding_window": 2}))
    ids = np.repeat(np.asarray(tokens(1, T)), T + 1, axis=0)
    ids[np.arange(T), np.arange(T)] = (ids[-1] + 1) % 31
    logits = np.asarray(run(model, jnp.asarray(ids))[0])
    changed = np.abs(logits[:-1] - logits[-1:]).max(-1)
    s, t = np.mgrid[:T, :T]
    assert changed[t < s].max() < 1e-12
    assert (changed[(t > s) & (t // C > s // C)] > 1e-12).all(), "every earlier chunk is remembered"


@pytest.mark.parametrize(("still", "other"), [(1, ERRORS), (3, EMBED)])
def test_the_last_layer_with_a_target_of_its_own(still, other, x64):
    """Where layer 1 writes nothing that is the model of errors, where layer 3 does that of
    embeddings, with the same parameters.
    """
    base = RIDGE | {"ttt.layers": (1, 3)}
    model, ids = make(config(**base | LAST_ERRORS), scan_layers=False), tokens(2, 3 * C + 1)
    run_of = {n: (g, r) for g, r, layers in model.ttt_runs() for n in layers}
    group, run_number = run_of[still]
    mlp = model.groups[group].blocks[run_number].mlp
    conv = mlp.target.conv
    conv.set_value(jnp.zeros_like(conv[...]))
    assert mlp.source == {1: "input_embed", 3: "prediction_error"}[still]
    logits, state = run(model, ids)
    want, _ = run(transplant(model, config(**base | other)), ids)
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-12)
    widths = [s.ttt.source_BCX.shape[-1] for runs in state.layers for s in runs if s.ttt]
    assert widths == [model.config.d_model, 2 * model.config.d_model]
    assert np.abs(np.asarray(logits - run(without_ttt(model), ids)[0])).max() > 1e-2


@pytest.mark.parametrize("scan_layers", [True, False])
def test_no_gradient_flows_through_an_error(scan_layers, x64):
    """An output weight of its own reaches hidden states by errors alone."""
    model = make(config(**ERRORS | {"tie_embeddings": False}), scan_layers=scan_layers)
    ids = tokens(2, 3 * C)

    def total(model):
        return jnp.sum(jnp.square(model.hidden(ids)[0]))

    gradients = jit(jax.grad(total))(model)
    found = {
        param_path(path): np.abs(np.asarray(x)).max()
        for path, x in jax.tree_util.tree_flatten_with_path(gradients)[0]
    }
    assert found.pop("head") == 0
    assert min(found.values()) > 0, "all else learns, the target too"

    def of_hidden(h_BTD):
        return jnp.sum(jnp.square(source(h_BTD, head)))

    head, h_BTD = head_of(ids_of(4))
    assert not np.asarray(jax.grad(of_hidden)(h_BTD)).any()


def test_auto_has_no_rule_for_sums_of_errors():
    ttt = {"layers": [1], "target": "prediction_error", "normalize_source": True}
    cfg = from_dict(Config, {"model": {"ttt": ttt | {"write": "ridge"}}})
    assert inner_rate(cfg) == 1
    with pytest.raises(ConfigError, match=r"prediction_error and model\.ttt\.write = sum; give a"):
        inner_rate(from_dict(Config, {"model": {"ttt": ttt | {"write": "sum"}}}))
    last = ttt | {"target": "input_embed", "last_target": "prediction_error", "write": "sum"}
    with pytest.raises(ConfigError, match=r"no rule for it with model\.ttt\.last_target = pred"):
        inner_rate(from_dict(Config, {"model": {"ttt": last}}))
    assert TTTConfig().target == "hidden_states", "absent fields mean what the official code does"
