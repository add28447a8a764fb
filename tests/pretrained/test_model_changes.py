"""What a configuration may change in a model it starts from, field by field."""

import dataclasses
import re

import pytest

from ttt_jax.config import (
    ModelConfig,
    RopeConfig,
    TTTConfig,
    preset_names,
    read_written,
    replace,
)
from ttt_jax.errors import ConfigError
from ttt_jax.pretrained.hf_config import config_from_hf
from ttt_jax.pretrained.model_changes import compare_models
from ttt_jax.pretrained.published import PUBLISHED
from ttt_jax.pretrained.start_config import load_start_config

YARN = {"rope.kind": "yarn", "rope.factor": 4.0, "rope.original_max_positions": 512}


LLAMA3 = YARN | {"rope.kind": "llama3"}


BASE = ModelConfig(num_layers=4, max_positions=512)


# Name: what the run has, what the checkpoint has beside BASE, and what is printed (None: refused,
# naming the field).
RULES = {
    "the same": ({}, {}, []),
    "init_std": ({"init_std": 0.5}, {}, []),
    "TTT for a plain model": ({"ttt.layers": [0, 2], "ttt.lr": 0.1}, {}, []),
    "more TTT layers": ({"ttt.layers": [0, 2]}, {"ttt.layers": [2]}, []),
    "another kernel": ({"ttt.layers": [2], "ttt.implementation": "xla"}, {"ttt.layers": [2]}, []),
    "fewer TTT layers": ({"ttt.layers": [0]}, {"ttt.layers": [0, 2]}, None),
    "no TTT": ({}, {"ttt.layers": [0, 2]}, None),
    "without W_target": ({"ttt.layers": [0], "ttt.proj": False}, {"ttt.layers": [0]}, None),
    "a new W_target": (
        {"ttt.layers": [0]},
        {"ttt.layers": [0], "ttt.proj": False},
        ["ttt.proj is true here, false in the checkpoint"],
    ),
    "inner rate": (
        {"ttt.layers": [0], "ttt.lr": 0.1},
        {"ttt.layers": [0]},
        ["ttt.lr is 0.1 here, 3.0 in the checkpoint"],
    ),
    "another target": (
        {"ttt.layers": [0, 2], "ttt.target": "input_embed"},
        {"ttt.layers": [0, 2]},
        ["ttt.target of layers [0, 2] is input_embed here, hidden_states in the checkpoint"],
    ),
    "a last target": (
        {"ttt.layers": [0, 2], "ttt.last_target": "prediction_error"},
        {"ttt.layers": [0, 2]},
        ["ttt.target of layers [2] is prediction_error here, hidden_states in the checkpoint"],
    ),
    "a new layer behind the last": (
        {"ttt.layers": [0, 2, 3], "ttt.last_target": "prediction_error"},
        {"ttt.layers": [0, 2], "ttt.last_target": "prediction_error"},
        ["ttt.target of layers [2] is hidden_states here, prediction_error in the checkpoint"],
    ),
    "a new layer before the last": (
        {"ttt.layers": [0, 1, 2], "ttt.last_target": "prediction_error"},
        {"ttt.layers": [0, 2], "ttt.last_target": "prediction_error"},
        [],
    ),
    "the same target in other words": (
        {"ttt.layers": [2], "ttt.target": "prediction_error"},
        {"ttt.layers": [2], "ttt.last_target": "prediction_error"},
        [],
    ),
    "longer": ({"max_positions": 1024}, {}, ["max_positions is 1024 here, 512 in the checkpoint"]),
    "shorter": ({"max_positions": 256}, {}, None),
    "yarn": (
        YARN,
        {},
        [
            "rope.kind is yarn here, default in",
            "rope.factor is 4.0",
            "rope.original_max_positions is 512",
            "rope.beta_fast is 32.0",
            "rope.beta_slow is 1.0",
            "rope.attention_factor is null",
        ],
    ),
    "yarn further": (
        YARN | {"rope.factor": 8.0},
        YARN,
        ["rope.factor is 8.0 here, 4.0 in the checkpoint"],
    ),
    "yarn back": (YARN | {"rope.factor": 2.0}, YARN, None),
    "yarn removed": ({}, YARN, None),
    "yarn for llama3": (YARN, LLAMA3, None),
    "yarn of another length": (YARN | {"rope.original_max_positions": 256}, YARN, None),
    "yarn, beta_fast": (YARN | {"rope.beta_fast": 16.0}, YARN, None),
    "llama3, low_freq_factor": (LLAMA3 | {"rope.low_freq_factor": 2.0}, LLAMA3, None),
    "llama3, without effect": (LLAMA3 | {"rope.beta_fast": 2.0}, LLAMA3, []),
    "rope base": ({"rope.base": 1e6}, {}, None),
    "a window": ({"sliding_window": 64}, {}, ["sliding_window is 64 here, null in the checkpoint"]),
    "a window, some layers full": (
        {"sliding_window": 64, "full_attention_layers": [1]},
        {},
        ["sliding_window is 64", "full_attention_layers is [1] here, [] in"],
    ),
    "narrower": (
        {"sliding_window": 32},
        {"sliding_window": 64},
        ["sliding_window is 32 here, 64 in"],
    ),
    "wider": ({"sliding_window": 128}, {"sliding_window": 64}, None),
    "no window": ({}, {"sliding_window": 64}, None),
    "fewer full layers": (
        {"sliding_window": 64},
        {"sliding_window": 64, "full_attention_layers": [1]},
        ["full_attention_layers is [] here, [1] in"],
    ),
    "more full layers": (
        {"sliding_window": 64, "full_attention_layers": [1]},
        {"sliding_window": 64},
        None,
    ),
    "vocab_size": ({"vocab_size": 300}, {}, None),
    "norm_eps": ({"norm_eps": 1e-5}, {}, None),
    "d_ff": ({"d_ff": 512}, {}, None),
    "num_layers": ({"num_layers": 3}, {}, None),
    "d_model": ({"d_model": 128}, {}, None),
    "heads": ({"num_heads": 8}, {}, None),
    "kv": ({"num_kv_heads": 2}, {}, None),
    "head_dim": ({"head_dim": 32}, {}, None),
    "qk_norm": ({"qk_norm": True}, {}, None),
    "qkv_bias": ({"qkv_bias": True}, {}, None),
    "o_bias": ({"o_bias": True}, {}, None),
    "mlp_bias": ({"mlp_bias": True}, {}, None),
    "tied": ({"tie_embeddings": False}, {}, None),
}


