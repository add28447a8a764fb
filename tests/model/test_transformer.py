"""The whole model on tiny sizes: causality, a stream in any pieces, packed documents,
rematerialisation, program size.

Exactness is tested in float64. Parameters are large enough for the fast weights to matter (asserted
where it counts).
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from support.awake import new_target
from support.models import (
    BASE,
    CAP,
    EMBED,
    ERRORS,
    LAST_ERRORS,
    RIDGE,
    WINDOW,
    C,
    abstract,
    assert_same_state,
    config,
    make,
    run,
    tokens,
    transplant,
    without_ttt,
)
from support.tolerance import relative_rms

from ttt_jax.errors import UserError
from ttt_jax.model import ttt_mlp as ttt
from ttt_jax.model.param_path import param_path
from ttt_jax.model.transformer import Transformer

# ---------------------------------------------------------------------------------------- causality


@pytest.mark.parametrize(
    "changes",
    [{}, {"sliding_window": 2, **EMBED}, RIDGE],
    ids=["hidden", "embed, window", "ridge"],
)
def test_future_tokens_have_no_gradient(changes, x64):
    """Every token has its own embedding row, so d output_t / d row_s is the influence of token s on
    token t.
    """
    T = 14
    model = make(config(vocab_size=T, tie_embeddings=False, **changes))
    probe = jnp.asarray(np.random.default_rng(5).standard_normal(model.config.d_model))

    def outputs(rows, model):
        model = jax.tree_util.tree_map_with_path(
            lambda p, x: rows if param_path(p) == "embed" else x, model
        )
        return model.hidden(jnp.arange(T, dtype=jnp.int32)[None])[0][0] @ probe

    influence = jnp.abs(jit(jax.jacrev(outputs))(model.embed[...], model)).sum(-1)
    t, s = np.mgrid[:T, :T]
    assert (influence[s > t] == 0).all(), "exactly"
    assert (influence[s == t] > 0).all()
    assert (influence[(s < t) & (s // C < t // C)] > 0).all(), "every earlier chunk is remembered"
    # four layers of windows of two reach four tokens back, fast weights all the way
    if model.config.sliding_window:
        plain = jnp.abs(jit(jax.jacrev(outputs))(model.embed[...], without_ttt(model))).sum(-1)
        assert (plain[t - s > 4] == 0).all()


# ------------------------------------------------------------------------------- one stream, pieces

STREAMS = {
    "hidden": {},
    "embed, window shorter than pieces": EMBED | WINDOW,
    "window longer than pieces, clipped": {"sliding_window": 18, "ttt.clip_norm": 0.5},
    "ridge, embed, window": EMBED | WINDOW | RIDGE,
    "errors, ridge, window": ERRORS | WINDOW | RIDGE,
    "errors in the last layer, own head": LAST_ERRORS
    | CAP
    | {"tie_embeddings": False, "mlp_bias": True},
    "biases, no projection": {
        "ttt.layers": (0, 1),
        "qkv_bias": True,
        "mlp_bias": True,
        "ttt.proj": False,
    },
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_in_any_pieces_equals_the_whole(name, x64):
    """All at once, in uneven pieces, and token by token: same logits, same final state."""
    T, capacity = 26, 32
    model, ids = make(config(**STREAMS[name])), tokens(2, T)
    whole, final = run(model, ids, capacity=capacity)
    for group, layers, _ in model.ttt_runs():
        S, down = final.layers[group][layers].ttt.S_BDF, model.groups[group].blocks[layers].mlp.down
        assert jnp.linalg.norm(S) > 0.1 * jnp.linalg.norm(down[...]), "fast weights matter"

    logits, state, start = [], None, 0
    # the second piece ends with a chunk that the first began
    for size in (5, 7, 1, 1, 1, 7, 1, 1, 1, 1):
        piece, state = run(
            model, ids[:, start : start + size], state, capacity=None if state else capacity
        )
        logits.append(piece)
        start += size
    np.testing.assert_allclose(jnp.concatenate(logits, 1), whole, rtol=0, atol=1e-12)
    assert_same_state(state, final)

    logits, state = [], model.init_state(2, capacity)
    for t in range(T):
        token, state = run(model, ids[:, t : t + 1], state)
        logits.append(token)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), whole, rtol=0, atol=1e-12)
    assert_same_state(state, final)


def test_chunks_of_one_token(x64):
    """Every token is a whole chunk: the update of a token reaches the next one."""
    model, ids = make(config(**{"ttt.chunk_size": 1})), tokens(1, 7)
    whole, final = run(model, ids, capacity=8)
    logits, state = [], model.init_state(1, 8)
    for size in (1, 1, 3, 1, 1):
        start = int(state.position_B[0])
        piece, state = run(model, ids[:, start : start + size], state)
        logits.append(piece)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), whole, rtol=0, atol=1e-12)
    assert_same_state(state, final, chunk=1)


def test_growing_caches(x64):
    """Without a capacity, `model(ids, state)` as a user calls it: full caches grow, rings do
    not.
    """
    model, ids = make(config(**EMBED | WINDOW)), tokens(2, 15)
    whole, final = run(model, ids)
    step = jit(lambda model, ids, state: model(ids, state))
    logits, state, start = [], None, 0
    for size in (3, 11, 1):
        piece, state = step(model, ids[:, start : start + size], state)
        logits.append(piece)
        start += size
    np.testing.assert_allclose(jnp.concatenate(logits, 1), whole, rtol=0, atol=1e-12)
    assert_same_state(state, final)


@pytest.mark.parametrize(
    "changes",
    [EMBED, WINDOW | {"ttt.decay": 0.8}, ERRORS | RIDGE],
    ids=["full", "window, decay", "errors"],
)
def test_rows_of_different_lengths_continue_as_each_alone(changes, x64):
    """Padded prompts, a padded piece, single tokens with and without lengths; what lies in the
    padding is noise.
    """
    model, B, capacity = make(config(**changes)), 3, 32
    streams = np.asarray(tokens(B, 24, seed=3))
    # causal: a prefix of it is the row's own prefix
    whole = np.asarray(run(model, jnp.asarray(streams))[0])
    position, state = np.zeros(B, int), None
    # Rows end up just before, on and after the end of a chunk; the last tokens complete one in a
    # single row.
    for T, lengths in [
        (12, (7, 12, 3)),
        (8, (4, 0, 8)),
        (1, (0, 0, 1)),
        (1, None),
        (1, None),
        (1, None),
    ]:
        real = np.full(B, T) if lengths is None else np.array(lengths)
        piece = np.asarray(tokens(B, T, seed=9)).copy()
        for b in range(B):
            piece[b, : real[b]] = streams[b, position[b] : position[b] + real[b]]
        lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
        logits, state = run(
            model, jnp.asarray(piece), state, lengths, capacity=None if state else capacity
        )
        for b in range(B):
            expected = whole[b, position[b] : position[b] + real[b]]
            np.testing.assert_allclose(logits[b, : real[b]], expected, rtol=0, atol=1e-12)
        position += real
        np.testing.assert_array_equal(state.position_B, position)


@pytest.mark.parametrize("T", [C - 1, C, 3 * C])
def test_lengths_around_the_chunk(T, x64):
    """A shorter row is the beginning of a longer one; the first chunk reads the pretrained weights
    alone.
    """
    model, ids = make(config()), tokens(1, 3 * C + 2)
    whole = run(model, ids)[0]
    got = run(model, ids[:, :T])[0]
    np.testing.assert_allclose(got, whole[:, :T], rtol=0, atol=1e-12)
    plain = run(without_ttt(model), ids)[0]
    np.testing.assert_allclose(got[:, :C], plain[:, : min(T, C)], rtol=0, atol=1e-12)
    if T > C:
        assert relative_rms(got[:, C:], plain[:, C:T]) > 1e-3


def test_rows_of_a_batch_are_independent(x64):
    model, ids = make(config(**EMBED | WINDOW)), tokens(3, 15)
    together = run(model, ids)[0]
    for b in range(3):
        np.testing.assert_allclose(
            run(model, ids[b : b + 1])[0], together[b : b + 1], rtol=0, atol=1e-12
        )


# ------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize(
    "changes",
    [{}, {"ttt.clip_norm": 0.3} | EMBED | WINDOW, RIDGE, ERRORS | WINDOW | CAP],
    ids=["plain", "everything", "ridge", "errors"],
)
def test_packed_documents_equal_each_document_alone(changes, x64):
    """Values, and gradients of every parameter; documents start on chunks, padding fills the last
    chunk of each.
    """
    model = make(config(**changes))
    rows = [[7, 8, 5], [12, 0, 6]]  # document lengths; 0 is a chunk of padding
    longest = 12
    documents = np.asarray(tokens(5, longest, seed=4))
    ids, segments, positions = (np.zeros((2, 24), np.int32) for _ in range(3))
    ids[:] = tokens(2, 24, seed=8)  # padding holds any token
    places, number = [], 0
    for b, lengths in enumerate(rows):
        start = 0
        for length in lengths:
            if length:
                here = slice(start, start + length)
                ids[b, here] = documents[number, :length]
                segments[b, here], positions[b, here] = number + 1, np.arange(length)
                places.append((b, start, length))
                number += 1
            start += max(-(-length // C), 1) * C
    probe = np.random.default_rng(6).standard_normal((5, longest, BASE.d_model))
    packed_probe, alone_probe = np.zeros((2, 24, BASE.d_model)), np.zeros_like(probe)
    for d, (b, start, length) in enumerate(places):
        packed_probe[b, start : start + length] = alone_probe[d, :length] = probe[d, :length]

    def outputs(model, ids, probe, **options):
        h = model.hidden(ids, **options)[0]
        return jnp.sum(h * probe), h

    run = jit(jax.grad(outputs, has_aux=True))
    options = {"segment_ids": jnp.asarray(segments), "positions": jnp.asarray(positions)}
    grads, packed = run(model, jnp.asarray(ids), jnp.asarray(packed_probe), **options)
    # Alone, documents are padded on the right to one length: causality keeps that out of what is
    # compared.
    alone_grads, alone = run(model, jnp.asarray(documents), jnp.asarray(alone_probe))
    for d, (b, start, length) in enumerate(places):
        np.testing.assert_allclose(
            packed[b, start : start + length], alone[d, :length], rtol=0, atol=1e-12
        )
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(grads)[0], jax.tree.leaves(alone_grads), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-10, err_msg=param_path(path))
        assert np.asarray(y).any(), param_path(path)


def test_packed_rows_start_fresh():
    model = abstract(config())
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    state = jax.eval_shape(lambda model: model.init_state(1, 8), model)
    with pytest.raises(UserError, match="packed rows start fresh"):
        jax.eval_shape(lambda m, i, s: m.hidden(i, s, segment_ids=i), model, ids, state)


# ------------------------------------------------------------------------------------- TTT switched


def test_scale_zero_is_the_model_without_ttt(x64):
    model, ids = make(config(**WINDOW)), tokens(2, 14)
    plain, _ = run(without_ttt(model), ids)
    off, state = run(model, ids[:, :9], capacity=16, ttt_scale=0.0)
    later, _ = run(model, ids[:, 9:], state, ttt_scale=0.0)
    np.testing.assert_allclose(jnp.concatenate([off, later], 1), plain, rtol=0, atol=1e-12)
    on = run(model, ids)[0]
    assert relative_rms(on[:, 2 * C :], plain[:, 2 * C :]) > 1e-2
    half = run(model, ids, ttt_scale=0.5)[0]
    lower = run(transplant(model, config(**WINDOW, **{"ttt.lr": 0.25})), ids)[0]
    np.testing.assert_allclose(half, lower, rtol=0, atol=1e-12)


def test_a_tiny_clip_norm_leaves_the_plain_model(x64):
    model, ids = make(config(**{"ttt.clip_norm": 1e-13})), tokens(1, 13)
    np.testing.assert_allclose(
        run(model, ids)[0], run(without_ttt(model), ids)[0], rtol=0, atol=1e-11
    )
    bounded = make(config(**{"ttt.clip_norm": 0.05}))
    S = run(bounded, ids)[1].layers[0][1].ttt.S_BDF
    norms = np.linalg.norm(np.asarray(S), axis=(-2, -1))
    assert (norms <= 3 * 0.05 + 1e-12).all()  # three chunks
    assert (norms > 0.01).all()


# ----------------------------------------------------------------------------------- dtypes, shapes


def test_bfloat16_stays_close_to_float32():
    single, ids = make(config(**EMBED | WINDOW), "float32"), tokens(2, 19)
    half = jax.tree.unflatten(
        jax.tree.structure(abstract(single.config, dtype="bfloat16")), jax.tree.leaves(single)
    )
    (x, state), (y, _) = run(half, ids), run(single, ids)
    assert x.dtype == y.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half)), (
        "parameters stay float32"
    )
    slots = state.layers[0][1]
    assert (slots.ttt.S_BDF.dtype, slots.ttt.z_BCF.dtype, slots.cache.k_BKLH.dtype) == (
        jnp.float32,
        jnp.bfloat16,
        jnp.bfloat16,
    )
    assert 1e-4 < relative_rms(x, y) < 3e-2


def test_a_new_model_starts_as_if_it_had_no_fast_weights(monkeypatch):
    """The paper's appendix: the convolution is zero and W_target diagonal, from scratch too."""
    monkeypatch.setattr(ttt, "initial_target", new_target)
    cfg = config(d_model=64, init_std=0.05)
    model = jit(lambda key: Transformer(cfg, key=key))(jax.random.key(0))
    target = model.groups[0].blocks[-1].mlp.target
    assert not np.asarray(target.conv[...]).any()
    for proj in np.asarray(target.proj[...]).reshape(-1, 64, 64):
        np.testing.assert_array_equal(proj, np.diag(np.diag(proj)))
        assert np.diag(proj).std() == pytest.approx(0.05, rel=0.3)
        assert np.diag(proj).all()
    ids = tokens(1, 3 * C)
    np.testing.assert_array_equal(run(model, ids)[0], run(without_ttt(model), ids)[0])


