"""The TPU attention kernel, interpreted on the CPU, against the XLA path: values, gradients,
meshes, split sequences.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info_lib
from support.tolerance import TOLERANCE, assert_close

from ttt_jax.config import MeshConfig
from ttt_jax.errors import UserError
from ttt_jax.ops.attention import api as attention
from ttt_jax.ops.attention import api as attention_api
from ttt_jax.ops.attention import splash
from ttt_jax.ops.attention.api import self_attention
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.parallel.shard_mapped import Parallel

NAMES = ("o", "dq", "dk", "dv")


def inputs(B=2, T=300, N=4, K=2, H=64, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def segments(T):
    """Documents that start anywhere, and padding."""
    ids = np.stack(
        [np.searchsorted([0, T // 7, T // 2], np.arange(T), side="right"), np.full(T, 7)]
    ).astype(np.int32)
    ids[1, T - 77 :] = 0
    return jnp.asarray(ids)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(run, q, k, v, do):
    o, pull = jax.vjp(run, q, k, v)
    return dict(zip(NAMES, (o, *pull(do)), strict=True))


def check(run, x, tolerance, **options):
    want = value_and_gradients(
        functools.partial(self_attention, implementation="xla", **options), *x
    )
    # jax's kernel is not written for strict promotion.
    with (
        splash.interpreted(),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        got = value_and_gradients(functools.partial(run, implementation="splash", **options), *x)
    for name in NAMES:
        assert got[name].dtype == x[0].dtype
        assert_close(
            name, np.asarray(got[name], np.float64), np.asarray(want[name], np.float64), tolerance
        )


@pytest.mark.parametrize(
    ("T", "window", "packed"),
    [(300, None, False), (300, None, True), (256, 100, True), (520, 129, True), (70, 500, False)],
)
def test_equals_xla(T, window, packed):
    """Lengths that do not fill blocks, windows within a block and over three, grouped queries."""
    check(
        self_attention,
        inputs(T=T),
        TOLERANCE["float32"],
        window=window,
        segment_ids_BT=segments(T) if packed else None,
    )


@pytest.mark.parametrize(("N", "K", "H"), [(2, 2, 128), (4, 1, 64), (6, 2, 80)])
def test_heads(N, K, H):
    check(self_attention, inputs(B=1, T=130, N=N, K=K, H=H), TOLERANCE["float32"])


def test_bfloat16():
    """Against the XLA path in float32 on the same rounded numbers; the kernel rounds the scaled
    queries once more.
    """
    x = inputs(T=256, H=128, dtype="bfloat16")
    want = value_and_gradients(
        functools.partial(self_attention, implementation="xla"), *(a.astype(jnp.float32) for a in x)
    )
    with (
        splash.interpreted(),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        got = value_and_gradients(functools.partial(self_attention, implementation="splash"), *x)
    for name in NAMES:
        assert_close(
            name,
            np.asarray(got[name], np.float64),
            np.asarray(want[name], np.float64),
            TOLERANCE["bfloat16"],
        )


def parallel(**sizes):
    mesh = MeshConfig(**({"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes))
    return Parallel(make_mesh(mesh, jax.devices()[: int(np.prod(list(sizes.values())))]))


@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        ({"data": 2, "tensor": 2}, None),
        ({"fsdp": 2}, 100),
        ({"context": 2, "tensor": 2}, None),  # blocks merged by their log-sum-exps
        pytest.param({"context": 3}, None, marks=pytest.mark.slow),
        ({"context": 2}, 60),  # the neighbour's last tokens
    ],
    ids=str,
)
def test_on_a_mesh(sizes, window):
    T = 256 * sizes.get("context", 1)
    check(
        parallel(**sizes).attention,
        inputs(T=T),
        TOLERANCE["float32"],
        window=window,
        segment_ids_BT=segments(T),
    )


def info(mask, block, dkv):
    multi = mask_lib.MultiHeadMask([mask] * 2)
    return (info_lib.process_mask_dkv if dkv else info_lib.process_mask)(multi, (block, block))


@pytest.mark.parametrize("dkv", [False, True])
@pytest.mark.parametrize(
    ("T", "block", "window"), [(1024, 128, None), (1024, 128, 300), (768, 256, 256), (768, 128, 1)]
)
def test_the_table_of_blocks_is_the_librarys(T, block, window, dkv):
    """Our mask answers what is asked of a block without computing its entries."""
    theirs = (
        mask_lib.CausalMask((T, T))
        if window is None
        else mask_lib.LocalMask((T, T), (window - 1, 0), 0)
    )
    (want, entry), (got, own_entry) = (
        info(theirs, block, dkv),
        info(splash._Causal(T, window), block, dkv),
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)
    q, k = np.mgrid[:T:7, :T:5]
    np.testing.assert_array_equal(own_entry(q, k), entry(q, k))
    jax.tree.map(
        np.testing.assert_array_equal,
        info(splash._All(T), block, dkv),
        info(mask_lib.FullMask((T, T)), block, dkv),
    )


@pytest.mark.parametrize(
    ("T", "window", "expected"),
    [
        (1, None, (128, 128)),
        (512, None, (512, 512)),
        (640, None, (384, 768)),
        (4097, None, (512, 4608)),
        (4096, 100, (128, 4096)),
        (8192, 300, (384, 8448)),
        (131072, None, (1024, 131072)),
    ],
)
def test_blocks_cover_the_sequence(T, window, expected):
    assert splash.block_size(T, window) == expected


def test_what_splash_takes(monkeypatch):
    bf16 = lambda T: jax.ShapeDtypeStruct((1, T, 2, 64), jnp.bfloat16)
    assert splash.why_not(bf16(256)) == "needs a TPU, this is cpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert splash.why_not(bf16(256)) is None
    assert "needs bfloat16, got float32" in str(
        splash.why_not(jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.float32))
    )
    assert "split the sequence (mesh.context)" in str(splash.why_not(bf16(splash.LONGEST + 1)))
    assert "multiple of 128 tokens, got 100" in str(splash.why_not_blocks(100))
    # Eight devices and no mesh: nothing says whose arrays these are, so the kernel is not taken,
    # and that is said once.
    attention_api._say_once.cache_clear()
    with pytest.warns(UserWarning, match="no fast kernel .*using the XLA path"):
        self_attention(*(jnp.zeros((1, 8, 2, 64), jnp.bfloat16),) * 3)


def test_a_named_implementation_that_cannot_run_says_why():
    q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(UserError, match="'splash': needs a TPU, this is cpu"):
        self_attention(q, q, q, implementation="splash")
    with pytest.raises(UserError, match="'splash': it attends to fresh sequences only"):
        attention.uses_cudnn(q, "splash")
    with (
        splash.interpreted(),
        pytest.raises(UserError, match="'splash' over a split sequence: half a shard"),
    ):
        parallel(context=2).attention(q, q, q, implementation="splash")
