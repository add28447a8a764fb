"""A module that is not a language model, to save, damage and restore."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from ttt_jax.checkpoint.checkpointer import Checkpointer
from ttt_jax.checkpoint.checksums import write_checksums
from ttt_jax.checkpoint.parameters import MODEL
from ttt_jax.checkpoint.trees import flat, save_args
from ttt_jax.config import CheckpointConfig, OptimizerConfig
from ttt_jax.errors import CheckpointError
from ttt_jax.training.optimizer import make_optimizer


class Model(nnx.Module):
    def __init__(self, width=8, dtype=jnp.float32, seed=0, bias=False):
        draw = lambda i, shape: jnp.asarray(
            np.random.default_rng([seed, i]).normal(size=shape).astype(dtype)
        )
        self.embed = nnx.Param(draw(0, (16, 8)), axes=("vocab", "embed"))
        self.groups = nnx.List(
            [nnx.Dict(down=nnx.Param(draw(1, (2, 8, width)), axes=("embed", "mlp")))]
        )
        self.scale = nnx.Param(
            jnp.asarray([1 / 3, jnp.nan, -0.0, 1e-40], jnp.bfloat16), axes=("embed",)
        )
        if bias:
            self.bias = nnx.Param(draw(2, (8,)), axes=("embed",))


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(checkpointer, step, model, **options):
    checkpointer.save(
        step,
        model=model,
        opt_state=state_of(model, **options),
        data_state={"step": step},
        extra={"a": 0.1},
    )


def save_parameters(folder, model):
    """Write `folder/model`, a checkpoint of the parameters alone, with its checksums."""
    target = folder / MODEL
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(target, args=save_args(flat(model)))
    write_checksums(folder, [str(x.relative_to(folder)) for x in target.rglob("*") if x.is_file()])


def refusal(call, *args, **kwargs):
    with pytest.raises(CheckpointError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def newest_of(folder, model, warned, **options):
    with Checkpointer(folder, CheckpointConfig(keep=3), warned.append) as checkpointer:
        return checkpointer.restore_newest(
            model=abstract(model), opt_state=abstract(state_of(model)), **options
        )


def older(step):
    """What an older version wrote: no checksums, and nothing that speaks of them."""
    (step / "checksums.json").unlink()
    (step / "extra/metadata").write_text("{}")


def state_of(model, **options):
    tx = make_optimizer(OptimizerConfig(**options), 10, model)
    state = tx.init(model)
    return jax.tree.map(lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), state)