def test_initialisation():
    """The abstract model has the real one's shapes and dtypes; scales are ones, embeddings have the
    stated spread.
    """
    cfg = config(
        num_layers=3, d_model=64, vocab_size=200, tie_embeddings=False, **{"ttt.layers": (1,)}
    )
    model = jit(lambda key: Transformer(cfg, key=key))(jax.random.key(0))
    jax.tree.map(
        lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)),
        model,
        abstract(cfg),
    )
    for path, x in jax.tree_util.tree_flatten_with_path(model)[0]:
        assert x.dtype == jnp.float32
        if param_path(path).endswith("scale"):
            np.testing.assert_array_equal(x, np.ones(x.shape))
    assert float(model.embed[...].std()) == pytest.approx(0.02, rel=0.05)
    assert (model.embed[...] != model.head[...]).any()
    groups = [
        np.asarray(block.attention.q[...]) for group in model.groups for block in group.blocks
    ]
    layers = [layer for stack in groups for layer in stack]
    assert len(layers) == 3
    assert len({layer.tobytes() for layer in layers}) == 3, "every layer draws its own"


def test_capacity():
    """More tokens than the caches hold are refused, on a fresh start too."""
    model, ids = abstract(config()), jax.ShapeDtypeStruct((1, 9), jnp.int32)
    state = jax.eval_shape(lambda model: model.init_state(1, 8), model)
    with pytest.raises(
        UserError, match="9 tokens do not fit the state's capacity of 8; make a larger"
    ):
        jax.eval_shape(lambda model, ids, state: model(ids, state), model, ids, state)
    with pytest.raises(UserError, match="9 tokens do not fit the state's capacity of 8"):
        jax.eval_shape(lambda model, ids: model(ids, capacity=8), model, ids)


