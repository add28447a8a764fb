"""One test base over all implementations of the op: values, final state and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_jit import jit
from tolerance import TOLERANCE, assert_close, relative_rms

from ttt_jax.errors import UserError
from ttt_jax.ops import IMPLEMENTATIONS, in_place_ttt

FAST = [name for name in IMPLEMENTATIONS if name != "reference"]
NAMES = ("z", "v", "w", "lr", "state")


def make_inputs(B=2, T=40, D=12, F=20, seed=0, state_scale=0.3):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((B, T, F))
    v = rng.standard_normal((B, T, D)) / np.sqrt(T)
    w = rng.standard_normal((D, F)) / np.sqrt(F)
    state = rng.standard_normal((B, D, F)) * state_scale / np.sqrt(F)
    do, dS = rng.standard_normal((B, T, D)), rng.standard_normal((B, D, F))
    return (z, v, w, 0.7, state), (do, dS)


@functools.cache
def compiled(**options):
    """One program per shape and option."""

    def both(arguments, cotangents, segment_ids, clip_norm):
        def run(z, v, w, lr, state):
            return in_place_ttt(z, v, w, lr=lr, state=state, segment_ids=segment_ids, clip_norm=clip_norm, **options)

        out, vjp = jax.vjp(run, *arguments)
        return out, vjp(cotangents)

    return jit(both)


def results(arguments, cotangents, dtype, segment_ids=None, clip_norm=None, **options):
    """(o, S) and the gradients of <o, do> + <S, dS> for z, v, w, lr and state, as float64 numpy."""
    z, v, w, lr, state = arguments
    acc = jnp.float64 if dtype == jnp.float64 else jnp.float32
    cast = [jnp.asarray(x, dtype) for x in (z, v, w)] + [jnp.asarray(lr, acc), jnp.asarray(state, acc)]
    do, dS = jnp.asarray(cotangents[0], dtype), jnp.asarray(cotangents[1], acc)
    out, grads = compiled(**options)(cast, (do, dS), segment_ids, clip_norm)
    named = {"o": out[0], "final_state": out[1]} | {f"d{n}": g for n, g in zip(NAMES, grads, strict=True)}
    return {name: np.asarray(x, np.float64) for name, x in named.items()}


def rounded(arguments, cotangents, dtype):
    """What the implementation under test receives, in float64: the oracle must not be charged for rounding inputs."""
    cast = lambda x: np.asarray(jnp.asarray(x, dtype), np.float64)
    z, v, w, lr, state = arguments
    lower = cast if dtype != jnp.float64 else np.float64
    single = (lambda x: np.asarray(x, np.float32).astype(np.float64)) if dtype != jnp.float64 else np.float64
    do, dS = cotangents
    return (lower(z), lower(v), lower(w), float(single(lr)), single(state)), (lower(do), single(dS))


def check(arguments, cotangents, dtype, implementation, **options):
    with jax.enable_x64(True):
        arguments, cotangents = rounded(arguments, cotangents, dtype)
        oracle = results(arguments, cotangents, jnp.float64, implementation="reference", **options)
    context = jax.enable_x64(True) if dtype == jnp.float64 else jax.enable_x64(False)
    with context:
        got = results(arguments, cotangents, dtype, implementation=implementation, **options)
    tolerance = TOLERANCE[jnp.dtype(dtype).name]
    for name, value in got.items():
        if name == "dlr":  # an inner product <v, dv> / lr, which may cancel (to zero, once every update is clipped)
            scale = np.linalg.norm(arguments[1]) * np.linalg.norm(oracle["dv"]) / max(arguments[3], 1e-2)
            assert abs(value - oracle[name]) <= tolerance * max(scale, abs(oracle[name])), name
        else:
            assert_close(name, value, oracle[name], tolerance)


DOCUMENTS = {
    "none": None,
    "boundaries": lambda T, C: np.minimum(np.arange(T) // C // 2 + 1, 3),
    "padding": lambda T, C: np.where(np.arange(T) % (3 * C) < 2 * C + C // 2, np.arange(T) // (3 * C) + 1, 0),
    "all_padding": lambda T, C: np.zeros(T, int),
}


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16], ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize(("T", "C"), [(40, 8), (41, 8), (7, 8), (8, 8), (1, 1), (5, 1), (37, 5), (64, 32)])
def test_matches_the_float64_reference(implementation, dtype, T, C):
    arguments, cotangents = make_inputs(T=T)
    check(arguments, cotangents, dtype, implementation, chunk_size=C)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("documents", ["boundaries", "padding", "all_padding"])
@pytest.mark.parametrize(("T", "C"), [(48, 8), (45, 8), (30, 5)])
def test_documents(implementation, documents, T, C):
    ids = np.stack([DOCUMENTS[documents](T, C), DOCUMENTS["boundaries"](T, C)]).astype(np.int32)
    arguments, cotangents = make_inputs(T=T)
    check(arguments, cotangents, jnp.float64, implementation, chunk_size=C, segment_ids=jnp.asarray(ids))
    check(arguments, cotangents, jnp.float32, implementation, chunk_size=C, segment_ids=jnp.asarray(ids))


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("clip_norm", [1e-6, 0.5, 2.0, 1e6])
@pytest.mark.parametrize("T", [40, 43, 5])
def test_clip(implementation, clip_norm, T):
    arguments, cotangents = make_inputs(T=T)
    check(arguments, cotangents, jnp.float64, implementation, chunk_size=8, clip_norm=clip_norm)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_clip_bounds_the_update(implementation, x64):
    (z, v, w, _, _), _ = make_inputs(T=8, B=3)
    run = functools.partial(in_place_ttt, lr=50.0, chunk_size=8, clip_norm=0.25, implementation=implementation)
    _, state = run(*map(jnp.asarray, (z, v, w)))
    np.testing.assert_allclose(np.linalg.norm(np.asarray(state), axis=(1, 2)), 0.25, rtol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_future_tokens_have_no_gradient(implementation, x64):
    """d o_t / d z_s and d v_s vanish for s > t; and v reaches no output of its own chunk."""
    T, C = 24, 8
    (z, v, w, lr, _), _ = make_inputs(B=1, T=T)
    run = lambda z, v: in_place_ttt(z, v, jnp.asarray(w), lr=lr, chunk_size=C, implementation=implementation)[0]
    dz, dv = (np.abs(np.asarray(j)).sum((0, 2, 3, 5)) for j in jax.jacrev(run, (0, 1))(jnp.asarray(z), jnp.asarray(v)))
    t, s = np.mgrid[:T, :T]
    assert (dz[s > t] == 0).all()
    assert (dz[s == t] > 0).all()
    assert (dv[s // C >= t // C] == 0).all()
    assert (dv[s // C < t // C] > 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cuts", [(8,), (16, 24), (8, 16, 24, 32)])
def test_pieces_on_chunk_boundaries_equal_the_whole(implementation, cuts, x64):
    (z, v, w, lr, state), _ = make_inputs(T=37)
    run = functools.partial(in_place_ttt, lr=lr, chunk_size=8, implementation=implementation)
    z, v, w, state = map(jnp.asarray, (z, v, w, state))
    o, final = run(z, v, w, state=state)
    pieces, start = [], 0
    for end in (*cuts, 37):
        o_piece, state = run(z[:, start:end], v[:, start:end], w, state=state)
        pieces.append(o_piece)
        start = end
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), o, rtol=0, atol=1e-14)
    np.testing.assert_allclose(state, final, rtol=0, atol=1e-14)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_batch_rows_are_independent(implementation, x64):
    (z, v, w, lr, state), _ = make_inputs(B=3, T=20)
    run = functools.partial(in_place_ttt, lr=lr, chunk_size=8, implementation=implementation)
    together = run(*map(jnp.asarray, (z, v, w)), state=jnp.asarray(state))
    for b in range(3):
        alone = run(*map(jnp.asarray, (z[b : b + 1], v[b : b + 1], w)), state=jnp.asarray(state[b : b + 1]))
        for x, y in zip(together, alone, strict=True):
            np.testing.assert_allclose(x[b : b + 1], y, rtol=0, atol=1e-14)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("ratio", [1e-6, 1e-4, 1e-2, 0.1, 1.0, 3.0])
def test_a_small_update_survives_bf16(implementation, ratio):
    """The adaptation term o - z W^T under bf16, from ||S||/||W|| = 1e-6 to 3 (DESIGN section 3).

    The output itself is bf16, so its rounding (about 1.7e-3 of o) is subtracted out by comparing state and term as the
    op computes them: with W = 0 the output is the adaptation term alone.
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
    assert_close("final state", np.asarray(final16, np.float64), np.asarray(final), TOLERANCE["bfloat16"])
    whole, _ = run(z16, v16, w16, state=s32, implementation=implementation)
    assert_close("output", np.asarray(whole, np.float64), np.asarray(o), TOLERANCE["bfloat16"])
    # With W in place the term is read through the output's own rounding, which is all that may be added.
    seen = np.asarray(whole, np.float64) - np.einsum("btf,df->btd", z, w)
    noise = relative_rms(np.asarray(jnp.asarray(o, jnp.bfloat16), np.float64), np.asarray(o)) * np.linalg.norm(o)
    assert np.linalg.norm(seen - term) <= 1.1 * noise + TOLERANCE["bfloat16"] * np.linalg.norm(term)


