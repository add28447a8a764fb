"""Attention's XLA paths against a plain float64 softmax: values and gradients, windows, documents,
odd lengths.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from support.attention import causal_mask, documents_in_xla, make_inputs, plain
from support.tolerance import TOLERANCE, assert_close

from ttt_jax.errors import UserError
from ttt_jax.ops.attention import cudnn as cudnn_attention
from ttt_jax.ops.attention import xla as xla_attention
from ttt_jax.ops.attention.api import self_attention
from ttt_jax.ops.attention.cudnn import _document_offsets
from ttt_jax.ops.attention.xla import windowed


@functools.partial(jit, static_argnums=0)
def value_and_gradients(run, q, k, v, do, *more):
    o, vjp = jax.vjp(lambda q, k, v: run(q, k, v, *more), q, k, v)
    return dict(zip(("o", "dq", "dk", "dv"), (o, *vjp(do)), strict=True))


def check(run, arguments, seen, dtype, **options):
    rounded = [x.astype(dtype).astype(np.float64) for x in arguments]
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        oracle = value_and_gradients(plain, *map(jnp.asarray, rounded), jnp.asarray(seen))
        oracle = {name: np.asarray(x) for name, x in oracle.items()}
    with jax.enable_x64(dtype == "float64"):
        got = value_and_gradients(
            functools.partial(run, **options), *(jnp.asarray(x, dtype) for x in rounded)
        )
    for name, value in got.items():
        assert value.dtype == dtype
        assert_close(name, np.asarray(value, np.float64), oracle[name], TOLERANCE[dtype])


# rows of 37, 0 is padding
SEGMENTS = np.array([[1] * 15 + [2] * 10 + [3] * 12, [5] * 5 + [4] * 20 + [0] * 12])


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one document", "documents"])
@pytest.mark.parametrize(
    ("window", "rows", "dtype"),
    [
        (w, r, "float64")
        for w, r in [(None, None), (None, 1), (None, 5), (30, 16), (7, None), (18, 36), (36, None)]
    ]
    + [(None, 5, "float32"), (7, None, "float32")],
)
def test_self_attention(monkeypatch, window, rows, dtype, segments):
    """`rows` queries are computed at a time; a window below half the length takes the windowed
    path.
    """
    if rows is not None:
        monkeypatch.setattr(xla_attention, "_BLOCK_BYTES", 4 * 2 * 4 * 37 * rows)
    arguments = make_inputs()
    ids = None if segments is None else jnp.asarray(segments, jnp.int32)
    options = {"window": window, "segment_ids_BT": ids, "implementation": "xla"}
    check(self_attention, arguments, causal_mask(2, 37, window, segments), dtype, **options)


@pytest.mark.parametrize(
    ("T", "window", "together"),
    [(37, 5, 1), (37, 5, 3), (37, 5, 100), (36, 6, 2), (11, 5, 2), (3, 5, 1), (13, 2, 4)],
)
def test_windowed_blocks(monkeypatch, T, window, together):
    """Any length against the block size, and any number of blocks at once."""
    monkeypatch.setattr(xla_attention, "_BLOCK_BYTES", 4 * 2 * 4 * 2 * window * window * together)
    arguments = make_inputs(T=T)
    run = lambda q, k, v: windowed(q, k, v, window, None)
    check(run, arguments, causal_mask(2, T, window), "float64")


def test_tokens_of_segment_0_do_not_see_what_lies_before_the_row(x64):
    """A row that begins with segment 0 (padding, or a document of that number): both paths
    agree.
    """
    q, k, v, _ = map(jnp.asarray, make_inputs())
    ids = jnp.asarray([[0] * 20 + [1] * 17, [0] * 3 + [2] * 30 + [0] * 4], jnp.int32)
    # A window of 5 of 37 tokens is computed in blocks of the window.
    options = {"window": 5, "segment_ids_BT": ids, "implementation": "xla"}
    got = np.asarray(jit(functools.partial(self_attention, **options))(q, k, v))
    position = jnp.arange(37, dtype=jnp.int32)[None]
    blocked = lambda q, k, v: xla_attention.blocked(q, k, v, position, position, ids, ids, 5)
    want = jit(blocked)(q, k, v)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-14)
    np.testing.assert_allclose(got[:, 0], np.repeat(v[:, 0], 2, axis=1), rtol=0, atol=1e-14)


def test_a_window_of_one_token_sees_itself(x64):
    q, k, v, do = map(jnp.asarray, make_inputs(T=9))
    got = value_and_gradients(functools.partial(self_attention, window=1), q, k, v, do)
    np.testing.assert_allclose(got["o"], np.repeat(v, 2, axis=2), rtol=0, atol=1e-15)
    np.testing.assert_allclose(got["dv"], do.reshape(2, 9, 2, 2, 8).sum(3), rtol=0, atol=1e-14)
    for name in ("dq", "dk"):
        np.testing.assert_allclose(got[name], 0, atol=1e-14)


@pytest.mark.parametrize(("N", "K"), [(4, 4), (4, 1), (6, 2)])
def test_grouped_queries(N, K):
    check(self_attention, make_inputs(T=9, N=N, K=K), causal_mask(2, 9), "float64")
    check(self_attention, make_inputs(T=9, N=N, K=K), causal_mask(2, 9, 3), "float64", window=3)


@pytest.mark.parametrize("window", [None, 8])
def test_bfloat16(window):
    """Values against the float64 oracle; logits and softmax are float32, probabilities bf16."""
    q, k, v, _ = make_inputs(T=33)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (q, k, v)]
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        oracle = np.asarray(
            plain(*map(jnp.asarray, rounded), jnp.asarray(causal_mask(2, 33, window)))
        )
    o = self_attention(*(jnp.asarray(x, jnp.bfloat16) for x in rounded), window=window)
    assert o.dtype == jnp.bfloat16
    assert_close("o", np.asarray(o, np.float64), oracle, TOLERANCE["bfloat16"])


@pytest.mark.parametrize("window", [None, 8])
def test_softmax_is_computed_in_float32_under_bfloat16(window):
    """Logits of about 10, which as bf16 numbers would be off by 0.03, and so their
    probabilities.
    """
    q, k, v, _ = make_inputs(T=33)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (10 * q, k, v)]
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        oracle = np.asarray(
            plain(*map(jnp.asarray, rounded), jnp.asarray(causal_mask(2, 33, window)))
        )
    o = self_attention(*(jnp.asarray(x, jnp.bfloat16) for x in rounded), window=window)
    assert_close("o", np.asarray(o, np.float64), oracle, TOLERANCE["bfloat16"])


def test_large_logits_stay_finite():
    q, k, v, do = make_inputs(T=20)
    run = functools.partial(self_attention, segment_ids_BT=jnp.zeros((2, 20), jnp.int32))
    got = value_and_gradients(
        run, *(jnp.asarray(x, jnp.float32) for x in (300 * q, 300 * k, v, do))
    )
    assert all(np.isfinite(x).all() for x in got.values())


def test_blocks_on_a_cpu_fit_its_cache():
    """Logits of 4 MiB at a time, where other platforms take 64."""
    struct = jax.ShapeDtypeStruct((1, 2048, 2, 8), jnp.float32)  # 32 MiB of logits
    run = functools.partial(self_attention, implementation="xla")
    assert "tensor<1x2x1x256x2048xf32>" in jax.jit(run).lower(*[struct] * 3).as_text()
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert "tensor<1x2x1x2048x2048xf32>" in jax.jit(run).lower(*[struct] * 3).as_text()


def test_memory_is_linear_in_the_length(monkeypatch):
    """Forward and backward of the windowed and the blocked path hold blocks, never [T, T]."""
    monkeypatch.setattr(xla_attention, "_BLOCK_BYTES", 2**16)

    def temporary_bytes(T, window):
        run = lambda q, k, v: self_attention(q, k, v, window=window).sum()
        struct = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)
        return (
            jax.jit(jax.grad(run, (0, 1, 2)))
            .lower(*[struct] * 3)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    for window in (None, 16):
        assert (
            temporary_bytes(4096, window)
            < 4.6 * temporary_bytes(1024, window)
            < 2 * 4 * 4096 * 4096
        )


# ------------------------------------------------------------------------- documents as cuDNN wants


@pytest.mark.parametrize(
    ("ids", "multiple", "starts", "sizes"),
    [
        ([1, 1, 1, 1, 1, 1, 1, 1], 4, [0], [8]),
        ([1, 1, 1, 1, 2, 2, 2, 2], 4, [0, 4], [4, 4]),
        ([1, 1, 1, 0, 2, 2, 0, 0], 4, [0, 4], [4, 4]),  # padding joins the document before it
        # a whole chunk of it is a document of its own
        ([1, 1, 1, 1, 0, 0, 0, 0], 4, [0, 4], [4, 4]),
        ([0, 0, 0, 0, 0, 0, 0, 0], 4, [0], [8]),
        ([3, 3, 3, 3, 3, 3, 1, 1, 1, 1], 2, [0, 6], [6, 4]),
        ([1, 1, 2, 2, 3, 3, 3], 2, [0, 2, 4], [2, 2, 3]),  # an odd end
        ([1, 2, 3], 1, [0, 1, 2], [1, 1, 1]),
        ([1, 1, 1], 4, [0], [3]),  # shorter than the multiple
    ],
)
def test_document_offsets(ids, multiple, starts, sizes):
    """Room for one document per multiple and an end; what is not used is -1."""
    room = -(-len(ids) // multiple)
    got = jit(_document_offsets, static_argnums=1)(jnp.asarray([ids], jnp.int32), multiple)
    np.testing.assert_array_equal(got[0][0], starts + [-1] * (room + 1 - len(starts)))
    np.testing.assert_array_equal(got[1][0], sizes + [-1] * (room - len(sizes)))
    assert got[0].dtype == got[1].dtype == jnp.int32


def test_document_offsets_of_each_row_of_a_batch():
    ids = jnp.asarray([[1, 1, 2, 2], [7, 7, 7, 7]], jnp.int32)
    offsets, sizes = _document_offsets(ids, 2)
    np.testing.assert_array_equal(offsets, [[0, 2, -1], [0, -1, -1]])
    np.testing.assert_array_equal(sizes, [[2, 2], [4, -1]])


# ---------------------------------------------------------------------------------- implementations


def test_a_named_implementation_that_cannot_run_says_why():
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in make_inputs(T=8))
    with pytest.raises(UserError, match="'cudnn': needs a CUDA device, this is cpu"):
        self_attention(q, k, v, implementation="cudnn")
    with pytest.raises(UserError, match="'flash': unknown; use one of xla, cudnn, splash"):
        self_attention(q, k, v, implementation="flash")


@pytest.mark.parametrize(
    ("dtype", "H", "ids", "multiple", "words"),
    [
        ("bfloat16", 8, False, 1, None),
        ("float16", 128, True, 64, None),
        ("float32", 8, False, 1, "needs bfloat16 or float16, got float32"),
        ("bfloat16", 12, False, 1, "multiple of 8, got 12"),
        ("bfloat16", 136, False, 1, "at most 128"),
        ("bfloat16", 8, True, 63, "multiples of 64 tokens or more, got 63"),
    ],
)
def test_what_cudnn_takes(monkeypatch, dtype, H, ids, multiple, words):
    assert_reason(monkeypatch, (1, 2, 1, H), dtype, multiple if ids else None, words)


def assert_reason(monkeypatch, shape, dtype, multiple, words):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q, ids = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:2], jnp.int32)
    reason = cudnn_attention.why_not(q, None if multiple is None else ids, multiple or 1)
    assert (reason is None) if words is None else (words in reason)


# ------------------------------------------------------------ packed calls within cuDNN's workspace

GIB = 2**30


@pytest.mark.parametrize(
    ("T", "H", "multiple", "words"),
    [
        (2**15, 128, 1024, None),
        (2**17, 128, 2048, None),  # 4 GiB, just within
        (
            2**17,
            128,
            2047,
            "2048 tokens or more in rows of 131072, got 2047: one head's backward would take 4.1 "
            "GiB",
        ),
        (2**20, 128, 1024, "multiples of 131072 tokens or more in rows of 1048576, got 1024"),
        (2**20, 128, 2**17, None),
        (2**20, 128, None, None),  # not packed
        (2**24, 128, 2**24, None),  # room for one document is an ordinary call
        (2**24, 128, 2**23, "multiples of 16777216 tokens"),
    ],
)
def test_cudnn_is_refused_where_one_head_takes_too_much(monkeypatch, T, H, multiple, words):
    assert_reason(monkeypatch, (8, T, 32, H), "bfloat16", multiple, words)


def workspace(rows, M, T, heads, kv_heads, H):
    """As measured on an H100 (docs/performance.md)."""
    return rows * M * T * heads * H * 4 * (2 if heads > kv_heads else 1)


@pytest.mark.parametrize(
    ("shape", "split"),
    [
        ((8, 32, 16384, 12, 12, 64), (2, 12)),  # Books: 1.5 GiB a row
        ((7, 32, 16384, 12, 12, 64), (2, 12)),  # 1, 2, 2, 2
        ((8, 128, 16384, 12, 12, 64), (1, 6)),
        ((8, 256, 16384, 12, 12, 64), (1, 4)),
        ((1, 32, 32768, 32, 8, 128), (1, 4)),  # one KV head
        ((2, 64, 32768, 32, 8, 128), (1, 2)),  # half of one
        # 2 GiB, and no second gradient of k and v with one head
        ((2, 128, 32768, 32, 8, 128), (1, 1)),
        ((2, 256, 32768, 32, 8, 128), (1, 1)),
        ((1, 1024, 2**20, 32, 8, 128), (1, 1)),  # refused before
        ((4, 2, 128, 8, 8, 64), (4, 8)),
    ],
    ids=str,
)
def test_split_of_real_shapes(shape, split):
    assert cudnn_attention._split_call(*shape) == split


@pytest.mark.parametrize(("N", "K"), [(1, 1), (12, 12), (6, 2), (32, 8), (35, 5), (5, 1)])
@pytest.mark.parametrize("M", [2, 24, 100, 200, 400])
def test_split_covers_everything_in_few_equal_calls_within_the_bound(N, K, M):
    for B in (1, 2, 7, 8):
        check_split(B, M, 16384, N, K, 128)


def check_split(B, M, T, N, K, H):
    G = N // K
    rows, heads = cudnn_attention._split_call(B, M, T, N, K, H)
    row_parts, head_parts = (
        cudnn_attention._parts(B, rows),
        cudnn_attention._head_parts(N, K, heads),
    )
    whole = lambda parts: [i for part in parts for i in range(part.start, part.stop)]
    assert whole(row_parts) == list(range(B))
    assert whole([n for n, _ in head_parts]) == list(range(N))
    for n, k in head_parts:  # every query head meets its own KV head
        assert [i // G for i in whole([n])] == [
            i for i in whole([k]) for _ in range(len(whole([n])) // (k.stop - k.start))
        ]
    size = lambda part: part.stop - part.start
    sizes = [size(n) if heads < G else size(n) // G for n, _ in head_parts]
    assert max(sizes) - min(sizes) <= 1
    assert max(map(size, row_parts)) - min(map(size, row_parts)) <= 1
    assert max(map(size, row_parts)) == rows
    assert max(size(n) for n, _ in head_parts) == heads
    assert all(workspace(rows, M, T, size(n), size(k), H) <= 4 * GIB for n, k in head_parts)
    # With one call fewer, its largest part would be too large.
    if heads == N and rows < B:
        assert workspace(-(-B // (len(row_parts) - 1)), M, T, N, K, H) > 4 * GIB
    elif G <= heads < N:
        kv_heads = -(-K // (len(head_parts) - 1))
        assert workspace(1, M, T, kv_heads * G, kv_heads, H) > 4 * GIB
    elif heads < G:
        assert workspace(1, M, T, -(-G // (len(head_parts) // K - 1)), 1, H) > 4 * GIB
    if rows > 1:
        assert heads == N


@pytest.mark.parametrize(
    ("N", "K", "fit", "calls"),
    [
        (4, 4, 12, [(3, 4, 4)]),
        (4, 4, 11, [(1, 4, 4), (2, 4, 4)]),
        (4, 4, 7, [(1, 4, 4)] * 3),
        (4, 4, 3, [(1, 2, 2)] * 6),
        (4, 4, 1, [(1, 1, 1)] * 12),
        (6, 2, 35, [(1, 6, 2), (2, 6, 2)]),
        (6, 2, 12, [(1, 6, 2)] * 3),
        (6, 2, 11, [(1, 3, 1)] * 6),
        (6, 2, 5, [(1, 1, 1), (1, 2, 1)] * 6),
        (6, 2, 1, [(1, 1, 1)] * 18),
    ],
)
def test_split_calls_give_the_values_and_gradients_of_one(monkeypatch, N, K, fit, calls):
    """`fit`: the constant in heads of one row, of which a call with more query than KV heads takes
    two for each.
    """
    B, T, multiple, H = 3, 24, 4, 8
    segments = np.array([[1] * 8 + [2] * 16, [1] * 4 + [2] * 4 + [3] * 12 + [4] * 4, [5] * 24])
    got = []
    monkeypatch.setattr(
        cudnn_attention, "_WORKSPACE_BYTES", fit * workspace(1, T // multiple, T, 1, 1, H)
    )
    monkeypatch.setattr(cudnn_attention, "_cudnn_call", documents_in_xla(got))
    monkeypatch.setattr(cudnn_attention, "why_not", lambda *_: None)
    options = {
        "segment_ids_BT": jnp.asarray(segments, jnp.int32),
        "segment_multiple": multiple,
        "implementation": "cudnn",
    }
    arguments = make_inputs(B=B, T=T, N=N, K=K, H=H)
    check(self_attention, arguments, causal_mask(B, T, 5, segments), "float64", window=5, **options)
    assert got == calls


def test_a_stream_is_not_split(monkeypatch):
    """One document a row, read without a backward: nothing to save, and splitting costs time."""
    got = []
    monkeypatch.setattr(cudnn_attention, "_WORKSPACE_BYTES", 1)
    monkeypatch.setattr(cudnn_attention, "_cudnn_call", documents_in_xla(got))
    q, k, v, _ = map(jnp.asarray, make_inputs(T=9))
    cudnn_attention.cudnn_documents(
        q, k, v, jnp.asarray([[0, -1], [3, -1]]), jnp.asarray([[9], [6]]), 4
    )
    assert got == [(2, 4, 2)]
