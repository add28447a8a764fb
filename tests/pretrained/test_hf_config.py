"""config.json of every family and of transformers 4 and 5: what is read, and what is refused."""

import dataclasses
import json
import math

import numpy as np
import pytest
from support.hf_folders import LLAMA3, QWEN3

from ttt_jax.config import RopeConfig
from ttt_jax.errors import ConfigError
from ttt_jax.model.layers import rope_frequencies
from ttt_jax.pretrained.hf_config import config_from_hf, read_config


def test_ttt_fields_of_the_official_config(golden_model):
    ttt = read_config(golden_model[0]).ttt
    target = golden_model[0].name.partition("_")[2].partition("_")[2]
    assert (ttt.layers, ttt.chunk_size, ttt.lr, ttt.target, ttt.proj) == (
        (0, 2),
        16,
        0.5,
        target,
        True,
    )
    raw = json.loads((golden_model[0] / "config.json").read_text())
    assert config_from_hf(raw | {"ttt_mode": False}).ttt.layers == ()
    assert not config_from_hf(raw | {"ttt_proj": False}).ttt.proj
    assert config_from_hf(raw | {"ttt_calibration": {"s": 0.4}}).ttt == ttt


def test_ttt_fields_that_are_not_known_are_refused(golden_model):
    """A clip norm, say: without it the weights compute something else."""
    raw = json.loads((golden_model[0] / "config.json").read_text()) | {"ttt_clip_norm": 0.5}
    told = r"^x\.json: ttt_clip_norm = 0\.5 is not known; known: ttt_"
    with pytest.raises(ConfigError, match=told):
        config_from_hf(raw, "x.json")
    assert config_from_hf(raw | {"ttt_mode": False}).ttt.layers == ()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize("scaling", [None, YARN, LLAMA3], ids=["default", "yarn", "llama3"])
def test_transformers_4_and_5_write_the_same_model(scaling):
    four = config_from_hf(QWEN3 | {"rope_theta": 5e5, "rope_scaling": scaling})
    five = config_from_hf(
        QWEN3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5} | (scaling or {})}
    )
    assert four == five
    assert four.rope.base == 5e5
    assert four.rope.kind == (scaling["rope_type"] if scaling else "default")
    if scaling:
        assert (four.rope.factor, four.rope.original_max_positions) == (
            scaling["factor"],
            scaling["original_max_position_embeddings"],
        )
        old = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
        assert config_from_hf(QWEN3 | {"rope_theta": 5e5, "rope_scaling": old}) == four


def test_golden_config_as_transformers_5_writes_it(golden_model):
    raw = json.loads((golden_model[0] / "config.json").read_text())
    five = {key: value for key, value in raw.items() if key not in ("rope_theta", "rope_scaling")}
    five["rope_parameters"] = {"rope_theta": raw["rope_theta"], "rope_type": "default"} | (
        raw["rope_scaling"] or {}
    )
    assert config_from_hf(five) == config_from_hf(raw)


def test_families():
    qwen3 = config_from_hf(QWEN3)
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.o_bias, qwen3.sliding_window) == (
        True,
        False,
        False,
        None,
    )
    qwen2 = config_from_hf(QWEN3 | {"model_type": "qwen2"})
    assert (qwen2.qk_norm, qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias) == (
        False,
        True,
        False,
        False,
    )
    biased = config_from_hf(QWEN3 | {"model_type": "qwen2", "attention_bias": True})
    assert (biased.qkv_bias, biased.o_bias) == (True, False), (
        "transformers' Qwen2 ignores the field"
    )
    llama = config_from_hf(
        QWEN3 | {"model_type": "llama", "attention_bias": True, "mlp_bias": True}
    )
    assert (llama.qk_norm, llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (
        False,
        True,
        True,
        True,
    )
    bare = {
        key: value for key, value in QWEN3.items() if key not in ("num_key_value_heads", "head_dim")
    }
    assert (config_from_hf(bare).num_kv_heads, config_from_hf(bare).head_dim) == (4, 12)


def test_windows():
    assert config_from_hf(QWEN3 | {"sliding_window": 32}).sliding_window is None, (
        "only Mistral's is always on"
    )
    mistral = config_from_hf(QWEN3 | {"model_type": "mistral", "sliding_window": 32})
    assert (mistral.sliding_window, mistral.full_attention_layers) == (32, ())
    assert (
        config_from_hf(QWEN3 | {"model_type": "mistral", "sliding_window": None}).sliding_window
        is None
    )
    default = config_from_hf(QWEN3 | {"model_type": "mistral"})
    assert default.sliding_window == 4096, "transformers' default"
    on = QWEN3 | {"sliding_window": 32, "use_sliding_window": True}
    some = config_from_hf(on | {"layer_types": ["full_attention", "sliding_attention"] * 2})
    assert (some.sliding_window, some.full_attention_layers) == (32, (0, 2))
    older = config_from_hf(on | {"max_window_layers": 3})
    assert (older.sliding_window, older.full_attention_layers) == (32, (0, 1, 2))
    assert config_from_hf(on | {"max_window_layers": 28}).sliding_window is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2' is not supported; supported: llama"),
        ({"model_type": None}, "model_type = None"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"hidden_size": None}, "field hidden_size is missing"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"rope_scaling\.factor is missing"),
        ({"rope_scaling": YARN | {"mscale": 1.0}}, "mscale and truncate"),
        ({"vocab_size": "many"}, "vocab_size = many"),
        ({"ttt_mode": True, "ttt_target": "logits"}, r"ttt\.target = logits"),
        ({"ttt_mode": True, "ttt_write": "spectral"}, r"ttt\.write = spectral: was taken out"),
    ],
)
def test_what_is_not_supported_is_said_in_one_line(change, words):
    with pytest.raises(ConfigError, match=words) as error:
        config_from_hf(QWEN3 | change, where="folder/config.json")
    assert str(error.value).startswith("folder/config.json: ")
    assert "\n" not in str(error.value)


