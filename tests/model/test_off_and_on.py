"""A stream that is read with TTT off for a while, in the middle of chunks."""

import jax
import numpy as np
import pytest
from support.models import (
    CAP,
    EMBED,
    ERRORS,
    RIDGE,
    C,
    assert_same_state,
    config,
    make,
    run,
    tokens,
)
from support.tolerance import relative_rms

from ttt_jax.errors import UserError
from ttt_jax.model.layers import Context
from ttt_jax.model.transformer import Transformer

ONE = {"num_layers": 1, "ttt.layers": (0,)}
# Tokens and the factor of each reading: the second chunk ends while TTT is off, the third one has
# tokens of both kinds, the fourth one waits.
PARTS = [(5, 1.0), (5, 0.0), (4, 1.0)]
# Chunks that are written, and which of their tokens were read with TTT on.
WRITTEN = [(slice(0, 4), [1, 1, 1, 1]), (slice(8, 12), [0, 0, 1, 1])]
TARGETS = {"hidden": {}, "embeddings": EMBED, "errors": ERRORS | RIDGE}


def read(model, ids, parts):
    """Logits and state of a stream that is read in parts."""
    state, logits, at = None, [], 0
    for length, scale in parts:
        options = {"capacity": ids.shape[1]} if state is None else {}
        got, state = run(model, ids[:, at : at + length], state, ttt_scale=scale, **options)
        logits, at = [*logits, np.asarray(got)], at + length
    return np.concatenate(logits, axis=1), state


@pytest.mark.parametrize("changes", TARGETS.values(), ids=TARGETS)
def test_tokens_that_are_read_with_ttt_off_write_nothing(x64, changes):
    """S is the sum over the other tokens, whose targets see all of them. The oracle's keys and
    sources are those of a stream of one long chunk.
    """
    changes = ONE | CAP | changes | {"ttt.decay": 1.0}
    model, ids = make(config(**changes)), tokens(2, 14)
    _, state = read(model, ids, PARTS)
    _, long = read(make(config(**changes | {"ttt.chunk_size": 16})), ids, [(14, 1.0)])
    whole, mlp = only(long), jax.tree.map(lambda x: x[0, 0], model.groups[0].blocks[0].mlp)
    head = jax.jit(Transformer._head)(model, ids)
    ctx, S_BDF = Context((ids, ids), None, None, None, ids, head), np.zeros(only(state).S_BDF.shape)
    for chunk, on_C in WRITTEN:
        keys_BCF = whole.z_BCF[:, chunk] * np.array(on_C, float)[None, :, None]
        v_BCD = jax.jit(lambda z, x: mlp.targets(z, x, ctx))(keys_BCF, whole.source_BCX[:, chunk])
        S_BDF += model.config.ttt.lr * np.einsum("bcd,bcf->bdf", v_BCD, keys_BCF)
    assert relative_rms(only(state).S_BDF, S_BDF) < 1e-12


def only(state):
    return jax.tree.map(lambda x: x[0, 0], state.layers[0][0].ttt)


def test_any_division_gives_the_same(x64):
    """Two TTT layers; pieces, and token by token."""
    model, ids = make(config(**RIDGE)), tokens(2, 14)
    logits, state = read(model, ids, PARTS)
    plain, _ = read(model, ids, [(5, 1.0), (9, 0.0)])
    np.testing.assert_allclose(plain[:, :10], logits[:, :10], rtol=0, atol=1e-12)
    pieces = [(4, 1.0), (1, 1.0), (2, 0.0), (3, 0.0), (3, 1.0), (1, 1.0)]
    for parts in (pieces, [(1, scale) for n, scale in PARTS for _ in range(n)]):
        other, end = read(model, ids, parts)
        np.testing.assert_allclose(other, logits, rtol=0, atol=1e-12)
        assert_same_state(end, state)


def test_a_stream_that_was_begun_with_ttt_off_has_no_chunk_to_go_on_with():
    model, ids = make(config(**ONE), "float32"), tokens(1, 3)
    _, state = run(model, ids, capacity=8, ttt_scale=0.0)
    with pytest.raises(UserError, match="state: was begun with TTT off"):
        model(ids, state)
    options = {"keep_state": True, "at_chunk_start": True}
    _, state, _ = jax.jit(lambda m, ids, s: m.hidden(ids, s, **options))(model, ids[:, :1], state)
    assert state.layers[0][0].ttt is not None


@pytest.mark.parametrize("zero", [0, False, np.float32(0)])
def test_a_number_of_zero_switches_ttt_off_whatever_its_kind(zero):
    """An array of zero applies the fast weights."""
    model, ids = make(config(**ONE), "float32"), tokens(1, 2 * C)
    _, state = run(model, ids, capacity=4 * C)
    got, off = (run(model, ids, state, ttt_scale=scale)[0] for scale in (zero, 0.0))
    np.testing.assert_array_equal(got, off)
    frozen, _ = model(ids, state, ttt_scale=jax.numpy.zeros(()))
    assert relative_rms(frozen, off) > 1e-3
