"""`model.ttt.read_cap`: what a token may read from S, beside its layer's output without S."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from support import models
from support.tolerance import relative_rms

from ttt_jax.config import ModelConfig, TTTConfig
from ttt_jax.config.validate import validate_model
from ttt_jax.errors import ConfigError
from ttt_jax.model import prediction_error
from ttt_jax.model.layers import Context
from ttt_jax.model.ttt_mlp import MLP, capped

CAP, LR, C, D, F = 0.1, 2.0, 4, 16, 24


def rms(x):
    return np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True))


def test_small_reads_stay_and_large_ones_are_limited(x64):
    rng = np.random.default_rng(0)
    h = rng.standard_normal((2, 5, 16))
    r = rng.standard_normal((2, 5, 16)) * np.geomspace(1e-6, 1e6, 5)[None, :, None]
    got = np.asarray(capped(jnp.asarray(r), jnp.asarray(h), CAP))
    limit = CAP * rms(h)
    assert (rms(got) < limit).all()
    np.testing.assert_allclose(got[:, 0], r[:, 0], rtol=1e-9)
    np.testing.assert_allclose(rms(got)[:, 4], limit[:, 4], rtol=1e-9)
    np.testing.assert_allclose(got / rms(got), r / rms(r), rtol=1e-9)
    assert not np.asarray(capped(jnp.zeros((1, 1, 4)), jnp.zeros((1, 1, 4)), CAP)).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_of_any_size_have_finite_gradients(dtype):
    """And the limit holds down to outputs of 1e-6, for small caps, too."""
    sizes = np.array([0, 1e-30, 1e-12, 1e-6, 1e-4, 1, 1e4])
    # each size of the read beside each of the output
    read, h = (jnp.asarray(x, dtype) for x in np.broadcast_arrays(sizes[:, None], sizes))
    read, h = (jnp.repeat(x[:, :, None], 8, axis=2) for x in (read, h))
    for cap in (1e-6, 0.06, 1e6):
        got, pull = jax.vjp(lambda r, h, cap=cap: capped(r, h, cap), read, h)
        for x in (got, *pull(jnp.ones_like(got))):
            assert np.isfinite(np.asarray(x, np.float32)).all()
        limit = cap * rms(np.asarray(h, np.float64))
        assert (rms(np.asarray(got, np.float64)) <= 1.01 * limit)[:, sizes >= 1e-6].all()


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_matches_the_rule_token_by_token(x64, bias):
    """Two rows of four chunks and a rest, float64, values and gradients; the oracle forms every
    state.
    """
    x, h, embed, do = arrays(4)
    layer = adaptive(read_cap=CAP, bias=bias)

    def ours(layer, x, h):
        nothing = jnp.zeros((1, 1, 1))
        return layer(x, Context((nothing, nothing), None, None, None, embed), None, h)[0]

    def literal(layer, x, h):
        gate, up = x @ layer.gate[...].T, x @ layer.up[...].T
        if bias:
            gate, up = gate + layer.gate_bias[...][None, None], up + layer.up_bias[...][None, None]
        z_BTF = jax.nn.silu(gate) * up
        slow_BTD = z_BTF @ layer.down[...].T + (layer.down_bias[...][None, None] if bias else 0)
        v_BTD = layer.target(embed[:, : 4 * C], C)
        S_BDF, rows = jnp.zeros((2, D, F)), []
        for t in range(x.shape[1]):
            if t and t % C == 0:
                last = slice(t - C, t)
                S_BDF += LR * jnp.einsum("btd,btf->bdf", v_BTD[:, last], z_BTF[:, last])
            read_BD = jnp.einsum("bdf,bf->bd", S_BDF, z_BTF[:, t])
            square_B = ((h + slow_BTD)[:, t] ** 2).mean(-1)
            ratio_B = (read_BD**2).mean(-1) / (CAP**2 * square_B)
            rows.append(slow_BTD[:, t] + read_BD / jnp.sqrt(1 + ratio_B)[:, None])
        return jnp.stack(rows, axis=1)

    def both(function):
        y, pull = jax.vjp(function, layer, x, h)
        return y, pull(do)

    for got, want in zip(*(jax.tree.leaves(both(f)) for f in (ours, literal)), strict=True):
        assert relative_rms(got, want) < 1e-11
    without = adaptive(read_cap=None, bias=bias)
    assert relative_rms(ours(without, x, h), ours(layer, x, h)) > 0.01  # it is felt here


def arrays(seed):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((2, 4 * C + 3, D))) for _ in range(4))


def adaptive(*, read_cap, bias):
    """A layer with random parameters of every kind."""
    ttt = TTTConfig(layers=(0,), chunk_size=C, lr=LR, target="input_embed", read_cap=read_cap)
    cfg = ModelConfig(d_model=D, d_ff=F, mlp_bias=bias, ttt=ttt)
    layer = MLP(cfg, ttt.target, key=jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape)), layer)


@pytest.mark.parametrize("gradient", [False, True])
def test_errors_and_the_cap_share_the_product_with_W(monkeypatch, gradient):
    """Both are made of z W^T, and the text has it twice. Compiled, the program has as many
    operations as one whose errors are made of h alone.
    """
    changes = models.ERRORS | models.CAP | {"num_layers": 2, "ttt.layers": (1,)}
    model, ids_BT = models.make(models.config(**changes), "float32"), np.zeros((2, 8), np.int32)

    def flops():
        read = lambda model: model.hidden(ids_BT)[0].sum()
        program = jit(jax.grad(read) if gradient else read).lower(model).compile()
        analysis = program.cost_analysis()
        assert analysis is not None
        return analysis["flops"]

    both = flops()
    of_h = lambda layer, x_BTD, z_BTF, h_BTD, ctx: prediction_error.source(h_BTD, ctx.head)
    monkeypatch.setattr(MLP, "_source", of_h)
    product = 2 * ids_BT.size * model.config.d_model * model.config.d_ff
    assert 0 <= both - flops() < product / 4


@pytest.mark.parametrize(
    ("fields", "word"), [({"apply": "fused"}, "apply"), ({"implementation": "triton"}, "triton")]
)
def test_what_it_leaves_without_effect_is_refused(fields, word):
    with pytest.raises(ConfigError, match=rf"{word}.*read_cap"):
        validate_model(ModelConfig(ttt=TTTConfig(layers=(1,), read_cap=0.1, **fields)))


@pytest.mark.parametrize("cap", [1e-7, 1e30])
def test_a_cap_that_float32_cannot_square_is_refused(cap):
    with pytest.raises(ConfigError, match=r"read_cap = 1e.*from 1e-6 to 1e6; leave it out"):
        validate_model(ModelConfig(ttt=TTTConfig(layers=(1,), read_cap=cap)))
