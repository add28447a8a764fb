"""The held-out loss by position: its table, its chart, and its scalars by step.

`heldout` is `positions` ([first, behind the last] of each bucket of tokens), and the mean losses
`ttt_on` and `ttt_off` in nats per token, each one number a bucket or None where no token counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ttt_jax.display.html_page import COLOURS, MARKERS, figure_of, tidy
from ttt_jax.display.tables import Table, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Held-out loss by position"
_MODES = ("ttt_on", "ttt_off")
_NAME = re.compile(r"heldout/(\d{1,12})-(\d{1,12})/(ttt_on|ttt_off)")


def gains(heldout: Mapping[str, Any]) -> list[float | None]:
    """Subtract the losses with TTT on from those with TTT off, bucket by bucket."""
    pairs = zip(heldout["ttt_on"], heldout["ttt_off"], strict=True)
    return [None if on is None or off is None else off - on for on, off in pairs]


def position_table(heldout: Mapping[str, Any], ttt: bool, title: str = TITLE) -> Table:
    """Make the table; without TTT layers there is one loss, not two equal ones."""
    columns = {
        "TTT off": (heldout["ttt_off"], ".4f"),
        "TTT on": (heldout["ttt_on"], ".4f"),
        "gain": (gains(heldout), "+.4f"),
    }
    if not ttt:
        columns = {"loss": (heldout["ttt_off"], ".4f")}
    cells = [[f"{start} to {stop - 1}" for start, stop in heldout["positions"]] + ["mean"]]
    for values, form in columns.values():
        cells.append([number(value, form, digits=4) for value in [*values, mean_loss(values)]])
    return Table(
        title, "", ["positions", *columns], [list(row) for row in zip(*cells, strict=True)]
    )


def mean_loss(values: list[float | None]) -> float | None:
    """Average over the buckets in which a token counts; None when there is none."""
    counted = [value for value in values if value is not None]
    return sum(counted) / len(counted) if counted else None


def position_scalars(heldout: Mapping[str, Any]) -> dict[str, float]:
    """Name the losses for `metrics.jsonl`: `heldout/ttt_on` is the mean over the buckets, and
    `heldout/0000-0511/ttt_on` the loss of the positions 0 to 511; None where no token counts is
    left out.
    """
    scalars = {f"heldout/{mode}": mean_loss(heldout[mode]) for mode in _MODES}
    width = len(str(max((stop for _, stop in heldout["positions"]), default=1) - 1))
    for n, (start, stop) in enumerate(heldout["positions"]):
        where = f"{start:0{width}d}-{stop - 1:0{width}d}"
        scalars |= {f"heldout/{where}/{mode}": heldout[mode][n] for mode in _MODES}
    return {name: value for name, value in scalars.items() if value is not None}


def heldout_of_scalars(scalars: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read what `position_scalars` has named; None when it is not there or not whole."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for name, value in scalars.items():
        if match := _NAME.fullmatch(name):
            place = int(match[1]), int(match[2]) + 1
            found.setdefault(place, {})[match[3]] = value
    positions = [list(place) for place in sorted(found)]
    losses = {mode: [found[place].get(mode) for place in sorted(found)] for mode in _MODES}
    return checked_heldout({"positions": positions, **losses}) if positions else None


def checked_heldout(heldout: Any) -> dict[str, Any] | None:
    """Return what a file says of the losses if it has their form, None otherwise."""
    try:
        positions = [(int(start), int(stop)) for start, stop in heldout["positions"]]
        losses = {mode: [_finite(value) for value in heldout[mode]] for mode in _MODES}
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    same = len(positions) == len(losses["ttt_on"]) == len(losses["ttt_off"])
    rising = all(0 <= start < stop < 1 << 53 for start, stop in positions)
    return {"positions": positions, **losses} if positions and same and rising else None


def _finite(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) or abs(value) > 1e300 else float(value)


def position_figure(heldout: Mapping[str, Any], ttt: bool) -> Figure:
    """Draw the losses with TTT on and off, and below them the gain; one curve without TTT."""
    figure = figure_of(7, 5.5 if ttt else 4)
    upper, *below = np.atleast_1d(
        figure.subplots(1 + ttt, 1, sharex=True, height_ratios=(2, 1)[: 1 + ttt])
    )
    centres = [(start + stop) / 2 for start, stop in heldout["positions"]]
    widths = [0.8 * (stop - start) for start, stop in heldout["positions"]]
    # None -> nan
    on, off, gain = (
        np.array(values, np.float64)
        for values in (heldout["ttt_on"], heldout["ttt_off"], gains(heldout))
    )
    style: dict[str, dict[str, Any]] = {
        mode: {"color": COLOURS[mode], "marker": MARKERS[mode], "linewidth": 2}
        for mode in ("on", "off")
    }
    upper.plot(centres, off, label="TTT off", **style["off"])
    title = TITLE + (", same weights" if ttt else "")
    upper.set(ylabel="loss (nats per token)", title=title)
    for lower in below:
        upper.plot(centres, on, label="TTT on", **style["on"])
        upper.legend(frameon=False)
        lower.bar(centres, gain, width=widths, color=COLOURS["on"])
        lower.axhline(0, color="black", linewidth=0.8)
        lower.set(ylabel="gain (off - on)")
    [upper, *below][-1].set(xlabel="position in the row (tokens)")
    for axes in (upper, *below):
        tidy(axes)
    return figure
