"""Blockwise cross-entropy against autodiff of a plain float64 log-softmax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from support.tolerance import TOLERANCE, assert_close

from ttt_jax.config import MeshConfig
from ttt_jax.model import loss
from ttt_jax.model.loss import cross_entropy, expected_row, token_nll, token_nll_and_hit
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.parallel.one_device import ONE_DEVICE
from ttt_jax.parallel.shard_mapped import make_parallel

B, T, D, V = 2, 13, 6, 17


def make_inputs(dtype="float64", scale=1.0):
    rng = np.random.default_rng(0)
    h, w = rng.standard_normal((B, T, D)) * scale, rng.standard_normal((V, D))
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = rng.random((B, T)).astype(np.float32) * (rng.random((B, T)) > 0.3)
    rounded = [x.astype(jnp.dtype(dtype)).astype(np.float64) for x in (h, w)]
    return *rounded, targets, weights


def plain(h, w, targets, weights):
    logits = jnp.einsum("btd,vd->btv", h, w)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(weights * picked)


def oracle(h, w, targets, weights, g):
    with jax.enable_x64(True):
        arguments = [jnp.asarray(x, jnp.float64) for x in (h, w)]
        run = jit(jax.value_and_grad(plain, (0, 1)))
        value, (dh, dw) = run(*arguments, jnp.asarray(targets), jnp.asarray(weights, jnp.float64))
        return float(value), g * np.asarray(dh), g * np.asarray(dw)


def computed(h, w, targets, weights, dtype, g):
    """The loss alone, and with its gradients scaled by a cotangent."""
    with jax.enable_x64(dtype == "float64"):
        h, w = jnp.asarray(h, dtype), jnp.asarray(w, dtype)
        targets, weights = jnp.asarray(targets), jnp.asarray(weights, jnp.float32)
        run = lambda h, w: cross_entropy(h, w, targets, weights)
        alone = jit(run)(h, w)
        value, vjp = jit(functools.partial(jax.vjp, run))(h, w)
        dh, dw = vjp(jnp.asarray(g, value.dtype))
        assert value.dtype == alone.dtype == jnp.float32
        assert (dh.dtype, dw.dtype) == (dtype, dtype)
        return float(alone), float(value), np.asarray(dh, np.float64), np.asarray(dw, np.float64)


def cut(monkeypatch, dtype, tokens, blocks=1):
    """Hold the logits of so many tokens at a time, and the gradients of so many blocks."""
    monkeypatch.setattr(loss, "_LOGITS_BYTES", 4 * V * tokens)
    monkeypatch.setattr(loss, "_GRADIENT_BYTES", jnp.dtype(dtype).itemsize * V * tokens * blocks)


def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(loss.platform, "compiled_for", lambda: "gpu")


@pytest.mark.parametrize("one_pass", [False, True], ids=["two passes", "one pass"])
@pytest.mark.parametrize(
    ("dtype", "tokens", "blocks"),
    [
        ("float64", None, None),
        ("float64", 1, 1),
        ("float64", 8, 1),
        ("float64", 4, 2),
        ("float64", 2, 4),
        ("float64", 16, 4),
        ("float32", 4, 2),
        ("bfloat16", 4, 2),
    ],
)
def test_value_and_gradients(monkeypatch, dtype, tokens, blocks, one_pass):
    """26 tokens in blocks and groups of blocks, whose last ones are padded."""
    if tokens is not None:
        cut(monkeypatch, dtype, tokens, blocks)
    if one_pass:
        as_on_a_gpu(monkeypatch)
    inputs = make_inputs(dtype)
    value, dh, dw = oracle(*inputs, g=0.7)
    alone, with_gradient, got_dh, got_dw = computed(*inputs, dtype, g=0.7)
    scalar = 1e-6 if dtype == "float64" else TOLERANCE[dtype]  # the scalar itself is float32
    assert abs(alone / value - 1) <= scalar
    assert abs(with_gradient / value - 1) <= scalar
    tolerance = 2e-7 if dtype == "float64" else TOLERANCE[dtype]  # so is its cotangent
    assert_close("dh", got_dh, dh, tolerance)
    assert_close("dw", got_dw, dw, tolerance)


@pytest.mark.parametrize(
    ("N", "V", "sizes"),
    [
        (32768, 151936, (1024, 4)),
        (131072, 16384, (8192, 4)),
        (8192, 259, (8192, 1)),
        (1000, 151936, (1000, 1)),
        (5000, 151936, (840, 3)),
        (1, 151936, (1, 1)),
        (26, 10**9, (1, 1)),
    ],
)
def test_sizes_of_blocks(N, V, sizes):
    """In bfloat16: powers of two where the tokens are one, multiples of 8 else; never fewer than
    one token.
    """
    Q, n = loss._block_sizes(N, V, jnp.bfloat16)
    assert (Q, n) == sizes
    if V < 10**9:
        assert 4 * V * Q <= loss._LOGITS_BYTES
        assert 2 * V * Q * n <= loss._GRADIENT_BYTES


def test_a_cotangent_of_one_keeps_float64_gradients():
    inputs = make_inputs()
    _, dh, dw = oracle(*inputs, g=1.0)
    _, _, got_dh, got_dw = computed(*inputs, "float64", g=1.0)
    assert_close("dh", got_dh, dh, TOLERANCE["float64"])
    assert_close("dw", got_dw, dw, TOLERANCE["float64"])


@pytest.mark.parametrize("one_pass", [False, True])
def test_large_logits(monkeypatch, one_pass):
    cut(monkeypatch, "float32", 4, 2)
    if one_pass:
        as_on_a_gpu(monkeypatch)
    h, w, targets, weights = make_inputs("float32", scale=300.0)
    value, _, _ = oracle(h, w, targets, weights, g=1.0)
    _, got, got_dh, got_dw = computed(h, w, targets, weights, "float32", g=1.0)
    assert abs(got / value - 1) <= TOLERANCE["float32"]
    assert np.isfinite(got_dh).all()
    assert np.isfinite(got_dw).all()


def test_tokens_of_weight_zero_count_for_nothing():
    h, w, targets, weights = make_inputs("float32")
    weights[:, 4:9] = 0
    changed_h, changed_targets = h.copy(), targets.copy()
    changed_h[:, 4:9] *= 3
    changed_targets[:, 4:9] = 0
    first = computed(h, w, targets, weights, "float32", g=1.0)
    second = computed(changed_h, w, changed_targets, weights, "float32", g=1.0)
    assert not first[2][:, 4:9].any()
    assert first[1] == second[1]
    np.testing.assert_array_equal(first[3], second[3])
    nothing = computed(h, w, targets, 0 * weights, "float32", g=1.0)
    assert nothing[1] == 0
    assert not nothing[2].any()
    assert not nothing[3].any()


def test_on_a_mesh_it_is_the_loss_of_one_device(monkeypatch):
    """Every device cuts its own tokens into blocks, some of them padding: rows over data, tokens
    over context and tensor.
    """
    cut(monkeypatch, "float32", 2, 1)
    h, w, targets, weights = (x if x.shape[0] == V else x[:, :12] for x in make_inputs("float32"))
    arguments = jnp.asarray(h, jnp.float32), jnp.asarray(w, jnp.float32)

    def run(devices):
        def total(h, w):
            tokens = h, w, jnp.asarray(targets), jnp.asarray(weights)
            return devices.over_tokens(cross_entropy, *tokens)

        return jit(jax.value_and_grad(total, (0, 1)))(*arguments)

    mesh = make_mesh(MeshConfig(data=2, fsdp=1, context=2, tensor=2))
    expected, got = run(ONE_DEVICE), run(make_parallel(mesh))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    for name, x, y in zip(("dh", "dw"), got[1], expected[1], strict=True):
        assert_close(name, x, y, TOLERANCE["float32"])


def test_float32_master_weights_under_bfloat16_compute():
    """h in bf16 and w in float32: w's gradient comes back in float32, not rounded to bf16."""
    h, w, targets, weights = make_inputs("bfloat16")
    arguments = (
        jnp.asarray(h, jnp.bfloat16),
        jnp.asarray(w, jnp.float32),
        jnp.asarray(targets),
        jnp.asarray(weights),
    )
    dh, dw = jit(jax.grad(cross_entropy, (0, 1)))(*arguments)
    assert (dh.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(
        "dw",
        np.asarray(dw, np.float64),
        oracle(h, w, targets, weights, g=1.0)[2],
        TOLERANCE["bfloat16"],
    )
    assert (np.asarray(dw) != np.asarray(dw.astype(jnp.bfloat16).astype(jnp.float32))).any()


@pytest.mark.parametrize("tokens", [None, 1, 4, 16])
def test_token_nll(monkeypatch, tokens, x64):
    if tokens is not None:
        cut(monkeypatch, "float64", tokens)
    h, w, targets, _ = make_inputs()
    logits = np.einsum("btd,vd->btv", h, w)
    expected = (
        np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    )
    got = jit(token_nll)(jnp.asarray(h), jnp.asarray(w), jnp.asarray(targets))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13)
    half = token_nll(
        jnp.asarray(h, jnp.bfloat16), jnp.asarray(w, jnp.float32), jnp.asarray(targets)
    )
    assert half.dtype == jnp.float32


