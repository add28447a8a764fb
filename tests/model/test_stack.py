"""Which layers are scanned together, and what the backward pass of a stack keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import jit
from jax.ad_checkpoint import checkpoint_name
from support.models import (
    RIDGE,
    abstract,
    config,
    make,
    run,
    tokens,
    transplant,
)

from ttt_jax.config import REMAT_NAMES
from ttt_jax.model.stack import LayerKind, find_groups, layer_kinds
from ttt_jax.model.transformer import LayerRun
from ttt_jax.ops.ttt import writes

REMAT_MODEL = {
    "num_layers": 1,
    "num_heads": 1,
    "num_kv_heads": 1,
    "qk_norm": False,
    "ttt.layers": (0,),
}


def remat_gradient(model, ids):
    return jax.grad(lambda model: jnp.sum(jnp.square(model.hidden(ids)[0] - 1)))(model)


def test_what_the_backward_keeps_does_not_change_the_gradients(x64):
    model, ids = make(config(**REMAT_MODEL), remat_save=None), tokens(1, 9)
    gradient = jit(remat_gradient)
    expected = gradient(model, ids)
    # nothing, attention's, the MLP's, the targets
    groups = (), REMAT_NAMES[:3], REMAT_NAMES[3:6], REMAT_NAMES[6:]
    for save in groups:
        got = gradient(transplant(model, model.config, remat_save=save), ids)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-12, err_msg=str(save))


def test_what_is_kept_is_not_computed_again():
    """A named activation appears twice in the program of the gradient, once if it is kept."""

    def program(save):
        model = make(config(**REMAT_MODEL), "float32", remat_save=save)
        return str(jax.make_jaxpr(remat_gradient)(model, tokens(1, 9)))

    nothing, everything = program(()), program(None)
    for name in REMAT_NAMES:
        if name not in ("attention", "ttt_states"):  # of kernels
            kept, mark = program((name,)), f"name[name={name}]"
            assert kept.count(mark) == everything.count(mark) == nothing.count(mark) / 2 > 0, name


def test_kept_targets_of_ridge_writes_keep_the_inverse(monkeypatch):
    """It is two thirds of the write's time to make again."""
    root = writes.inverse_root
    named = lambda *arguments: checkpoint_name(root(*arguments), "root")
    monkeypatch.setattr(writes, "inverse_root", named)

    def times(save):
        model = make(config(**REMAT_MODEL | RIDGE), "float32", remat_save=save)
        return str(jax.make_jaxpr(remat_gradient)(model, tokens(1, 9))).count("name[name=root]")

    assert times(None) == times(("ttt_target",)) == times(()) / 2 > 0


def test_program_size_does_not_grow_with_depth():
    def size(layers):
        cfg = config(num_layers=layers, **{"ttt.layers": tuple(range(0, layers, 6))})
        loss = lambda model, ids: jnp.sum(model.hidden(ids)[0])
        ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        return len(jit(jax.grad(loss)).lower(abstract(cfg), ids).as_text())

    shallow, deep = size(12), size(48)
    assert deep < 1.05 * shallow, (shallow, deep)


KINDS = st.sampled_from([LayerKind("input_embed", None), LayerKind(None, None), LayerKind(None, 8)])


@settings(max_examples=300, deadline=None)
@given(st.lists(KINDS, min_size=1, max_size=30))
def test_groups_cover_the_layers_in_order(kinds):
    groups = find_groups(kinds)
    assert [
        run.kind
        for pattern, repeats in groups
        for run in pattern * repeats
        for _ in range(run.count)
    ] == kinds
    assert all(repeats >= 1 and pattern for pattern, repeats in groups)


@settings(max_examples=200, deadline=None)
@given(st.lists(KINDS, min_size=1, max_size=6), st.integers(2, 8), st.integers(0, 5))
def test_groups_of_a_periodic_model_are_few(pattern, repeats, tail):
    """However the pattern is cut, at most it and its tail are compiled; a whole number of periods
    costs one pattern.
    """
    kinds = pattern * repeats + pattern[: min(tail, len(pattern) - 1)]
    blocks = sum(len(p) for p, _ in find_groups(kinds))
    assert blocks <= 2 * len(pattern)


@pytest.mark.parametrize(
    ("layers", "ttt", "groups"),
    [
        (36, range(0, 36, 6), [(2, 6)]),
        (28, range(0, 28, 6), [(2, 4), (1, 1), (1, 1)]),
        (5, (), [(1, 1)]),
        (4, (1, 3), [(2, 2)]),
    ],
)
def test_groups_of_known_models(layers, ttt, groups):
    cfg = config(num_layers=layers, **{"ttt.layers": tuple(ttt)})
    assert [(len(pattern), repeats) for pattern, repeats in find_groups(layer_kinds(cfg))] == groups


def test_layer_kinds():
    cfg = config(
        sliding_window=8,
        full_attention_layers=(0, 3),
        **{"ttt.target": "input_embed", "ttt.last_target": "prediction_error"},
    )
    assert layer_kinds(cfg) == [
        (None, None),
        ("input_embed", 8),
        (None, 8),
        ("prediction_error", None),
    ]


def test_scanned_groups_equal_layer_after_layer(monkeypatch, x64):
    """A pattern with a run of two layers in it, repeated twice, and a tail."""
    model, ids = make(config(num_layers=8, **{"ttt.layers": (0, 3, 6)})), tokens(1, 10)
    assert [group.repeats for group in model.groups] == [2, 1, 1]
    assert [run.count for run in model.groups[0].pattern] == [1, 2]
    whole, _ = run(model, ids)
    monkeypatch.setattr(
        "ttt_jax.model.transformer.find_groups",
        lambda kinds: [((LayerRun(kind, 1),), 1) for kind in kinds],
    )
    single = transplant(model, model.config)
    assert len(single.groups) == 8
    np.testing.assert_allclose(run(single, ids)[0], whole, rtol=0, atol=1e-12)
    stats = jit(lambda model: model.hidden(ids)[2])
    by_group, by_layer = stats(model), stats(single)
    assert set(by_group) == set(by_layer) == {0, 3, 6}
    for layer in by_layer:
        for name, value in by_layer[layer].items():
            np.testing.assert_allclose(by_group[layer][name], value, rtol=1e-12)
