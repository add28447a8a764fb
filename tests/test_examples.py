"""Commands in the documents: every option that a document gives to `ttt-jax` or `train.py` exists,
and the config of examples/smollm2.md is one.
"""

import re
import textwrap

import pytest
from test_documents import ROOT, documents, is_record

from ttt_jax.command.cli import cli
from ttt_jax.config import Config, make_config, read_written, to_dict

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


def test_the_config_of_the_real_model(tmp_path):
    """The page writes a file for training; it is a config, and fits what the page says before."""
    text = (ROOT / "examples/smollm2.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "train.yaml").write_text(block)
    config = make_config(read_written(tmp_path / "train.yaml"), {"model": {"num_layers": 30}})
    assert config.init_from == "smollm2"
    assert f"runs/{config.name}" in text
    assert config.model.ttt.layers == (0, 6, 12, 18, 24)
    assert config.data.seq_len % config.model.ttt.chunk_size == 0
    assert all(name in text for name in (*config.data.train, *config.data.heldout))