@pytest.mark.parametrize("tokens", [None, 8])
def test_a_hit_is_the_token_that_greedy_decoding_takes(monkeypatch, tokens):
    """Of equal logits the lowest id, as argmax: rows 2 and 9 of the weights are the same, and all
    logits of a zero state are."""
    if tokens is not None:
        cut(monkeypatch, "float32", tokens)
    h, w, targets, _ = make_inputs("float32")
    w[9] = w[2] = 4 * h[0, 0]  # the most likely ones of that token
    h[1, 3] = 0
    targets[0, 0], targets[1, 3], targets[1, 4] = 9, 5, 0
    h, w, targets = jnp.asarray(h, jnp.float32), jnp.asarray(w, jnp.float32), jnp.asarray(targets)
    best = np.argmax(np.einsum("btd,vd->btv", h, w), axis=-1)
    for _ in range(2):
        nll, hit = jit(token_nll_and_hit)(h, w, targets)
        np.testing.assert_array_equal(hit, targets == best)
        np.testing.assert_allclose(nll, token_nll(h, w, targets), rtol=1e-6)
        assert bool(hit[0, 0]) == (int(targets[0, 0]) == 2)
        assert bool(hit[1, 3]) == (int(targets[1, 3]) == 0)
        targets = targets.at[0, 0].set(2).at[1, 3].set(0)


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}])
def test_tokens_are_judged_as_by_one_device_where_vocabularies_are_split(monkeypatch, sizes):
    """The likeliest token is one of two equal ones of different devices, the target is on another
    than the device of the largest logit, and of a zero state all logits are equal.
    """
    cut(monkeypatch, "float32", 4)
    h, w, _, _ = make_inputs("float32", scale=3.0)
    h, w = h[:, :12], w[:16]
    w[13] = w[2] = 4 * h[0, 0]
    h[1, 3] = 0
    targets = np.argmax(np.einsum("btd,vd->btv", h, w), axis=-1).astype(np.int32)
    targets[:, 5:] = (targets[:, 5:] + 7) % 16
    targets[0, 0], targets[1, 3] = 13, 8  # the lower ones, 2 and 0, are the likeliest
    targets[1, 0] = 15
    arrays = jnp.asarray(h, jnp.float32), jnp.asarray(w, jnp.float32), jnp.asarray(targets)
    mesh = make_parallel(make_mesh(MeshConfig(**{"data": 1} | sizes)))
    judge = lambda devices: jit(lambda *x: devices.over_vocabulary(token_nll_and_hit, *x))(*arrays)
    (nll, hit), (expected, expected_hit) = judge(mesh), judge(ONE_DEVICE)
    np.testing.assert_array_equal(hit, expected_hit)
    assert not hit[0, 0]
    assert not hit[1, 3]
    assert 4 < hit.sum() < 12
    np.testing.assert_allclose(nll, expected, rtol=1e-6, atol=1e-5)


