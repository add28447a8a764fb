"""Pictures of a run's scalars by step, for its page."""

from __future__ import annotations

import collections
import math
from typing import Any

import numpy as np

from ttt_jax.display.html_page import COLOURS, MARKERS, figure_of, tidy

Curves = dict[str, tuple[np.ndarray, np.ndarray]]  # name of a scalar -> (steps, values)
_POINTS = 2000  # of a curve
_SIZE = 4.2, 3.0  # inches of a picture


def curves_of(metrics: list[dict[str, Any]]) -> Curves:
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


def pictures(curves: Curves) -> list[tuple[str, list[Any]]]:
    """Draw what has been measured: (what it is about, figures that stand side by side)."""
    speed = {
        "tokens_per_second": "tokens/s",
        "mfu": "MFU (share of peak)",
        "time/input_wait": "waiting for input (share)",
        "time/checkpoint": "held up by saving (s)",
        "memory_bytes": "device memory, peak (GiB)",
        "host_memory_bytes": "host memory, peak (GiB)",
    }
    optimisation = {"grad_norm": "gradient norm", "learning_rate": "learning rate"}
    made = [("Loss by step", _losses(curves))] if "loss" in curves else []
    for title, panels in (
        ("Fast weights by step", _layer_panels(curves)),
        ("Optimisation by step", _panels(curves, optimisation)),
        ("Speed by step", _panels(curves, speed)),
    ):
        made += [(title, [_panel(*panel) for panel in panels])] if panels else []
    return made


def _losses(curves: Curves) -> list[Any]:
    figures = [_of_modes(curves, "heldout", "Loss", "held-out, ", curves["loss"])]
    figures[0].axes[0].set(ylabel="nats per token")
    if "probe/gain" in curves:
        figures.append(_of_modes(curves, "probe", "Probe rows, same weights"))
        figures.append(_panel("Gain of TTT (off - on)", [("", curves["probe/gain"])]))
        figures[-1].axes[0].axhline(0, color="black", linewidth=0.8)
    return figures


def _of_modes(
    curves: Curves, source: str, title: str, prefix: str = "", training: Any = None
) -> Any:
    """Draw a source's losses with TTT on and off, below the one of training."""
    figure, axes = _axes(title)
    if training is not None:
        _draw(axes, training, color="#555555", label="training")
    for mode in ("off", "on"):
        if (name := f"{source}/ttt_{mode}") in curves:
            style = {"color": COLOURS[mode], "marker": MARKERS[mode]}
            _draw(axes, curves[name], label=f"{prefix}TTT {mode}", **style)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return figure


def _axes(title: str) -> tuple[Any, Any]:
    figure = figure_of(*_SIZE)
    axes = figure.subplots()
    axes.set(title=title, xlabel="step")
    tidy(axes)
    return figure, axes


def _layer_panels(curves: Curves) -> list[tuple[str, list[tuple[str, Any]]]]:
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


def _panels(curves: Curves, titles: dict[str, str]) -> list[tuple[str, list[tuple[str, Any]]]]:
    unit = lambda title: 2.0**30 if title.endswith("(GiB)") else 1.0
    return [
        (title, [("", (curves[name][0], curves[name][1] / unit(title)))])
        for name, title in titles.items()
        if name in curves
    ]


def _panel(title: str, lines: list[tuple[str, Any]]) -> Any:
    figure, axes = _axes(title)
    for n, (label, curve) in enumerate(lines):
        shade = n / max(len(lines) - 1, 1)
        _draw(axes, curve, color=(0.9 * shade, 0.45, 0.7 - 0.6 * shade), label=label or None)
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
