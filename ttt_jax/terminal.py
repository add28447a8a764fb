"""Foreign text on a terminal: names, messages and what a model writes, without the codes that a
terminal obeys.

Whatever somebody else chose (documents, runs, tasks, paths, error messages that quote them,
generated text) may hold escape sequences that recolour, move, rename or answer for a terminal. All
of it goes through `printable` before it is shown.
"""

from __future__ import annotations

import re
from typing import Any

# Control characters (C0, DEL, C1), line and paragraph separators, marks that turn the direction of
# what follows, and lone surrogates, which file names that are not UTF-8 hold and which no stream
# takes.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object, keep: str = "") -> str:
    """Return the text with every character that a terminal would obey written as an escape, such as
    `\\x1b`.

    Args:
      keep: characters that stay, such as "\\n\\t" for text of several lines.
    """
    return _UNSAFE.sub(
        lambda m: m[0] if m[0] in keep else m[0].encode("unicode_escape").decode(), str(text)
    )


def for_stream(text: str, stream: Any) -> str:
    """Return generated text as `stream` should get it: safe on a terminal, byte for byte in a file
    or a pipe."""
    return printable(text, "\n\t") if stream.isatty() else text
