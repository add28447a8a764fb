"""`report.html`: one self-contained page of a training run; no script, no network. It is written at
the end of a run, and by `ttt-jax report RUN` of any run, finished or not.

Everything is read from the run folder: `config.yaml`, `metrics.jsonl`, and where they are there
`environment.json`, `report.json`, `events.jsonl`, `samples.jsonl` and `quarantine.jsonl`. Nothing
in them is trusted: texts are escaped, sizes are limited, and a line that is damaged is counted and
left out.
"""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any, NamedTuple

from ttt_jax.config import Config, dump_yaml
from ttt_jax.data.quarantine import QUARANTINE_FILE
from ttt_jax.display.html_page import (
    code,
    data_table,
    details,
    escape,
    facts_table,
    html_page,
    image,
    note,
    side_by_side,
)
from ttt_jax.errors import CheckpointError, UserError
from ttt_jax.files.reading import MAX_JSON_BYTES
from ttt_jax.files.text import atomic_write_text, shorten
from ttt_jax.run.curves import Curves, curves_of, pictures
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


def write_page(
    run_dir: str | Path,
    out: str | Path | None = None,
    *,
    config: Config | None = None,
    report: dict[str, Any] | None = None,
) -> Path:
    """Write the page of a run; returns its path (by default `RUN/report.html`).

    Args:
      config, report: what `config.yaml` and `report.json` hold, or are about to; None: they are
        read.

    Raises:
      CheckpointError: `run_dir` is not the folder of a run, or its files are too large or
        unreadable.
      UserError: the page cannot be written.
    """
    path = Path(out) if out is not None else Path(run_dir) / PAGE_FILE
    text = run_page(read_run(run_dir, config, report))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, text)
    except OSError as error:
        raise UserError(
            f"--out {path}: cannot be written ({error.strerror}); choose another file"
        ) from None
    return path


def read_run(
    run_dir: str | Path, config: Config | None = None, report: dict[str, Any] | None = None
) -> RunFiles:
    """Read everything that the page shows, but what is given. Raises CheckpointError, one line."""
    folder = Path(run_dir)
    config = read_run_config(folder) if config is None else config
    damaged: dict[str, int] = {}
    metrics, events, quarantine, samples = (
        _lines(folder / name, damaged)
        for name in (METRICS_FILE, EVENTS_FILE, QUARANTINE_FILE, SAMPLES_FILE)
    )
    environment = _object(folder / ENVIRONMENT_FILE, damaged)
    report = _object(folder / "report.json", damaged) if report is None else report
    metrics = [row for row in metrics if isinstance(row.get("step"), int)]
    return RunFiles(
        folder, config, metrics, environment, report, events, quarantine, samples, damaged
    )


def run_page(run: RunFiles) -> str:
    """Make the page's HTML."""
    curves = curves_of(run.metrics)
    title = f"Run {run.config.name}"
    body = [f"<h1>{escape(title)}</h1>", _facts(run, curves), _warnings(run)]
    body += [_by_position(run)]
    body += [side_by_side(image(f, title) for f in figures) for title, figures in pictures(curves)]
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


# ------------------------------------------------------------------------------------------- tables


def _facts(run: RunFiles, curves: Curves) -> str:
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


def _latest(curves: Curves) -> str:
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
