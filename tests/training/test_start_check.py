"""What `init_from` may change, field by field, and the loss of the source beside that of the run's
start.
"""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from support.fuzzing import SMALL
from support.hf_folders import make_folder

import ttt_jax.training.start_check
from ttt_jax.checkpoint.checkpointer import Checkpointer
from ttt_jax.config import (
    CheckpointConfig,
    Config,
    MeshConfig,
    ModelConfig,
    RopeConfig,
    TTTConfig,
    dump_yaml,
    load_config,
    replace,
)
from ttt_jax.errors import ConfigError, VerificationError
from ttt_jax.model.transformer import abstract_transformer
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.pretrained.convert import convert
from ttt_jax.pretrained.hf_config import config_from_hf
from ttt_jax.pretrained.hf_weights import load_hf
from ttt_jax.pretrained.load import initial_model, load_pretrained
from ttt_jax.pretrained.model_changes import compare_models
from ttt_jax.training.start_check import checked_start
from ttt_jax.training.step import abstract_state

CONFIGS = Path(__file__).parents[2] / "configs"
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
    "fewer TTT layers": (
        {"ttt.layers": [0]},
        {"ttt.layers": [0, 2]},
        ["ttt.layers is [0] here, [0, 2] in"],
    ),
    "inner rate": (
        {"ttt.layers": [0], "ttt.lr": 0.1},
        {"ttt.layers": [0]},
        ["ttt.lr is 0.1 here, 3.0 in the checkpoint"],
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
    changed = {int: lambda x: x + 2, float: lambda x: x * 2, bool: lambda x: not x}
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


QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 36,
    "tie_word_embeddings": True,
}
PUBLISHED = {  # the fields of config.json that matter here
    "qwen3_0p6b": QWEN3
    | {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 3072,
    },
    "qwen3_1p7b": QWEN3
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 6144,
    },
    "qwen3_4b_longct_32k": QWEN3
    | {
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 9728,
    },
    "qwen3_8b_longct": QWEN3
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 12288,
        "tie_word_embeddings": False,
    },
    "llama3p1_8b_longct": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
}
PUBLISHED["qwen3_4b_longct_128k"] = PUBLISHED["qwen3_4b_longct_32k"]


def test_presets_fit_the_checkpoints_they_are_made_for():
    continual = {
        path.stem for path in CONFIGS.glob("*.yaml") if load_config(path).init_from is not None
    }
    assert continual == set(PUBLISHED)
    for name, raw in PUBLISHED.items():
        lines = compare_models(
            load_config(CONFIGS / f"{name}.yaml").model, config_from_hf(raw), name
        )
        allowed = "model.max_positions is ", "model.rope."
        assert all(line.startswith(allowed if "128k" in name else allowed[:1]) for line in lines), (
            lines
        )
    first, second = (
        load_config(CONFIGS / f"qwen3_4b_longct_{length}.yaml").model for length in ("32k", "128k")
    )
    assert len(compare_models(second, first, "the first stage")) == 7


# ------------------------------------------------------------------------------------------- losses