@pytest.mark.parametrize("case", RULES)
def test_rules(case):
    ours, theirs, printed = RULES[case]
    wanted, found = replace(BASE, ours), replace(BASE, theirs)
    if printed is None:
        with pytest.raises(ConfigError) as caught:
            compare_models(wanted, found, "source")
        message = str(caught.value)
        field = re.match(
            r"config field model\.([\w.]+) = (.+): source has (.+); set model\.\1 to ", message
        )
        assert field, message
        assert field[1] in {*ours, *theirs}
        return
    lines = compare_models(wanted, found, "source")
    assert len(lines) == len(printed), lines
    assert all(
        line.startswith(f"model.{words}") for line, words in zip(lines, printed, strict=True)
    ), lines


def both_ways(a, b):
    """One direction of the ordered fields is printed, the other one refused."""
    return compare_models(a, b, "source") + compare_models(b, a, "source")


def test_every_field_has_a_rule():
    """A field that is added later is refused when it differs, until somebody decides otherwise."""
    changed = {int: lambda x: x + 2, float: lambda x: x / 2, bool: lambda x: not x}
    start = replace(
        BASE, YARN | {"sliding_window": 64, "full_attention_layers": [1], "ttt.layers": [1]}
    )
    for field in dataclasses.fields(ModelConfig):
        value = getattr(start, field.name)
        if field.name == "init_std" or type(value) not in changed:
            continue
        other = dataclasses.replace(start, **{field.name: changed[type(value)](value)})
        with pytest.raises(ConfigError, match=field.name):
            both_ways(start, other)
    for field in dataclasses.fields(RopeConfig):
        value = getattr(start.rope, field.name)
        if type(value) in (int, float) and field.name not in (
            "low_freq_factor",
            "high_freq_factor",
        ):
            other = dataclasses.replace(
                start, rope=dataclasses.replace(start.rope, **{field.name: value * 2})
            )
            with pytest.raises(ConfigError, match=field.name):
                both_ways(start, other)
    for field in dataclasses.fields(TTTConfig):
        value = getattr(start.ttt, field.name)
        if type(value) in changed:
            other = dataclasses.replace(
                start,
                ttt=dataclasses.replace(start.ttt, **{field.name: changed[type(value)](value)}),
            )
            assert compare_models(start, other, "source"), field.name


CHECKPOINTS = {  # preset -> the model that it is made for
    "qwen3_0p6b": "Qwen3-0.6B",
    "qwen3_1p7b": "Qwen3-1.7B",
    "qwen3_4b_longct_32k": "Qwen3-4B",
    "qwen3_4b_longct_128k": "Qwen3-4B",
    "qwen3_8b_longct": "Qwen3-8B",
    "llama3p1_8b_longct": "Llama-3.1-8B",
}


def test_presets_fit_the_checkpoints_they_are_made_for():
    written = {name: read_written(name).get("init_from") for name in preset_names()}
    continual = {name for name, source in written.items() if source not in (None, "CHECKPOINT")}
    assert continual == set(CHECKPOINTS)
    for name, checkpoint in CHECKPOINTS.items():
        found = config_from_hf(PUBLISHED[checkpoint])
        lines = compare_models(load_start_config(name).model, found, name)
        allowed = "model.max_positions is ", "model.rope."
        assert all(line.startswith(allowed if "128k" in name else allowed[:1]) for line in lines), (
            lines
        )
    first, second = (
        load_start_config(f"qwen3_4b_longct_{length}").model for length in ("32k", "128k")
    )
    assert len(compare_models(second, first, "the first stage")) == 7
