"""One test base over all implementations of the op: values, final state and every gradient.

The TPU kernel runs in Pallas' interpreter, on sizes that do not fill its tiles and take several in
every dimension.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from support.op_checks import (
    BF16,
    DOCUMENTS,
    DTYPES,
    F32,
    F64,
    FAST,
    HERE,
    KERNELS,
    SIZES,
    cases,
    check,
    make_inputs,
    rounded,
)
from support.tolerance import TOLERANCE, assert_close

from ttt_jax.ops import in_place_ttt, write_chunk

SHAPES = [(41, 8), (7, 8), (64, 32), (40, 8), (8, 8), (1, 1), (5, 1), (37, 5)]


@pytest.mark.parametrize(
    ("implementation", "T", "C", "dtype"),
    [*cases(*((*shape, dtype) for shape in SHAPES for dtype in (F64, F32, BF16)), fast=6)],
)
def test_matches_the_float64_reference(implementation, T, C, dtype):
    arguments, cotangents = make_inputs(T=T, **SIZES.get(implementation, {}))
    check(arguments, cotangents, dtype, implementation, chunk_size=C)


@pytest.mark.parametrize(
    ("implementation", "T", "C", "documents"),
    [
        *cases(
            (41, 8, "boundaries"), (41, 8, "none"), (8, 8, "none"), (7, 8, "none"), (40, 8, "none")
        )
    ],
)
def test_no_initial_state_and_a_final_state_that_nothing_reads(
    implementation, best, T, C, documents
):
    """Implementations may leave out what is known to be zero."""
    make = DOCUMENTS[documents]
    ids = None if make is None else np.stack([make(T, C), np.ones(T, int)]).astype(np.int32)
    arguments, cotangents = make_inputs(T=T, **SIZES.get(implementation, {}))
    for fresh, unread in ((True, False), (False, True), (True, True)):
        options = {"chunk_size": C, "segment_ids": ids, "fresh": fresh, "unread": unread}
        check(arguments, cotangents, best[0], implementation, **options)


def test_xla_does_not_compute_with_zeros():
    """Five chunks: the loops are shorter where nothing comes in, and where nothing reads what comes
    out.
    """
    (z, v, w, lr, state), _ = make_inputs(T=40)

    def lengths(state, read):
        def loss(z, v):
            o, S = in_place_ttt(z, v, w, lr=lr, chunk_size=8, state=state, implementation="xla")
            return jnp.sum(o) + (jnp.sum(S) if read else 0)

        return [
            int(n)
            for n in re.findall(r"length=(\d+)", str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(z, v)))
        ]

    # forward, replay (without the last update), reverse
    assert lengths(state, read=True) == [5, 4, 5]
    assert lengths(None, read=True) == [4, 3, 5]
    assert lengths(state, read=False) == [5, 4, 4]
    assert lengths(None, read=False) == [4, 3, 4]


@pytest.mark.parametrize("documents", ["boundaries", "padding", "all_padding"])
@pytest.mark.parametrize(("implementation", "T", "C"), [*cases((37, 8), (45, 8), (48, 8), (30, 5))])
def test_documents(implementation, documents, T, C):
    """Of 37 tokens, the last document starts with the trailing partial chunk."""
    ids = np.stack([DOCUMENTS[documents](T, C), DOCUMENTS["boundaries"](T, C)]).astype(np.int32)
    arguments, cotangents = make_inputs(T=T, **SIZES.get(implementation, {}))
    for dtype in DTYPES[implementation][:2] if implementation not in KERNELS else (F32,):
        check(
            arguments, cotangents, dtype, implementation, chunk_size=C, segment_ids=jnp.asarray(ids)
        )


@pytest.mark.parametrize(
    ("implementation", "documents", "T", "C"),
    [*cases(("padding", 45, 8), ("none", 41, 8), ("boundaries", 48, 8), ("none", 5, 8))],
)
def test_decay(implementation, documents, T, C):
    """Also behind a chunk with padding, which writes nothing, and before a trailing partial one."""
    ids = None
    if documents != "none":
        rows = [DOCUMENTS[documents](T, C), DOCUMENTS["boundaries"](T, C)]
        ids = jnp.asarray(np.stack(rows), jnp.int32)
    arguments, cotangents = make_inputs(T=T, **SIZES.get(implementation, {}))
    for dtype in DTYPES[implementation][:2] if implementation not in KERNELS else (F32,):
        options = {"chunk_size": C, "segment_ids": ids, "decay": 0.6}
        check(arguments, cotangents, dtype, implementation, **options)


@pytest.mark.parametrize("implementation", HERE)
def test_decay_in_rows_that_end_early(implementation, best):
    """A row that has read fewer chunks keeps its state: as if it had been read alone."""
    dtype, tolerance = best
    (z, v, w, lr, state), _ = make_inputs(B=3, T=32)
    z, v, w, state = (jnp.asarray(x, dtype) for x in (z, v, w, state))
    whole_B = np.array([4, 1, 0], np.int32)
    v = jnp.where((np.arange(32) // 8)[None, :, None] < whole_B[:, None, None], v, 0)
    run = functools.partial(
        in_place_ttt, lr=lr, chunk_size=8, decay=0.5, implementation=implementation
    )
    run = jit(run)
    o, final = run(z, v, w, state=state, whole_chunks=jnp.asarray(whole_B))
    z, v, o, final, state = map(np.asarray, (z, v, o, final, state))
    for b, whole in enumerate(whole_B):
        T = 8 * whole or 5  # of 5 tokens nothing is written
        o_alone, alone = run(z[b : b + 1, :T], v[b : b + 1, :T], w, state=state[b : b + 1])
        np.testing.assert_allclose(o[b : b + 1, :T], o_alone, rtol=0, atol=tolerance)
        np.testing.assert_allclose(final[b : b + 1], alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"decay": 0.5}, {"clip_norm": 0.5}, {"decay": 0.5, "clip_norm": 0.5}],
    ids=["plain", "decay", "clip", "decay, clip"],
)
def test_write_chunk(options, dtype):
    """The state that the whole op leaves, in float64; the second of three rows writes nothing."""
    arguments, cotangents = make_inputs(B=3, T=8)
    whole_B = np.array([1, 0, 1], np.int32)
    options = options | {"whole_chunks": whole_B}
    with jax.enable_x64(True):
        (z, v, w, lr, state), _ = rounded(arguments, cotangents, dtype)
        v = v * whole_B[:, None, None]
        whole = {"chunk_size": 8, "implementation": "reference", **options}
        _, expected = in_place_ttt(*map(jnp.asarray, (z, v, w)), lr=lr, state=state, **whole)
    acc = F64 if dtype == F64 else F32
    with jax.enable_x64(dtype == F64):
        z, v, state = jnp.asarray(z, dtype), jnp.asarray(v, dtype), jnp.asarray(state, acc)
        final = jit(functools.partial(write_chunk, lr=lr, **options))(z, v, state)
        assert final.dtype == acc
        assert_close("S", final, expected, TOLERANCE[dtype.name])
        np.testing.assert_array_equal(final[1], state[1])


@pytest.mark.parametrize("T", [40, 43, 5])
@pytest.mark.parametrize(("implementation", "clip_norm"), [*cases(0.5, 1e-6, 2.0, 1e6)])
def test_clip(implementation, clip_norm, T):
    arguments, cotangents = make_inputs(T=T)
    check(
        arguments,
        cotangents,
        DTYPES[implementation][0],
        implementation,
        chunk_size=8,
        clip_norm=clip_norm,
    )


@pytest.mark.parametrize("implementation", HERE)
def test_clip_bounds_the_update(implementation, best):
    dtype, tolerance = best
    (z, v, w, _, _), _ = make_inputs(T=8, B=3)
    run = functools.partial(
        in_place_ttt, lr=50.0, chunk_size=8, clip_norm=0.25, implementation=implementation
    )
    _, state = run(*(jnp.asarray(x, dtype) for x in (z, v, w)))
    np.testing.assert_allclose(
        np.linalg.norm(np.asarray(state), axis=(1, 2)), 0.25, rtol=100 * tolerance
    )


@pytest.mark.parametrize("implementation", HERE)
def test_future_tokens_have_no_gradient(implementation, best):
    """d o_t / d z_s and d v_s vanish for s > t; and v reaches no output of its own chunk."""
    T, C = 24, 8
    (z, v, w, lr, _), _ = make_inputs(B=1, T=T, D=6, F=10)
    z, v, w = (jnp.asarray(x, best[0]) for x in (z, v, w))
    run = lambda z, v: in_place_ttt(z, v, w, lr=lr, chunk_size=C, implementation=implementation)[0]
    dz, dv = (np.abs(np.asarray(j)).sum((0, 2, 3, 5)) for j in jit(jax.jacrev(run, (0, 1)))(z, v))
    t, s = np.mgrid[:T, :T]
    assert (dz[s > t] == 0).all()
    assert (dz[s == t] > 0).all()
    assert (dv[s // C >= t // C] == 0).all()
    assert (dv[s // C < t // C] > 0).all()


@pytest.mark.parametrize(
    ("implementation", "cuts"),
    [*cases(((16, 24),), ((8,),), ((8, 16, 24, 32),), implementations=HERE)],
)
def test_pieces_on_chunk_boundaries_equal_the_whole(implementation, cuts, best):
    dtype, tolerance = best
    (z, v, w, lr, state), _ = make_inputs(T=37)
    options = {"chunk_size": 8, "decay": 0.8, "implementation": implementation}
    run = jit(functools.partial(in_place_ttt, lr=lr, **options))
    z, v, w, state = (jnp.asarray(x, dtype) for x in (z, v, w, state))
    o, final = run(z, v, w, state=state)
    pieces, start = [], 0
    for end in (*cuts, 37):
        o_piece, state = run(z[:, start:end], v[:, start:end], w, state=state)
        pieces.append(o_piece)
        start = end
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), o, rtol=0, atol=tolerance)
    np.testing.assert_allclose(state, final, rtol=0, atol=tolerance)


@pytest.mark.parametrize("implementation", HERE)
def test_batch_rows_are_independent(implementation, best):
    dtype, tolerance = best
    (z, v, w, lr, state), _ = make_inputs(B=3, T=20)
    run = jit(functools.partial(in_place_ttt, lr=lr, chunk_size=8, implementation=implementation))
    z, v, w, state = (jnp.asarray(x, dtype) for x in (z, v, w, state))
    together = run(z, v, w, state=state)
    for b in range(3):
        alone = run(z[b : b + 1], v[b : b + 1], w, state=state[b : b + 1])
        for x, y in zip(together, alone, strict=True):
            np.testing.assert_allclose(x[b : b + 1], y, rtol=0, atol=tolerance)


# tests/kernels/test_tpu_aot.py
@pytest.mark.parametrize("implementation", [name for name in FAST if name not in KERNELS])
def test_backward_memory_does_not_grow_with_the_number_of_chunks(implementation):
    """Temporaries of forward + backward: bounded by a few state-sized buffers plus the outputs' own
    size.
    """
    B, D, F, C = 1, 64, 256, 16

    def temporary_bytes(T):
        def loss(z, v, w, state):
            o, final = in_place_ttt(
                z, v, w, lr=0.1, chunk_size=C, state=state, implementation=implementation
            )
            return jnp.sum(o**2) + jnp.sum(final**2)

        shapes = [(B, T, F), (B, T, D), (D, F), (B, D, F)]
        structs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*structs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # per token: dz, dv, o and the slow part of o
    state_bytes, token_bytes = 4 * D * F, 4 * (F + 3 * D)
    short, long = temporary_bytes(16 * C), temporary_bytes(256 * C)
    assert long - short <= 240 * C * token_bytes * 1.1, (short, long)
    assert long < 256 * state_bytes, "one state per chunk would not fit in this"


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_no_tokens_leave_the_state_as_it_is(implementation):
    z, v, w, S = (np.ones(shape, F32) for shape in ((2, 0, 3), (2, 0, 5), (5, 3), (2, 5, 3)))
    options = {"lr": 1.0, "chunk_size": 4, "implementation": implementation}
    o, after = in_place_ttt(z, v, w, state=jnp.asarray(S), decay=0.9, **options)
    assert o.shape == (2, 0, 5)
    np.testing.assert_array_equal(after, S)