RAW = SMALL | {"vocab_size": 31, "max_position_embeddings": 128, "initializer_range": 0.5}
PLAIN = {name: value for name, value in RAW.items() if not name.startswith("ttt_")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same weights as a Hugging Face, a converted and a run folder, and a plain model without
    TTT.
    """
    root = tmp_path_factory.mktemp("sources")
    make_folder(root / "hf", RAW)
    make_folder(root / "plain", PLAIN)
    convert(root / "hf", root / "orbax", to="orbax")
    run = Config(name="run", runs_dir=str(root), model=config_from_hf(RAW))
    (root / "run").mkdir()
    (root / "run/config.yaml").write_text(dump_yaml(run))
    with Checkpointer(root / "run/checkpoints", CheckpointConfig()) as checkpointer:
        checkpointer.save(
            3, model=load_hf(root / "hf"), opt_state={"a": jax.numpy.zeros(1)}, data_state={}
        )
    return root


def start(source, raw=RAW, compute_dtype="float32", **changes):
    config = Config(
        model=replace(config_from_hf(raw), changes),
        init_from=str(source),
        compute_dtype=compute_dtype,
    )
    config = replace(config, {"data.seq_len": 48, "data.batch_size": 2})
    ids = np.random.default_rng(0).integers(0, 31, (2, 49)).astype(np.int32)
    rows = {
        "ids": ids[:, :-1],
        "targets": ids[:, 1:],
        "segment_ids": np.ones((2, 48), np.int32),
        "positions": np.tile(np.arange(48, dtype=np.int32), (2, 1)),
        "weights": np.ones((2, 48), np.float32),
    }
    mesh = make_mesh(MeshConfig())
    return checked_start(config, abstract_state(config, mesh)[0].model, rows, mesh)


def losses(text):
    (found,) = re.findall(
        r"\(2 x 48 tokens\): ([\d.]+) as it is, ([\d.]+) at the start of this run\n", text
    )
    return [float(value) for value in found]


@pytest.mark.parametrize("kind", ["hf", "orbax", "run", "run/checkpoints/3"])
def test_a_start_equals_its_source(sources, kind, capsys):
    model = start(sources / kind)
    text = capsys.readouterr().out
    assert text.count("\n") == 1  # and nothing else is said
    assert text.startswith(f"init_from {sources / kind}: loss of the first held-out rows")
    theirs, ours = losses(text)
    assert theirs == ours
    assert theirs > 0.5
    for x, y in zip(
        jax.tree.leaves(model), jax.tree.leaves(load_pretrained(sources / "hf")), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def test_new_layers_start_at_zero(sources, capsys):
    start(sources / "plain")
    assert len(set(losses(capsys.readouterr().out))) == 1
    start(sources / "run", **{"ttt.layers": [0, 1]})  # the layers are grouped otherwise
    assert len(set(losses(capsys.readouterr().out))) == 1


@pytest.mark.slow
def test_bfloat16_is_compared_to_its_rounding(sources, capsys):
    start(sources / "hf", compute_dtype="bfloat16")
    theirs, ours = losses(capsys.readouterr().out)
    assert abs(ours - theirs) < 0.01 * theirs


@pytest.mark.parametrize("kind", ["hf", "orbax", "run"])
@pytest.mark.parametrize("field", ["rope.base", "max_positions", "norm_eps"])
def test_another_model_is_refused_before_anything_is_read(
    sources, kind, field, capsys, monkeypatch
):
    monkeypatch.setattr(ttt_jax.training.start_check, "load_pretrained", None)
    value = {"rope.base": 1e6, "max_positions": 64, "norm_eps": 1e-5}[field]
    with pytest.raises(
        ConfigError, match=rf"^config field model\.{field} = .*; set model\.{field} to "
    ):
        start(sources / kind, **{field: value})
    config = Config(
        model=replace(config_from_hf(RAW), {field: value}), init_from=str(sources / kind)
    )
    with pytest.raises(ConfigError, match=field):  # and where nothing is printed, too
        initial_model(config, abstract_transformer(config.model))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (
            "hf",
            {"rope.kind": "yarn", "rope.factor": 8.0, "rope.original_max_positions": 16},
            "model.rope.kind is yarn here",
        ),
        ("orbax", {"sliding_window": 4}, "model.sliding_window is 4 here, null in the checkpoint"),
        ("run", {"ttt.lr": 40.0}, "model.ttt.lr is 40.0 here, 0.5 in the checkpoint"),
    ],
)
def test_what_continual_training_changes_is_printed_with_both_losses(
    sources, kind, changes, words, capsys
):
    start(sources / kind, **changes)
    text = capsys.readouterr().out
    assert f"init_from {sources / kind}: {words}" in text
    theirs, ours = losses(text)
    assert theirs != ours


def test_a_difference_that_nobody_asked_for_is_an_error(sources, monkeypatch, capsys):
    def wrong(config, abstract):
        return jax.tree.map(lambda x: 1.01 * x, initial_model(config, abstract))

    monkeypatch.setattr(ttt_jax.training.start_check, "initial_model", wrong)
    with pytest.raises(VerificationError, match="though nothing was changed") as caught:
        start(sources / "hf")
    assert "\n" not in str(caught.value)
    start(sources / "hf", max_positions=256)  # something was changed: both numbers are printed
    theirs, ours = losses(capsys.readouterr().out.partition("max_positions")[2])
    assert theirs != ours


def test_what_is_not_compared_is_said(sources, tmp_path, monkeypatch, capsys):
    with Checkpointer(tmp_path / "alone", CheckpointConfig()) as checkpointer:
        checkpointer.save(
            1, model=load_hf(sources / "hf"), opt_state={"a": jax.numpy.zeros(1)}, data_state={}
        )
    start(tmp_path / "alone")
    assert (
        "was not compared with this run's: its folder holds no config of a model"
        in capsys.readouterr().out
    )
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    start(sources / "hf")
    assert (
        "was not compared with this run's: there are several processes" in capsys.readouterr().out
    )
