"""`ttt-jax report RUN`: one self-contained HTML page of a training run, finished or not; no script,
no network.

Everything is read from the run folder: `config.yaml`, `metrics.jsonl`, and where they are there
`environment.json`, `report.json`, `events.jsonl`, `samples.jsonl` and `quarantine.jsonl`. Nothing
in them is trusted: texts are escaped, sizes are limited, and a line that is damaged is counted and
left out.
"""

from __future__ import annotations

import collections
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.config import Config, dump_yaml
from ttt_jax.data.quarantine import QUARANTINE_FILE
from ttt_jax.display.html_page import (
    COLOURS,
    MARKERS,
    code,
    data_table,
    details,
    escape,
    facts_table,
    figure_of,
    html_page,
    image,
    note,
    tidy,
)
from ttt_jax.errors import CheckpointError, UserError
from ttt_jax.files.reading import MAX_JSON_BYTES
from ttt_jax.files.text import atomic_write_text, shorten
from ttt_jax.run.folder import ENVIRONMENT_FILE, METRICS_FILE, read_run_config
from ttt_jax.run.logs import EVENTS_FILE, SAMPLES_FILE
from ttt_jax.run.positions import (
    checked_heldout,
    heldout_of_scalars,
    position_figure,
    position_table,
)

PAGE_FILE = "report.html"
_MAX_LINES_BYTES = 512 << 20
_POINTS = 2000  # of a curve
_SHOWN = 50  # events, and quarantined records
_SAMPLES = 12  # texts that were written while the run trained
_EXCERPT = 300  # characters of a text


class RunFiles(NamedTuple):
    """What a run folder holds. Rows are JSON objects as they were written."""

    folder: Path
    config: Config
    metrics: list[dict[str, Any]]
    environment: dict[str, Any]
    report: dict[str, Any]
    events: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    damaged: dict[str, int]  # file -> lines that could not be read


def write_page(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run; returns its path (by default `RUN/report.html`).

    Raises:
      CheckpointError: `run_dir` is not the folder of a run, or its files are too large or
        unreadable.
      UserError: the page cannot be written.
    """
    path = Path(out) if out is not None else Path(run_dir) / PAGE_FILE
    text = run_page(read_run(run_dir))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, text)
    except OSError as error:
        raise UserError(
            f"--out {path}: cannot be written ({error.strerror}); choose another file"
        ) from None
    return path


def read_run(run_dir: str | Path) -> RunFiles:
    """Read everything that the page shows. Raises CheckpointError, one line."""
    folder = Path(run_dir)
    config = read_run_config(folder)
    damaged: dict[str, int] = {}
    metrics, events, quarantine, samples = (
        _lines(folder / name, damaged)
        for name in (METRICS_FILE, EVENTS_FILE, QUARANTINE_FILE, SAMPLES_FILE)
    )
    environment, report = (
        _object(folder / name, damaged) for name in (ENVIRONMENT_FILE, "report.json")
    )
    metrics = [row for row in metrics if isinstance(row.get("step"), int)]
    return RunFiles(
        folder, config, metrics, environment, report, events, quarantine, samples, damaged
    )


def run_page(run: RunFiles) -> str:
    """Make the page's HTML."""
    curves = _curves(run.metrics)
    title = f"Run {run.config.name}"
    body = [f"<h1>{escape(title)}</h1>", _facts(run, curves), _warnings(run)]
    body += [_by_position(run)]
    body += [image(*picture) for picture in _pictures(curves)]
    if not curves:
        body.append(note("No metrics yet."))
    body += [_written(run), _latest(curves), _quarantine(run)]
    if environment := (
        run.environment
        or {key: run.report.get(key) for key in ("date", "commit", "hardware", "versions")}
    ):
        body.append("<h2>Environment</h2>" + _table(_flat(environment)))
    config = details("config.yaml", code(dump_yaml(run.config)), opened=True)
    body.append("<h2>Configuration</h2>" + config)
    return html_page(title, [part for part in body if part])


# ------------------------------------------------------------------------------------------ reading


def _bytes(path: Path, limit: int) -> bytes | None:
    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"run file {path}: {size} bytes; at most {limit} are read")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"run file {path}: cannot be read ({error.strerror})") from None


def _lines(path: Path, damaged: dict[str, int]) -> list[dict[str, Any]]:
    rows = []
    for line in (_bytes(path, _MAX_LINES_BYTES) or b"").split(b"\n"):
        if line.strip():
            row = _json_object(line)
            if row is None:
                damaged[path.name] = damaged.get(path.name, 0) + 1
            else:
                rows.append(row)
    return rows


def _object(path: Path, damaged: dict[str, int]) -> dict[str, Any]:
    data = _bytes(path, MAX_JSON_BYTES)
    found = None if data is None else _json_object(data)
    if data is not None and found is None:
        damaged[path.name] = 1
    return found or {}


