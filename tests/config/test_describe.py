"""What `--help` shows of each field, and which field an unknown word is taken for."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ttt_jax.config import (
    REMAT_NAMES,
    Config,
    dump_yaml,
    field_names,
    fields_help,
    help_text,
    load_config,
    preset_names,
    replace,
    to_dict,
)
from ttt_jax.config.describe import nearest_fields, written
from ttt_jax.train import main

ROOT = Path(__file__).parents[2]
ROWS = {row.name: row for row in fields_help()}


def leaves(tree, prefix=""):
    for key, value in tree.items():
        yield from (
            leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
        )


def test_every_field_has_its_sentence():
    assert sorted(ROWS) == sorted(field_names()) == sorted(leaves(to_dict(Config())))
    for name, row in ROWS.items():
        assert len(row.sentence.split()) >= 2, f"{name}: write a comment beside it"
        assert not re.search(r"None|False|True|\(\)", row.sentence), f"{name}: as YAML has it"
        assert "#" not in row.sentence


def test_sentences_are_the_comments():
    """Beside the field, in the line above it, and in several lines above it."""
    assert ROWS["steps"].sentence.startswith("updates of the run in all;")
    assert ROWS["model.ttt.ridge"].sentence == (
        "lambda of the ridge write, relative to the mean squared norm of a chunk's keys"
    )
    for name in REMAT_NAMES:
        assert name in ROWS["remat_save"].sentence
    assert ROWS["optimizer.b1"].sentence == "decay of Adam's first moment", "not the neighbour's"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("steps", "whole number above 0"),
        ("eval.every", "whole number, 0 or more"),
        ("model.ttt.lr", "number"),
        ("optimizer.b1", "number from 0 to 1"),
        ("data.heldout_fraction", "number above 0 and below 1"),
        ("seed", "whole number from 0 to below 4294967296"),
        ("model.sliding_window", "whole number above 0, or null"),
        ("data.pack", "true or false"),
        ("init_from", "text, or null"),
        ("optimizer.schedule", "one of cosine, wsd, constant"),
        ("data.train", "texts, with commas between them"),
        ("model.ttt.layers", "whole numbers, 0 or more, with commas between them"),
        ("remat_save", "texts, with commas between them, or null"),
        (
            "optimizer.groups",
            "a list of {pattern: text; lr_multiplier: number, 0 or more; frozen: true or false; "
            "weight_decay: true or false, or null}",
        ),
    ],
)
def test_ranges_are_words(name, values):
    assert ROWS[name].values == values


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_shows_its_own_values_and_they_can_be_typed(name):
    """What stands in the help, typed on a command line, gives the preset again."""
    config = load_config(name)
    rows = fields_help(config)
    words = [word for row in rows for word in (f"--{row.name}", row.value)]
    assert load_config(None, words) == config
    assert f"  --name {name}\n" in help_text(config)
    assert f"  --model.ttt.layers {','.join(map(str, config.model.ttt.layers))}\n" in help_text(
        config
    )


def test_odd_values_can_be_typed_too():
    config = replace(
        load_config("default"),
        {
            "data.text_field": "",
            "optimizer.groups": [{"pattern": "a, b: 'c'", "weight_decay": True}],
            "optimizer.weight_decay": 1e-30,
            "model.ttt.layers": [],
        },
    )
    words = [word for row in fields_help(config) for word in (f"--{row.name}", row.value)]
    assert dump_yaml(load_config(None, words)) == dump_yaml(config)
    assert (written(None), written(True), written(())) == ("null", "true", "[]")


def test_the_help_has_each_group_once_and_fits_the_line():
    text = help_text(Config())
    assert max(map(len, text.splitlines())) <= 100
    heads = [line.partition(":")[0] for line in text.splitlines() if re.match(r"[a-z.]+:", line)]
    assert len(heads) == len(set(heads))
    assert {"run", "model", "model.rope", "model.ttt", "sample"} <= set(heads)


def test_the_command_shows_the_preset_that_is_asked_for(capsys):
    for words in (["books", "--help"], ["-h", "books"], ["books", "--lr", "3", "--help"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert "with the values of books:" in out
        assert "--model.d_model 768\n" in out
    assert main(["--help"]) == 0
    assert "--model.d_model 96\n" in capsys.readouterr().out
    assert main(["boks", "--help"]) == 2
    assert "did you mean books?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("lr", ["optimizer.lr", "model.ttt.lr"]),
        ("ttt.lr", ["model.ttt.lr"]),
        ("model.lr", ["optimizer.lr", "model.ttt.lr"]),
        ("batch_size", ["data.batch_size"]),
        ("chunk_size", ["model.ttt.chunk_size"]),
        ("every", ["checkpoint.every", "log.every", "eval.every"]),
        ("seq_length", ["data.seq_len"]),
        ("n_layers", ["model.num_layers"]),
        ("modle.d_model", ["model.d_model"]),
        ("model.ttt.chunk", ["model.ttt.chunk_size"]),
        ("learning_rate", ["optimizer.lr", "model.ttt.lr"]),
        ("context_length", ["data.seq_len"]),
        ("hidden_size", ["model.d_model"]),
        ("gradient_accumulation_steps", ["optimizer.accumulate"]),
        ("max_steps", ["steps"]),
        ("warmup", ["optimizer.warmup_steps", "optimizer.warmup_ratio"]),
        ("chekpoint", ["checkpoint"]),
        ("qqqq", []),
    ],
)
def test_an_unknown_word_suggests_the_field(word, near):
    found = nearest_fields(word)
    assert found[: len(near)] == near
    assert len(found) <= 3
    assert near or not found


def test_a_suggestion_in_the_error(capsys):
    assert main(["--batch-size", "3"]) == 2
    assert capsys.readouterr().err == (
        "error: config field batch_size: unknown; did you mean data.batch_size?\n"
    )
    assert main(["--ttt.lr", "3"]) == 2
    assert "config field ttt.lr: unknown; did you mean model.ttt.lr?" in capsys.readouterr().err


def test_fields_of_other_configs_are_described_too():
    """`fields_help` takes any group, and names only that group's fields."""
    rows = fields_help(Config().data)
    assert [row.name for row in rows] == [f.name for f in dataclasses.fields(Config().data)]
    assert nearest_fields("batchsize", type(Config().data)) == ["batch_size"]


def test_the_words_cost_no_time_unless_they_are_asked_for():
    """A right command line reads no source; the interpreter's own time is not the config's."""
    code = (
        "import sys, tokenize\nfrom ttt_jax.config import load_config\n"
        "def fail(*_): raise AssertionError\ntokenize.generate_tokens = fail\n"
        "load_config('books', ['--steps', '500', '--name', 'off'])\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
