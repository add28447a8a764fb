"""Tiny models with random parameters of every kind, and what a test does with them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from jax import jit

from ttt_jax.config import ModelConfig, TTTConfig
from ttt_jax.model.param_path import param_path
from ttt_jax.model.stack import LayerState, Runtime
from ttt_jax.model.transformer import Transformer
from ttt_jax.pretrained.hf_weights import tensor_names

C, V = 4, 31


BASE = ModelConfig(
    vocab_size=V,
    d_model=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=24,
    qk_norm=True,
    ttt=TTTConfig(layers=(1, 3), chunk_size=C, lr=0.5),
)


EMBED = {"ttt.target": "input_embed"}


ERRORS = {"ttt.target": "prediction_error"}


LAST_ERRORS = EMBED | {"ttt.last_target": "prediction_error"}


RIDGE = {
    "ttt.write": "ridge",
    "ttt.normalize_source": True,
    "ttt.lr": 2.0,
    "ttt.decay": 0.8,
}


CAP = {"ttt.read_cap": 0.1}


# shorter than most pieces, and a full layer in between
WINDOW = {"sliding_window": 3, "full_attention_layers": (0, 2)}


def config(**changes):
    cfg = BASE
    for name, value in changes.items():
        if name.startswith("ttt."):
            cfg = dataclasses.replace(cfg, ttt=dataclasses.replace(cfg.ttt, **{name[4:]: value}))
        else:
            cfg = dataclasses.replace(cfg, **{name: value})
    return cfg


def abstract(cfg, **runtime):
    return jax.eval_shape(lambda: Transformer(cfg, Runtime(**runtime), key=jax.random.key(0)))


def make(cfg, dtype="float64", **runtime):
    """A model with random parameters of every kind (norm scales and biases too), without compiling
    its init.
    """
    rng = np.random.default_rng(0)

    def leaf(path, struct):
        name, noise = param_path(path), rng.standard_normal(struct.shape)
        if name.endswith("scale"):
            value = 1 + 0.1 * noise
        elif name.endswith(("bias", "conv", "embed")):
            value = 0.5 * noise
        else:
            value = noise / np.sqrt(struct.shape[-1])
        return jax.device_put(value.astype("float64" if dtype == "float64" else "float32"))

    return jax.tree_util.tree_map_with_path(leaf, abstract(cfg, dtype=dtype, **runtime))


def transplant(model, cfg, **runtime):
    """The parameters of one model in a model of another depth pattern (by layer, through the
    checkpoint's names).
    """
    values, names = {}, tensor_names(model)
    for path, value in jax.tree_util.tree_flatten_with_path(model)[0]:
        ours, value = param_path(path), np.asarray(value)
        layers = value.reshape(-1, *value.shape[2:]) if ours.startswith("groups.") else value[None]
        values |= dict(zip(names[ours], layers, strict=True))
    new = abstract(cfg, dtype=model.runtime.dtype, **runtime)
    places = tensor_names(new)

    def leaf(path, struct):
        layers = [values[name] for name in places[param_path(path)]]
        return jax.device_put(np.stack(layers).reshape(struct.shape))

    return jax.tree_util.tree_map_with_path(leaf, new)


def without_ttt(model):
    return transplant(model, dataclasses.replace(model.config, ttt=TTTConfig(chunk_size=C)))


def tokens(B, T, seed=1):
    return jax.device_put(np.random.default_rng(seed).integers(0, V, (B, T)).astype(np.int32))


# As one program: op by op there would be one for each.
hidden = jit(Transformer.hidden, static_argnames=("keep_state", "at_chunk_start"))


@functools.partial(jit, static_argnames=("capacity", "ttt_scale"))
def run(
    model,
    ids,
    state=None,
    lengths=None,
    segment_ids=None,
    positions=None,
    capacity=None,
    ttt_scale=1.0,
):
    """Logits and state."""
    h, state, _ = model.hidden(
        ids,
        state,
        keep_state=True,
        lengths=lengths,
        segment_ids=segment_ids,
        positions=positions,
        capacity=capacity,
        ttt_scale=ttt_scale,
    )
    return model.logits(h), state


def assert_same_state(state, other, chunk=C):
    """All that a stream can still read: positions, caches, S, pending tokens (the slots behind them
    hold nothing).
    """
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(state.position_B, other.position_B)
    pending_BC1 = (np.arange(chunk)[None] < (np.asarray(state.position_B) % chunk)[:, None])[
        :, :, None
    ]
    is_layer = lambda x: isinstance(x, LayerState)
    layers, others = (jax.tree.leaves(s.layers, is_leaf=is_layer) for s in (state, other))
    assert any(layer.ttt is not None for layer in layers)
    for x, y in zip(layers, others, strict=True):
        jax.tree.map(close, x.cache, y.cache)
        if x.ttt is not None:
            close(x.ttt.S_BDF, y.ttt.S_BDF)
            for name in ("z_BCF", "source_BCX"):
                close(*(np.asarray(getattr(layer.ttt, name)) * pending_BC1 for layer in (x, y)))