def _json_object(data: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _curves(metrics: list[dict[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Collect name -> (steps, values) of every scalar; what is not a finite number is left out."""
    points: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
    for row in metrics:
        step = row["step"]
        for name, value in row.items():
            number = (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and abs(value) < 1e300
            )
            if name != "step" and number and abs(step) < 1 << 53 and math.isfinite(value):
                points[name].append((step, float(value)))
    return {
        name: (np.array([s for s, _ in p]), np.array([v for _, v in p]))
        for name, p in sorted(points.items())
    }


# ----------------------------------------------------------------------------------------- pictures

_Curves = dict[str, tuple[np.ndarray, np.ndarray]]


def _pictures(curves: _Curves) -> list[tuple[Any, str]]:
    """Draw (figure, description) of what has been measured."""
    made = [_loss_picture(curves)] if "loss" in curves else []
    for title, panels in (
        ("Fast weights by step", _layer_panels(curves)),
        (
            "Optimisation by step",
            _panels(curves, {"grad_norm": "gradient norm", "learning_rate": "learning rate"}),
        ),
        (
            "Speed by step",
            _panels(
                curves,
                {
                    "tokens_per_second": "tokens/s",
                    "mfu": "MFU (share of peak)",
                    "time/input_wait": "waiting for input (share)",
                    "time/checkpoint": "held up by saving (s)",
                    "memory_bytes": "device memory, peak (GiB)",
                    "host_memory_bytes": "host memory, peak (GiB)",
                },
            ),
        ),
    ):
        made += [(_row_of_panels(panels[i : i + 3]), title) for i in range(0, len(panels), 3)]
    return made


def _loss_picture(curves: _Curves) -> tuple[Any, str]:
    figure = figure_of(11, 3.6)
    training, probe, gain = figure.subplots(1, 3)
    _draw(training, curves["loss"], color="#555555", label="training")
    for axes, source in ((training, "heldout"), (probe, "probe")):
        for mode in ("off", "on"):
            if (name := f"{source}/ttt_{mode}") in curves:
                label = f"held-out, TTT {mode}" if source == "heldout" else f"TTT {mode}"
                _draw(axes, curves[name], color=COLOURS[mode], label=label, marker=MARKERS[mode])
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    if "probe/gain" in curves:
        _draw(gain, curves["probe/gain"], color=COLOURS["on"], marker="o")
        gain.axhline(0, color="black", linewidth=0.8)
    else:
        probe.set_visible(False)
        gain.set_visible(False)
    training.set(title="Loss", xlabel="step", ylabel="nats per token")
    probe.set(title="Probe rows, same weights", xlabel="step")
    gain.set(title="Gain of TTT (off - on)", xlabel="step")
    for axes in (training, probe, gain):
        tidy(axes)
    return figure, "Loss by step"


def _layer_panels(curves: _Curves) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Collect (title, [(label, curve)]): one panel for each quantity, one line for each layer."""
    panels = []
    for prefix, quantity, title in (
        ("ttt", "state_ratio", "||S|| / ||W|| after a row"),
        ("ttt", "update_norm", "norm of the last update"),
        ("probe", "update_cosine", "cosine of successive updates"),
    ):
        names = [
            name
            for name in curves
            if name.startswith(f"{prefix}/layer_") and name.endswith(f"/{quantity}")
        ]
        if names:
            panels.append(
                (title, [(name.split("/")[1].replace("_", " "), curves[name]) for name in names])
            )
    return panels


def _panels(curves: _Curves, titles: dict[str, str]) -> list[tuple[str, list[tuple[str, Any]]]]:
    unit = lambda title: 2.0**30 if title.endswith("(GiB)") else 1.0
    return [
        (title, [("", (curves[name][0], curves[name][1] / unit(title)))])
        for name, title in titles.items()
        if name in curves
    ]


def _row_of_panels(panels: list[tuple[str, list[tuple[str, Any]]]]) -> Any:
    figure = figure_of(11, 3.2)
    for axes, (title, lines) in zip(
        figure.subplots(1, 3), panels + [("", [])] * (3 - len(panels)), strict=True
    ):
        if not lines:
            axes.set_visible(False)
        for n, (label, curve) in enumerate(lines):
            shade = n / max(len(lines) - 1, 1)
            _draw(axes, curve, color=(0.9 * shade, 0.45, 0.7 - 0.6 * shade), label=label or None)
        axes.set(title=title, xlabel="step")
        tidy(axes)
        if len(lines) <= 8 and any(label for label, _ in lines):
            axes.legend(frameon=False, fontsize="small")
    return figure


def _draw(
    axes: Any, curve: tuple[np.ndarray, np.ndarray], *, marker: str = "", **style: Any
) -> None:
    """Draw a line through at most `_POINTS` means of neighbouring points."""
    steps, values = curve
    if len(steps) > _POINTS:
        parts = np.array_split(np.arange(len(steps)), _POINTS)
        steps, values = (np.array([x[part].mean() for part in parts]) for x in (steps, values))
    axes.plot(
        steps,
        values,
        linewidth=1.6,
        marker=marker or ("." if len(steps) < 3 else ""),
        markersize=4,
        **style,
    )


# ------------------------------------------------------------------------------------------- tables


def _facts(run: RunFiles, curves: _Curves) -> str:
    facts: dict[str, Any] = {"folder": run.folder.absolute()}
    last = int(max((steps[-1] for steps, _ in curves.values()), default=0))
    facts["steps"] = f"{last} of {run.config.steps}" + (" (finished)" if run.report else "")
    if isinstance(run.environment.get("parameters"), int):
        facts["parameters"] = f"{run.environment['parameters']:,}"
    for name, label, form in (
        ("loss", "training loss", "{:.4f}"),
        ("probe/gain", "gain of TTT on the probe rows", "{:+.4f} nats per token"),
        ("tokens_per_second", "tokens/s", "{:,.0f}"),
        ("mfu", "MFU", "{:.1%}"),
        ("time/input_wait", "waiting for input", "{:.2%} of the time"),
        ("time/to_first_step", "start to first step", "{:.1f} s"),
    ):
        if name in curves:
            facts[f"{label} (last)"] = form.format(curves[name][1][-1])
    return _table(facts)


def _warnings(run: RunFiles) -> str:
    lines = [f"{name}: {count} lines could not be read" for name, count in run.damaged.items()]
    for event in run.events[-_SHOWN:]:
        when, step = _short(event.get("time", ""), 40), _short(event.get("step", "?"), 20)
        lines.append(f"{when} step {step}: {_short(event.get('text', event))}")
    if len(run.events) > _SHOWN:
        lines.insert(0, f"{len(run.events) - _SHOWN} earlier events are left out")
    if run.quarantine:
        lines.append("malformed records were left out of the data; see below")
    if not lines:
        return "<h2>Warnings</h2>" + note("None.")
    return "<h2>Warnings</h2><ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _by_position(run: RunFiles) -> str:
    """Show the newest losses by position: the report's, or those of a later evaluation."""
    found, step = checked_heldout(run.report.get("heldout")), run.report.get("steps")
    for row in reversed(run.metrics):
        if later := heldout_of_scalars(row):
            if found is None or not isinstance(step, int) or row["step"] > step:
                found, step = later, row["step"]
            break
    if found is None:
        return ""
    ttt = bool(run.config.model.ttt.layers)
    table = position_table(found, ttt)
    both = ", TTT on and off on the same weights; gain: off minus on" if ttt else ""
    text = note(f"Nats per token on held-out rows after {_short(step, 20)} steps{both}.")
    picture = image(position_figure(found, ttt), table.title)
    return f"<h2>{table.title}</h2>{text}{data_table(table.headings, table.rows)}{picture}"


def _written(run: RunFiles) -> str:
    """Show the newest samples of text."""
    rows = [
        [_short(sample.get(key, "?"), size) for key, size in (("step", 20), ("ttt", 20))]
        + [str(sample.get("prompt", ""))[-_EXCERPT:], _short(sample.get("text", ""))]
        for sample in run.samples[-_SAMPLES:]
    ]
    if not rows:
        return ""
    table = data_table(["step", "TTT", "end of the prompt", "what was written"], rows, of_text=True)
    return f"<h2>Samples</h2>{note(f'The last {len(rows)}; {SAMPLES_FILE} has them all.')}{table}"


def _quarantine(run: RunFiles) -> str:
    if not run.quarantine:
        return "<h2>Quarantined records</h2>" + note("None.")
    kinds = collections.Counter(
        _short(entry.get("kind", "not listed"), 40) for entry in run.quarantine
    )
    extra = sum(n for entry in run.quarantine if isinstance(n := entry.get("not_listed"), int))
    del kinds["not listed"]
    counts = dict(kinds.most_common()) | ({"not listed": extra} if extra else {})
    rows = []
    for entry in run.quarantine[:_SHOWN]:
        unit = next((unit for unit in ("line", "row", "record", "file") if unit in entry), None)
        place = "" if unit is None else f"{unit} {_short(entry[unit], 20)}"
        field, path, reason, excerpt = (
            _short(entry.get(key, "")) for key in ("field", "path", "reason", "excerpt")
        )
        rows.append([field, path, place, reason, excerpt])
    table = data_table(["field", "file", "place", "reason", "excerpt"], rows, of_text=True)
    if len(run.quarantine) > _SHOWN:
        table = note(f"The first {len(rows)}; quarantine.jsonl has them all.") + table
    return f"<h2>Quarantined records</h2>{_table(counts)}{table}"


def _latest(curves: _Curves) -> str:
    if not curves:
        return ""
    rows = {
        name: f"{values[-1]:.6g}  (step {int(steps[-1])})"
        for name, (steps, values) in curves.items()
    }
    return "<h2>All scalars</h2>" + details("The last value of each", _table(rows))


def _table(facts: dict[str, Any]) -> str:
    return facts_table((_short(name), _short(value)) for name, value in facts.items())


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Write one level of nesting as dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            {f"{key}.{name}": inner for name, inner in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
    return flat


def _short(value: Any, length: int = _EXCERPT) -> str:
    return shorten(str(value), length)
