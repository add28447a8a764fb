"""Stacked layers scanned in place: the gradients of the plain loop, nothing kept twice, no stack
cut into pieces.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from support import unwritten
from support.models import EMBED, abstract, config, make, tokens, transplant
from support.tolerance import relative_rms

from ttt_jax.config import REMAT_NAMES
from ttt_jax.model.layer_scan import _linearize, layers_in_a_row, scan_layers
from ttt_jax.model.transformer import LayerRun
from ttt_jax.ops import platform

R, COUNTS = 3, (1, 2)
B, T, D = 2, 5, 4
SEVEN = {"num_layers": 7, "ttt.layers": (0, 3, 6)}  # (1 TTT layer, 2 plain ones) x 2, then one more


# --------------------------------------------------------------------------------------- toy layers


def first(params, h_BTD, source_BTD, rest):
    h_BTD = h_BTD + jnp.tanh(h_BTD @ params["w"] + source_BTD)
    return h_BTD, {"mean": jnp.mean(h_BTD)}


def second(params, h_BTD, source_BTD, rest):
    table_TD, index_T = rest
    spread = lambda x: jnp.broadcast_to(x, h_BTD.shape)
    return h_BTD * spread(table_TD) + jnp.sin(h_BTD @ params["w"]) * spread(
        table_TD[index_T]
    ) + spread(params["b"]), None


def in_a_row(layers, stacks, h_BTD, source_BTD, rest):
    stats = []
    for r in range(R):
        for layer, count, stack in zip(layers, COUNTS, stacks, strict=True):
            for n in range(count):
                h_BTD, stat = layer(
                    jax.tree.map(lambda x, r=r, n=n: x[r, n], stack), h_BTD, source_BTD, rest
                )
                stats += [] if stat is None else [stat["mean"]]
    return h_BTD, jnp.stack(stats)


def toy():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    stacks = {"w": draw(R, 1, D, D)}, {"w": draw(R, 2, D, D), "b": draw(R, 2, D)}
    rest = draw(T, D), jnp.asarray(rng.integers(0, T, T), jnp.int32)
    return stacks, draw(B, T, D), draw(B, T, D), rest


@pytest.mark.parametrize("run", [scan_layers, layers_in_a_row])
def test_values_and_gradients_are_those_of_the_plain_loop(x64, monkeypatch, run):
    unwritten.show(monkeypatch)
    monkeypatch.setattr(platform, "on_one_device", lambda: True)
    monkeypatch.setattr(platform, "compiled_for", lambda: "gpu")
    layers = first, second
    stacks, h_BTD, source_BTD, rest = toy()
    weight_BTD = jnp.cos(h_BTD)

    def loss(run):
        def scalar(stacks, h_BTD, source_BTD):
            h_BTD, stats = run(layers, stacks, h_BTD, source_BTD, rest)
            return jnp.sum(weight_BTD * h_BTD), (h_BTD, stats)

        return jit(jax.value_and_grad(scalar, (0, 1, 2), has_aux=True))(stacks, h_BTD, source_BTD)

    (_, (got, stats)), gradients = loss(run)
    (_, (expected, means)), wanted = loss(in_a_row)
    assert relative_rms(got, expected) < 1e-13
    assert stats[1] is None
    np.testing.assert_allclose(stats[0]["mean"].reshape(-1), means, rtol=1e-12)
    for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype
        assert relative_rms(x, y) < 1e-13
    # one repeat, and outside of jit: a run of one layer is then no loop
    one = jax.tree.map(lambda x: x[:1], stacks)
    single = jax.grad(lambda one: jnp.sum(run(layers, one, h_BTD, source_BTD, rest)[0]))
    for x, y in zip(jax.tree.leaves(single(one)), jax.tree.leaves(jit(single)(one)), strict=True):
        assert relative_rms(x, y) < 1e-13
    without_gradient, _ = jit(lambda *args: run(layers, *args))(stacks, h_BTD, source_BTD, rest)
    np.testing.assert_allclose(without_gradient, got, rtol=1e-13)


# ---------------------------------------------------------------------------------------- the model


def gradient(model, ids, **options):
    """Loss, stats and gradients; the loss weighs every output differently."""

    def loss(model):
        h_BTD, _, stats = model.hidden(ids, **options)
        return jnp.sum(
            jnp.sin(jnp.arange(h_BTD.size, dtype=h_BTD.dtype)).reshape(h_BTD.shape) * h_BTD
        ), stats

    return jit(jax.value_and_grad(loss, has_aux=True))(model)


@pytest.mark.parametrize("changes", [{}, EMBED], ids=["hidden", "embed"])
def test_gradients_are_those_of_layer_after_layer(monkeypatch, x64, changes):
    model, ids = make(config(**SEVEN | changes), remat_save=None), tokens(2, 11)
    assert [[run.count for run in group.pattern] for group in model.groups] == [[1, 2], [1]]
    segment_ids = jnp.asarray([[1] * 8 + [2] * 3, [1] * 4 + [2] * 4 + [0] * 3], jnp.int32)
    with monkeypatch.context() as patch:
        patch.setattr(
            "ttt_jax.model.transformer.find_groups",
            lambda kinds: [((LayerRun(kind, 1),), 1) for kind in kinds],
        )
        (wanted_value, wanted_stats), wanted = gradient(
            transplant(model, model.config), ids, segment_ids=segment_ids
        )
    for save, unroll in (
        ((None, False), (REMAT_NAMES, False)) if changes else (((), False), ((), True))
    ):
        one = transplant(model, model.config, remat_save=save, unroll_layers=unroll)
        (value, stats), got = gradient(one, ids, segment_ids=segment_ids)
        np.testing.assert_allclose(value, wanted_value, rtol=1e-12)
        assert set(stats) == set(wanted_stats) == {0, 3, 6}
        for layer, values in wanted_stats.items():
            for name, x in values.items():
                np.testing.assert_allclose(stats[layer][name], x, rtol=1e-10)
        expected = transplant(wanted, model.config, remat_save=save, unroll_layers=unroll)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert np.asarray(y).any()
            assert relative_rms(x, y) < 1e-11


def test_without_loops_nothing_is_stacked_and_what_is_computed_again_stays_so():
    """A step has no loop, nothing of a layer in a stack, and a barrier for each layer that is
    computed again: without, the compiler would keep what the first time made.
    """
    plain, ids = config(**SEVEN | {"ttt.layers": ()}), jax.ShapeDtypeStruct((3, 8), jnp.int32)
    gradient = jax.jit(jax.grad(lambda model, ids: jnp.sum(model.hidden(ids)[0])))
    looped, text = (
        gradient.lower(abstract(plain, remat_save=(), unroll_layers=unroll), ids).as_text()
        for unroll in (False, True)
    )
    kept = f"7x3x8x{plain.d_model}x"  # inputs of layers
    assert (looped.count("stablehlo.while"), text.count("stablehlo.while")) == (2, 0)
    assert kept in looped
    assert kept not in text
    barriers = [x.count("stablehlo.optimization_barrier") for x in (looped, text)]
    assert barriers[1] - barriers[0] == plain.num_layers


def test_without_loops_the_rate_may_be_traced(x64):
    """As `optimizer.ttt_drop` trains."""
    looped, ids = make(config(**SEVEN), remat_save=()), tokens(2, 11)
    unrolled = transplant(looped, looped.config, remat_save=(), unroll_layers=True)

    def of(model, rate):
        loss = lambda model: jnp.mean(jnp.sin(model.hidden(ids, ttt_scale=rate)[0]))
        return jax.grad(loss)(model)

    rate = jnp.asarray(0.5)
    loops = lambda run, *args: jax.jit(run).lower(*args).as_text().count("stablehlo.while")
    fixed = loops(lambda model: of(model, 0.5), unrolled)  # those over chunks
    assert loops(of, unrolled, rate) == fixed < loops(of, looped, rate)
    wanted, got = (jax.jit(of)(model, rate) for model in (looped, unrolled))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert relative_rms(x, y) < 1e-11


@pytest.fixture
def saved(monkeypatch):
    """What each kind of layer keeps for the backward: shapes and dtypes."""
    seen = []

    def spy(*args):
        out = _linearize(*args)
        seen.append([(x.shape, x.dtype) for x in out[3].saved(out[2])])
        return out

    monkeypatch.setattr("ttt_jax.model.layer_scan._linearize", spy)

    def run(model):
        ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)
        loss = lambda model, ids: jnp.sum(model.hidden(ids)[0]).astype(jnp.float32)
        jax.eval_shape(jax.grad(loss), model, ids)
        return seen

    return run


@pytest.mark.parametrize(("save", "kept"), [((), ["h"]), (("ttt_target",), ["h", "v"])])
def test_parameters_and_what_all_layers_share_are_not_saved_with_a_layer(saved, save, kept):
    """Only what differs from layer to layer and is not at hand in the backward is kept: its input,
    and what was named.
    """
    model = abstract(config(**SEVEN), remat_save=save, dtype="bfloat16")
    seen = saved(model)
    D = model.config.d_model
    assert [((2, 8, D), jnp.bfloat16)] * len(kept) in seen  # the TTT layer
    assert all(shape == (2, 8, D) for leaves in seen for shape, _ in leaves)
    assert max(len(leaves) for leaves in seen) == len(kept)


def test_targets_are_kept_once(saved):
    """Of a ridge write: its targets, which its gradient reads too, and the inverse's two terms."""
    options = {"remat_save": ("ttt_target",), "dtype": "bfloat16"}
    model = abstract(config(**SEVEN, **{"ttt.write": "ridge"}), **options)
    seen = saved(model)
    C, D = model.config.ttt.chunk_size, model.config.d_model
    sizes = [[math.prod(shape) for shape, _ in leaves] for leaves in seen]
    assert sorted([2 * 8 * D] * 2 + [2 * 8 * C] * 2) in map(sorted, sizes)
    assert max(map(len, sizes)) == 4


def test_no_stack_is_cut_into_repeats():
    """An array of one repeat's two plain layers would be a copy out of, or into, a stack of two
    repeats.
    """
    model = abstract(config(**SEVEN), remat_save=())
    ids = jax.ShapeDtypeStruct((3, 8), jnp.int32)
    text = (
        jax.jit(jax.grad(lambda model, ids: jnp.sum(model.hidden(ids)[0])))
        .lower(model, ids)
        .as_text()
    )
    D, F = model.config.d_model, model.config.d_ff
    shapes = set(re.findall(r"tensor<([\dx]+)xf32>", text))
    assert f"2x2x{D}x{F}" in shapes
    assert f"2x2x3x8x{D}" in shapes  # inputs kept for the backward
    cut = [
        f"{one}{shape}"
        for one in ("", "1x")
        for shape in (f"2x{D}x{F}", f"2x{F}x{D}", f"2x3x8x{D}")
    ]
    assert not shapes & set(cut)
