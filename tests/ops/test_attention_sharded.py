"""Attention over a split sequence against the same sequence on one device: values, gradients,
balance, communication.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.attention import documents_in_xla
from support.hlo import collective_bytes
from support.tolerance import TOLERANCE, assert_close

from ttt_jax.config import MeshConfig
from ttt_jax.errors import UserError
from ttt_jax.model.stack import _remat_policy
from ttt_jax.ops.attention import cudnn as cudnn_attention
from ttt_jax.ops.attention import xla as xla_attention
from ttt_jax.ops.attention.api import self_attention
from ttt_jax.ops.attention.sharded import (
    _Axis,
    _exchange,
    _holder,
    _whole_blocks,
    attention_shard,
)
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.parallel.shard_mapped import Parallel

NAMES = ("o", "dq", "dk", "dv")


def parallel(**sizes):
    mesh = MeshConfig(**({"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes))
    return Parallel(make_mesh(mesh, jax.devices()[: int(np.prod(list(sizes.values())))]))


def inputs(B=2, T=48, N=4, K=2, H=8, dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def segments(T=48):
    """Documents inside a shard, over several shards, and padding."""
    ids = np.stack(
        [np.searchsorted([0, 5, 11, 30], np.arange(T), side="right"), np.full(T, 7)]
    ).astype(np.int32)
    ids[1, T - 7 :] = 0
    return jnp.asarray(ids)


@functools.partial(jit, static_argnums=0)
def value_and_gradients(run, q, k, v, do):
    o, pull = jax.vjp(run, q, k, v)
    return dict(zip(NAMES, (o, *pull(do)), strict=True))


def check(p, x, tolerance, **options):
    want = value_and_gradients(
        functools.partial(self_attention, implementation="xla", **options), *x
    )
    got = value_and_gradients(functools.partial(p.attention, **options), *x)
    for name in NAMES:
        assert_close(name, got[name], want[name], tolerance)


@pytest.mark.parametrize(
    ("window", "packed"),
    [
        (None, False),
        (None, True),
        (1, True),
        (4, True),
        (7, False),
        (7, True),
        (8, True),
        (40, True),
    ],
)
def test_equals_one_device(x64, window, packed):
    """8 shards of 6 tokens: windows of one token, within a shard, of one shard and a token, and
    longer.
    """
    check(
        parallel(context=8),
        inputs(),
        1e-10,
        window=window,
        segment_ids_BT=segments() if packed else None,
    )


@pytest.mark.parametrize("shards", [2, 3])
def test_any_number_of_shards(x64, shards):
    check(parallel(context=shards), inputs(), 1e-10, segment_ids_BT=segments())


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"context": 2, "tensor": 2}, {}),
        ({"fsdp": 2, "context": 2, "tensor": 2}, {"window": 5}),
        ({"context": 2, "tensor": 4}, {}),  # 2 KV heads: neither kind of head is split
        ({"tensor": 2}, {"window": 5}),
    ],
    ids=str,
)
def test_heads_and_rows_are_split_too(x64, sizes, options):
    check(parallel(**sizes), inputs(), 1e-10, segment_ids_BT=segments(), **options)


def test_odd_shards(x64):
    check(parallel(context=4), inputs(T=20), 1e-10)


def test_blocks_of_queries(x64, monkeypatch):
    """Three queries of a half of 12 at a time, then five (which leaves a partial block)."""
    for rows in (3, 5):
        monkeypatch.setattr(xla_attention, "_BLOCK_BYTES", 4 * 2 * 4 * 12 * rows)
        check(parallel(context=2), inputs(), 1e-10, segment_ids_BT=segments())


def test_float32():
    check(
        parallel(context=4),
        inputs(dtype="float32"),
        TOLERANCE["float32"],
        segment_ids_BT=segments(),
    )


def test_bfloat16():
    x = inputs(dtype="bfloat16")
    want = value_and_gradients(self_attention, *(y.astype(jnp.float32) for y in x))
    got = value_and_gradients(parallel(context=4).attention, *x)
    assert got["o"].dtype == got["dk"].dtype == jnp.bfloat16
    assert_close("o", np.asarray(got["o"], np.float32), want["o"], TOLERANCE["bfloat16"])


def test_lengths_that_do_not_divide_are_left_to_gspmd(x64):
    check(parallel(context=4), inputs(T=9), 1e-10)


@pytest.mark.parametrize("window", [9, 10])
@pytest.mark.parametrize("shards", [2, 4])
def test_cudnn_is_told_of_documents_that_shards_do_not_hold_whole(x64, monkeypatch, shards, window):
    """Documents at multiples of 16 in shards of 24 and 12 tokens; the first queries see 8 tokens of
    the neighbour, which is a multiple of where documents start, or 9.
    """
    monkeypatch.setattr(cudnn_attention, "why_not", lambda *_: None)
    monkeypatch.setattr(cudnn_attention, "_cudnn_call", documents_in_xla([]))
    x, ids = (
        inputs(),
        jnp.asarray(np.stack([[1] * 16 + [2] * 16 + [3] * 16, [1] * 32 + [2] * 16]), jnp.int32),
    )
    options = {"window": window, "segment_ids_BT": ids}
    alone = functools.partial(self_attention, implementation="xla", **options)
    want = value_and_gradients(alone, *x)
    options |= {"segment_multiple": 16, "implementation": "cudnn"}
    got = value_and_gradients(functools.partial(parallel(context=shards).attention, **options), *x)
    for name in NAMES:
        assert_close(name, got[name], want[name], 1e-10)


@pytest.mark.parametrize("shards", [2, 3, 4, 8])
def test_work_is_balanced(shards):
    """Every device has two halves of queries and 2P + 1 blocks; together they cover the causal
    triangle once.
    """
    covered = np.zeros((2 * shards, 2 * shards), int)
    mesh = jax.make_mesh(
        (shards,), ("s",), axis_types=(AxisType.Auto,), devices=jax.devices()[:shards]
    )
    axis = _Axis("s", shards)
    blocks = jax.shard_map(
        lambda: jax.tree.map(lambda x: x[None], _whole_blocks(axis)),
        mesh=mesh,
        in_specs=(),
        out_specs=P("s"),
        check_vma=False,
    )()
    for p in range(shards):
        halves = [half for half in range(2 * shards) if _holder(half, shards) == p]
        assert halves == [p, 2 * shards - 1 - p]
        for half in halves:
            covered[half, half] += 1
        for query, key in zip(np.asarray(blocks.query[p]), np.asarray(blocks.key[p]), strict=True):
            covered[halves[query], key] += 1
    np.testing.assert_array_equal(covered, np.tri(2 * shards, dtype=int))


@pytest.mark.parametrize("shards", [2, 3, 4, 8])
def test_the_exchange_and_back(shards):
    mesh = jax.make_mesh(
        (shards,), ("s",), axis_types=(AxisType.Auto,), devices=jax.devices()[:shards]
    )
    axis = _Axis("s", shards)
    T = 4 * shards
    x = np.arange(T)[None]
    split = functools.partial(jax.shard_map, mesh=mesh, in_specs=P(None, "s"), check_vma=False)
    run = lambda function, out_specs: np.asarray(jit(split(function, out_specs=out_specs))(x))
    there = run(lambda x: _exchange(x, axis)[None], P("s"))
    for p in range(shards):
        np.testing.assert_array_equal(there[p, :, 0, 0], [2 * p, 2 * (2 * shards - 1 - p)])
    back = run(lambda x: _exchange(_exchange(x, axis), axis, back=True), P(None, "s"))
    np.testing.assert_array_equal(back, x)


def test_a_window_gathers_nothing():
    """Four tokens from the neighbour, keys and values, there and back; full attention gathers all
    48.
    """
    p, x = parallel(context=4), inputs(dtype="float32")
    place = NamedSharding(p.mesh, P(None, p.axis))
    x = [jax.device_put(y, place) for y in x]
    run = lambda q, k, v, do, **options: jax.vjp(
        functools.partial(p.attention, **options), q, k, v
    )[1](do)
    moved = collective_bytes(jit(functools.partial(run, window=5)).lower(*x).compile().as_text())
    token = 4 * 2 * 8 * 2  # bytes of one token's keys, both rows
    assert moved.pop("collective-permute") == 4 * token * (2 * 2 + 2 * 2), (
        "keys and values, twice the queries"
    )
    assert not any(moved.values()), moved
    moved = collective_bytes(jit(run).lower(*x).compile().as_text())
    assert moved["all-gather"] == 2 * 48 * token, (
        "keys and values, once: XLA shares them with the backward here"
    )
    assert moved["reduce-scatter"] == 2 * 12 * token


@pytest.mark.parametrize(("saved", "exchanges"), [((), 16), (("attention",), 12)], ids=str)
def test_rematerialisation_keeps_the_output_and_its_statistics(saved, exchanges):
    """Two permutations each: queries and outputs forward; queries, outputs, their gradients and the
    queries' backward. Without the saved output the forward runs once more.
    """
    run = jax.checkpoint(
        lambda q, k, v: 2.0 * parallel(context=4).attention(q, k, v), policy=_remat_policy(saved)
    )
    program = jax.make_jaxpr(lambda q, k, v, do: jax.vjp(run, q, k, v)[1](do))(
        *inputs(dtype="float32")
    )
    assert str(program).count("ppermute[") == exchanges


def test_errors():
    q, k, v, _ = inputs(dtype="float32")
    with pytest.raises(UserError, match="'cudnn' over a split sequence: needs a CUDA device"):
        parallel(context=2).attention(q, k, v, implementation="cudnn")
    with pytest.raises(UserError, match="'flash': unknown"):
        attention_shard(q, k, v, axis="s", shards=2, implementation="flash")


def test_masks_are_not_kept_for_the_backward_pass():
    """What a rematerialised layer keeps may hold one block's mask, not those of all 2P - 1
    blocks.
    """
    p, (q, k, v, _), ids = parallel(context=4), inputs(dtype="float32"), segments()
    layer = jax.checkpoint(
        lambda h: p.attention(h, k, v, segment_ids_BT=ids), policy=_remat_policy(("attention",))
    )

    def loss(q):
        return jax.lax.scan(lambda h, _: (layer(h), None), q, None, length=2)[0].sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(q))
    masks = [
        np.prod([int(n) for n in shape.split(",")])
        for shape in re.findall(r"bool\[([\d,]+)\]", program)
    ]
    assert max(masks) == 2 * 4 * 6 * 6, "rows, heads, and the tokens of two halves"
