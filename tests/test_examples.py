"""Commands in the documents: every option that a document gives to `ttt-jax` or `train.py` exists,
and the recipe of examples/smollm2.md is a config.
"""

import dataclasses
import re
import textwrap

import pytest
from support.byte_models import byte_model
from test_documents import ROOT, documents, is_record

from ttt_jax.command.cli import cli
from ttt_jax.config import Config, read_written, to_dict
from ttt_jax.pretrained.hf_config import read_config
from ttt_jax.pretrained.start_config import load_start_config

COMMAND = re.compile(r"^(?:\$ )?(?:ttt-jax|(?:\S+/)?python3? (train)\.py) ?([a-z]*)(.*)$")
OPTION = re.compile(r"(?<![\w-])--[A-Za-z][\w.-]*")


def commands(text):
    """(command, rest of the line) of every command in a block of code; continued lines are one."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)
    for block in blocks:
        block = re.sub(r" *\\\n\s*", " ", textwrap.dedent(block))
        for line in block.splitlines():
            for part in line.partition(" # ")[0].split(" && "):
                if match := COMMAND.match(part.strip()):
                    yield match[1] or match[2], match[3]


def fields(tree, prefix="--"):
    for name, value in tree.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from fields(value, f"{prefix}{name}.")


def known_options(name):
    command = cli.commands[name]
    params = [p for c in (command, *getattr(command, "commands", {}).values()) for p in c.params]
    found = {o for p in params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    config = set(fields(to_dict(Config())))
    if name in ("train", "plan"):
        found |= config
    if name == "convert":
        found |= {field.replace("--model.", "--") for field in config}
    return found


def unknown(text):
    found = []
    for name, rest in commands(text):
        if name and name not in cli.commands:
            found.append(name)
        elif name:
            found += [o for o in OPTION.findall(rest) if o not in known_options(name)]
    return found


def test_what_the_check_finds():
    text = "    ttt-jax score --model DIR \\\n        --texts FILE --no-ttt  # --gone\n"
    assert list(commands(text)) == [("score", " --model DIR --texts FILE --no-ttt")]
    assert unknown(text) == ["--texts"]
    text = "```bash\npip x && .venv/bin/python train.py --model.d_mode 3 --steps=4\n```\nttt-jax\n"
    assert unknown(text) == ["--model.d_mode"]
    assert unknown("    $ ttt-jax chatt --model DIR\n") == ["chatt"]
    assert unknown("    ttt-jax convert A B --ttt.layers 0 --ttt.chunk 3\n") == ["--ttt.chunk"]


@pytest.mark.parametrize("name", [n for n in documents() if not is_record(n)])
def test_every_option_in_a_document_exists(name):
    assert unknown((ROOT / name).read_text(encoding="utf-8")) == []


def test_the_recipe_for_the_real_model(tmp_path):
    """The page's file takes model, TTT layer and tokenizer from the folder that the page makes."""
    text, path = (ROOT / "examples/smollm2.md").read_text(encoding="utf-8"), "smollm2_books.yaml"
    source = byte_model(tmp_path / "source", **{"ttt.write": "ridge", "ttt.decay": 0.95})
    config = load_start_config(ROOT / "examples" / path, [f"--init_from={source}"])
    model = read_config(source)
    assert config.model.ttt == dataclasses.replace(model.ttt, read_cap=0.06)
    assert (config.model.d_model, config.model.sliding_window) == (model.d_model, 1024)
    assert config.data.tokenizer == str(source)
    written = read_written(ROOT / "examples" / path)
    assert f"ttt-jax convert smollm2 {written.get('init_from')} --to hf --ttt.calibrate" in text
    assert f"ttt-jax train ttt_jax/examples/{path} --data.train {written.get('data.train')}" in text
    assert f"runs/{config.name}" in text
    assert f"{config.steps} steps of {config.data.batch_size} rows" in text