@pytest.mark.parametrize("implementation", FAST)
def test_backward_memory_does_not_grow_with_the_number_of_chunks(implementation):
    """Temporaries of forward + backward: bounded by a few state-sized buffers plus the outputs' own size."""
    B, D, F, C = 1, 64, 256, 16

    def temporary_bytes(T):
        def loss(z, v, w, state):
            o, final = in_place_ttt(z, v, w, lr=0.1, chunk_size=C, state=state, implementation=implementation)
            return jnp.sum(o**2) + jnp.sum(final**2)

        shapes = [(B, T, F), (B, T, D), (D, F), (B, D, F)]
        structs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*structs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    state_bytes, token_bytes = 4 * D * F, 4 * (F + 3 * D)  # per token: dz, dv, o and the slow part of o
    short, long = temporary_bytes(16 * C), temporary_bytes(256 * C)
    assert long - short <= 240 * C * token_bytes * 1.1, (short, long)
    assert long < 256 * state_bytes, "one state per chunk would not fit in this"


def test_lr_may_be_traced_and_zero():
    arguments, cotangents = make_inputs()
    z, v, w, _, state = arguments
    check((z, v, w, 0.0, state), cotangents, jnp.float32, None, chunk_size=8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"implementation": "triton2"}, "implementation 'triton2'"),
        ({"chunk_size": 0}, "chunk_size = 0"),
        ({"state": jnp.zeros((2, 3, 4))}, "state has shape"),
        ({"segment_ids": jnp.zeros((1, 40), jnp.int32)}, "segment_ids has shape"),
    ],
)
def test_wrong_arguments(change, words):
    (z, v, w, lr, _), _ = make_inputs()
    options = {"lr": lr, "chunk_size": 8} | change
    with pytest.raises(UserError, match=words) as error:
        in_place_ttt(*(jnp.asarray(x, jnp.float32) for x in (z, v, w)), **options)
    assert "\n" not in str(error.value)


def test_wrong_shapes():
    (z, v, w, lr, _), _ = make_inputs()
    with pytest.raises(UserError, match="do not fit"):
        in_place_ttt(*(jnp.asarray(x, jnp.float32) for x in (z, v, w.T)), lr=lr, chunk_size=8)
