"""The library examples of README.md, line by line on a small model: they run, and do what their
comments say. A line `expression  # -> VALUE` is checked against its value.
"""

import ast
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from support.hf_folders import make_folder

from ttt_jax import generate, load_pretrained, save_pretrained
from ttt_jax.data.tokenizer import ByteTokenizer

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
TTT = {
    "ttt_layers": [1],
    "ttt_mode": True,
    "ttt_proj": True,
    "ttt_lr": 0.5,
    "ttt_chunk": 4,
    "ttt_target": "hidden_states",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A Hugging Face folder whose tokenizer is the one of bytes."""
    monkeypatch.chdir(tmp_path)
    make_folder(
        tmp_path / "small",
        {"model_type": "qwen3", "head_dim": 16, "num_hidden_layers": 2, "vocab_size": 257} | TTT,
    )

    def with_bytes(path, **options):
        model = load_pretrained(tmp_path / "small" if "path/to" in str(path) else path, **options)
        model.tokenizer = ByteTokenizer()
        return model

    monkeypatch.setattr("ttt_jax.load_pretrained", with_bytes, raising=False)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield tmp_path


def run(source, names):
    """Run a block statement by statement, and compare what its lines say that they give. Returns
    the names that are assigned, and those that are read.
    """
    tree, lines = ast.parse(source), source.splitlines()
    for statement in tree.body:
        _, arrow, said = lines[statement.end_lineno - 1].partition("  # -> ")
        if arrow:
            assert isinstance(statement, ast.Expr), f"no value: {lines[statement.end_lineno - 1]}"
            code = compile(ast.Expression(statement.value), "README.md", "eval")
            assert repr(eval(code, names)) == said.strip()
            continue
        code = compile(ast.Module([statement], []), "README.md", "exec")
        exec(code, names)  # what the README says, and nothing else
    stored = {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    loaded = {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
    }
    return stored, loaded


def test_a_value_that_is_said_is_checked():
    run("a = 2\na + 1  # -> 3\n(a,\n a)  # -> (2, 2)\n", {})
    for wrong in ("a = 2\na + 1  # -> 4", "a = 2  # -> 2"):
        with pytest.raises(AssertionError):
            run(wrong, {})


def test_the_library_example(folder):
    names = {}
    stored, loaded = run(BLOCKS[0], names)
    # Results that the example ends with are shown, not used.
    assert stored - loaded <= {"_", "logits", "logits_off", "o", "S"}
    vocab = names["model"].config.vocab_size
    length = names["ids"].shape[1]
    assert names["logits"].shape == names["logits_off"].shape == (1, length, vocab)
    assert names["state"].position_B.tolist() == [2 * length]
    twice = np.concatenate([names["ids"]] * 2, axis=1)
    whole, _ = names["model"](twice)
    np.testing.assert_allclose(names["logits"], whole[:, length:], rtol=1e-3, atol=1e-3)
    assert np.abs(names["logits_off"] - whole[:, :length]).max() > 1e-3
    assert names["read"]._cache_size() == 2  # a fresh start, and reading on
    again = load_pretrained(folder / "hf_folder")  # "a round trip is exact"
    assert again.config == names["model"].config
    pairs = zip(jax.tree.leaves(again), jax.tree.leaves(names["model"]), strict=True)
    assert all(np.array_equal(x, y) for x, y in pairs)
    assert save_pretrained is names["save_pretrained"]
    assert names["o"].shape == (2, 4096, 256)
    assert names["S"].shape == (2, 256, 512)  # "one fast weight for each sequence"


def test_the_generation_example(folder, capsys):
    names = {"document": "a book " * 5, "question": "who?"}
    names["model"] = load_pretrained(folder / "small")
    names["model"].tokenizer = ByteTokenizer()
    run(BLOCKS[1], names)
    assert names["session"].position_B.tolist() == [len("a book " * 5) - 1]
    shown = capsys.readouterr().out
    again = generate(names["model"], names["prompts"], max_new_tokens=64, temperature=0.8)
    asked = names["session"].branch()
    asked.extend(["who?"])
    assert shown == f"{again[0].text}\n{asked.generate(64)[0].text}\n"
