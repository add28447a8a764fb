"""The result folder: `results.json`, `report.html`, and `text.html` when asked for; and the
comparison of several of them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ttt_jax.display.tables import Table, number
from ttt_jax.errors import CheckpointError, UserError
from ttt_jax.eval.page import comparison_page, report_page
from ttt_jax.eval.side_by_side import LETTERS, scored_tokens, side_by_side
from ttt_jax.eval.statistics import mean_with_interval
from ttt_jax.eval.tables import interval, tokens
from ttt_jax.eval.unfinished import UNFINISHED
from ttt_jax.files.new_folder import new_folder
from ttt_jax.files.text import atomic_write_text, one_line

RESULTS = "results.json"
_MAX_BYTES = 256 << 20  # of results.json
_OURS = {
    RESULTS,
    "report.html",
    "text.html",
    "comparison.json",
    "comparison.html",
    UNFINISHED,
    *LETTERS.lower(),
}


def check_out(out: Path, overwrite: bool) -> None:
    """Raise UserError when `out` exists and may not be replaced: never anything but a result
    folder.

    One that holds nothing, or only what an interrupted evaluation has kept, may be filled without
    `overwrite`.
    """
    if (not out.exists() and not out.is_symlink()) or _is_unfinished(out):
        return
    if not overwrite:
        raise UserError(f"--out {out}: exists already; choose another folder or pass --overwrite")
    foreign = (
        sorted({path.name for path in out.iterdir()} - _OURS)
        if out.is_dir() and not out.is_symlink()
        else [out.name]
    )
    if foreign:
        raise UserError(
            f"--out {out}: holds {foreign[0]!r}, so it is not a result folder; choose another "
            "folder"
        )


def _is_unfinished(out: Path) -> bool:
    if out.is_symlink() or not out.is_dir():
        return False
    inner = [
        path for name in LETTERS.lower() if (path := out / name).is_dir() and not path.is_symlink()
    ]
    found = [path for folder in (out, *inner) for path in folder.iterdir() if path not in inner]
    return all(path.name == UNFINISHED and path.is_file() for path in found)


def write_folder(out: Path, files: dict[str, str], overwrite: bool) -> None:
    """Write text files (names may have one folder); `out` appears complete or not at all.

    Raises: UserError when `out` may not be replaced or cannot be written.
    """
    check_out(out, overwrite)
    try:
        with new_folder(out, replace=True) as part:
            for name, text in files.items():
                (part / name).parent.mkdir(exist_ok=True)
                atomic_write_text(part / name, text)
    except OSError as error:
        raise UserError(
            f"--out {out}: could not be written ({error.strerror}); free space or choose another "
            "folder"
        ) from None


def files_of(results: dict[str, Any], text_html: str | None = None) -> dict[str, str]:
    """Return the files of a result folder."""
    files = {
        RESULTS: json.dumps(results, indent=1, allow_nan=False) + "\n",
        "report.html": report_page(results),
    }
    return files | ({"text.html": text_html} if text_html else {})


def read_results(folder: Path) -> dict[str, Any]:
    """Raise CheckpointError when the folder holds no readable results."""
    try:
        if (folder / RESULTS).stat().st_size > _MAX_BYTES:
            raise CheckpointError(
                f"--compare {folder}: {RESULTS} has more than {_MAX_BYTES} bytes; evaluate again"
            )
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"--compare {folder}: holds no {RESULTS}; give the --out folder of an evaluation"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = one_line(error, end="")
        raise CheckpointError(
            f"--compare {folder}: {RESULTS} is not readable ({reason}); evaluate again"
        ) from None
    if not isinstance(results, dict) or "model" not in results or "config" not in results:
        raise CheckpointError(
            f"--compare {folder}: {RESULTS} is not of an evaluation; give an --out folder of "
            "ttt-jax eval"
        )
    return results


# --------------------------------------------------------------------------------------- comparison


def comparison(*results: dict[str, Any]) -> tuple[dict[str, Any], list[Table]]:
    """Say what B gives over A, where both have the same entries; losses on the same documents are
    paired. More than two stand side by side.

    Raises: UserError when they have nothing in common, CheckpointError when one of them is not
    what an evaluation writes.
    """
    with _damage_is_told():
        return _compare(*results) if len(results) == 2 else side_by_side(list(results))


@contextlib.contextmanager
def _damage_is_told() -> Iterator[None]:
    """Blame the files: a comparison hangs on nothing else."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {one_line(error, end='')}"
        raise CheckpointError(
            f"--compare: one of the two {RESULTS} is damaged ({reason}); evaluate again"
        ) from None


