"""The HTML pages: self-contained, no script, no network; pictures are SVG inside the page."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

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
from ttt_jax.display.tables import Table
from ttt_jax.eval.side_by_side import LETTERS
from ttt_jax.eval.tables import tables, tokens

# Okabe and Ito's colours, one for each run of a comparison.
_RUN_COLOURS = (
    *COLOURS.values(),
    "#56B4E9",
    "#F0E442",
    "#000000",
)


def report_page(results: dict[str, Any]) -> str:
    """Show all tables and plots of one evaluation."""
    body = [
        f"<h1>Evaluation of {escape(results['model'])}</h1>",
        _facts(results),
        *_pictures(results),
    ]
    body += [_table(table) for table in tables(results)]
    config = code(json.dumps(results["config"], indent=2))
    body.append(details("Model configuration", config))
    return html_page(f"Evaluation of {results['model']}", body)


def comparison_page(results: list[dict[str, Any]], made: list[Table]) -> str:
    body = ["<h1>Comparison</h1>"]
    if picture := _comparison_picture(results):
        body.append(picture)
    for name, result in zip(LETTERS, results, strict=False):
        body += [f"<h2>{name}: {escape(result['model'])}</h2>", _facts(result)]
    return html_page("Comparison", body + [_table(table) for table in made])


def _comparison_picture(results: list[dict[str, Any]]) -> str | None:
    """Show the losses by context length of all that scored the same number of tokens."""
    named = [
        (a, r["perplexity"]) for a, r in zip(LETTERS, results, strict=False) if "perplexity" in r
    ]
    named = [(letter, part) for letter, part in named if part["block"] == named[0][1]["block"]]
    if len(named) < 2:
        return None
    figure = figure_of(8, 4)
    axes, lengths = figure.subplots(), sorted({e["length"] for _, p in named for e in p["lengths"]})
    dashes = {"on": "-", "off": "--"}
    for (letter, part), colour in zip(named, _RUN_COLOURS, strict=False):
        x = [lengths.index(entry["length"]) for entry in part["lengths"]]
        for mode in (mode for mode in part["modes"] if mode in dashes):
            style = _style(mode, f"{letter}, TTT {mode}")
            style |= {"color": colour, "linestyle": dashes[mode]}
            axes.plot(x, _values(part["lengths"], mode, "mean"), **style)
    axes.set_xticks(range(len(lengths)), [tokens(length) for length in lengths])
    axes.set(
        xlabel="context length (tokens)",
        ylabel="loss (nats per token)",
        title=f"Same final {named[0][1]['block']} tokens, growing context",
    )
    axes.legend(frameon=False, fontsize="small")
    tidy(axes)
    return image(figure, "Loss by context length of all runs")


def text_page(pieces: list[tuple[str, float | None, float | None]], title: str) -> str:
    """Show a text, coloured by what TTT gives.

    Args:
      pieces: (text, log-probability with TTT on, and off), in order; None for the first token,
        which nothing predicts.
    """
    gains = np.array([on - off for _, on, off in pieces if on is not None and off is not None])
    scale = max(float(np.percentile(np.abs(gains), 98)), 1e-6) if gains.size else 1.0
    spans = []
    for text, on, off in pieces:
        if on is None or off is None:
            spans.append(escape(text))
            continue
        hint = f"gain {on - off:+.3f} nats (on {on:.3f}, off {off:.3f})"
        colour = gain_colour((on - off) / scale)
        spans.append(f'<span style="background:{colour}" title="{hint}">{escape(text)}</span>')
    legend = "".join(
        f'<span style="background:{gain_colour(x)}">{x * scale:+.2f}</span>'
        for x in (-1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0)
    )
    mean = (
        f"Mean gain {gains.mean():+.4f} nats per token over {len(gains)} tokens; "
        if gains.size
        else ""
    )
    helped = f"TTT helps on {100 * float((gains > 0).mean()):.1f} % of them." if gains.size else ""
    body = [
        f"<h1>{escape(title)}</h1>",
        "<p class='note'>Each token is coloured by log p with TTT minus log p without, on the "
        f"same weights: blue where adaptation helps, orange where it hurts. {mean}{helped} Hover "
        "over a token for the figures.</p>",
        f"<p class='legend'>{legend} nats</p>",
        f"<pre class='text'>{''.join(spans)}</pre>",
    ]
    return html_page(title, body)


def gain_colour(x: float) -> str:
    """Mix a colour: white at 0, blue towards 1, orange towards -1 (clipped)."""
    strength = min(abs(x), 1.0) ** 0.7
    end = (86, 160, 214) if x > 0 else (240, 150, 70)
    return "#" + "".join(f"{round(255 + (channel - 255) * strength):02x}" for channel in end)


def _facts(results: dict[str, Any]) -> str:
    hardware, versions = results["hardware"], results["versions"]
    facts = {
        "date": results["date"],
        "commit": results["commit"] or "not in git",
        "hardware": f"{hardware['device_count']} x {hardware['device']}, {hardware['cpus']} CPU "
        "cores",
        "dtype": results["dtype"],
        "seconds": f"{results['seconds']:.0f}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "options": ", ".join(
            f"{key} {value}"
            for key, value in results["options"].items()
            if value not in (None, False)
        ),
    }
    return facts_table(facts.items())


def _table(table: Table) -> str:
    title = f"<h2>{escape(table.title)}</h2>"
    return title + note(table.note) + data_table(table.headings, table.rows)


# ----------------------------------------------------------------------------------------- pictures


def _pictures(results: dict[str, Any]) -> list[str]:
    made = []
    if "perplexity" in results:
        made.append(_perplexity_picture(results["perplexity"]))
    if "recall" in results:
        made.append(_recall_picture(results["recall"]))
    if "synthetic" in results:
        pictures = (draw(results["synthetic"]) for draw in (_distance_picture, _pairs_picture))
        made += [picture for picture in pictures if picture]
    if "diagnostics" in results and results["diagnostics"]["layers"]:
        made.append(_fast_weight_picture(results["diagnostics"]))
    return made


def _values(entries: list[dict[str, Any]], key: str, field: str) -> np.ndarray:
    return np.array([entry[key][field] for entry in entries], np.float64)  # None -> nan


def _style(mode: str, label: str) -> dict[str, Any]:
    return {"color": COLOURS[mode], "marker": MARKERS[mode], "label": label, "linewidth": 2}


def _line(axes: Any, x: Any, entries: list[dict[str, Any]], key: str, style: dict) -> None:
    mean, low, high = (_values(entries, key, field) for field in ("mean", "low", "high"))
    axes.plot(x, mean, **style)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _perplexity_picture(part: dict[str, Any]) -> str:
    figure = figure_of(11, 6)
    paired = "gain" in part["lengths"][0]
    axes = figure.subplots(
        2 if paired else 1, 2, squeeze=False, height_ratios=(2, 1) if paired else (1,)
    )
    lengths, positions = part["lengths"], part["positions"]
    x_length = np.arange(len(lengths))
    x_position = [(entry["start"] + entry["stop"]) / 2 for entry in positions]
    for column, (x, entries) in enumerate(((x_length, lengths), (x_position, positions))):
        for mode in [mode for mode in part["modes"] if mode in entries[0]]:
            values = _values(entries, mode, "mean")
            axes[0, column].plot(x, values, **_style(mode, f"TTT {mode}"))
        if paired:
            below = axes[1, column]
            _line(below, x, entries, "gain", _style("on", "off - on"))
            if "gain_memory" in entries[0]:
                _line(below, x, entries, "gain_memory", _style("memory", "off - memory"))
            if "gain_shuffled" in entries[0]:
                _line(below, x, entries, "gain_shuffled", _style("shuffled", "off - shuffled"))
            if "gain_strict" in entries[0]:
                _line(below, x, entries, "gain_strict", _style("strict", "cold - strict"))
            below.axhline(0, color="black", linewidth=0.8)
            below.set_ylabel("gain (nats), 95 %")
        for row in axes[:, column]:
            tidy(row)
        axes[-1, column].set_xlabel(
            "context length (tokens)" if column == 0 else "position (tokens)"
        )
    for row in axes[:, 0]:
        row.set_xticks(x_length, [tokens(entry["length"]) for entry in lengths])
    axes[0, 0].set(
        title=f"Same final {part['block']} tokens, growing context", ylabel="loss (nats per token)"
    )
    axes[0, 1].set_title("By position")
    axes[0, 0].legend(frameon=False)
    return image(figure, "Loss by context length and by position, TTT on and off")


def _recall_picture(part: dict[str, Any]) -> str:
    figure = figure_of(7, 3.6)
    axes, entries = figure.subplots(), part["lengths"]
    x = np.arange(len(entries))
    for mode in part["modes"]:
        _line(axes, x, [e[mode] for e in entries], "recall", _style(mode, f"TTT {mode}"))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(x, [tokens(entry["length"]) for entry in entries])
    axes.set(
        xlabel="tokens of the sequence",
        ylabel="control - second (nats), 95 %",
        title=f"A passage of {part['passage']} tokens read again",
    )
    axes.legend(frameon=False)
    tidy(axes)
    return image(figure, "Recall of a passage by length of the sequence, TTT on and off")


def _distance_picture(part: dict[str, Any]) -> str | None:
    sweep = [entry for entry in part["entries"] if entry["distance"] is not None]
    return _sweep_picture(
        part["modes"], sweep, "distance", "tokens between needle and question", "Recall by distance"
    )


def _pairs_picture(part: dict[str, Any]) -> str | None:
    """Show the longest sequences."""
    sweep = [entry for entry in part["entries"] if "pairs" in entry]
    longest = max((entry["length"] for entry in sweep), default=0)
    sweep = [entry for entry in sweep if entry["length"] == longest]
    return _sweep_picture(
        part["modes"], sweep, "pairs", "pairs of key and value", "Recall by number of pairs"
    )


def _sweep_picture(
    modes: list[str], sweep: list[dict[str, Any]], key: str, xlabel: str, title: str
) -> str | None:
    if len(sweep) < 2:
        return None
    figure = figure_of(7, 3.6)
    axes = figure.subplots()
    x = [entry[key] for entry in sweep]
    for mode in modes:
        entries = [entry[mode] for entry in sweep]
        _line(axes, x, entries, "accuracy", _style(mode, f"TTT {mode}"))
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [tokens(n) for n in x])
    axes.minorticks_off()
    axes.set(xlabel=xlabel, ylabel="accuracy", ylim=(-0.03, 1.03), title=title)
    axes.legend(frameon=False)
    tidy(axes)
    return image(figure, title.replace("Recall", "Recall accuracy"))


def _fast_weight_picture(part: dict[str, Any]) -> str:
    figure = figure_of(11, 3.4)
    panels = (
        ("state_ratio", "||S|| / ||W||"),
        ("effective_rank", "effective rank of S"),
        ("output_share", "share of output"),
    )
    for axes, (key, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for n, layer in enumerate(part["layers"]):
            shade = n / max(len(part["layers"]) - 1, 1)
            colour = (0.0, 0.25 + 0.5 * shade, 0.75 - 0.25 * shade)
            chunks = layer["chunks"]
            x = [chunk["chunk"] for chunk in chunks]
            axes.plot(
                x,
                [chunk[key] for chunk in chunks],
                color=colour,
                marker=".",
                label=f"layer {layer['layer']}",
            )
        axes.set(title=title, xlabel="chunks read", ylim=(0, None))
        tidy(axes)
        if len(part["layers"]) <= 8:
            axes.legend(frameon=False, fontsize="small")
    return image(figure, "Fast weights by layer and chunk")
