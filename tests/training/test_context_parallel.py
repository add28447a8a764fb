"""The whole model and its training on meshes that split rows, sequence, heads, F and parameters:
equal to one device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from support.hlo import collectives
from support.tolerance import TOLERANCE, assert_close

from ttt_jax.config import Config, from_dict
from ttt_jax.model.loss import cross_entropy
from ttt_jax.model.param_path import param_path
from ttt_jax.model.transformer import Transformer
from ttt_jax.parallel.mesh import make_mesh, put_batch
from ttt_jax.training.heldout import evaluate_by_position, make_position_nll
from ttt_jax.training.step import abstract_state, init_state, make_train_step

V, T, B, C = 64, 64, 8, 8
MODEL = {
    "vocab_size": V,
    "d_model": 36,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 48,
    "sliding_window": 7,
    "full_attention_layers": [1],
    "qk_norm": True,
    "init_std": 0.2,
    "max_positions": 64,
    "rope": {"kind": "yarn", "factor": 4.0, "original_max_positions": 16},
    "ttt": {"layers": [0, 1], "chunk_size": C, "lr": 0.05},
}
# the fast tests; tests/parallel/test_mesh.py has the other axes alone
MIXED = ("context", "fsdp, context, tensor")
ONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "context": {"context": 8},
    "tensor": {"tensor": 2},
    "fsdp, context, tensor": {"fsdp": 2, "context": 2, "tensor": 2},
    "data, context": {"data": 2, "context": 4},
}


def make_config(sizes, **optimizer):
    optimizer = {"lr": 1e-3, "warmup_steps": 0, "schedule": "constant"} | optimizer
    return from_dict(
        Config,
        {
            "model": MODEL,
            "data": {"seq_len": T, "batch_size": B},
            "optimizer": optimizer,
            "mesh": ONE | sizes,
            "steps": 20,
        },
    )


def mesh_for(sizes):
    return make_mesh(make_config(sizes).mesh, jax.devices()[: int(np.prod(list(sizes.values())))])


@functools.cache
def parameters():
    """Random parameters of every kind, by path, on the host."""
    rng = np.random.default_rng(0)
    model = jax.eval_shape(lambda: Transformer(make_config({}).model, key=jax.random.key(0)))

    def leaf(path, x):
        scale = param_path(path).endswith("scale")
        return (
            rng.standard_normal(x.shape) * (0.1 if scale else 0.3) + (1 if scale else 0)
        ).astype(np.float32)

    return [leaf(*item) for item in jax.tree_util.tree_flatten_with_path(model)[0]]


def make_model(sizes):
    abstract, _ = abstract_state(make_config(sizes), mesh_for(sizes))
    leaves, tree = jax.tree.flatten(abstract.model)
    return tree.unflatten(
        jax.device_put(x, y.sharding) for x, y in zip(parameters(), leaves, strict=True)
    )


def make_batch(seed=0, rows=B):
    """Packed rows: documents of 24, 8 and 16 tokens that start inside shards, then padding."""
    ids = np.random.default_rng(seed).integers(0, V, (rows, T + 1)).astype(np.int32)
    starts = [0, 24, 32]
    segments = (
        np.broadcast_to(np.searchsorted(starts, np.arange(T), side="right"), (rows, T))
        .astype(np.int32)
        .copy()
    )
    segments[::2, 45:] = 0
    segments[1] = 1  # one document in the whole row
    positions = np.arange(T)[None] - np.take(starts, np.maximum(segments - 1, 0))
    return {
        "ids": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": (segments > 0).astype(np.float32),
        "segment_ids": segments,
        "positions": positions.astype(np.int32),
    }


@jit
def loss_and_gradients(model, batch):
    def loss(model):
        h, _, stats = model.hidden(
            batch["ids"], segment_ids=batch["segment_ids"], positions=batch["positions"]
        )
        tokens = (
            h,
            model.output_weight,
            batch["targets"],
            batch["weights"] / batch["weights"].sum(),
        )
        return model.runtime.parallel.over_tokens(cross_entropy, *tokens), stats

    return jax.value_and_grad(loss, has_aux=True)(model)


def named(model):
    return {param_path(path): x for path, x in jax.tree_util.tree_flatten_with_path(model)[0]}


@pytest.fixture(scope="module")
def single():
    (loss, stats), gradients = loss_and_gradients(make_model({}), make_batch())
    assert min(float(x["state_ratio_B"].max()) for x in stats.values()) > 0.02, (
        "the fast weights matter"
    )
    return loss, stats, named(gradients)


@pytest.mark.parametrize(
    "name", [*MIXED, *(pytest.param(m, marks=pytest.mark.slow) for m in MESHES if m not in MIXED)]
)
def test_loss_and_gradients_equal_one_device(name, single):
    """Packed rows, sliding window and full attention, yarn, TTT: every gradient, and the
    statistics.
    """
    model, batch = make_model(MESHES[name]), make_batch()
    (loss, stats), gradients = loss_and_gradients(model, put_batch(batch, mesh_for(MESHES[name])))
    assert_close("loss", loss, single[0], TOLERANCE["float32"])
    for path, gradient in named(gradients).items():
        assert_close(path, gradient, single[2][path], TOLERANCE["float32"])
    for layer, stat in stats.items():
        for key, value in stat.items():
            assert_close(f"layer {layer} {key}", value, single[1][layer][key], TOLERANCE["float32"])


def test_ragged_lengths_and_a_state_to_read_on_with():
    """Rows padded at the right, then more tokens of odd number: the split prefill and its state
    equal one device's.
    """
    ids, more = (jnp.asarray(make_batch(seed)["ids"][:2]) for seed in (3, 4))
    lengths = jnp.asarray([T - 3, 2 * C + 5], jnp.int32)

    @jit
    def read(model, ids, more, lengths):
        h, state, _ = model.hidden(ids, keep_state=True, lengths=lengths)
        whole, state_whole, _ = model.hidden(ids, keep_state=True)
        return h, whole, model.hidden(more, state)[0], model.hidden(more, state_whole)[0]

    got, want = (
        read(make_model(sizes), ids, more[:, :11], lengths)
        for sizes in ({"context": 4, "tensor": 2}, {})
    )
    for b, n in enumerate(lengths):
        assert_close(f"row {b}", got[0][b, :n], want[0][b, :n], TOLERANCE["float32"])
    for name, x, y in zip(("", "whole", "after lengths", "after whole"), got, want, strict=True):
        if name:
            assert_close(name, x, y, TOLERANCE["float32"])


def test_no_token_sees_a_later_one_on_any_shard():
    """The gradient of one token's output with respect to every input is zero after it and not
    before. Every token has a row of the embedding of its own, so the embedding's gradient tells the
    tokens apart.
    """
    model = make_model({"context": 4})
    assert V == T

    @jit
    def seen(model, t):
        def output(embed_VD):
            copy = jax.tree.map(lambda x: x, model)
            copy.embed.set_value(embed_VD)
            return jnp.take(
                copy.hidden(jnp.arange(T, dtype=jnp.int32)[None])[0][0], t, axis=0
            ).sum()

        return jnp.abs(jax.grad(output)(model.embed[...])).sum(axis=1)

    for t in (0, 15, 16, 40, 63):
        by_token = np.asarray(seen(model, t))
        assert (by_token[: t + 1] > 0).all(), t
        np.testing.assert_array_equal(by_token[t + 1 :], 0)


def train(sizes, steps):
    config, mesh = make_config(sizes), mesh_for(sizes)
    abstract, tx = abstract_state(config, mesh)
    state, step = init_state(config, abstract, tx, make_model(sizes)), make_train_step(config, tx)
    losses = []
    for i in range(steps):
        state, metrics = step(state, put_batch(make_batch(i % 2), mesh))
        losses.append(float(metrics["loss"]))
    return np.array(losses), state.model


@pytest.fixture(scope="module")
def trained():
    return train({}, 20)


@pytest.mark.slow  # three steps are in tests/parallel/test_mesh.py
@pytest.mark.parametrize("name", ["fsdp, context, tensor", "data, context"])
def test_twenty_steps_end_at_the_same_loss(name, trained):
    losses, model = train(MESHES[name], 20)
    assert losses[-1] < losses[0] - 0.5
    assert_close("losses", losses, trained[0], 1e-4)  # rounding, amplified by twenty steps of Adam
    assert_close("first losses", losses[:3], trained[0][:3], TOLERANCE["float32"])
    # Held-out loss by position, TTT on and off, on the trained weights.
    rows, mesh = make_batch(7, rows=4), mesh_for(MESHES[name])
    got = evaluate_by_position(make_position_nll(mesh), model, rows, mesh, 4)
    want = evaluate_by_position(make_position_nll(mesh_for({})), trained[1], rows, mesh_for({}), 4)
    for x, y in zip(got, want, strict=True):
        assert_close("loss by position", x, y, 1e-3)
    assert np.abs(got[0] - got[1]).max() > 1e-3, "TTT matters"


def test_activations_are_not_gathered():
    """Elementwise parts, projections, the target's convolution and the loss leave every token where
    it is: nothing in the compiled gradient that moves is as large as a shard of the hidden states,
    but the keys, values and queries of attention and S. (Many rows, so that activations are larger
    than parameters.)
    """
    sizes, rows = {"context": 4}, 64
    hlo = (
        loss_and_gradients.lower(
            make_model(sizes), put_batch(make_batch(rows=rows), mesh_for(sizes))
        )
        .compile()
        .as_text()
    )
    hidden, keys, S = (4 * rows * size for size in (T // 4 * 36, T * 2 * 8, 36 * 48))
    large = {(kind, size) for kind, size in collectives(hlo) if size >= hidden}
    assert large == {("all-gather", keys), ("all-to-all", S)}
