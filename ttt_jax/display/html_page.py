"""HTML pages: self-contained, no script, no network; pictures are SVG inside the page.

Texts that a page shows are somebody else's. Every function here escapes what it is given, but for
parameters that are named `html`.
"""

from __future__ import annotations

import base64
import html as _html
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by colour-blind readers and in grey.
COLOURS = {
    "on": "#0072B2",
    "off": "#D55E00",
    "shuffled": "#009E73",
    "strict": "#CC79A7",
    "cold": "#E69F00",
    "memory": "#56B4E9",
}
MARKERS = {"on": "o", "off": "s", "shuffled": "^", "strict": "D", "cold": "v", "memory": "P"}

_STYLE = """
body {
  font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c;
  max-width: 84rem; margin: 2rem auto; padding: 0 1rem;
}
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
p.note { color: #555; margin: 0 0 .6rem; }
table {
  border-collapse: collapse; font-variant-numeric: tabular-nums;
  display: block; overflow-x: auto;
}
th, td {
  padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap;
}
th { border-bottom: 2px solid #888; font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
tbody tr:hover { background: #f4f7fa; }
img { max-width: 100%; height: auto; display: block; margin: .8rem 0; }
.figures { display: flex; flex-wrap: wrap; gap: 0 1rem; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.facts td:first-child { min-width: 7.5rem; }
pre.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.7 ui-monospace, monospace; }
pre.json { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 12px; }
.legend span { display: inline-block; padding: .1rem .5rem; margin-right: .2rem; }
"""


def escape(text: object) -> str:
    """Make a text fit to stand anywhere in a page."""
    return _html.escape(str(text), quote=True)


def html_page(title: str, html: Iterable[str]) -> str:
    """Make a whole page of fragments, with the style inside."""
    head = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<title>{escape(title)}</title><meta name='viewport' content='width=device-width'>"
        f"<style>{_STYLE}</style></head>"
    )
    return f"{head}<body>\n" + "\n".join(html) + "\n</body></html>\n"


def note(text: str) -> str:
    return f"<p class='note'>{escape(text)}</p>"


def details(summary: str, html: str, opened: bool = False) -> str:
    """Make a part that the reader opens and closes."""
    tag = "<details open>" if opened else "<details>"
    return f"{tag}<summary>{escape(summary)}</summary>{html}</details>"


def code(text: str) -> str:
    return f"<pre class='json'>{escape(text)}</pre>"


def facts_table(facts: Iterable[tuple[str, Any]]) -> str:
    """Make a table of names and values; both are wrapped where they are long."""
    rows = (f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts)
    return f"<table class='facts'><tbody>{''.join(rows)}</tbody></table>"


def data_table(
    headings: Iterable[object], rows: Iterable[Iterable[object]], of_text: bool = False
) -> str:
    """Make a table with headings.

    Args:
      of_text: the cells are texts, set to the left and wrapped, and not numbers.
    """
    th, td = "<th>", "<td>"
    if of_text:
        th = "<th style='text-align:left'>"
        td = "<td style='text-align:left;white-space:normal;overflow-wrap:anywhere'>"
    head = "".join(f"{th}{escape(heading)}</th>" for heading in headings)
    body = "".join(
        "<tr>" + "".join(f"{td}{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


# ------------------------------------------------------------------------------------------ figures


def figure_of(width: float, height: float) -> Figure:
    """Make an empty matplotlib figure, in inches."""
    # no pyplot: its global state and windows are not wanted here
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def image(figure: Figure, alt: str) -> str:
    """Put a figure into the page, as SVG."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}">'


def side_by_side(html: Iterable[str]) -> str:
    """Set pictures side by side, as many as the window has room for."""
    return f"<div class='figures'>{''.join(html)}</div>"


def tidy(axes: Axes) -> None:
    """Draw a horizontal grid, and no box."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
