"""What only a CUDA device can show. Run on one: JAX_PLATFORMS=cuda,cpu python -m pytest tests/gpu
-m gpu
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tolerance import TOLERANCE, assert_close

from ttt_jax.config import ModelConfig, TTTConfig, replace
from ttt_jax.inference.decoding import decode_step
from ttt_jax.inference.prefill import Frozen, read_piece
from ttt_jax.inference.sampling import Sampling
from ttt_jax.model import loss
from ttt_jax.model.stack import Runtime
from ttt_jax.model.transformer import Transformer
from ttt_jax.ops import in_place_ttt
from ttt_jax.ops.attention import cached as kv_cache
from ttt_jax.ops.attention.api import self_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]


def attention_results(q, k, v, do, **options):
    run = lambda q, k, v: self_attention(q, k, v, **options)
    o, vjp = jax.vjp(jax.jit(run), q, k, v)
    return dict(zip(("o", "dq", "dk", "dv"), (o, *vjp(do)), strict=True))


@pytest.mark.parametrize("window", [None, 96])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [448])
def test_cudnn_attention_matches_the_float32_path(window, packed, T):
    B, N, K, H, C = 2, 8, 2, 64, 64
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, do = (
        jax.random.normal(key, (B, T, n, H)).astype(jnp.bfloat16)
        for key, n in zip(keys, (N, K, K, N), strict=True)
    )
    options = {"window": window}
    real_BT = np.ones((B, T), bool)
    if packed:
        segments = np.stack([np.arange(T) // (3 * C) + 1, np.arange(T) // C // 2 + 1]).astype(
            np.int32
        )
        segments[0, 3 * C - 10 : 3 * C] = 0  # a document that fills its last chunk in part
        segments[1, -C - 5 :] = 0
        real_BT = segments > 0
        options |= {"segment_ids_BT": jnp.asarray(segments), "segment_multiple": C}
    do = do * jnp.asarray(real_BT, jnp.bfloat16)[:, :, None, None]
    got = attention_results(q, k, v, do, implementation="cudnn", **options)
    wide = [x.astype(jnp.float32) for x in (q, k, v, do)]
    oracle = attention_results(*wide, implementation="xla", **options)
    for name, value in got.items():
        x, y = np.asarray(value, np.float32), np.asarray(oracle[name])
        assert np.isfinite(x).all(), name
        mask = real_BT[:, :, None, None]
        assert_close(name, x * mask, y * mask, TOLERANCE["bfloat16"])


@pytest.mark.parametrize("T", [64, 200, 500])
@pytest.mark.parametrize("start", [(1,), (100, 0), (255, 256), (700, 17)], ids=str)
def test_a_piece_after_a_window_in_cudnn_matches_the_float32_path(start, T):
    """Pieces that come before the window is full, exactly full, and long after; rows of one batch
    at different positions.
    """
    W, N, K, H, B = 256, 8, 2, 64, len(start)
    keys = jax.random.split(jax.random.key(2), 5)
    sizes = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, K, W, H), (B, K, W, H))
    new_and_old = [
        jax.random.normal(key, size).astype(jnp.bfloat16)
        for key, size in zip(keys, sizes, strict=True)
    ]

    def run(arrays, implementation):
        q, k, v, *old = arrays
        extend = functools.partial(kv_cache.extend_window, implementation=implementation)
        return jax.jit(extend)(q, k, v, kv_cache.KVCache(*old), jnp.asarray(start, jnp.int32))

    oracle = run([x.astype(jnp.float32) for x in new_and_old], "xla")
    assert_close(
        "o",
        np.asarray(run(new_and_old, "cudnn"), np.float32),
        np.asarray(oracle),
        TOLERANCE["bfloat16"],
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize(("T", "C"), [(4000, 512)])
def test_op_on_the_device(dtype, T, C):
    B, D, F = 2, 256, 512
    keys = jax.random.split(jax.random.key(1), 5)
    make = lambda key, shape, scale: (
        (scale * jax.random.normal(key, shape)).astype(dtype).astype(jnp.float32)
    )
    z, v = make(keys[0], (B, T, F), 1.0), make(keys[1], (B, T, D), 1 / T)
    w, do = make(keys[2], (D, F), F**-0.5), make(keys[3], (B, T, D), 1.0)
    state = 0.1 * F**-0.5 * jax.random.normal(keys[4], (B, D, F))

    def results(dtype, implementation):
        run = lambda z, v, w, s: in_place_ttt(
            z, v, w, lr=0.7, chunk_size=C, state=s, implementation=implementation
        )
        out, vjp = jax.vjp(jax.jit(run), *(x.astype(dtype) for x in (z, v, w)), state)
        return [*out, *vjp((do.astype(dtype), jnp.zeros_like(out[1])))]

    got, oracle = results(dtype, "xla"), results(jnp.float32, "reference")
    for name, x, y in zip(("o", "S", "dz", "dv", "dw", "dS"), got, oracle, strict=True):
        assert_close(
            name, np.asarray(x, np.float32), np.asarray(y), TOLERANCE[jnp.dtype(dtype).name]
        )


@pytest.mark.parametrize("write", ["sum", "ridge"])
@pytest.mark.parametrize("pieces", [1, 4])
def test_reading_a_scanned_model_writes_the_states_of_its_stacks(write, pieces):
    """Evaluation and memories read models whose layers are scanned, piece by piece. XLA must not
    take a launch that updates S in place and the slice of the stack into one (gpu_launch.apart).
    """
    T = 4 * C
    ids_BT = jax.random.randint(jax.random.key(5), (3, T), 0, 64)

    def states(implementation):
        """S of both TTT layers, read in pieces by the programs of evaluation."""
        model, state = small_model(write, implementation), None
        for ids_BP in jnp.split(ids_BT, pieces, axis=1):
            state = state_behind(model, state, ids_BP)
        return fast_weights(model, state)

    got, oracle = states("pallas_gpu"), states("xla")
    assert np.abs(oracle).max() > 0
    assert_close("S", got, oracle, TOLERANCE["bfloat16"])


@pytest.mark.parametrize("write", ["sum", "ridge"])
@pytest.mark.parametrize("B", [1, 3])
def test_a_token_that_completes_a_chunk_writes_the_states_of_a_scanned_model(B, write):
    """Samples of a run are written by such a model. XLA takes the matmul that adds to S and the
    update of the stack into one; one row is another program than several.
    """
    ids_BT = jax.random.randint(jax.random.key(6), (B, 2 * C), 0, 64)
    model = small_model(write, None)
    oracle = fast_weights(model, state_behind(model, None, ids_BT))
    state = state_behind(model, None, ids_BT[:, :C])
    state = state_behind(model, state, ids_BT[:, C:-1])
    frozen, alive_B = Frozen(model), jnp.ones((B,), bool)
    options = {"sampling": Sampling(), "eos": (), "ends_chunk": True, "ttt": True}
    seed_B = jnp.zeros((B,), jnp.int32)
    state, _ = decode_step(frozen, state, ids_BT[:, -1], alive_B, seed_B, **options)
    assert_close("S", fast_weights(model, state), oracle, TOLERANCE["bfloat16"])


C = 256


def small_model(write, implementation):
    """Two TTT layers, scanned, in bfloat16."""
    ttt = TTTConfig(
        layers=(1, 3), chunk_size=C, lr=0.3, write=write, decay=0.9, normalize_source=True
    )
    model_config = ModelConfig(
        vocab_size=64, d_model=256, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=64,
        d_ff=512, max_positions=4 * C, sliding_window=128, ttt=ttt,
    )  # fmt: skip
    cfg = replace(model_config, {"ttt.implementation": implementation})
    model = Transformer(cfg, Runtime(dtype="bfloat16"), key=jax.random.key(0))
    return jax.tree_util.tree_map_with_path(with_a_tap, model)


def state_behind(model, state, ids_BP):
    """Read a piece that starts a chunk by the program of evaluation."""
    (B, P), logits = ids_BP.shape, jnp.zeros((ids_BP.shape[0], 64))
    options = {"capacity": None, "at_chunk_start": True, "ttt": True}
    lengths_B = jnp.full((B,), P, jnp.int32)
    return read_piece(Frozen(model), state, logits, ids_BP, lengths_B, **options)[0]


def fast_weights(model, state):
    ((group, run, _),) = model.ttt_runs()
    return np.asarray(state.layers[group][run].ttt.S_BDF, np.float32)


def with_a_tap(path, x):
    """Parameters in bfloat16, and a convolution that is not zero."""
    name = jax.tree_util.keystr(path)
    return jnp.ones(x.shape, jnp.bfloat16) if "conv" in name else x.astype(jnp.bfloat16)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: jnp.dtype(d).name)
def test_loss_on_the_device(monkeypatch, dtype):
    """In one pass over logits as large as 60, in blocks and groups with padding, by float64."""
    B, T, D, V = 2, 300, 64, 5003
    monkeypatch.setattr(loss, "_LOGITS_BYTES", 4 * V * 128)
    monkeypatch.setattr(loss, "_GRADIENT_BYTES", 4 * V * 256)
    keys = jax.random.split(jax.random.key(3), 4)
    h = (8 * jax.random.normal(keys[0], (B, T, D))).astype(dtype)
    w = (jax.random.normal(keys[1], (V, D)) / 8).astype(dtype)
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    weights = (jax.random.uniform(keys[3], (B, T)) > 0.2).astype(jnp.float32) / (B * T)
    value, grads = jax.jit(jax.value_and_grad(loss.cross_entropy, (0, 1)))(h, w, targets, weights)

    h64, w64 = (np.asarray(x.astype(jnp.float32), np.float64) for x in (h, w))
    logits = np.einsum("btd,vd->btv", h64, w64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    total = p.sum(-1, keepdims=True)
    picked = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)
    nll = (np.log(total) + logits.max(-1, keepdims=True) - picked)[..., 0]
    d = p / total
    np.put_along_axis(
        d,
        np.asarray(targets)[..., None],
        np.take_along_axis(d, np.asarray(targets)[..., None], -1) - 1,
        -1,
    )
    d *= np.asarray(weights, np.float64)[..., None]
    tolerance = TOLERANCE[jnp.dtype(dtype).name]
    assert abs(float(value) / (nll * np.asarray(weights)).sum() - 1) <= tolerance
    expected = np.einsum("btv,vd->btd", d, w64), np.einsum("btv,btd->vd", d, h64)
    for name, x, y in zip(("dh", "dw"), grads, expected, strict=True):
        assert_close(name, np.asarray(x.astype(jnp.float32)), y, tolerance)
