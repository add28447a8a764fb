"""`OneDevice` and `Parallel` answer alike.

B batch, T tokens, D model width, F MLP width, V vocabulary, C chunk size.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tolerance import assert_close

from ttt_jax.config import MeshConfig
from ttt_jax.model.loss import expected_row, token_nll
from ttt_jax.ops.ttt.writes import transformed
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.parallel.one_device import ONE_DEVICE
from ttt_jax.parallel.shard_mapped import Parallel, make_parallel

B, D, F, V, C = 2, 6, 8, 11, 4


def on_two(**sizes):
    return Parallel(make_mesh(MeshConfig(**{"data": 1, "fsdp": 1} | sizes), jax.devices()[:2]))


def arrays(T):
    rng = np.random.default_rng(0)
    shapes = {"z": (B, T, F), "v": (B, T, D), "w": (D, F), "table": (V, D)}
    return {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}


def answers(devices, T):
    x = arrays(T)
    ids_BT = jnp.arange(B * T, dtype=jnp.int32).reshape(B, T) % V
    lr = jnp.asarray(0.1)
    expected = functools.partial(expected_row, normalize=True)

    def run(z, v, w, table):
        o_BTD, S_BDF = devices.in_place_ttt(z, v, w, lr=lr, chunk_size=C)
        end = T // C * C
        ridge = functools.partial(
            transformed, "ridge", chunk_size=C, over_chunks=devices.over_chunks
        )
        written, vjp = jax.vjp(ridge, z[:, :end], v[:, :end]) if end else (v, lambda _: ())
        gradients = dict(zip(("dz", "dv"), vjp(v[:, :end]), strict=False))
        return gradients | {
            "written": written,
            "outputs": o_BTD,
            "state": S_BDF,
            "norm": devices.last_update_norm(z, v, lr, C),
            "embeddings": devices.pin(devices.embed(table, ids_BT)),
            "expected": devices.over_vocabulary(expected, v, table),
            "losses": devices.over_vocabulary(token_nll, v, table, ids_BT),
        }

    return jax.jit(run)(*x.values())


@pytest.mark.parametrize(
    ("sizes", "T"),
    [({"context": 2}, 16), ({"tensor": 2}, 16), ({"tensor": 2}, 14), ({"tensor": 2}, 3)],
)
def test_a_mesh_gives_what_one_device_gives(sizes, T, x64):
    """Also with tokens behind the last whole chunk, and without a whole one."""
    devices = on_two(**sizes)
    assert devices.splits(T, C)
    got, want = answers(devices, T), answers(ONE_DEVICE, T)
    for name, x in want.items():
        assert got[name].shape == x.shape
        assert_close(name, got[name], x, 1e-12)
    assert (want["norm"] > 0).all() == (T >= C)


def test_one_device_splits_nothing():
    assert make_parallel(make_mesh(MeshConfig(), jax.devices()[:1])) is ONE_DEVICE
    assert (ONE_DEVICE.shards, ONE_DEVICE.axis) == (1, None)
    assert ONE_DEVICE.splits(7, 4)
    assert ONE_DEVICE.head_axes(4, 2) == (None, None)
    x = jnp.ones((2, 3))
    assert ONE_DEVICE.pin(x) is x
