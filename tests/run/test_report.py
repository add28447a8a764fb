"""The closing report: means by position, the promised keys, files that programs and people can
read.
"""

import io
import itertools
import json

import numpy as np
import pytest
from rich.console import Console
from support.reports import CONFIG, CURVE, HELDOUT, POSITIONS

from ttt_jax.config import Config
from ttt_jax.errors import UserError
from ttt_jax.run import report as report_module
from ttt_jax.run.report import print_report, write_report
from ttt_jax.training.heldout import bucket_losses


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(("length", "buckets"), [(32, 8), (29, 8), (5, 8), (7, 1)])
def test_bucket_losses(length, buckets):
    random = np.random.default_rng(0)
    nll, weights = (
        random.normal(size=(3, length)).astype(np.float32),
        random.integers(0, 2, (3, length)).astype(np.float32),
    )
    nll[weights == 0] = np.nan  # what stands at padded positions must not matter
    positions, losses = bucket_losses(nll, weights, buckets)
    assert [positions[0][0], positions[-1][1], len(positions)] == [0, length, min(buckets, length)]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(positions))
    assert {b - a for a, b in positions} <= {length // len(positions), length // len(positions) + 1}
    for (start, stop), loss in zip(positions, losses, strict=True):
        kept = [float(nll[b, t]) for b in range(3) for t in range(start, stop) if weights[b, t]]
        assert loss == (pytest.approx(np.mean(kept), rel=1e-12) if kept else None)


def test_bucket_losses_accumulates_in_float64():
    nll = np.full((1, 1 << 20), 0.1, np.float32)
    assert bucket_losses(nll, np.ones_like(nll), 1)[1][0] == pytest.approx(
        float(np.float32(0.1)), rel=1e-12
    )


def test_report_files(tmp_path):
    summary = {"tokens_per_second": np.float32(1234.5), "seconds": 3.25}
    report = write_report(tmp_path, config=CONFIG, heldout=HELDOUT, curve=CURVE, summary=summary)
    stored = strict((tmp_path / "report.json").read_text())
    assert stored == report
    assert stored["heldout"] == {**HELDOUT, "gain": [0.0, 0.25, None]}
    assert (stored["steps"], stored["loss_first"], stored["loss_last"]) == (40, 3.0, 3 / 40)
    assert stored["tokens_per_second"] == 1234.5
    assert stored["seconds"] == 3.25
    assert {"date", "commit", "hardware", "versions", "config"} <= stored.keys()
    assert stored["hardware"]["platform"] == "cpu"
    assert stored["versions"]["jax"]

    text = (tmp_path / "report.md").read_text()
    assert "| 512 to 1023 | 2.5000 | 2.2500 | +0.2500 |" in text
    assert "| 1024 to 1535 | 2.6000 | - | - |" in text
    for name in ("loss_curve.png", "loss_by_position.png"):
        assert f"]({name})" in text
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "chunk_size: 4096" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "loss_by_position.png", "loss_curve.png", "report.html", "report.json", "report.md"
    ]  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert "<td>512 to 1023</td><td>2.5000</td><td>2.2500</td><td>+0.2500</td>" in page
    assert "after 40 steps, TTT on and off" in page
    assert "(finished)" in page, "it is written before report.json"
    assert '<img alt="Held-out loss by position" src="data:image/svg' in page


def test_a_page_that_cannot_be_made_costs_nothing_else(tmp_path, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise UserError("run file metrics.jsonl: too large")

    monkeypatch.setattr(report_module, "write_page", fail)
    write_report(tmp_path, config=CONFIG, heldout=HELDOUT, curve=CURVE, summary={})
    said = "warning: no report.html: run file metrics.jsonl: too large\n"
    assert capsys.readouterr().out == said
    assert json.loads((tmp_path / "report.json").read_text())["steps"] == 40


def test_report_of_a_run_without_curve_or_heldout(tmp_path):
    heldout = {"positions": [], "ttt_on": [], "ttt_off": []}
    report = write_report(tmp_path, config=CONFIG, heldout=heldout, curve=[], summary={"steps": 0})
    assert (report["steps"], report["loss_first"], report["tokens_per_second"]) == (0, None, None)
    assert ".png" not in (tmp_path / "report.md").read_text()
    print_report(report, tmp_path, Console(file=io.StringIO()))


def test_not_a_number_becomes_null(tmp_path):
    heldout = {"positions": POSITIONS[:1], "ttt_on": [np.nan], "ttt_off": [np.float32(2.5)]}
    write_report(tmp_path, config=CONFIG, heldout=heldout, curve=CURVE, summary={})
    assert strict((tmp_path / "report.json").read_text())["heldout"]["ttt_on"] == [None]


def test_lengths_must_agree(tmp_path):
    with pytest.raises(ValueError, match="3 positions, 2 ttt_on and 3 ttt_off"):
        write_report(
            tmp_path, config=CONFIG, heldout={**HELDOUT, "ttt_on": [1, 2]}, curve=[], summary={}
        )


def test_print_report(tmp_path):
    report = write_report(
        tmp_path, config=CONFIG, heldout=HELDOUT, curve=CURVE, summary={"tokens_per_second": 1234.5}
    )
    out = io.StringIO()
    print_report(report, tmp_path, Console(file=out, width=80))
    assert "512 to 1023" in out.getvalue()
    assert "+0.2500" in out.getvalue()
    assert "40 steps, training loss 3.0000 -> 0.0750, 1,234 tokens/s" in out.getvalue()
    assert out.getvalue().endswith(f"report: {tmp_path / 'report.html'}\n")
    (tmp_path / "report.html").unlink()  # of a run of before
    print_report(report, tmp_path, Console(file=out, width=80))
    assert out.getvalue().endswith(f"report: {tmp_path / 'report.md'}\n")


def test_without_ttt_there_is_one_loss(tmp_path):
    report = write_report(tmp_path, config=Config(), heldout=HELDOUT, curve=CURVE, summary={})
    assert "| positions | loss |\n|---:|---:|\n" in (text := (tmp_path / "report.md").read_text())
    assert "| 512 to 1023 | 2.5000 |\n" in text
    assert "gain" not in text.lower().split("## configuration")[0]
    print_report(report, tmp_path, Console(file=(out := io.StringIO()), width=80))
    assert "TTT" not in out.getvalue()
    assert "mean" in out.getvalue()
    assert (tmp_path / "loss_by_position.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
