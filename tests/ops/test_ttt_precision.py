"""W and S in two products or in one: what is rounded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.op_checks import DOCUMENTS, DTYPES, SIZES, cases, check, make_inputs, rounded
from support.tolerance import TOLERANCE, assert_close, relative_rms

from ttt_jax.ops import in_place_ttt


@pytest.mark.parametrize(
    ("implementation", "ratio"), [*cases(1e-4, 1.0, 1e-6, 1e-2, 0.1, 3.0, fast=2)]
)
def test_a_small_update_survives_bf16(implementation, ratio):
    """The adaptation term o - z W^T under bf16, from ||S||/||W|| = 1e-6 to 3.

    The output itself is bf16, so its rounding (about 1.7e-3 of o) is subtracted out by comparing
    state and term as the op computes them: with W = 0 the output is the adaptation term alone.
    """
    (z, v, w, _, state), _ = make_inputs(B=1, T=256, D=64, F=96, seed=3, state_scale=1.0)
    state = state * ratio * np.linalg.norm(w) / np.linalg.norm(state)
    v = v * ratio * 0.1
    with jax.enable_x64(True):
        (z, v, w, lr, state), _ = rounded((z, v, w, 0.7, state), (z, state), jnp.bfloat16)
        run = functools.partial(in_place_ttt, lr=lr, chunk_size=32)
        f64 = [jnp.asarray(x, jnp.float64) for x in (z, v, w, state)]
        o, final = run(f64[0], f64[1], f64[2], state=f64[3], implementation="reference")
        term = np.asarray(o) - np.einsum("btf,df->btd", z, w)
    z16, v16, w16 = (jnp.asarray(x, jnp.bfloat16) for x in (z, v, w))
    s32 = jnp.asarray(state, jnp.float32)
    adapted, final16 = run(z16, v16, jnp.zeros_like(w16), state=s32, implementation=implementation)
    assert_close("adaptation term", np.asarray(adapted, np.float64), term, TOLERANCE["bfloat16"])
    assert_close(
        "final state", np.asarray(final16, np.float64), np.asarray(final), TOLERANCE["bfloat16"]
    )
    whole, _ = run(z16, v16, w16, state=s32, implementation=implementation)
    assert_close("output", np.asarray(whole, np.float64), np.asarray(o), TOLERANCE["bfloat16"])
    # With W in place the term is read through the output's own rounding, which is all that may be
    # added.
    seen = np.asarray(whole, np.float64) - np.einsum("btf,df->btd", z, w)
    noise = relative_rms(
        np.asarray(jnp.asarray(o, jnp.bfloat16), np.float64), np.asarray(o)
    ) * np.linalg.norm(o)
    assert np.linalg.norm(seen - term) <= 1.1 * noise + TOLERANCE["bfloat16"] * np.linalg.norm(term)


@pytest.mark.parametrize(
    ("implementation", "T", "C", "documents"),
    [*cases((41, 8, "none"), (45, 8, "padding"), (7, 8, "none"), (1, 8, "none"))],
)
def test_one_product(implementation, T, C, documents):
    """In the most precise dtype nothing is lost by adding W and S first."""
    make = DOCUMENTS[documents]
    ids = None if make is None else np.stack([make(T, C), np.ones(T, int)]).astype(np.int32)
    arguments, cotangents = make_inputs(T=T, **SIZES.get(implementation, {}))
    for fresh in (False, True):
        options = {"chunk_size": C, "segment_ids": ids, "fresh": fresh, "apply": "fused"}
        check(arguments, cotangents, DTYPES[implementation][0], implementation, **options)


def test_one_product_rounds_what_two_do_not():
    """An update of 1e-2 of W: a sixth of it is lost in bfloat16 where it is added to W first. Here
    z W^T is zero, so that the output is the adaptation term alone.
    """
    (z, v, w, _, state), _ = make_inputs(B=1, T=64, D=64, F=96, state_scale=1.0)
    z = np.concatenate([z, z], axis=2)
    w, state = (
        np.concatenate([w, -w], axis=1),
        np.concatenate([state, np.zeros_like(state)], axis=2),
    )
    state = state * 1e-2 * np.linalg.norm(w) / np.linalg.norm(state)
    z, w = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (z, w))
    exact, errors = np.einsum("btf,bdf->btd", z, state), {}
    for apply in ("split", "fused"):
        run = functools.partial(in_place_ttt, lr=0.0, chunk_size=64, apply=apply)
        arrays = (jnp.asarray(x, jnp.bfloat16) for x in (z, v, w))
        o, _ = run(*arrays, state=jnp.asarray(state, jnp.float32), implementation="xla")
        errors[apply] = relative_rms(np.asarray(o, np.float64), exact)
    assert errors["split"] <= TOLERANCE["bfloat16"]
    assert 0.05 < errors["fused"] < 0.5
