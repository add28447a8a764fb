"""Malformed records: what was wrong with each, how many there are, and the file that lists them.

A reader yields a `BadRecord` in the place of a document it cannot give. The corpus leaves it out
and counts it, up to the share `data.max_bad_records`; `write_quarantine` lists what was left out in
the run folder.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from ttt_jax.errors import DataError
from ttt_jax.files.stores import StoredFile
from ttt_jax.files.text import atomic_write_text

QUARANTINE_FILE = "quarantine.jsonl"
_LISTED = 100_000  # records that are listed; all are counted
# When so many at the beginning are all bad, a setting is wrong; reading on would waste hours.
_HOPELESS = 100
_EXCERPT = 200  # characters


class BadRecord(NamedTuple):
    """Why a record is not a document.

    Fields:
      unit, number: where it is in its file: "line" (from 1), "row", "record" (both from 0) or
        "file".
      kind: one of a few words that are counted, such as "not JSON".
      problem: what is wrong, a phrase that continues "line 3 ...".
      excerpt: its first characters.
    """

    unit: str
    number: int
    kind: str
    problem: str
    excerpt: str


def bad_record(unit: str, number: int, kind: str, problem: str, content: bytes = b"") -> BadRecord:
    """Make a `BadRecord` of `content`, of which an excerpt is kept."""
    excerpt = content[: 4 * _EXCERPT].decode("utf-8", errors="replace")[:_EXCERPT]
    return BadRecord(unit, number, kind, problem, excerpt)


@dataclasses.dataclass(frozen=True)
class Rejected:
    """The malformed records of a corpus.

    Attributes:
      records: all records, good and bad (whole `.npy` files are not counted).
      kinds: kind -> number of bad ones.
      listed: the first of them, as the quarantine file has them.
    """

    records: int = 0
    kinds: dict[str, int] = dataclasses.field(default_factory=dict)
    listed: tuple[dict[str, Any], ...] = ()

    @property
    def bad(self) -> int:
        return sum(self.kinds.values())

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Rejected:
        """Read what `to_json` wrote. Raises ValueError, KeyError or TypeError when the text is not
        one of `to_json`.
        """
        tree = json.loads(text)
        return cls(int(tree["records"]), dict(tree["kinds"]), tuple(tree["listed"]))

    def check(self, label: str, limit: float) -> None:
        """Raise DataError, one line, when the share of bad records exceeds `limit`
        (`data.max_bad_records`).
        """
        if self.bad and self.bad / self.records > limit:
            raise DataError(self._complaint(label, limit))

    def summary(self) -> str:
        """Say, for instance, "3 of 1200 records left out as malformed (2 not JSON, 1 empty)"."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        return f"{self.bad} of {self.records} records left out as malformed ({kinds})"

    def _complaint(self, label: str, limit: float) -> str:
        first = self.listed[0]
        unit = next(unit for unit in ("line", "row", "record", "file") if unit in first)
        place = "the file" if unit == "file" else f"{unit} {first[unit]}"
        share = (
            f"{self.bad} of {self.records} records are malformed, "
            f"{100 * self.bad / self.records:.3g} %"
        )
        fix = "fix them" if limit == 0 else f"fix them, or raise data.max_bad_records = {limit:g}"
        return f"{label}: {Path(first['path']).name}: {place} {first['reason']} ({share}); {fix}"


class Rejects:
    """Counts the records of a corpus while it is read.

    Args:
      limit: `data.max_bad_records`.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._records = 0
        self._kinds: collections.Counter[str] = collections.Counter()
        self._listed: list[dict[str, Any]] = []

    def good(self) -> None:
        self._records += 1

    def bad(self, path: Path | StoredFile, label: str, record: BadRecord) -> None:
        """Count a malformed record. Raises DataError, one line, when all of the first records are
        bad.
        """
        self._records += 1
        self._kinds[record.kind] += 1
        if len(self._listed) < _LISTED:
            place = {record.unit: record.number}
            entry = {
                "path": str(path),
                **place,
                "kind": record.kind,
                "reason": record.problem,
                "excerpt": record.excerpt,
            }
            self._listed.append(entry)
        if self._limit < 1 and self._records == _HOPELESS == sum(self._kinds.values()):
            self.result().check(f"{label} (its first {_HOPELESS} records)", self._limit)

    def result(self) -> Rejected:
        return Rejected(self._records, dict(sorted(self._kinds.items())), tuple(self._listed))


def write_quarantine(run_dir: str | Path, rejected: dict[str, Rejected]) -> list[str]:
    """Write `quarantine.jsonl`, one malformed record a line; it replaces that of an earlier start.
    Without any, no file.

    Args:
      rejected: config field -> what was left out of its files.

    Returns: a line for the user for each field that has some; a full disk changes that line only.
    """
    path = Path(run_dir) / QUARANTINE_FILE
    found = {field: part for field, part in rejected.items() if part.bad}
    if not found:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return []
    lines = []
    for field, part in found.items():
        lines += [json.dumps({"field": field, **entry}) for entry in part.listed]
        if len(part.listed) < part.bad:
            lines.append(json.dumps({"field": field, "not_listed": part.bad - len(part.listed)}))
    where = f"see {path}"
    try:
        atomic_write_text(path, "\n".join(lines) + "\n")
    except OSError as error:
        where = f"{path} could not be written ({error.strerror})"
    return [f"{field}: {part.summary()}; {where}" for field, part in found.items()]