@pytest.mark.parametrize("shape", [(1, 0), (0, 4)])
def test_no_tokens_are_refused(shape):
    """By a line; the op takes them."""
    model = abstract(config())
    with pytest.raises(UserError, match=re.escape(f"ids: shape {shape}; give at least one token")):
        jax.eval_shape(lambda model: model(np.zeros(shape, np.int32)), model)


def test_empty_state_has_the_shape_of_a_read_one():
    for changes in ({}, WINDOW):
        model = abstract(config(**changes))
        empty = jax.eval_shape(lambda model: model.init_state(2, 16), model)
        read = jax.eval_shape(lambda model, ids: model(ids, capacity=16)[1], model, tokens(2, 5))
        same = jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), empty, read)
        assert all(jax.tree.leaves(same))


def test_documents_that_begin_inside_of_a_chunk_are_refused():
    """They would learn from the document before them: not as if they were alone."""
    model = make(config(), "float32")
    ids, segments = tokens(1, 3 * C), np.zeros((1, 3 * C), np.int32)
    segments[0, : C + 1], segments[0, C + 2 :] = 1, 2
    positions = jnp.arange(3 * C)[None]
    words = rf"^segment_ids: document 2 of row 0 begins at token {C + 2}; .* = {C}: pad the"
    for given in (segments, jnp.asarray(segments)):
        with pytest.raises(UserError, match=words):
            model(ids, segment_ids=given, positions=positions)
    segments[0, C + 2 : 2 * C] = 0
    jax.eval_shape(lambda: model(ids, segment_ids=segments, positions=positions))