def test_the_expected_row_is_that_of_one_device_where_vocabularies_are_split(monkeypatch):
    """Parts of V weigh as much as their tokens are likely."""
    cut(monkeypatch, "float32", 4)
    h, w, _, _ = make_inputs("float32", scale=3.0)
    arrays = jnp.asarray(h[:, :12], jnp.float32), jnp.asarray(w[:16], jnp.float32)
    mesh = make_parallel(make_mesh(MeshConfig(data=1, fsdp=2, tensor=4)))
    rows = functools.partial(expected_row, normalize=True)
    found, expected = (
        jit(lambda *x, devices=devices: devices.over_vocabulary(rows, *x))(*arrays)
        for devices in (mesh, ONE_DEVICE)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_logits_are_held_block_by_block(monkeypatch):
    """Temporaries of the loss and its gradient do not grow with the number of blocks."""
    monkeypatch.setattr(loss, "_LOGITS_BYTES", 4 * 2048 * 16)
    monkeypatch.setattr(loss, "_GRADIENT_BYTES", 4 * 2048 * 32)

    def temporary_bytes(length):
        shapes = [
            ((1, length, 8), "float32"),
            ((2048, 8), "float32"),
            ((1, length), "int32"),
            ((1, length), "float32"),
        ]
        structs = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        compiled = jax.jit(jax.value_and_grad(cross_entropy, (0, 1))).lower(*structs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(512) < 4 * 512 * 2048 / 2, "less than half of all the logits"
    assert temporary_bytes(512) < 1.3 * temporary_bytes(64)
