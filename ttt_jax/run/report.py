"""The closing report of a run: held-out loss by position with TTT on and off on the same weights,
and the loss curve.

`report.json` is for programs, `report.html` (page.py) and `report.md` with two PNGs for people,
`print_report` for the terminal. jax is asked only for the hardware, matplotlib is imported only to
draw.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from ttt_jax.config import Config, dump_yaml, to_dict
from ttt_jax.display.html_page import COLOURS, figure_of, tidy
from ttt_jax.display.tables import Table, number, print_tables
from ttt_jax.errors import UserError
from ttt_jax.files.text import atomic_write_text
from ttt_jax.run.page import PAGE_FILE, write_page
from ttt_jax.run.positions import gains, position_figure, position_table
from ttt_jax.run.provenance import provenance
from ttt_jax.terminal import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_FILE = "report.json"
_FAINT = "#9DC3DE"  # of COLOURS["on"]


def write_report(
    run_dir: str | Path,
    *,
    config: Config,
    heldout: dict[str, Any],
    curve: list[dict[str, Any]],
    summary: dict[str, Any],
) -> dict[str, Any]:
    """Write `report.json`, `report.html`, `report.md`, `loss_curve.png` and `loss_by_position.png`
    into `run_dir`. A page that cannot be made is a warning.

    Args:
      heldout: `positions` as of `bucket_losses`, and the losses `ttt_on` and `ttt_off`, all of one
        length.
      curve: rows of `metrics.jsonl`; those with a `loss` make the curve.
      summary: further entries of the report, such as `tokens_per_second`; they replace the ones
        derived here.

    Returns:
      What `report.json` holds.
    """
    run_dir = Path(run_dir)
    losses = [(row["step"], row["loss"]) for row in curve if row.get("loss") is not None]
    positions = [[int(start), int(stop)] for start, stop in heldout["positions"]]
    on, off = [[_number(value) for value in heldout[key]] for key in ("ttt_on", "ttt_off")]
    if not len(positions) == len(on) == len(off):
        raise ValueError(
            f"heldout: {len(positions)} positions, {len(on)} ttt_on and {len(off)} ttt_off losses"
        )
    modes = {"ttt_on": on, "ttt_off": off}
    summary = {key: _plain(value) for key, value in summary.items()}
    report = {
        "name": config.name,
        "steps": losses[-1][0] if losses else 0,
        "tokens_per_second": None,
        "loss_first": losses[0][1] if losses else None,
        "loss_last": losses[-1][1] if losses else None,
        "heldout": {**heldout, "positions": positions, **modes, "gain": gains(modes)},
        **summary,
        **provenance(),
        "config": to_dict(config),
    }
    pictures = _draw(run_dir, losses, report["heldout"], bool(config.model.ttt.layers))
    atomic_write_text(run_dir / "report.md", _markdown(report, config, summary, pictures))
    try:
        write_page(run_dir, config=config, report=report)
    except UserError as error:
        print(f"warning: no {PAGE_FILE}: {error}", flush=True)
    # Last: it is what makes a run a finished one.
    atomic_write_text(run_dir / REPORT_FILE, json.dumps(report, indent=2, default=_plain) + "\n")
    return report


def print_report(
    report: dict[str, Any], run_dir: str | Path, console: Console | None = None
) -> None:
    """Print the report as a table in the terminal; plain text when there is none."""
    console = console or Console()
    if report["heldout"]["positions"]:
        print_tables([_table(report)], console, first="right")
    console.print(_sentence(report), highlight=False, markup=False)
    found = [Path(run_dir) / name for name in (PAGE_FILE, "report.md")]
    path = printable(f"report: {next((p for p in found if p.is_file()), found[-1])}")
    console.print(path, highlight=False, markup=False, soft_wrap=True)


# --------------------------------------------------------------------------------------------- text


def _table(report: dict[str, Any]) -> Table:
    return position_table(report["heldout"], bool(report["config"]["model"]["ttt"]["layers"]))


def _sentence(report: dict[str, Any]) -> str:
    first, last = (number(report[key], digits=4) for key in ("loss_first", "loss_last"))
    text = f"{report['steps']} steps, training loss {first} -> {last}"
    if report["tokens_per_second"] is not None:
        text += f", {report['tokens_per_second']:,.0f} tokens/s"
    return text


def _markdown(
    report: dict[str, Any], config: Config, summary: dict[str, Any], pictures: list[str]
) -> str:
    lines = [f"# Run {report['name']}", "", _sentence(report) + ".", ""]
    if report["heldout"]["positions"]:
        table = _table(report)
        both = (
            "; fast weights on and off on the same slow weights. Gain: off minus on"
            if config.model.ttt.layers
            else ""
        )
        lines += [
            f"## {table.title}",
            "",
            f"Nats per token on held-out rows{both}.",
            "",
            "| " + " | ".join(table.headings) + " |",
            "|" + "---:|" * len(table.headings),
            *("| " + " | ".join(row) + " |" for row in table.rows),
            "",
        ]
    lines += [
        line for name in pictures for line in (f"![{name[:-4].replace('_', ' ')}]({name})", "")
    ]
    hardware = report["hardware"]
    facts = {
        "date": report["date"],
        "commit": report["commit"] or "not in git",
        "hardware": f"{hardware['device_count']} x {hardware['device']}, {hardware['cpus']} CPU "
        "cores",
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        **{key: value for key, value in summary.items() if isinstance(value, str | int | float)},
    }
    lines += [
        "## Run",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in facts.items()),
        "",
    ]
    lines += ["## Configuration", "", "```yaml", dump_yaml(config).rstrip(), "```", ""]
    return "\n".join(lines)


def _number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """Turn numpy and jax scalars and arrays into Python's."""
    return value.tolist() if hasattr(value, "tolist") else value


# ----------------------------------------------------------------------------------------- pictures


def _draw(
    run_dir: Path, losses: list[tuple[int, float]], heldout: dict[str, Any], ttt: bool
) -> list[str]:
    """Draw what there is to draw; returns the file names."""
    names = []
    if losses:
        names.append(_save(_loss_curve(losses), run_dir, "loss_curve.png"))
    if heldout["positions"]:
        names.append(_save(position_figure(heldout, ttt), run_dir, "loss_by_position.png"))
    return names


def _save(figure: Figure, run_dir: Path, name: str) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    temporary = run_dir / f".{name}.tmp"
    figure.savefig(temporary, format="png", dpi=150)
    os.replace(temporary, run_dir / name)
    return name


def _loss_curve(losses: list[tuple[int, float]]) -> Figure:
    figure = figure_of(7, 4)
    axes = figure.subplots()
    steps, values = zip(*losses, strict=True)
    noisy = len(values) >= 20
    axes.plot(
        steps,
        values,
        color=_FAINT if noisy else COLOURS["on"],
        linewidth=1.2,
        label="logged",
        marker="" if noisy else "o",
    )
    if noisy:
        axes.plot(steps, _smooth(values), color=COLOURS["on"], linewidth=2, label="smoothed")
        axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="training loss (nats per token)", title="Training loss")
    tidy(axes)
    return figure


def _smooth(values: Sequence[float]) -> list[float]:
    """Take the mean over a centred window of a tenth of the curve, narrower at its ends; no lag."""
    last = len(values) - 1
    reach = len(values) // 20
    windows = ((i, min(reach, i, last - i)) for i in range(len(values)))
    return [float(np.mean(values[i - half : i + half + 1])) for i, half in windows]
