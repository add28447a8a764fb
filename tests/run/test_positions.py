"""The held-out loss by position in `metrics.jsonl`, in tables, and on the page of a run."""

import json
import math

import pytest
from support.reports import CONFIG, HELDOUT

from ttt_jax.config import dump_yaml, replace
from ttt_jax.display.tables import table_text
from ttt_jax.run.page import write_page
from ttt_jax.run.positions import (
    checked_heldout,
    heldout_of_scalars,
    position_scalars,
    position_table,
)


def test_scalars_and_back():
    """A bucket in which no token counts is left out, and the means are over those that count."""
    scalars = position_scalars(HELDOUT)
    assert scalars == {
        "heldout/ttt_on": 2.375,
        "heldout/ttt_off": pytest.approx(7.6 / 3),
        "heldout/0000-0511/ttt_on": 2.5,
        "heldout/0000-0511/ttt_off": 2.5,
        "heldout/0512-1023/ttt_on": 2.25,
        "heldout/0512-1023/ttt_off": 2.5,
        "heldout/1024-1535/ttt_off": 2.6,
    }
    back = heldout_of_scalars({"loss": 3.0, "heldout/x": 1, **scalars})
    assert back == {**HELDOUT, "positions": [tuple(p) for p in HELDOUT["positions"]]}
    assert heldout_of_scalars({"heldout/ttt_on": 1.0}) is None
    none = {"positions": [[0, 9]], "ttt_on": [None], "ttt_off": [None]}
    assert position_scalars(none) == {}


def test_the_table():
    text = table_text(position_table(HELDOUT, ttt=True, title="At step 3"), first="right")
    assert text.startswith("At step 3")
    assert "512 to 1023 │  2.5000 │ 2.2500 │ +0.2500" in text
    assert "1024 to 1535 │  2.6000 │      - │       -" in text
    assert "TTT" not in table_text(position_table(HELDOUT, ttt=False))


@pytest.mark.parametrize(
    "heldout",
    [
        None,
        [],
        {"positions": [], "ttt_on": [], "ttt_off": []},
        {**HELDOUT, "ttt_on": [1.0]},
        {**HELDOUT, "ttt_on": ["1.0", 2.0, 3.0]},
        {**HELDOUT, "positions": [[0, 512], [512, 512], [1024, 1536]]},
        {**HELDOUT, "positions": [[-1, 512], [512, 1024], [1024, 1536]]},
        {**HELDOUT, "positions": [[0, 512, 3], [512, 1024], [1024, 1536]]},
        {**HELDOUT, "positions": [["<b>", 512], [512, 1024], [1024, 1536]]},
        {**HELDOUT, "positions": 7},
    ],
)
def test_what_a_file_says_is_looked_at(heldout):
    assert checked_heldout(heldout) is None


def test_numbers_that_are_not_finite_are_left_out():
    odd = {**HELDOUT, "ttt_on": [math.inf, math.nan, 1e301]}
    assert checked_heldout(odd)["ttt_on"] == [None] * 3


@pytest.fixture
def run(tmp_path):
    """A folder with a metrics row of step 40, the report of step 20, and samples."""
    config = replace(CONFIG, {"name": "demo"})
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    row = {"step": 40, "loss": 3.0, **position_scalars(HELDOUT)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def report(run, steps, **heldout):
    text = json.dumps({"steps": steps, "heldout": {**HELDOUT, **heldout}})
    (run / "report.json").write_text(text)
    return write_page(run).read_text()


def test_the_page_has_the_newest_losses(run):
    page = write_page(run).read_text()
    assert "<h2>Held-out loss by position</h2>" in page
    assert "after 40 steps, TTT on and off" in page
    assert "<td>512 to 1023</td><td>2.5000</td><td>2.2500</td><td>+0.2500</td>" in page
    assert page.count('alt="Held-out loss by position"') == 1
    newer = report(run, 60, ttt_on=[2.0, 2.0, 2.0])
    assert "after 60 steps, TTT on" in newer
    assert "<td>512 to 1023</td><td>2.5000</td><td>2.0000</td><td>+0.5000</td>" in newer
    older = report(run, 20, ttt_on=[2.0, 2.0, 2.0])  # a finished run that goes on
    assert "after 40 steps, TTT on" in older
    assert "<td>512 to 1023</td><td>2.5000</td><td>2.2500</td><td>+0.2500</td>" in older
    assert "after 40 steps, TTT on" in report(run, 60, ttt_on=["<script>"] * 3)


def test_the_page_has_the_last_samples_escaped(run):
    assert "Samples" not in write_page(run).read_text()
    lines = [
        {"step": n, "ttt": "on", "prompt": "x" * 999 + "end", "text": f"<script>{n}"}
        for n in range(20)
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_page(run).read_text()
    assert "The last 12; samples.jsonl has them all." in page
    assert "&lt;script&gt;19" in page
    assert "&lt;script&gt;8" in page
    assert "&lt;script&gt;7<" not in page
    assert "<script" not in page
    assert ">" + "x" * 297 + "end<" in page