def _compare(a: dict[str, Any], b: dict[str, Any]) -> tuple[dict[str, Any], list[Table]]:
    rows = [*_compare_losses(a, b), *_compare_recall(a, b)]
    rows += [*_compare_synthetic(a, b), *_compare_tasks(a, b)]
    if not rows:
        raise UserError(
            "--compare: the two results have no entry in common; evaluate both with the same "
            "options"
        )
    headings = ["what", "mode", "A", "B", "B - A"]
    note = (
        f"A: {a['model']} ({a['commit'] or 'no commit'}), B: {b['model']} "
        f"({b['commit'] or 'no commit'})."
    )
    note += (
        " Losses in nats (lower is better), recall in nats, accuracies and task scores (higher is "
        "better)."
    )
    cells = [
        [r["what"], r["mode"], number(r["a"]), number(r["b"]), interval(r["difference"], "+.4f")]
        for r in rows
    ]
    return {"a": a["model"], "b": b["model"], "rows": rows}, [
        Table("B against A", note, headings, cells)
    ]


def comparison_files(
    results: list[dict[str, Any]], compared: dict[str, Any], made: list[Table]
) -> dict[str, str]:
    with _damage_is_told():
        text = json.dumps(compared, indent=1, allow_nan=False) + "\n"
        return {"comparison.json": text, "comparison.html": comparison_page(results, made)}


def _row(
    what: str, mode: str, a: float, b: float, difference: dict[str, Any] | None = None
) -> dict[str, Any]:
    difference = difference or {"mean": b - a, "low": None, "high": None}
    return {"what": what, "mode": mode, "a": a, "b": b, "difference": difference}


def _compare_losses(a: dict[str, Any], b: dict[str, Any]) -> Iterator[dict[str, Any]]:
    pa, pb = a.get("perplexity"), b.get("perplexity")
    if not pa or not pb or scored_tokens(pa) != scored_tokens(pb):
        return
    paired = pa["documents"] == pb["documents"]  # the same documents, and so the same order
    for entry, other, mode in _common(pa, pb, "lengths", ("length",)):
        ours, theirs = (np.array(e["per_document"][mode]) for e in (entry, other))
        difference = mean_with_interval(theirs - ours) if paired else None
        what = f"loss at {tokens(entry['length'])}"
        yield _row(what, mode, entry[mode]["mean"], other[mode]["mean"], difference)


def _compare_recall(a: dict[str, Any], b: dict[str, Any]) -> Iterator[dict[str, Any]]:
    pa, pb = a.get("recall"), b.get("recall")
    if not pa or not pb or pa["passage"] != pb["passage"]:
        return
    paired = pa["documents"] == pb["documents"]
    for entry, other, mode in _common(pa, pb, "lengths", ("length",)):
        ours, theirs = (
            np.subtract(e[mode]["per_document"]["control"], e[mode]["per_document"]["second"])
            for e in (entry, other)
        )
        difference = mean_with_interval(theirs - ours) if paired else None
        a_mean, b_mean = (e[mode]["recall"]["mean"] for e in (entry, other))
        what = f"recall at {tokens(entry['length'])}"
        yield _row(what, mode, a_mean, b_mean, difference)


def _compare_synthetic(a: dict[str, Any], b: dict[str, Any]) -> Iterator[dict[str, Any]]:
    pa, pb = a.get("synthetic"), b.get("synthetic")
    if not pa or not pb or any(pa[key] != pb[key] for key in ("examples", "form", "seed")):
        return
    for entry, other, mode in _common(pa, pb, "entries", ("task", "length", "distance")):
        where = "" if entry["distance"] is None else f" at distance {entry['distance']}"
        what = f"{entry['task']} at {tokens(entry['length'])}{where}"
        yield _row(what, mode, *(e[mode]["accuracy"]["mean"] for e in (entry, other)))


def _compare_tasks(a: dict[str, Any], b: dict[str, Any]) -> Iterator[dict[str, Any]]:
    pa, pb = a.get("tasks"), b.get("tasks")
    if not pa or not pb or any(pa[key] != pb[key] for key in ("limit", "fewshot", "chat")):
        return
    for entry, other, mode in _common(pa, pb, "entries", ("task", "metric")):
        what = f"{entry['task']} {entry['metric']}"
        yield _row(what, mode, *(e[mode]["value"] for e in (entry, other)))


def _common(
    a: dict[str, Any], b: dict[str, Any], part: str, names: tuple[str, ...]
) -> Iterator[tuple[dict, dict, str]]:
    """Yield (entry of A, entry of B, mode) of what both have."""
    others = {tuple(entry[name] for name in names): entry for entry in b[part]}
    for entry in a[part]:
        other = others.get(tuple(entry[name] for name in names))
        if other is not None:
            yield from ((entry, other, mode) for mode in a["modes"] if mode in b["modes"])