def test_default_rope_frequencies():
    frequencies, factor = rope_frequencies(RopeConfig(base=1e6), 128)
    np.testing.assert_allclose(frequencies, 1e6 ** (-np.arange(64) / 64), rtol=1e-14)
    assert factor == 1.0


def test_llama3_rope_frequencies():
    """LLaMA-3.1: wavelengths below 2048 are kept, above 8192 stretched eightfold, blended
    between.
    """
    rope = RopeConfig("llama3", 5e5, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    got = np.asarray(rope_frequencies(rope, 128)[0])
    plain = 5e5 ** (-np.arange(0, 128, 2) / 128)
    waves = 2 * np.pi / plain
    np.testing.assert_allclose(got[waves < 2048], plain[waves < 2048], rtol=1e-14)
    np.testing.assert_allclose(got[waves > 8192], plain[waves > 8192] / 8, rtol=1e-14)
    middle = (waves >= 2048) & (waves <= 8192)
    assert middle.sum() >= 5
    smooth = (8192 / waves[middle] - 1) / 3
    np.testing.assert_allclose(
        got[middle], (1 - smooth) * plain[middle] / 8 + smooth * plain[middle], rtol=1e-14
    )
    # By hand: index 30 of 64, 500000^(-30/64) = 2.13112e-3, wavelength 2948.3, 8192 / 2948.3 =
    # 2.77855, blend 0.59285
    assert got[30] == pytest.approx(2.13112e-3 * (0.40715 / 8 + 0.59285), rel=1e-5)
    assert rope_frequencies(rope, 128)[1] == 1.0


@pytest.mark.parametrize(
    ("base", "factor", "length", "head_dim"),
    [(1e6, 4.0, 32768, 128), (1e4, 16.0, 64, 16), (1e4, 32.0, 4096, 64)],
)
def test_yarn_rope_frequencies(base, factor, length, head_dim):
    """arXiv 2309.00071, section 3.2, with the boundaries rounded outwards as Hugging Face does."""
    got, scale = rope_frequencies(RopeConfig("yarn", base, factor, length), head_dim)
    plain = base ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    # The real-valued index at which a dimension turns r times over the original length: length
    # base^(-2i/d) = 2 pi r
    index = lambda r: head_dim / 2 * np.log(length / (2 * np.pi * r)) / np.log(base)
    first, last = max(np.floor(index(32)), 0), min(np.ceil(index(1)), head_dim - 1)
    kept = 1 - np.clip((np.arange(head_dim // 2) - first) / (last - first), 0, 1)
    np.testing.assert_allclose(got, kept * plain + (1 - kept) * plain / factor, rtol=1e-13)
    assert scale == pytest.approx(0.1 * math.log(factor) + 1, rel=1e-14)
    assert (got[0], got[-1]) == pytest.approx(
        (1.0 if index(32) > 0 else got[0], plain[-1] / factor), rel=1e-12
    )
    set_by_hand = dataclasses.replace(
        RopeConfig("yarn", base, factor, length), attention_factor=0.7
    )
    assert rope_frequencies(set_by_hand, head_dim)[1] == 0.7


def test_yarn_over_an_original_context_longer_than_every_wavelength():
    """The range's upper end may lie beyond the last pair (index 31), up to head_dim - 1, as in
    transformers' code: the last pair is then not stretched by the whole factor."""
    got, _ = rope_frequencies(RopeConfig("yarn", 1e4, 4.0, 1 << 20), 64)
    # Turns over the original length: 32 at index 29.7, 1 at 41.8 (rounded outwards).
    r = np.clip((np.arange(32) - 29) / (42 - 29), 0, 1)
    plain = 1e4 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(got, plain * (1 - r + r / 4), rtol=1e-13)
    # With base 10, 32 turns at index 20.2 and 1 at 68.4, which is cut at head_dim - 1 = 63.
    got, _ = rope_frequencies(RopeConfig("yarn", 10.0, 4.0, 860), 64)
    r = np.clip((np.arange(32) - 20) / (63 - 20), 0, 1)
    np.testing.assert_allclose(got, 10.0 ** (-np.arange(32) / 32) * (1 - r + r / 4), rtol=1e-13)


def test_fields_of_another_kind_of_rope_mean_nothing():
    """As in transformers, which reads those of the kind."""
    of_llama3 = {"low_freq_factor": 2.0, "high_freq_factor": 8.0}
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    rope = config_from_hf(QWEN3 | {"rope_scaling": scaling | of_llama3 | {"beta_fast": 16.0}}).rope
    assert rope == RopeConfig("yarn", 1e4, 4.0, 64, beta_fast=16.0)
    with pytest.raises(ConfigError, match=r"config\.json: .*rope\.low_freq_factor = 9: must be"):
        config_from_hf(QWEN3 | {"rope_scaling": LLAMA3 | {"low_freq_factor": 9.0}})
