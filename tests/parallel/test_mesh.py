"""The mesh and its rules: a sharded step equals one on a single device, and nothing big is
replicated.
"""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support.tolerance import assert_close

from ttt_jax.config import Config, MeshConfig, from_dict
from ttt_jax.errors import ConfigError
from ttt_jax.model.layers import RMSNorm
from ttt_jax.parallel.mesh import make_mesh, model_shardings, put_batch, spec
from ttt_jax.training.step import abstract_state, init_state, make_train_step

MODEL = {
    "vocab_size": 64,
    "d_model": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 48,
    "sliding_window": 16,
    "full_attention_layers": [1],
    "qk_norm": True,
    "init_std": 0.2,
    "ttt": {"layers": [0], "chunk_size": 8, "lr": 0.05},
}


def steps(mesh_sizes, accumulate=1, number=3, **ttt):
    """Losses, gradient norms and the parameters after some steps on packed rows."""
    config = from_dict(
        Config,
        {
            "model": MODEL | {"ttt": MODEL["ttt"] | ttt},
            "data": {"seq_len": 48, "batch_size": 8},
            "optimizer": {
                "lr": 1e-3,
                "warmup_steps": 0,
                "schedule": "constant",
                "accumulate": accumulate,
            },
            "mesh": mesh_sizes,
        },
    )
    count = int(np.prod([abs(size) for size in mesh_sizes.values()]))
    mesh = make_mesh(config.mesh, jax.devices()[:count])
    abstract, tx = abstract_state(config, mesh)
    state, step = init_state(config, abstract, tx), make_train_step(config, tx)
    rng, metrics = np.random.default_rng(0), []
    for _ in range(number):
        ids = rng.integers(0, 64, (8, 49)).astype(np.int32)
        segments = np.broadcast_to(np.arange(48) // 24 + 1, (8, 48)).astype(np.int32).copy()
        # rows, and so micro-batches, of other counts
        segments[np.arange(48) >= 45 - 5 * np.arange(8)[:, None]] = 0
        positions = np.broadcast_to(np.arange(48) % 24, (8, 48)).astype(np.int32)
        batch = {
            "ids": ids[:, :-1],
            "targets": ids[:, 1:],
            "weights": (segments > 0).astype(np.float32),
        }
        state, out = step(
            state, put_batch(batch | {"segment_ids": segments, "positions": positions}, mesh)
        )
        metrics.append([float(out["loss"]), float(out["grad_norm"])])
    return np.array(metrics), state


ONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}


@pytest.fixture(scope="module")
def single():
    metrics, state = steps(ONE)
    return metrics, jax.device_get(jax.tree.leaves(state.model))


@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 8}, {"tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2}],
    ids=lambda sizes: "x".join(f"{k}{v}" for k, v in sizes.items()),
)
def test_a_sharded_step_equals_one_device(sizes, single):
    metrics, state = steps(ONE | sizes)
    assert_close("losses and gradient norms", metrics, single[0], 1e-5)
    for x, y in zip(jax.tree.leaves(state.model), single[1], strict=True):
        # Adam divides by the gradient's size, so a rounding difference may move a parameter by a
        # share of lr.
        assert np.abs(np.asarray(x) - y).max() < 2e-4


def test_prediction_errors_of_a_sharded_step_are_those_of_one_device():
    """Their logits are made by devices that have tokens of their own, and the whole head. What is
    read of them is limited.
    """
    ttt = {"target": "prediction_error", "write": "ridge", "layers": [0, 1], "lr": 1.0}
    ttt |= {"read_cap": 0.05, "decay": 0.9}
    sizes = {"fsdp": 2, "context": 2, "tensor": 2}
    metrics, one = (steps(ONE | mesh, number=2, **ttt)[0] for mesh in (sizes, {}))
    assert_close("losses and gradient norms", metrics, one, 1e-5)


def test_accumulation_equals_one_batch(single):
    """The mean is over the tokens of the whole batch, not over the means of micro-batches, whose
    counts differ.
    """
    metrics, _ = steps(ONE, accumulate=4)
    assert_close("losses and gradient norms", metrics, single[0], 1e-5)


def test_large_parameters_and_moments_are_sharded():
    config = from_dict(
        Config, {"model": MODEL, "data": {"seq_len": 48}, "mesh": {"fsdp": 4, "tensor": 2}}
    )
    abstract, _ = abstract_state(config, make_mesh(config.mesh))
    for leaf in jax.tree.leaves((abstract.model, abstract.opt_state)):
        shard = leaf.sharding.shard_shape(leaf.shape)
        if np.prod(leaf.shape) >= 32 * 32:
            assert np.prod(shard) <= np.prod(leaf.shape) / 4, (leaf.shape, shard)


def test_specs():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, context=1, tensor=2))
    assert spec(("mlp", "embed"), (2, 48, 32), mesh) == P(None, "tensor", "fsdp")
    assert spec(("mlp", "embed"), (47, 30), mesh) == P(None, None), (
        "sizes that do not divide stay whole"
    )
    assert spec(("batch", "tokens"), (8, 16), mesh) == P("fsdp", None)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    assert spec(("mlp", "embed"), (48, 32), mesh) == P("tensor", ("fsdp", "context"))
    assert spec(("mlp", "embed"), (48, 30), mesh) == P("tensor", "fsdp"), (
        "the first axes that divide"
    )
    assert spec(("batch", "embed", "mlp"), (2, 32, 48), mesh) == P("fsdp", "context", "tensor"), "S"
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, context=1, tensor=2))
    norm = RMSNorm(32, "embed", 1e-6, key=jax.random.key(0))
    assert [x.spec for x in jax.tree.leaves(model_shardings(norm, mesh))] == [P(None)], (
        "vectors are replicated"
    )


@pytest.mark.parametrize(
    ("sizes", "words"),
    [({"data": 3}, "does not divide 8 devices"), ({"data": 2, "fsdp": 2}, "needs 4 devices")],
)
def test_a_mesh_that_does_not_fit(sizes, words):
    with pytest.raises(ConfigError, match=words):
        make_mesh(MeshConfig(**({"fsdp": -1} | sizes)))
