"""Which loss is which: a run's report against the same model scored apart, and the pictures'
labels.
"""

import io
import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from support.jobs import TINY, one_device, write_corpus
from support.reports import CONFIG, CURVE, HELDOUT

import train
from ttt_jax.config import load_config
from ttt_jax.data import heldout_rows, load_tokenizer
from ttt_jax.inference.scoring import score
from ttt_jax.pretrained.load import load_pretrained
from ttt_jax.run.report import print_report, write_report


@pytest.mark.parametrize("every", [3, 4])
def test_a_reports_losses_are_those_of_score(tmp_path, capsys, every):
    """After some steps with a high rate on and off differ; `score` reads the checkpoint with TTT
    on, and off. What `eval.every` measured after the last step is not measured again.
    """
    corpus = write_corpus(tmp_path / "corpus")
    words = [
        *TINY, f"--data.train={corpus}", f"--runs_dir={tmp_path}", "--name=run", "--steps=6",
        "--model.ttt.lr=5", "--optimizer.lr=0.05", "--optimizer.warmup_steps=0",
        f"--eval.every={every}", "--log.probe_every=6", "--guard.max_state_ratio=1e9",
        "--model.ttt.target=input_embed",
    ]  # fmt: skip
    with one_device():
        assert train.main(words) == 0
    again = "evaluating held-out loss by position" in capsys.readouterr().out
    assert again == (every == 4)
    config = load_config(tmp_path / "run" / "config.yaml")
    rows = heldout_rows(
        config, tokenizer=load_tokenizer(config.data.tokenizer), rows=config.eval.rows
    )
    model = load_pretrained(tmp_path / "run")
    losses = {}
    for name, ttt in (("ttt_on", True), ("ttt_off", False)):
        nll = -score(model, rows["ids"], ttt=ttt).logprobs_BT
        counted = rows["weights"][:, :-1] > 0
        cut = lambda start, stop, nll=nll, counted=counted: float(
            nll[:, start:stop][counted[:, start:stop]].mean()
        )
        losses[name] = [cut(0, 16), cut(16, 31)]
        losses[f"{name} of all"] = float(nll[counted].mean())
    assert abs(losses["ttt_on"][1] - losses["ttt_off"][1]) > 1e-3, "otherwise nothing is told apart"
    heldout = json.loads((tmp_path / "run" / "report.json").read_text())["heldout"]
    logged = {}
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        logged |= json.loads(line)
    for name in ("ttt_on", "ttt_off"):
        assert heldout[name] == pytest.approx(losses[name], rel=1e-4)
        if again:  # logged is what was measured two steps before
            continue
        assert logged[f"heldout/{name}"] == pytest.approx(np.mean(losses[name]), rel=1e-4)
        buckets = [logged[f"heldout/{where}/{name}"] for where in ("00-15", "16-31")]
        assert buckets == pytest.approx(losses[name], rel=1e-4)
    gain = np.subtract(losses["ttt_off"], losses["ttt_on"])
    assert heldout["gain"] == pytest.approx(gain, rel=1e-2, abs=1e-5)


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved, by the title of its first axes."""
    kept, save = {}, Figure.savefig

    def keep(figure, *args, **kwargs):
        kept[figure.axes[0].get_title()] = figure
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def test_lines_are_labelled_as_what_they_are(tmp_path, figures):
    write_report(tmp_path, config=CONFIG, heldout=HELDOUT, curve=CURVE, summary={})
    upper, lower = next(figure for title, figure in figures.items() if "position" in title).axes
    drawn = {line.get_label(): line.get_ydata() for line in upper.lines}
    np.testing.assert_array_equal(drawn["TTT on"], [2.5, 2.25, np.nan])
    np.testing.assert_array_equal(drawn["TTT off"], [2.5, 2.5, 2.6])
    np.testing.assert_array_equal([bar.get_height() for bar in lower.patches], [0.0, 0.25, np.nan])


def test_columns_are_headed_as_what_they_are(tmp_path):
    """On the terminal and in report.md: one row of the table, and the mean."""
    report = write_report(tmp_path, config=CONFIG, heldout=HELDOUT, curve=CURVE, summary={})
    print_report(report, tmp_path, Console(file=(out := io.StringIO()), width=80))
    text = (tmp_path / "report.md").read_text()
    for lines in (out.getvalue().splitlines(), text.splitlines()):
        cells = [
            [cell.strip() for cell in line.replace("┃", "│").replace("|", "│").split("│")[1:-1]]
            for line in lines
        ]
        head = next(row for row in cells if row and row[0] == "positions")
        table = {
            row[0]: dict(zip(head, row, strict=True)) for row in cells if len(row) == len(head)
        }
        assert table["512 to 1023"] == {
            "positions": "512 to 1023", "TTT off": "2.5000", "TTT on": "2.2500", "gain": "+0.2500"
        }  # fmt: skip
        assert table["mean"]["TTT on"] == "2.3750"
