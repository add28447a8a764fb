"""Configs: one-line errors, files, overrides, round trips."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from ttt_jax.config import (
    REMAT_NAMES,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParamGroup,
    dump_yaml,
    from_dict,
    load_config,
    parse_overrides,
    replace,
    to_dict,
    validate,
)
from ttt_jax.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
# One wrong value each: the overrides, and what the line must say (field, value, fix).
BAD = {
    "unknown field": (
        "--model.ttt.chunk_sise 512",
        ["model.ttt.chunk_sise", "did you mean model.ttt.chunk_size?"],
    ),
    "unknown group": ("--modle.d_model 512", ["modle.d_model", "did you mean model.d_model?"]),
    "far from everything": ("--qqqq 1", ["qqqq", "--help"]),
    "wrong type": ("--steps many", ["steps", "many", "integer"]),
    "fraction of a step": ("--steps 1.5", ["steps", "1.5", "integer"]),
    "not positive": ("--data.batch_size 0", ["data.batch_size", "0", "greater than 0"]),
    "not a choice": (
        "--model.ttt.target embeddings",
        ["model.ttt.target", "embeddings", "'input_embed' or 'prediction_error'"],
    ),
    "not finite": ("--optimizer.lr .inf", ["optimizer.lr", "inf", "finite"]),
    "a field of a number": ("--steps.x 3 --steps 3 --steps.x 4", ["steps", "single value"]),
    "group as a number": ("--mesh 3", ["mesh = 3", "group of fields", "such as mesh.data"]),
    "no value but a field": ("--log.tensorboard --steps 3", ["'--log.tensorboard' has no value"]),
    "no space behind a colon": ("--optimizer.groups [{pattern:x}]", ["'pattern:x'", "colon"]),
    "layer out of range": ("--model.ttt.layers 0,4", ["model.ttt.layers", "layer 4", "0 to 3"]),
    "negative layer": (
        "--model.ttt.layers [-1]",
        ["model.ttt.layers.0", "-1", "greater than or equal to 0"],
    ),
    "layer twice": ("--model.ttt.layers [1,2,1]", ["model.ttt.layers", "[1, 2, 1]", "twice"]),
    "full layer out of range": (
        "--model.sliding_window 64 --model.full_attention_layers 9",
        ["model.full_attention_layers", "layer 9", "0 to 3"],
    ),
    "full layers without a window": (
        "--model.full_attention_layers 0",
        ["model.full_attention_layers", "model.sliding_window"],
    ),
    "rows of broken chunks": (
        "--model.ttt.layers 0 --model.ttt.chunk_size 96 --data.seq_len 1000",
        ["data.seq_len", "1000", "model.ttt.chunk_size = 96", "data.pack false"],
    ),
    "chunk over two shards": (
        "--model.ttt.layers 0 --model.ttt.chunk_size 512 --data.seq_len 2048 --mesh.context 8",
        ["mesh.context", "8", "256 tokens a shard", "model.ttt.chunk_size = 512"],
    ),
    "uneven shards": (
        "--model.ttt.layers 0 --model.ttt.chunk_size 512 --data.seq_len 2048 --mesh.context 3",
        ["mesh.context", "3", "tokens a shard"],
    ),
    "rows that do not split": (
        "--data.seq_len 2050 --mesh.context 4",
        ["mesh.context = 4", "does not divide", "2050"],
    ),
    "empty mesh axis": ("--mesh.tensor 0", ["mesh.tensor", "0", "-1 for what is left"]),
    "two free mesh axes": ("--mesh.data -1", ["mesh", "only one axis may be -1"]),
    "rope without a length": (
        "--model.rope.kind yarn --model.rope.factor 4",
        ["model.rope.original_max_positions", "required", "'yarn'"],
    ),
    "a factor of plain rope": (
        "--model.rope.factor 4",
        ["model.rope.factor = 4", "no effect", "model.rope.kind = default", "set that to yarn"],
    ),
    "a field of llama3 for yarn": (
        "--model.rope.kind yarn --model.rope.original_max_positions 64 "
        "--model.rope.low_freq_factor 2",
        ["model.rope.low_freq_factor = 2", "no effect", "kind = yarn", "set that to llama3,"],
    ),
    "no band between low and high": (
        "--model.rope.kind llama3 --model.rope.original_max_positions 64 "
        "--model.rope.low_freq_factor 4",
        ["model.rope.low_freq_factor = 4", "below model.rope.high_freq_factor = 4"],
    ),
    "slow above fast": (
        "--model.rope.kind yarn --model.rope.original_max_positions 64 --model.rope.beta_slow 33",
        ["model.rope.beta_slow = 33", "above model.rope.beta_fast = 32"],
    ),
    "a context that is shortened": (
        "--model.rope.kind yarn --model.rope.original_max_positions 64 --model.rope.factor 0.5",
        ["model.rope.factor = 0.5", "at least 1"],
    ),
    "one wavelength": ("--model.rope.base 1", ["model.rope.base = 1", "above 1"]),
    "a ridge of sums": (
        "--model.ttt.layers 0 --model.ttt.ridge 0.1",
        ["model.ttt.ridge = 0.1", "no effect", "model.ttt.write = sum", "set that to ridge"],
    ),
    "heads that do not divide": (
        "--model.num_heads 6",
        ["model.num_kv_heads", "4", "model.num_heads = 6"],
    ),
    "odd head": ("--model.head_dim 63", ["model.head_dim", "63", "even"]),
    "rows too long": (
        "--model.max_positions 1024 --data.seq_len 2048",
        ["data.seq_len", "2048", "model.max_positions = 1024"],
    ),
    "a row of one token": ("--data.seq_len 1", ["data.seq_len", "1", "2 tokens"]),
    "accumulation": (
        "--optimizer.accumulate 3",
        ["optimizer.accumulate", "3", "data.batch_size = 8"],
    ),
    "a write that was taken out": (
        "--model.ttt.write spectral",
        ["model.ttt.write", "spectral", "taken out", "docs/writes.md", "use sum or ridge"],
    ),
    "decay": ("--model.ttt.decay 1.5", ["model.ttt.decay", "1.5", "less than or equal to 1"]),
    "warm-up": (
        "--optimizer.warmup_steps 100",
        ["optimizer.warmup_steps", "100", "below steps = 100"],
    ),
    "activation": ("--remat_save mlp", ["remat_save", "'mlp'", "mlp_gate"]),
    "auto and more": ("--remat_save auto,qkv", ["remat_save", "'auto'", "auto alone"]),
    "run name": ("--name ../x", ["name", "'../x'", "letters"]),
    "pattern": ('--optimizer.groups [{"pattern":"("}]', ["optimizer.groups", "'('"]),
    "group without a pattern": (
        '--optimizer.groups [{"frozen":true}]',
        ["optimizer.groups.0.pattern", "required"],
    ),
    "no value": ("--steps", ["--steps", "no value", "--steps VALUE"]),
    "no dashes": ("steps=3", ["steps=3", "--field.name VALUE"]),
    "not YAML": ("--model.ttt.layers [1,2", ["model.ttt.layers", "[1,2", "brackets"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_override_gives_one_line_with_field_value_and_fix(case):
    words, expected = BAD[case]
    with pytest.raises(ConfigError) as error:
        load_config(None, words.split())
    message = str(error.value)
    assert "\n" not in message
    for part in expected:
        assert part in message, message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("model: [1, 2", ["not valid YAML"]),
        ("- 1\n- 2\n", ["mapping of fields", "list"]),
        ("model:\n  ttt:\n    layer: [0]\n", ["model.ttt.layer", "did you mean model.ttt.layers?"]),
        (b"\xff\xfe\x00", ["not valid YAML"]),
    ],
    ids=["syntax", "a list", "unknown field", "not text"],
)
def test_a_wrong_file_gives_one_line(tmp_path, content, expected):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert "\n" not in str(error.value)
    for part in expected:
        assert part in str(error.value)


def test_a_missing_file_names_its_neighbours(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file .*500m\.yaml"):
        load_config(CONFIGS / "nothing.yaml")
    with pytest.raises(ConfigError, match=r"no YAML file in"):
        load_config(tmp_path / "nothing.yaml")


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("steps: 7\nmodel: {ttt: {layers: [1], chunk_size: 64}}\n")
    config = load_config(
        path, ["--model.ttt.chunk_size", "128", "--optimizer.lr=1e-4", "--remat_save", "null"]
    )
    assert (config.steps, config.model.ttt.layers, config.model.ttt.chunk_size) == (7, (1,), 128)
    assert config.optimizer.lr == 1e-4
    assert config.remat_save is None
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing\n")
    assert load_config(empty) == Config()


@pytest.mark.parametrize("text", ["0,2", "[0, 2]", "[0,2]"])
def test_lists_on_the_command_line(text):
    rows = ["--data.seq_len", "8192"]
    assert load_config(None, ["--model.ttt.layers", text, *rows]).model.ttt.layers == (0, 2)
    assert load_config(None, ["--model.ttt.layers", "2", *rows]).model.ttt.layers == (2,)
    assert load_config(None, ["--remat_save", "attention,qkv"]).remat_save == ("attention", "qkv")


def test_parse_overrides():
    assert parse_overrides(["--a.b", "1", "--c-d=x", "--e", "null", "--f", "-1"]) == [
        ("a.b", 1),
        ("c_d", "x"),
        ("e", None),
        ("f", -1),
    ]


def test_round_trip_of_every_kind_of_field():
    config = Config(
        remat_save=REMAT_NAMES,
        data=DataConfig(seq_len=8192, heldout=("a.jsonl",)),
        model=replace(
            ModelConfig(),
            {"ttt.layers": [0, 3], "rope.kind": "yarn", "rope.original_max_positions": 64},
        ),
        optimizer=OptimizerConfig(
            groups=(ParamGroup("mlp", lr_multiplier=2.0), ParamGroup("^embed", frozen=True))
        ),
    )
    validate(config)
    assert from_dict(Config, to_dict(config)) == config
    assert from_dict(Config, yaml.safe_load(dump_yaml(config))) == config
    assert hash(config.model) == hash(from_dict(ModelConfig, to_dict(config.model))), (
        "static under jit"
    )
    for cut in (None, ()):
        assert (
            from_dict(
                Config, yaml.safe_load(dump_yaml(replace(config, {"remat_save": cut})))
            ).remat_save
            == cut
        )


def test_replace_leaves_the_original_alone():
    config = Config()
    changed = replace(config, {"model.ttt.lr": 1.0, "steps": 5})
    assert (changed.model.ttt.lr, changed.steps) == (1.0, 5)
    assert config == Config()
    with pytest.raises(ConfigError, match=r"model\.ttt\.learning_rate"):
        replace(config, {"model.ttt.learning_rate": 1.0})


def test_frozen():
    config = Config()
    for item, field in ((config, "steps"), (config.model, "d_model"), (config.model.ttt, "lr")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(item, field, 1)


def test_warmup():
    assert OptimizerConfig(warmup_ratio=0.02).warmup(5000) == 100
    assert OptimizerConfig(warmup_steps=7).warmup(5000) == 7


@pytest.mark.parametrize(
    "word",
    ["off", "no", "123", "1e3", "0100", "1:30", "2024-01-01", "null", "1_0", "~x", "a: b", "[x"],
)
def test_a_text_field_takes_the_word_as_written(tmp_path, word):
    assert load_config(None, ["--data.text_field", word]).data.text_field == word
    assert load_config(None, [f"--data.text_field={word}"]).data.text_field == word
    if word != "[x":  # a bracket opens a list
        assert load_config(None, ["--data.train", word]).data.train == (word,)
    assert load_config(None, ["--data.text_field", f"'{word}'"]).data.text_field == word
    if word not in ("null", "~x", "a: b", "[x"):  # in a file these are YAML's own
        path = tmp_path / "c.yaml"
        path.write_text(
            f"name: {word}\ndata:\n  train: [{word}, b]\noptimizer:\n  groups: [{{pattern: "
            f"{word}}}]\n"
        )
        read = load_config(path, ["--name", "x"])
        assert read.data.train == (word, "b")
        assert read.optimizer.groups[0].pattern == word
        assert (
            load_config(None, ["--optimizer.groups", f"[{{pattern: {word}}}]"])
            .optimizer.groups[0]
            .pattern
            == word
        )


def test_what_else_words_of_the_command_line_mean():
    for name in ("off", "123", "1_0"):
        assert load_config(None, ["--name", name]).name == name
    assert load_config(None, ["--data.heldout", "2020,no"]).data.heldout == ("2020", "no")
    assert load_config(None, ["--data.heldout", "[2020, no]"]).data.heldout == ("2020", "no")
    assert load_config(None, ["--compile_cache", "null", "--init_from", "~"]).compile_cache is None
    assert load_config(None, ["--data.pack", "off", "--log.tensorboard", "no"]).data.pack is False
    assert load_config(None, ["--steps", "0100"]).steps == 100  # not octal
    assert load_config(None, ["--steps", "1_000"]).steps == 1000
    assert load_config(None, ["--optimizer.lr", "1.5e-4"]).optimizer.lr == 1.5e-4


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--steps yes", ["config field steps = true", "a switch"]),
        ("--optimizer.lr on", ["config field optimizer.lr = true", "a switch"]),
        ("--steps 1:30", ["config field steps = 1:30", "integer"]),
        ("--model.ttt.layers [yes]", ["config field model.ttt.layers.0 = true", "a switch"]),
        (
            "--optimizer.groups [{pattern:x,lr_multiplier:yes}]",
            ["optimizer.groups.0.lr_multiplier = true", "a switch"],
        ),
        ("--compile_cache off", ["config field compile_cache = false", "write null"]),
        ("--log.wandb no", ["config field log.wandb = false", "write null"]),
        (
            "--optimizer.groups [{pattern:x,pattern:y}]",
            ["--optimizer.groups", "'pattern' is given twice"],
        ),
    ],
)
def test_a_word_that_would_become_something_else_is_refused(words, expected):
    field, value = words.split(" ")
    with pytest.raises(ConfigError) as error:
        load_config(None, [field, value.replace(":", ": ") if "{" in value else value])
    for part in expected:
        assert part in str(error.value), error.value


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("steps: 1\nname: x\nsteps: 3\n", r"line 3: 'steps' is given twice \(first in line 1\)"),
        (
            "model:\n  ttt:\n    lr: 1\n    proj: no\n    lr: 2\n",
            r"line 5: 'lr' is given twice \(first in line 3\)",
        ),
        ("model: {d_model: 1, d_model: 1}\n", "line 1: 'd_model' is given twice"),
        ('steps: 1\n"steps": 2\n', "line 2: 'steps' is given twice"),
    ],
)
def test_a_key_that_is_written_twice_is_refused(tmp_path, text, where):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=where) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
