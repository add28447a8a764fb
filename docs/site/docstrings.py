"""Docstrings of this project as Markdown.

They have sections, `Args:`, `Fields:`, `Returns:`, `Raises:` and `Warns`, whose text may begin on
the same line. Entries stand two columns further in, and their next lines two more.
"""

from __future__ import annotations

import re

SECTION = re.compile(r"(Args|Fields|Returns|Raises|Warns)(?:: *|, )(.*)")
INLINE = re.compile(r"(?<=[.;]) (Returns|Raises): ")  # a section in the middle of a line
ENTRY = re.compile(r"  (\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)")


def to_markdown(text: str) -> str:
    """Headings in bold for sections, and a list for entries.

    Args:
      text: a docstring without common indentation.
    """
    lines: list[str] = []
    inside = False  # of a section
    for line in INLINE.sub(r"\n\1: ", text).splitlines():
        if section := SECTION.fullmatch(line):
            inside = True
            lines += ["", f"**{section[1]}** {section[2]}".rstrip()]
        elif inside and (entry := ENTRY.fullmatch(line)):
            names = ", ".join(f"`{name}`" for name in entry[1].split(", "))
            lines += ["", f"- {names}: {entry[2]}"]
        elif inside and line.startswith("  "):
            lines.append("    " + line.strip())
        else:
            inside = inside and bool(line.strip())
            lines.append(line)
    return "\n".join(lines)
