"""`model.ttt.lr: auto`: the rule, the size of keys that it rests on, and where it is silent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.config import Config, ModelConfig, TTTConfig, load_config, preset_names
from ttt_jax.config.inner_rate import SUM, describe_rate, factor, inner_rate, key_square
from ttt_jax.errors import ConfigError
from ttt_jax.model.layers import linear
from ttt_jax.model.ttt_mlp import MLP
from ttt_jax.pretrained.start_config import CONTINUAL, load_start_config

AUTO = ["--model.ttt.lr", "auto"]
SUM_WRITE = [*AUTO, "--model.ttt.write", "sum", "--model.ttt.target", "input_embed"]


@pytest.mark.parametrize(("D", "F", "std"), [(64, 256, 0.02), (96, 128, 0.06), (48, 96, 0.3)])
def test_the_size_of_the_keys_is_that_of_a_new_model(D, F, std):
    model = ModelConfig(d_model=D, d_ff=F, init_std=std)
    mlp = MLP(model, None, key=jax.random.key(0))
    x_TD = jax.random.normal(jax.random.key(1), (500, D))
    x_TD /= jnp.sqrt(jnp.mean(jnp.square(x_TD), axis=1, keepdims=True))
    z_TF = jax.nn.silu(linear(x_TD, mlp.gate)) * linear(x_TD, mlp.up)
    measured = float(jnp.mean(jnp.sum(jnp.square(z_TF), axis=1)))
    assert key_square(model) == pytest.approx(measured, rel=0.1)


def rate(*words):
    return load_config("default", [*SUM_WRITE, "--model.ttt.decay", "1", *words]).model.ttt.lr


def test_the_rule_keeps_lr_m_T():
    wide = ["--model.d_ff", "512", "--model.d_model", "48"]
    for words in ([], ["--data.seq_len", "1024"], wide, ["--model.ttt.proj", "true"]):
        config = load_config("default", [*SUM_WRITE, "--model.ttt.decay", "1", *words])
        product = config.model.ttt.lr * key_square(config.model) * config.data.seq_len
        assert product == pytest.approx(factor(config.model.ttt), rel=0.05)  # of two digits
    assert factor(TTTConfig()) == SUM == 6 * factor(TTTConfig(proj=False))
    assert rate("--model.ttt.chunk_size", "32") == rate()


def test_decay_shortens_what_counts_as_the_row():
    """0.5 leaves 2 chunks of 64 tokens, whatever the row."""
    short = load_config("default", [*SUM_WRITE, "--model.ttt.decay", "0.5"])
    long = load_config(
        "default", [*SUM_WRITE, "--model.ttt.decay", "0.5", "--data.seq_len", "1024"]
    )
    assert short.model.ttt.lr == long.model.ttt.lr
    product = short.model.ttt.lr * key_square(short.model) * 128
    assert product == pytest.approx(factor(short.model.ttt), rel=0.05)


def test_ridge_has_no_unit():
    words = [*AUTO, "--model.ttt.write", "ridge"]
    assert load_config("default", words).model.ttt.lr == 1
    assert load_start_config("qwen3_0p6b", words).model.ttt.lr == 1


@pytest.mark.parametrize(
    ("preset", "words", "line"),
    [
        ("default", ["--model.ttt.normalize_source", "no"], "set model.ttt.normalize_source true"),
        ("default", ["--model.ttt.target", "prediction_error"], "or set write to ridge"),
        ("qwen3_0p6b", [], "with model.ttt.normalize_source = false; give"),
    ],
)
def test_where_the_rule_says_nothing(preset, words, line):
    with pytest.raises(ConfigError, match=r"^config field model\.ttt\.lr") as caught:
        load_start_config(preset, [*SUM_WRITE, *words])
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_comes_after_reading_sees_a_number():
    assert rate() == pytest.approx(0.0027, rel=0.01)
    assert rate("--model.ttt.proj", "true") == pytest.approx(0.016, rel=0.01)
    assert load_config("default", [*AUTO, "--model.ttt.lr", "0.25"]).model.ttt.lr == 0.25
    with pytest.raises(ConfigError, match=r"model\.ttt\.lr = automatic"):
        load_config("default", ["--model.ttt.lr", "automatic"])


def test_presets_from_scratch_have_the_rule():
    for name in preset_names():
        config = load_start_config(name) if name != CONTINUAL else Config(init_from="x")
        if config.init_from is None:
            assert config.model.ttt.lr == inner_rate(config), name


def test_a_model_without_a_rate_has_the_official_one():
    assert TTTConfig().lr == Config().model.ttt.lr == 3.0
    assert np.isfinite(load_config("default", ["--model.ttt.layers=[]"]).model.ttt.lr)


def test_the_rate_of_the_rule_is_said():
    (line,) = describe_rate(load_config("default", [*SUM_WRITE, "--model.ttt.decay", "1"]))
    assert line.startswith(f"model.ttt.lr = {rate():g}, by the rule")
    for words in (["--model.ttt.lr", "0.2"], ["--model.ttt.layers=[]"]):
        assert describe_rate(load_config("default", words)) == []
    assert describe_rate(load_start_config("qwen3_0p6b")) == []
