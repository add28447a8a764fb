"""The result folder, the page, the comparison and the command line."""

import json
import re

import numpy as np
import pytest
from support.hf_folders import BASE, make_folder
from support.models import config
from support.results import results_head

from ttt_jax.command.cli import main
from ttt_jax.config import to_dict
from ttt_jax.errors import CheckpointError, UserError
from ttt_jax.eval.output import check_out, comparison, files_of, read_results, write_folder
from ttt_jax.eval.run import Options, check, parse_lengths
from ttt_jax.eval.tables import tables

V = BASE["vocab_size"]


def entry(on, off, **where):
    """One length or position of two documents."""
    mean = lambda values: {"mean": float(np.mean(values)), "low": 0.0, "high": 9.0}
    gain = mean(np.array(off) - np.array(on))
    return where | {
        "on": mean(on),
        "off": mean(off),
        "gain": gain,
        "per_document": {"on": on, "off": off},
    }


def results_of(on=(2.0, 3.0), name="a"):
    on, off = list(on), [2.5, 3.0]
    perplexity = {
        "block": 8,
        "documents": ["x", "y"],
        "tokens_read": 99,
        "modes": ["off", "on"],
        "lengths": [entry(on, off, length=16), entry(on, off, length=1024)],
        "positions": [entry(on, off, start=0, stop=16)],
    }
    return {
        **results_head(name, model=name),
        "perplexity": perplexity,
        "config": to_dict(config()),
    }


def test_parse_lengths():
    assert parse_lengths("4k, 2K,100,1m,2048") == (100, 2048, 4096, 1 << 20)
    for wrong in ("", "2k,", "k", "-3", "1.5k", "0"):
        with pytest.raises(UserError, match="--lengths"):
            parse_lengths(wrong)


def test_folder_is_atomic_and_never_replaces_other_things(tmp_path):
    out = tmp_path / "out"
    write_folder(out, files_of(results_of()), False)
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.json"]
    assert read_results(out) == results_of()
    with pytest.raises(
        UserError, match="exists already; choose another folder or pass --overwrite"
    ):
        write_folder(out, files_of(results_of()), False)
    write_folder(out, files_of(results_of(name="b"), "<p>"), True)
    assert read_results(out)["model"] == "b"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"holds 'thesis.tex', so it is not a result folder"):
        check_out(out, True)


def test_the_page_is_self_contained():
    page = files_of(results_of(name="<m>"))["report.html"]
    assert "&lt;m&gt;" in page
    assert "<m>" not in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "<script" not in page
    (by_length, by_position) = tables(results_of())
    assert by_length.rows[1][:3] == ["1k", "2.7500", "2.5000"]
    assert by_position.rows[0][0] == "0 to 15"


def test_comparison_pairs_documents():
    compared, (table,) = comparison(results_of(), results_of(on=(1.5, 2.9), name="b"))
    rows = {(row["what"], row["mode"]): row for row in compared["rows"]}
    difference = rows["loss at 1k", "on"]["difference"]
    assert difference["mean"] == pytest.approx(-0.3)
    assert difference["low"] == pytest.approx(-0.5)
    assert difference["high"] == pytest.approx(-0.1)
    assert rows["loss at 16", "off"]["difference"]["mean"] == 0.0
    assert len(table.rows) == 4
    other = results_of()
    other["perplexity"]["documents"] = ["x", "z"]
    assert comparison(results_of(), other)[0]["rows"][0]["difference"]["low"] is None
    # Of a longer text, other tokens are the last ones, and their losses are not compared.
    shorter = results_of()
    del shorter["perplexity"]["lengths"][1]
    with pytest.raises(UserError, match="no entry in common"):
        comparison(results_of(), shorter)
    other["perplexity"]["block"] = 7
    with pytest.raises(UserError, match="no entry in common"):
        comparison(results_of(), other)


def test_damaged_results(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no results.json"):
        read_results(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(CheckpointError, match="--compare"):
            read_results(tmp_path)


def test_checks_before_a_model_is_loaded():
    with pytest.raises(UserError, match="nothing to evaluate"):
        check(Options("m"))
    with pytest.raises(UserError, match="--shuffled: is a control"):
        check(Options("m", perplexity="x", ttt="on", shuffled=True))
    with pytest.raises(UserError, match="--diagnostics and --html"):
        check(Options("m", tasks=("synthetic",), text_page=True))


@pytest.fixture
def folder(tmp_path):
    ttt = {
        "ttt_layers": [1],
        "ttt_mode": True,
        "ttt_proj": True,
        "ttt_lr": 0.5,
        "ttt_chunk": 4,
        "ttt_target": "hidden_states",
    }
    make_folder(
        tmp_path / "model", {"model_type": "qwen3", "head_dim": 16, "num_hidden_layers": 2} | ttt
    )
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, V, (3, 40)))
    return tmp_path


def test_command_line(folder, capsys):
    """From a Hugging Face folder and an .npy to results, a page, a coloured text, and a comparison
    with itself.
    """
    model, ids, out = (str(folder / name) for name in ("model", "ids.npy", "out"))
    words = [
        "eval",
        "--model",
        model,
        "--perplexity",
        ids,
        "--lengths",
        "16,32",
        "--html",
        "--diagnostics",
        "--strict",
        "--recall",
        ids,
        "--passage",
        "4",
        "--out",
        out,
    ]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "Loss of the same final 8 tokens" in shown
    results = json.loads((folder / "out" / "results.json").read_text())
    assert results["perplexity"]["modes"] == ["off", "on", "shuffled", "strict", "cold"]
    assert [entry["length"] for entry in results["recall"]["lengths"]] == [16, 32]
    page = (folder / "out" / "report.html").read_text()
    assert "A passage read again" in page
    assert "cold - strict" in page
    assert results["config"]["ttt"]["layers"] == [1]
    assert (results["dtype"], results["hardware"]["platform"]) == ("float32", "cpu")
    assert results["versions"]["jax"]
    assert (folder / "out" / "text.html").read_text().count("<span style") > 39
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["eval", "--compare", out, out]) == 0
    shown = capsys.readouterr().out
    assert "loss at 32" in shown
    assert "recall at 32" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x"], "give --model DIR or --compare A B"),
        (["--model", "m"], "--out DIR is missing"),
        (["--model", "m", "--out", "x"], "nothing to evaluate"),
        (
            ["--model", "nowhere", "--out", "x", "--perplexity", "d"],
            "model nowhere: no such folder",
        ),
        (
            ["--model", "m", "--out", "x", "--perplexity", "d", "--lengths", "2q"],
            "--lengths 2q: '2q' is not a number",
        ),
        (["--compare", "nowhere", "nowhere"], "--compare nowhere: holds no results.json"),
    ],
)
def test_command_line_refusals(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
