from __future__ import annotations

import base64
import html
import io
from typing import Any

# Okabe and Ito's colours: told apart by colour-blind readers and in grey.
COLOURS = {"on": "#0072B2", "off": "#D55E00", "shuffled": "#009E73"}


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; } p.note { color: #555; margin: 0 0 .6rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { border-bottom: 2px solid #888; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
tbody tr:hover { background: #f4f7fa; } img { max-width: 100%; height: auto; display: block; margin: .8rem 0; }
pre.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.7 ui-monospace, monospace; }
pre.json { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 12px; }
.legend span { padding: .1rem .5rem; margin-right: .2rem; }
"""


def escape(text: object) -> str:
    """Text that may stand anywhere in a page."""
    return html.escape(str(text), quote=True)


def html_page(title: str, body: list[str]) -> str:
    """A whole page of HTML fragments, with the style inside."""
    head = (
        "<!doctype html>\n<html lang='en'><head><meta "
        f"charset='utf-8'><title>{escape(title)}</title>"
    )
    view = "<meta name='viewport' content='width=device-width'>"
    return (
        f"{head}{view}<style>{_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def figure_of(width: float, height: float):
    """An empty matplotlib figure, inches."""
    # no pyplot: its global state and windows are not wanted here
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def image(figure: Any, alt: str) -> str:
    """The figure as SVG inside the page."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    return (
        f'<img alt="{escape(alt)}" '
        f'src="data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}">'
    )


def tidy(axes: Any) -> None:
    """Horizontal grid, no box."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
