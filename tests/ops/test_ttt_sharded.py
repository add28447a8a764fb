"""The op over a split sequence: equal to one device in values and gradients; what its prefix moves
and keeps.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support.hlo import collective_bytes
from support.tolerance import TOLERANCE, assert_close

from ttt_jax.config import MeshConfig
from ttt_jax.errors import UserError
from ttt_jax.ops import in_place_ttt
from ttt_jax.ops.ttt.sharded import exclusive_prefix, in_place_ttt_shard
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.parallel.shard_mapped import Parallel

C = 4
NAMES = ("z", "v", "w", "lr", "state")


def parallel(**sizes):
    mesh = MeshConfig(**({"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes))
    return Parallel(make_mesh(mesh, jax.devices()[: int(np.prod(list(sizes.values())))]))


def arrays(B, T, D, F, dtype, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"z": (B, T, F), "v": (B, T, D), "w": (D, F), "lr": (), "state": (B, D, F)}
    x = {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}
    x["lr"] = jnp.asarray(0.3, x["z"].dtype)
    return (
        x,
        jnp.asarray(rng.standard_normal((B, T, D)), dtype),
        jnp.asarray(rng.standard_normal((B, D, F)), dtype),
    )


def segments(B, T, kind):
    """Documents that start inside shards, at their edges, and before padding; chunks are whole."""
    if kind is None:
        return None
    starts = {"edges": [[0, T // 2], [0, T // 4]], "inside": [[0, C, 3 * C, T // 2 - C], [0]]}[kind]
    ids = np.stack(
        [np.searchsorted(starts[b % 2], np.arange(T), side="right") for b in range(B)]
    ).astype(np.int32)
    ids[0, T - 2 :] = 0
    if kind == "edges":  # padding from inside the last chunk of a shard
        ids[1, T // 2 - 1 :] = 0
    return jnp.asarray(ids)


def value_and_gradients(op, x, do, dS, **options):
    def run(x):
        x = dict(x)
        return op(x.pop("z"), x.pop("v"), x.pop("w"), **x, **options)

    @jit
    def both(x, do, dS):
        out, pull = jax.vjp(run, x)
        return out, pull((do, dS))[0]

    (o, S), gradients = both(x, do, dS)
    return {"o": o, "S": S} | {f"d{name}": value for name, value in gradients.items()}


MESHES = [
    {"context": 2},
    {"context": 4},
    {"context": 8},
    {"context": 2, "tensor": 2},
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"data": 2, "context": 4},
    {"tensor": 4},
    {"fsdp": 2},
]
name_of = lambda sizes: "x".join(f"{k}{v}" for k, v in sizes.items())


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        *((sizes, "inside") for sizes in MESHES),
        *((MESHES[i], kind) for i in (1, 4) for kind in (None, "edges")),
    ],
    ids=lambda x: name_of(x) if isinstance(x, dict) else str(x),
)
def test_equals_one_device(sizes, kind):
    """D = 6 rows do not divide by 4 or 8 shards; an initial state, a gradient to the final one."""
    x, do, dS = arrays(2, 8 * C * 2, 6, 8, "float32")
    options = {"chunk_size": C, "segment_ids": segments(2, 8 * C * 2, kind)}
    want = value_and_gradients(in_place_ttt, x, do, dS, **options)
    got = value_and_gradients(parallel(**sizes).in_place_ttt, x, do, dS, **options)
    for name, value in got.items():
        assert_close(name, value, want[name], TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("sizes", "implementation"),
    [({"context": 4}, "reference"), ({"context": 2, "tensor": 2}, "xla"), ({"tensor": 2}, "xla")],
    ids=lambda x: x if isinstance(x, str) else name_of(x),
)
def test_equals_one_device_exactly(x64, sizes, implementation):
    """float64, without an initial state, clipping some of the chunks."""
    x, do, dS = arrays(2, 8 * C, 5, 8, "float64")
    del x["state"]
    options = {"chunk_size": C, "segment_ids": segments(2, 8 * C, "inside"), "clip_norm": 3.0}
    want = value_and_gradients(in_place_ttt, x, do, dS, **options)
    norm_BM = np.linalg.norm(
        np.einsum("bmcd,bmcf->bmdf", *(x[n].reshape(2, 8, C, -1) for n in "vz")), axis=(2, 3)
    )
    assert 2 < np.sum(norm_BM * 0.3 > 3.0) < 14, "some chunks are clipped and some are not"
    got = value_and_gradients(
        parallel(**sizes).in_place_ttt, x, do, dS, **options, implementation=implementation
    )
    for name, value in got.items():
        assert_close(name, value, want[name], TOLERANCE["float64"])


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 2}, {"fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2}], ids=name_of
)
def test_devices_with_the_same_rows_split_D(x64, sizes):
    """One row: `fsdp` has none to split. Some chunks are clipped; no device holds all of S."""
    x, do, dS = arrays(1, 8 * C, 8, 8, "float64")
    options = {"chunk_size": C, "clip_norm": 5.0}
    v, z = (np.asarray(x[name]).reshape(8, C, 8) for name in "vz")
    over_M = 0.3 * np.linalg.norm(np.einsum("mcd,mcf->mdf", v, z), axis=(1, 2)) > 5.0
    assert over_M.any()
    assert not over_M.all()
    want = value_and_gradients(in_place_ttt, x, do, dS, **options)
    devices = parallel(**sizes)
    got = value_and_gradients(devices.in_place_ttt, x, do, dS, **options)
    for name, value in got.items():
        assert_close(name, value, want[name], TOLERANCE["float64"])
    assert np.prod(got["S"].sharding.shard_shape(got["S"].shape)) == 64 // devices.mesh.size


def test_blocks_of_chunks_and_one_product_in_shards(x64, monkeypatch):
    """Documents start inside of blocks, and at other chunks on each shard."""
    registry = importlib.import_module("ttt_jax.ops.ttt.api")
    in_blocks = registry._FAST["xla"]._replace(block=lambda call: 2)
    monkeypatch.setitem(registry._FAST, "xla", in_blocks)
    x, do, dS = arrays(2, 8 * C, 5, 8, "float64")
    options = {"chunk_size": C, "segment_ids": segments(2, 8 * C, "inside")}
    want = value_and_gradients(in_place_ttt, x, do, dS, **options, implementation="reference")
    op = parallel(context=2, tensor=2).in_place_ttt
    got = value_and_gradients(op, x, do, dS, **options, apply="fused", implementation="xla")
    for name, value in got.items():
        assert_close(name, value, want[name], TOLERANCE["float64"])


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [({"context": 4}, "inside"), ({"context": 2, "tensor": 2}, "edges"), ({"context": 8}, None)],
    ids=lambda x: name_of(x) if isinstance(x, dict) else str(x),
)
def test_decay_equals_one_device_exactly(x64, sizes, kind):
    """float64; without documents also with rows of 5 and 9 of the 16 chunks, the others' targets
    zero.
    """
    x, do, dS = arrays(2, 16 * C, 5, 8, "float64")
    options = {"chunk_size": C, "segment_ids": segments(2, 16 * C, kind), "decay": 0.7}
    if kind is None:
        whole_B = jnp.asarray([5, 9], "int32")
        options["whole_chunks"] = whole_B
        written_BT = jnp.arange(16 * C, dtype="int32")[None] // C < whole_B[:, None]
        x["v"] = jnp.where(written_BT[:, :, None], x["v"], 0)
    want = value_and_gradients(in_place_ttt, x, do, dS, **options, implementation="reference")
    got = value_and_gradients(parallel(**sizes).in_place_ttt, x, do, dS, **options)
    for name, value in got.items():
        if name == "dv" and kind is None:  # what is not written has a gradient of its own
            value, want[name] = (jnp.where(x["v"] != 0, y, 0) for y in (value, want[name]))
        assert_close(name, value, want[name], TOLERANCE["float64"])


def test_bfloat16_keeps_a_small_update(x64):
    """The adaptation term against float64, beside the single device's error, with ||S|| / ||W||
    about 1e-3.
    """
    x, *_ = arrays(1, 16 * C, 16, 32, "bfloat16")
    x["lr"], x["state"] = jnp.float32(1e-4), None
    with_lr = lambda lr: {
        **{k: None if v is None else v.astype("float64") for k, v in x.items()},
        "lr": lr,
    }
    call = lambda op, x: op(x["z"], x["v"], x["w"], lr=x["lr"], chunk_size=C, state=x["state"])
    term = np.asarray(call(in_place_ttt, with_lr(1e-4))[0] - call(in_place_ttt, with_lr(0.0))[0])
    slow = np.asarray(call(in_place_ttt, with_lr(0.0))[0])
    o, S = jit(lambda x: call(parallel(context=4).in_place_ttt, x))(x)
    o_one, S_one = jit(lambda x: call(in_place_ttt, x))(x)
    assert S.dtype == jnp.float32
    assert_close("S", S, S_one, 1e-5)
    assert_close("o", np.asarray(o, np.float64), slow + term, TOLERANCE["bfloat16"])
    assert np.mean(np.asarray(o) == np.asarray(o_one)) > 0.99


def test_a_shard_must_hold_whole_chunks():
    x, *_ = arrays(1, 4 * C, 3, 5, "float32")
    mesh = jax.make_mesh((4,), ("s",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    op = lambda z, v, w: in_place_ttt_shard(z, v, w, lr=0.1, chunk_size=3, axis="s", shards=4)[0]
    split = P(None, "s")
    with pytest.raises(UserError, match="shard of 4 tokens does not hold whole chunks of 3"):
        jax.shard_map(
            op, mesh=mesh, in_specs=(split, split, P()), out_specs=split, check_vma=False
        )(x["z"], x["v"], x["w"])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shards", [2, 3, 8])
def test_exclusive_prefix(x64, shards, reverse):
    """Against the recurrence written out, with maps that forget."""
    rng = np.random.default_rng(0)
    B, D, F = 2, 5, 3
    delta, keep = rng.standard_normal((shards, B, D, F)), rng.integers(0, 3, (shards, B)) / 2
    X = -(-D // shards)
    start = rng.standard_normal((B, D, F))
    mesh = jax.make_mesh(
        (shards,), ("s",), axis_types=(AxisType.Auto,), devices=jax.devices()[:shards]
    )

    def local(delta, keep, start):
        S, end = exclusive_prefix(
            delta[0], keep[0], start, axis="s", shards=shards, reverse=reverse
        )
        return S[None], end

    padded = jnp.asarray(np.pad(start, ((0, 0), (0, shards * X - D), (0, 0))))
    specs = (P("s"), P("s"), P(None, "s"))
    run = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=(P("s"), P(None, "s")), check_vma=False
    )
    got, end = jit(run)(jnp.asarray(delta), jnp.asarray(keep), padded)
    S = start
    for p in reversed(range(shards)) if reverse else range(shards):
        np.testing.assert_allclose(got[p], S, atol=1e-12)
        S = keep[p][:, None, None] * S + delta[p]
    np.testing.assert_allclose(end[:, :D], S, atol=1e-12)


def compiled(p, T, gradient, D=64, F=96):
    x, do, _ = arrays(1, T, D, F, "float32")
    x["state"] = None
    run = lambda z, v, w: parallel(**p).in_place_ttt(z, v, w, lr=0.1, chunk_size=C)[0]
    if gradient:
        run = lambda z, v, w, run=run: jax.vjp(run, z, v, w)[1](do)[:2]
    place = parallel(**p).mesh
    sharded = [
        jax.ShapeDtypeStruct(x[n].shape, "float32", sharding=jax.sharding.NamedSharding(place, s))
        for n, s in (("z", P(None, "context")), ("v", P(None, "context")), ("w", P()))
    ]
    return jax.jit(run).lower(*sharded).compile()


@pytest.mark.parametrize("gradient", [False, True])
def test_the_prefix_moves_as_much_on_any_number_of_shards(gradient):
    """Two all_to_all of S (results counted whole, own slice included) in each direction, and
    nothing else of that size.
    """
    S = 4 * 64 * 96
    for shards in (2, 4, 8):
        moved = collective_bytes(compiled({"context": shards}, 16 * C, gradient).as_text())
        assert moved["all-to-all"] == (4 if gradient else 2) * S, (shards, moved)
        assert sum(moved.values()) - moved["all-to-all"] <= S // 100, (shards, moved)


def test_the_backward_keeps_no_state_per_chunk():
    """Temporary memory grows by a few arrays of C tokens for each further chunk of the shard; one S
    would be larger.
    """
    few, many = (
        compiled({"context": 2}, 2 * n * C, True).memory_analysis().temp_size_in_bytes
        for n in (4, 36)
    )
    assert (many - few) / 32 < 4 * 64 * 96 / 2, "half an S for each further chunk"
