"""Three results in one table: each mode of each run, against the first."""

import json

import numpy as np
import pytest
from support.models import config
from support.results import results_head

from ttt_jax.command.cli import main
from ttt_jax.config import to_dict
from ttt_jax.errors import CheckpointError, UserError
from ttt_jax.eval.output import comparison, files_of, write_folder
from ttt_jax.eval.statistics import mean_with_interval


def mean(values):
    return mean_with_interval(np.array(values))


def results_of(name, documents=("x", "y"), **losses):
    """One length and position, with the losses of two documents in each mode."""
    entry = {mode: mean(values) for mode, values in losses.items()} | {"per_document": losses}
    return {
        **results_head(name),
        "perplexity": {
            "block": 8,
            "documents": list(documents),
            "modes": list(losses),
            "lengths": [entry | {"length": 16}],
            "positions": [entry | {"start": 0, "stop": 16}],
        },
        "config": to_dict(config()),
    }


def three():
    return [
        results_of("none", off=[3.0, 2.0]),
        results_of("full", off=[2.0, 1.5]),
        results_of("ttt", off=[3.2, 2.4], on=[2.5, 1.6]),
    ]


def test_every_mode_of_every_run_against_the_first():
    compared, (table,) = comparison(*three())
    assert compared["runs"] == {"A": "none", "B": "full", "C": "ttt"}
    rows = {(row["run"], row["mode"]): row for row in compared["rows"]}
    assert list(rows) == [("A", "off"), ("B", "off"), ("C", "off"), ("C", "on")]
    assert rows["A", "off"]["difference"] is None
    assert rows["B", "off"]["difference"] == mean([-1.0, -0.5])
    assert rows["C", "on"]["difference"] == mean([-0.5, 2.0 - 2.4])
    assert rows["C", "on"]["mean"] == pytest.approx(2.05)
    assert {row["what"] for row in compared["rows"]} == {"loss at 16"}
    assert {row["reference"] for row in compared["rows"]} == {"A off"}
    assert table.rows[0][4:] == ["-", "-"]
    assert table.rows[1][:5] == ["loss at 16", "B", "off", "1.7500", "A off"]


def test_the_reference_is_on_where_the_first_run_has_it():
    none, full, ttt = three()
    compared, _ = comparison(ttt, none, full)
    rows = {(row["run"], row["mode"]): row["difference"] for row in compared["rows"]}
    assert rows["A", "on"] is None
    assert rows["A", "off"] == mean([3.2 - 2.5, 2.4 - 1.6])


def test_other_documents_are_not_paired_and_other_blocks_not_compared():
    none, full, ttt = three()
    other = results_of("ttt", documents=("x", "z"), on=[2.5, 1.6])
    difference = comparison(none, full, other)[0]["rows"][-1]["difference"]
    assert (difference["low"], difference["high"]) == (None, None)
    assert difference["mean"] == pytest.approx(-0.45)
    longer = results_of("ttt", off=[3.2, 2.4])
    longer["perplexity"]["lengths"].append(longer["perplexity"]["lengths"][0] | {"length": 32})
    assert {row["run"] for row in comparison(none, full, longer)[0]["rows"]} == {"A", "B"}
    ttt["perplexity"]["block"] = 4
    assert {row["run"] for row in comparison(none, full, ttt)[0]["rows"]} == {"A", "B"}
    none["perplexity"]["block"] = 2
    with pytest.raises(UserError, match="no two of the results have an entry in common"):
        comparison(none, full, ttt)
    with pytest.raises(CheckpointError, match="damaged"):
        comparison(none, full, ttt | {"perplexity": {"documents": 3}})


def test_recall_and_accuracies_stand_in_the_table_too():
    losses = {"control": [2.0, 3.0], "second": [1.0, 1.0], "first": [2.0, 2.0]}
    recall = {"recall": mean([1.0, 2.0]), "per_document": losses}
    probe = {"passage": 4, "documents": ["x", "y"], "modes": ["on"]}
    probe["lengths"] = [{"length": 2048, "on": recall}]
    entry = {"task": "mqar_4", "length": 1024, "distance": None, "on": {"accuracy": mean([0.5])}}
    suite = {"examples": 1, "form": "ids", "seed": 0, "modes": ["on"], "entries": [entry]}
    both = [result | {"recall": probe, "synthetic": suite} for result in three()[1:]]
    rows = comparison(three()[0], *both)[0]["rows"]
    found = {(row["what"], row["run"]): row for row in rows}
    assert found["recall at 2k", "B"]["difference"] is None
    assert found["recall at 2k", "C"]["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert found["mqar_4 at 1k", "C"]["mean"] == 0.5


def test_command_line(tmp_path, capsys):
    folders = []
    for results in three():
        folders.append(str(tmp_path / results["model"]))
        write_folder(tmp_path / results["model"], files_of(results), False)
    out = tmp_path / "out"
    assert main(["eval", "--compare", *folders, "--out", str(out)]) == 0
    assert "Side by side" in capsys.readouterr().out
    assert len(json.loads((out / "comparison.json").read_text())["rows"]) == 4
    page = (out / "comparison.html").read_text()
    assert "C: ttt" in page
    assert "Loss by context length of all runs" in page
    assert main(["eval", "--compare", *folders * 3]) == 2
    assert "--compare: 9 results; give at most 8" in capsys.readouterr().err
    assert main(["eval", "--model", "m", "--out", "x", "surplus"]) == 2
    assert "unexpected extra argument (surplus)" in capsys.readouterr().err
