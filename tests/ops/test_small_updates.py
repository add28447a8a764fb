"""bf16 against float64 over ||S|| / ||W||: prefill, pieces of chunks and single tokens
(docs/numerics.md).

B batch, T tokens, D model width, F MLP width, C chunk size, S accumulated update of the fast
weight.

Three things are asked of each way of reading. The adaptation term o - z W^T, read with W = 0, and
the state are within 5e-3 of float64. And with W in place the output is *rounded once*: nearly every
element is the bf16 number nearest to the exact one. A second rounding on the way, of the fast
product or of S, costs about as much as the output's own and hides in a relative error; here it
moves a third of all elements.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from support.op_checks import make_inputs, results, rounded
from support.tolerance import TOLERANCE, assert_close

from ttt_jax.kernels_pallas import tpu
from ttt_jax.ops import in_place_ttt

RATIOS = [1e-6, 1e-4, 1e-2, 0.3, 1.0, 3.0]
B, T, D, F, C = 1, 96, 32, 48, 16
ROUNDED_ONCE = 0.02  # share of elements that a float32 sum may leave on the other side of a tie
op = functools.partial(in_place_ttt, lr=0.7, chunk_size=C)
run = jit(functools.partial(op, implementation="xla"))


def bf16(x):
    """The nearest bf16 numbers, in float64."""
    return np.asarray(jnp.asarray(np.asarray(x, np.float32), jnp.bfloat16), np.float64)


def scaled_inputs(ratio):
    """z, v, W, S in float64, all bf16 numbers; ||S|| = ratio ||W||, and the updates grow it by a
    half.
    """
    (z, v, w, _, state), _ = make_inputs(B=B, T=T, D=D, F=F, seed=3)
    state = bf16(state * ratio * np.linalg.norm(w) / np.linalg.norm(state))
    z, w = bf16(z), bf16(w)
    written = 0.7 * np.einsum("btd,btf->bdf", v, z)
    return z, bf16(v * 0.5 * np.linalg.norm(state) / np.linalg.norm(written)), w, state


def prefill(z, v, w, S):
    return run(z, v, w, state=S)


def pieces(z, v, w, S):
    """Two chunks, one, then the rest."""
    outs = []
    for cut in (slice(0, 2 * C), slice(2 * C, 3 * C), slice(3 * C, T)):
        o, S = run(z[:, cut], v[:, cut], w, state=S)
        outs.append(o)
    return jnp.concatenate(outs, 1), S


def tokens(z, v, w, S):
    """As the MLP decodes: a token reads, and the last one of a chunk writes the whole chunk."""
    outs = []
    for t in range(T):
        outs.append(run(z[:, t : t + 1], v[:, t : t + 1], w, state=S)[0])
        if t % C == C - 1:
            chunk = slice(t + 1 - C, t + 1)
            S = run(z[:, chunk], v[:, chunk], w, state=S)[1]
    return jnp.concatenate(outs, 1), S


WAYS = {"prefill": prefill, "pieces": pieces, "tokens": tokens}


def exact(z, v, w, S):
    """o, z S^T and the final S, chunk by chunk in float64."""
    outs, terms = [], []
    for start in range(0, T, C):
        chunk = slice(start, start + C)
        terms.append(np.einsum("btf,bdf->btd", z[:, chunk], S))
        outs.append(np.einsum("btf,df->btd", z[:, chunk], w) + terms[-1])
        S = S + 0.7 * np.einsum("btd,btf->bdf", v[:, chunk], z[:, chunk])
    return np.concatenate(outs, 1), np.concatenate(terms, 1), S


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_adaptation_term_and_the_state(way, ratio):
    z, v, w, S = scaled_inputs(ratio)
    o, term, final = exact(z, v, w, S)
    z16, v16, w16 = (jnp.asarray(x, jnp.bfloat16) for x in (z, v, w))
    S32 = jnp.asarray(S, jnp.float32)
    alone, got_final = WAYS[way](z16, v16, jnp.zeros_like(w16), S32)
    assert got_final.dtype == jnp.float32
    assert_close("adaptation term", np.asarray(alone, np.float64), term, TOLERANCE["bfloat16"])
    assert_close("state", np.asarray(got_final, np.float64), final, TOLERANCE["bfloat16"])
    written, got_written = final - S, np.asarray(got_final, np.float64) - S
    assert_close("what was written", got_written, written, TOLERANCE["bfloat16"])
    whole, _ = WAYS[way](z16, v16, w16, S32)
    assert_close("output", np.asarray(whole, np.float64), o, TOLERANCE["bfloat16"])


@pytest.mark.parametrize(
    ("implementation", "ratio"), [*(("xla", ratio) for ratio in RATIOS), ("pallas_tpu", 0.3)]
)
def test_a_chunk_rounds_its_output_once(implementation, ratio):
    """S is bf16 already, so its bf16 copy costs nothing: the two products are added in float32."""
    z, v, w, S = scaled_inputs(ratio)
    o = np.einsum("btf,bdf->btd", z, w[None] + S)
    z16, v16, w16 = (jnp.asarray(x, jnp.bfloat16) for x in (z, 0 * v, w))  # nothing is written
    for end in (T, T - 3):  # whole chunks, and a trailing part of one
        with tpu.interpreted():
            arrays = z16[:, :end], v16[:, :end], w16
            got, _ = op(*arrays, state=jnp.asarray(S, jnp.float32), implementation=implementation)
        assert np.mean(np.asarray(got, np.float64) != bf16(o[:, :end])) <= ROUNDED_ONCE


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_token_reads_the_state_in_float32(ratio):
    """S as it is after some updates, no bf16 numbers: at decoding it is not rounded at all."""
    z, v, w, S = scaled_inputs(ratio)
    S = np.asarray(exact(z, v, w, S)[2], np.float32).astype(np.float64)
    o = np.einsum("btf,bdf->btd", z, w[None] + S)
    z16, v16, w16 = (jnp.asarray(x, jnp.bfloat16) for x in (z, v, w))
    S32 = jnp.asarray(S, jnp.float32)
    got = [run(z16[:, t : t + 1], v16[:, t : t + 1], w16, state=S32)[0] for t in range(T)]
    assert np.mean(np.asarray(jnp.concatenate(got, 1), np.float64) != bf16(o)) <= ROUNDED_ONCE


def test_an_initial_state_is_not_rounded():
    """A stream is read on from a float32 state under bf16: what is not written stays bit for
    bit.
    """
    (z, v, w, _, state), _ = make_inputs(T=2 * C, D=D, F=F)
    z, v, w = (jnp.asarray(x, jnp.bfloat16) for x in (z, 0 * v, w))
    state = jnp.asarray(state, jnp.float32)
    for implementation in ("reference", "xla"):
        got = in_place_ttt(
            z, v, w, lr=0.7, chunk_size=C, state=state, implementation=implementation
        )[1]
        np.testing.assert_array_equal(got, state)


def test_the_inner_rate_is_not_rounded():
    """No result is off by a factor; 0.7012 as a bf16 number would be 0.703125, 0.3 % more.

    The part along the exact result: the rounding of many elements, each its own way, does not reach
    it.
    """
    arguments, cotangents = make_inputs(B=2, T=64, D=D, F=F)
    arguments = (*arguments[:3], 0.7012, arguments[4])
    options = {"chunk_size": 8}
    with jax.enable_x64(True):
        arguments, cotangents = rounded(arguments, cotangents, jnp.bfloat16)
        oracle = results(arguments, cotangents, jnp.float64, implementation="reference", **options)
    got = results(arguments, cotangents, jnp.bfloat16, implementation="xla", **options)
    del got["dlr"]  # one number, a sum that cancels
    for name, value in got.items():
        along = np.vdot(value, oracle[name]) / np.vdot(oracle[name], oracle[name])
        assert abs(along - 1) < 5e-4, (name, along)


def test_float32_products_ask_for_float32():
    """On TPUs, and on GPUs with tf32, a float32 product without a precision is made of bf16 or tf32
    ones.
    """
    (z, v, w, lr, state), (do, dS) = jax.tree.map(jnp.float32, make_inputs(T=20))

    def both(z, v, w, lr, state):
        op = functools.partial(
            in_place_ttt, chunk_size=8, clip_norm=0.5, segment_ids=jnp.ones((2, 20), jnp.int32)
        )
        out, pull = jax.vjp(
            lambda z, v, w, lr, state: op(z, v, w, lr=lr, state=state), z, v, w, lr, state
        )
        return out, pull((do, dS))

    products = re.findall(
        r"= dot_general\[(.*?)\n *\]", str(jax.make_jaxpr(both)(z, v, w, lr, state)), re.DOTALL
    )
    assert len(products) >= 8
    for product in products:
        assert "precision=(Precision.HIGHEST, Precision.HIGHEST)" in product, product
