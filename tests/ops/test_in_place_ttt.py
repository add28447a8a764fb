"""One test base over all implementations of the op: values, final state and every gradient.

The TPU kernel runs in Pallas' interpreter, on sizes that do not fill its tiles and take several in
every dimension.
"""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support.op_checks import BF16, DOCUMENTS, F32, F64, check, compiled, make_inputs, rounded
from support.tolerance import TOLERANCE, assert_close, relative_rms

from ttt_jax.errors import UserError
from ttt_jax.kernels_pallas import tpu
from ttt_jax.ops import IMPLEMENTATIONS, in_place_ttt, write_chunk

# the others: test_gpu_kernels.py, tests/gpu
HERE = [name for name in IMPLEMENTATIONS if name not in ("pallas_gpu", "triton")]
FAST = [name for name in HERE if name != "reference"]
KERNELS = ("pallas_tpu",)  # float32 and bfloat16 only
# padded to 384: the second tile, of 256, is half full; three blocks
SIZES = {"pallas_tpu": {"D": 260, "F": 300}}

DTYPES = {name: (F32, BF16) if name in KERNELS else (F64, F32, BF16) for name in HERE}


def cases(*values, implementations=FAST, fast=1):
    """Implementations x tuples of values, without dtypes that an implementation lacks. Of the
    interpreter's, which take long, only the first `fast` are fast tests.
    """
    for implementation in implementations:
        tuples = [case if isinstance(case, tuple) else (case,) for case in values]
        lacks = {F64, F32, BF16} - set(DTYPES[implementation])
        for i, case in enumerate(case for case in tuples if lacks.isdisjoint(case)):
            slow = implementation in KERNELS and i >= fast
            name = "-".join(map(str, (implementation, *case)))
            yield pytest.param(
                implementation, *case, id=name, marks=[pytest.mark.slow] if slow else []
            )


@pytest.fixture(autouse=True)
def interpreter(request):
    """Tests with implementation="pallas_tpu" run it in the interpreter."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    with (
        tpu.interpreted()
        if parameters.get("implementation") == "pallas_tpu"
        else contextlib.nullcontext()
    ):
        yield


@pytest.fixture
def best(implementation):
    """The most precise dtype of an implementation, and what results in it may differ by after
    another order of sums.
    """
    dtype = DTYPES[implementation][0]
    with jax.enable_x64(dtype == F64):
        yield dtype, {F64: 1e-14, F32: 1e-5}[dtype]


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


@pytest.mark.parametrize(
    ("implementation", "ratio"), [*cases(1e-4, 1.0, 1e-6, 1e-2, 0.1, 3.0, fast=2)]
)
def test_a_small_update_survives_bf16(implementation, ratio):
    """The adaptation term o - z W^T under bf16, from ||S||/||W|| = 1e-6 to 3 (DESIGN section 3).

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
        ({"written": jnp.ones((2, 40), bool)}, "written has shape .* beside segment_ids"),
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


@pytest.mark.parametrize(
    ("implementation", "dtype"), [*cases(BF16, F32, implementations=["pallas_tpu"])]
)
def test_tpu_kernel_has_no_races_and_reads_nothing_unwritten(implementation, dtype, capfd, caplog):
    """The TPU's own interpreter: two cores share the parallel dimensions, memory starts as NaN,
    DMAs land when waited for.
    """
    T, C = 22, 8
    ids = np.stack([DOCUMENTS["padding"](T, C), DOCUMENTS["boundaries"](T, C)]).astype(np.int32)
    arguments, cotangents = make_inputs(T=T, D=130, F=200)
    parameters = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2
    )
    compiled.cache_clear()  # the interpreter is not in the key
    # Tiles that end where the array does: with others this interpreter (jax 0.10.2) returns aliased
    # outputs with their padding.
    with tpu.interpreted(parameters, tiles=(128, 128)):
        check(
            arguments, cotangents, dtype, implementation, chunk_size=C, segment_ids=jnp.asarray(ids)
        )
    compiled.cache_clear()
    assert "RACE DETECTED" not in "".join(capfd.readouterr()) + caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["pallas_tpu"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_tpu_kernel_over_many_tiles(implementation, dtype):
    arguments, cotangents = make_inputs(T=300, D=600, F=700)
    ids = np.stack([DOCUMENTS[name](300, 64) for name in ("padding", "boundaries")]).astype(
        np.int32
    )
    check(arguments, cotangents, dtype, implementation, chunk_size=64)
    check(arguments, cotangents, dtype, implementation, chunk_size=64, segment_ids=jnp.asarray(ids))


def test_a_kernel_says_why_it_cannot_run():
    (z, v, w, lr, _), _ = make_inputs()
    run = functools.partial(in_place_ttt, lr=lr, chunk_size=8, implementation="pallas_tpu")
    z, v, w = (jnp.asarray(x, F32) for x in (z, v, w))
    with pytest.raises(
        UserError, match="'pallas_tpu' cannot run: it needs a TPU, and the platform is cpu"
    ):
        run(z, v, w)
    with tpu.interpreted(), pytest.raises(UserError, match="float32 and bfloat16, not in float16"):
        run(z.astype(jnp.float16), v, w)
    with tpu.interpreted(), pytest.raises(UserError, match="there are no tokens"):
        run(z[:, :0], v[:, :0], w)
    large = [
        jax.ShapeDtypeStruct(s, BF16) for s in ((1, 65536, 9728), (1, 65536, 2560), (2560, 9728))
    ]
    with (
        tpu.interpreted(tiles=None),
        pytest.raises(UserError, match="D = 2560, F = 9728 needs more than the 64 MiB"),
    ):
        jax.eval_shape(functools.partial(run, chunk_size=65536), *large)


def test_a_kernel_is_never_partitioned_by_the_compiler():
    """Over a mesh, a kernel runs inside a `shard_map`, each shard with its own sequences."""
    arguments, cotangents = make_inputs(T=21)
    arguments, cotangents = jax.tree.map(lambda x: jnp.asarray(x, F32), (arguments, cotangents))
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def results(run):
        out, vjp = jax.vjp(run, *arguments)
        return out, vjp(cotangents)

    run = lambda name: (
        lambda z, v, w, lr, S: in_place_ttt(
            z, v, w, lr=lr, state=S, chunk_size=8, implementation=name
        )
    )
    with tpu.interpreted():
        with jax.set_mesh(mesh), pytest.raises(UserError, match="not partitioned over a mesh"):
            run("pallas_tpu")(*arguments)
        # The interpreter itself does not pass the check of varying axes; compiled kernels do
        # (tests/kernels/test_tpu_aot.py).
        specs = (P("x"), P("x"), P(), P(), P("x"))
        sharded = jax.shard_map(
            run("pallas_tpu"), mesh=mesh, in_specs=specs, out_specs=P("x"), check_vma=False
        )
        got = jax.jit(functools.partial(results, sharded))()
    want = jax.jit(functools.partial(results, run("xla")))()
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close("a result", x, y, TOLERANCE["float32"])


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
