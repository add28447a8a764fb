"""Attention's XLA paths against a plain float64 softmax: values and gradients, windows, documents, odd lengths."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_jit import jit
from tolerance import TOLERANCE, assert_close

from ttt_jax import attention
from ttt_jax.attention import _document_offsets, _windowed, self_attention
from ttt_jax.errors import UserError


def make_inputs(B=2, T=37, N=4, K=2, H=8, S=None, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(B, T, N, H), (B, S or T, K, H), (B, S or T, K, H), (B, T, N, H)]
    return [rng.standard_normal(shape) for shape in shapes]


def plain(q, k, v, seen):
    """Softmax attention written out, `seen` [B, T, S]; every query head has its own copy of its key head."""
    repeat = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, repeat, axis=2), jnp.repeat(v, repeat, axis=2)
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])
    weights = jnp.exp(logits - logits.max(-1, keepdims=True)) * seen[:, None]
    return jnp.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


def causal_mask(B, T, window=None, segments=None):
    t, s = np.mgrid[:T, :T]
    seen = (s <= t) & (t - s < (window or T))
    seen = np.broadcast_to(seen, (B, T, T)).copy()
    if segments is not None:
        seen &= segments[:, :, None] == segments[:, None, :]
    return seen


@functools.partial(jit, static_argnums=0)
def value_and_gradients(run, q, k, v, do, *more):
    o, vjp = jax.vjp(lambda q, k, v: run(q, k, v, *more), q, k, v)
    return dict(zip(("o", "dq", "dk", "dv"), (o, *vjp(do)), strict=True))


def check(run, arguments, seen, dtype, **options):
    rounded = [x.astype(dtype).astype(np.float64) for x in arguments]
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        oracle = value_and_gradients(plain, *map(jnp.asarray, rounded), jnp.asarray(seen))
        oracle = {name: np.asarray(x) for name, x in oracle.items()}
    with jax.enable_x64(dtype == "float64"):
        got = value_and_gradients(functools.partial(run, **options), *(jnp.asarray(x, dtype) for x in rounded))
    for name, value in got.items():
        assert value.dtype == dtype
        assert_close(name, np.asarray(value, np.float64), oracle[name], TOLERANCE[dtype])


SEGMENTS = np.array([[1] * 15 + [2] * 10 + [3] * 12, [5] * 5 + [4] * 20 + [0] * 12])  # rows of 37, 0 is padding


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one document", "documents"])
@pytest.mark.parametrize(
    ("window", "rows", "dtype"),
    [(w, r, "float64") for w, r in [(None, None), (None, 1), (None, 5), (30, 16), (7, None), (18, 36), (36, None)]]
    + [(None, 5, "float32"), (7, None, "float32")],
)
def test_self_attention(monkeypatch, window, rows, dtype, segments):
    """`rows` queries are computed at a time; a window below half the length takes the windowed path."""
    if rows is not None:
        monkeypatch.setattr(attention, "_BLOCK_BYTES", 4 * 2 * 4 * 37 * rows)
    arguments = make_inputs()
    ids = None if segments is None else jnp.asarray(segments, jnp.int32)
    options = {"window": window, "segment_ids_BT": ids, "implementation": "xla"}
    check(self_attention, arguments, causal_mask(2, 37, window, segments), dtype, **options)


@pytest.mark.parametrize(
    ("T", "window", "together"), [(37, 5, 1), (37, 5, 3), (37, 5, 100), (36, 6, 2), (11, 5, 2), (3, 5, 1), (13, 2, 4)]
)
def test_windowed_blocks(monkeypatch, T, window, together):
    """Any length against the block size, and any number of blocks at once."""
    monkeypatch.setattr(attention, "_BLOCK_BYTES", 4 * 2 * 4 * 2 * window * window * together)
    arguments = make_inputs(T=T)
    run = lambda q, k, v: _windowed(q, k, v, window, None)
    check(run, arguments, causal_mask(2, T, window), "float64")


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
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        oracle = np.asarray(plain(*map(jnp.asarray, rounded), jnp.asarray(causal_mask(2, 33, window))))
    o = self_attention(*(jnp.asarray(x, jnp.bfloat16) for x in rounded), window=window)
    assert o.dtype == jnp.bfloat16
    assert_close("o", np.asarray(o, np.float64), oracle, TOLERANCE["bfloat16"])


def test_large_logits_stay_finite():
    q, k, v, do = make_inputs(T=20)
    run = functools.partial(self_attention, segment_ids_BT=jnp.zeros((2, 20), jnp.int32))
    got = value_and_gradients(run, *(jnp.asarray(x, jnp.float32) for x in (300 * q, 300 * k, v, do)))
    assert all(np.isfinite(x).all() for x in got.values())


def test_memory_is_linear_in_the_length(monkeypatch):
    """Forward and backward of the windowed and the blocked path hold blocks, never [T, T]."""
    monkeypatch.setattr(attention, "_BLOCK_BYTES", 2**16)

    def temporary_bytes(T, window):
        run = lambda q, k, v: self_attention(q, k, v, window=window).sum()
        struct = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)
        return jax.jit(jax.grad(run, (0, 1, 2))).lower(*[struct] * 3).compile().memory_analysis().temp_size_in_bytes

    for window in (None, 16):
        assert temporary_bytes(4096, window) < 4.6 * temporary_bytes(1024, window) < 2 * 4 * 4096 * 4096


# ------------------------------------------------------------------------------------------- documents as cuDNN wants


@pytest.mark.parametrize(
    ("ids", "multiple", "starts", "sizes"),
    [
        ([1, 1, 1, 1, 1, 1, 1, 1], 4, [0], [8]),
        ([1, 1, 1, 1, 2, 2, 2, 2], 4, [0, 4], [4, 4]),
        ([1, 1, 1, 0, 2, 2, 0, 0], 4, [0, 4], [4, 4]),  # padding joins the document before it
        ([1, 1, 1, 1, 0, 0, 0, 0], 4, [0, 4], [4, 4]),  # a whole chunk of it is a document of its own
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


# ---------------------------------------------------------------------------------------------------- implementations


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
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q = jnp.zeros((1, 2, 1, H), dtype)
    reason = attention._why_not_cudnn(q, jnp.zeros((1, 2), jnp.int32) if ids else None, multiple)
    assert (reason is None) if words is None else (words in reason)
