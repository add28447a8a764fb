"""What a compiled program sends between devices, read from its text.

A collective inside a loop runs once per round. Rounds are known where XLA says so
(`known_trip_count`) or where the loop's condition compares a counter with a constant, as in every
`jax.lax.scan` (from 0 in steps of 1); other loops count once and are reported. TPU programs split
one asynchronous collective into several pieces with the same `chain_id`; they count once.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

KINDS: tuple[str, ...] = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
# A kernel's attributes may hold line breaks (splash attention's do), and a line of them may begin
# with `}}`.
_END = re.compile(r"^\}(, execution_thread=.*)?\s*$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ALONE = re.compile(r"replica_groups=(\{\{0\}|\[\d+,1\])")  # every device by itself: nothing moves
_CALLED = re.compile(r"\b(calls|body|condition|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)')


class Traffic(NamedTuple):
    """Collectives of one kind: how often they run, and the bytes of their results on one device,
    per call of the program.
    """

    count: int
    nbytes: int


class Collectives(NamedTuple):
    kinds: dict[str, Traffic]
    loops_of_unknown_length: int


def read_collectives(text: str) -> Collectives:
    """All collectives of a compiled program's text (`compiled.as_text()`), by kind.

    Raises: ValueError when the text has no entry computation.
    """
    found, entry = computations(text)
    if entry is None:
        raise ValueError("not the text of a compiled program: it has no ENTRY computation")
    counts, sizes = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    chains: set[str] = set()
    unknown = 0

    def walk(name: str, times: int) -> None:
        nonlocal unknown
        for line in found.get(name, ()):
            if match := _COLLECTIVE.search(line):
                result, kind, start = match.groups()
                chain = re.search(r'chain_id="(\d+)"', line)
                if chain:
                    key = f"{kind} {chain[1]}"
                    if key in chains:
                        continue
                    chains.add(key)
                if not _ALONE.search(line):
                    counts[kind] += times
                    sizes[kind] += times * nbytes(_result(result, kind) if start else result)
                continue
            called = dict(_CALLED.findall(line))
            if " while(" in line:
                rounds = trips(line, found.get(called.get("condition", ""), ()))
                unknown += rounds is None
                walk(called["body"], times * (rounds or 1))
                continue
            # A reduction's `to_apply` is arithmetic; a call's is a program.
            names = [called[key] for key in ("calls",) if key in called] + (
                [called["to_apply"]] if " call(" in line and "to_apply" in called else []
            )
            if branches := _BRANCHES.search(line):
                names += [name.strip().lstrip("%") for name in branches[1].split(",")]
            for inner in names:
                walk(inner, times)

    walk(entry, 1)
    return Collectives(
        {kind: Traffic(counts[kind], sizes[kind]) for kind in KINDS if counts[kind]}, unknown
    )


def nbytes(shapes: str) -> int:
    """Bytes of every array in a type such as `(f32[2,3]{1,0}, u8[4])`; tokens and opaque values
    have none.
    """
    total = 0
    for dtype, shape in re.findall(r"\b([a-z]+\d*(?:e\d\w*)?)\[([\d,]*)\]", shapes):
        total += math.prod(int(n) for n in shape.split(",") if n) * _bits(dtype)
    return -(-total // 8)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0


def _result(started: str, kind: str) -> str:
    """The result inside what a `-start` gives: (operand, result, ...), but only the result for an
    all-reduce.
    """
    if kind == "all-reduce" or not started.startswith("("):
        return started
    parts, depth, begin = [], 0, 1
    for i, char in enumerate(started):
        depth += (char in "([{") - (char in ")]}")
        if (char == "," and depth == 1) or (char == ")" and depth == 0):
            parts.append(started[begin:i])
            begin = i + 1
    return parts[1]


def computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    """Name -> instructions of every computation, and the name of the entry."""
    found: dict[str, list[str]] = {}
    entry, lines = None, None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif _END.match(line):
            lines = None
        elif lines is not None:
            lines.append(re.sub(r"/\*.*?\*/", "", line))
    return found, entry


def trips(line: str, condition: list[str] | tuple[()]) -> int | None:
    """Rounds of a loop; None when its text does not say."""
    if known := _TRIPS.search(line):
        return int(known[1])
    constants = dict(
        re.findall(r"%?([\w.\-]+) = s(?:32|64)\[\][^ ]* constant\((\d+)\)", "\n".join(condition))
    )
    root = next((text for text in condition if text.lstrip().startswith("ROOT")), "")
    if "direction=LT" in root or "calls=" in root:  # the comparison itself, or a fusion of it
        named = [
            constants[name]
            for name in re.findall(r"%([\w.\-]+)", root.partition("(")[2])
            if name in constants
        ]
        if len(named) == 1:
            return int(named[0])
    return None
