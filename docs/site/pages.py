"""Hooks of mkdocs: pages of the site are the documents where they lie in the tree, so that the same
links work here and there.

mkdocs reads Markdown a little more strictly than GitHub: `on_page_markdown` bridges that. Formulas
become MathML, which browsers show by themselves.

mkdocs takes one folder, `docs`. `on_files` replaces what it found there with the documents of the
whole tree under their paths from the root; `on_config` puts those that `nav` does not name into it.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = (
    "*.md",
    "docs/*.md",
    "docs/lab/*.md",
    "docs/results/*.md",
    "docs/**/*.png",
    "docs/results/*.json",
    "docs/results/*.jsonl",
    "docs/site/*.css",
    "examples/*.md",
    "examples/*.py",
    "examples/*.ipynb",
    "examples/*.yaml",
)

FORMULA = re.compile(r'(?<=class="arithmatex">)\\([\[(])(.*?)\\[\])](?=<)', re.DOTALL)


def documents() -> list[str]:
    """Paths of the site's files from the root."""
    found = (path for pattern in PATTERNS for path in ROOT.glob(pattern))
    return sorted({path.relative_to(ROOT).as_posix() for path in found})


def named(nav: Any) -> set[str]:
    """The documents that a navigation names."""
    if isinstance(nav, str):
        return {nav}
    entries = nav.values() if isinstance(nav, dict) else nav
    return set().union(*map(named, entries))


def on_config(config: Any) -> Any:
    """Add the documents that have no place yet: the lab's, newest first, and others."""
    left = [n for n in documents() if n.endswith(".md") and n not in named(config["nav"])]
    lab = [name for name in left if name.startswith(("docs/lab/", "docs/results/"))]
    more = [name for name in left if name not in lab]
    config["nav"] += [{"More": more}] if more else []
    config["nav"] += [{"Lab": lab[::-1]}]
    return config


def on_files(files: Files, config: Any) -> Files:
    """The documents of the tree, beside the theme's own files."""
    from mkdocs.structure.files import File, Files

    own = Path(config["docs_dir"])
    kept = [f for f in files if f.src_dir is None or not Path(f.src_dir).is_relative_to(own)]
    urls = config["use_directory_urls"]
    return Files([*kept, *(File(n, str(ROOT), config["site_dir"], urls) for n in documents())])


def as_mkdocs_reads_it(text: str) -> str:
    """Markdown whose lists begin behind an empty line and are nested by four columns. Code stays as
    it is.
    """
    lines: list[str] = []
    fenced, before = False, ""
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        paragraph = before.strip() and not before.startswith((" ", "- ", "#", "```", "|"))
        if not fenced and line.startswith("- ") and paragraph:
            lines.append("")
        if not fenced and line.startswith("  - "):
            line = "  " + line
        lines.append(line)
        before = line
    return "\n".join(lines) + "\n"


def on_page_markdown(markdown: str, **_: Any) -> str:
    return as_mkdocs_reads_it(markdown)


def on_page_content(text: str, **_: Any) -> str:
    """Turn the formulas that arithmatex has found into MathML."""
    from latex2mathml.converter import convert

    def mathml(match: re.Match[str]) -> str:
        if match[1] == "(":
            return convert(html.unescape(match[2]))
        block = convert(html.unescape(match[2]), display="block")
        return f'<div style="overflow-x: auto">{block}</div>'  # on a telephone

    return FORMULA.sub(mathml, text)
