"""Break one line of the library at a time and see whether a test notices.

    python tests/mutants/run.py                    all mutants, one after the other
    python tests/mutants/run.py --only rope        those whose name or file contains the word
    python tests/mutants/run.py --show             the table of what has been run, in Markdown
    python tests/mutants/run.py --check            only whether every line is still there
    python tests/mutants/run.py --mend             follow lines that moved to another file

The lines are data: `*.toml` beside this file. Each gives a name, a file, the text `before`, the
text `after`, and the tests that should notice (node ids of pytest below tests/). A mutant that
changes nothing that a caller can see says why in `same`; it is run too, and has to live.

The work tree is never touched: everything happens in a copy of it under --folder. The tests are
first run on the unbroken copy, so that a test that fails anyway kills nothing. A result is added to
--results (JSON lines) as soon as it is there; the same command goes on behind it. A result counts
until the mutant, or the file that it breaks, changes; of one that lived, until its tests change.

Exit code 0: every mutant was noticed (those with `same` were not); 1: some were not; 2: the list is
out of date, or a test fails on the unbroken tree.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
# pytest's exit codes: 1 is a test that failed; 2 to 5 mean that nothing was tested.
PASSED, FAILED = 0, 1


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A line broken on purpose.

    Fields:
      name: what is wrong afterwards; unique.
      file: below the root.
      before, after: text that occurs exactly once in the file, and what stands there instead.
      tests: node ids below tests/.
      same: why nobody can see a difference; empty for a mutant that has to be noticed.
      limit: seconds for the tests.
    """

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    same: str = ""
    limit: int = 600

    def digest(self, root: Path) -> str:
        """Of the mutant and of the file that it breaks."""
        return _sha(
            self.before, self.after, self.tests, (root / self.file).read_text(encoding="utf-8")
        )

    def tests_digest(self, root: Path) -> str:
        """Of the tests: who lived is tried again when they change."""
        files = sorted({test.partition("::")[0] for test in self.tests})
        return _sha(*((root / "tests" / name).read_text(encoding="utf-8") for name in files))


def _sha(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def load_mutants(folder: Path = HERE) -> list[Mutant]:
    """All mutants of the `*.toml` files. Raises TypeError or KeyError for an entry that is none."""
    mutants = []
    for path in sorted(folder.glob("*.toml")):
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]:
            mutants.append(Mutant(**{**entry, "tests": tuple(entry["tests"])}))
    return mutants


def problems(mutants: list[Mutant], root: Path = ROOT) -> list[str]:
    """Say what is out of date, a line each: text that is not there once, tests that are gone."""
    found = []
    names = [mutant.name for mutant in mutants]
    found += [
        f"{name}: two mutants have this name"
        for name in sorted({n for n in names if names.count(n) > 1})
    ]
    for mutant in mutants:
        path = root / mutant.file
        count = path.read_text(encoding="utf-8").count(mutant.before) if path.is_file() else -1
        if count != 1:
            what = (
                "there is no such file" if count < 0 else f"`before` occurs {count} times, not once"
            )
            there = elsewhere(mutant, root)
            what += f"; now in {there}: --mend" if there else ""
            found.append(f"{mutant.name}: {mutant.file}: {what}")
        if mutant.before == mutant.after:
            found.append(f"{mutant.name}: changes nothing")
        found += [
            f"{mutant.name}: no test {test}" for test in mutant.tests if not _exists(root, test)
        ]
        if not mutant.tests:
            found.append(f"{mutant.name}: names no test")
    return found


def elsewhere(mutant: Mutant, root: Path = ROOT) -> str | None:
    """The one file of the library that has the text once, where its own has it no more."""
    paths = [path for part in ("ttt_jax", "kernels_pallas") for path in (root / part).rglob("*.py")]
    counts = {path: path.read_text(encoding="utf-8").count(mutant.before) for path in paths}
    found = [path for path, count in counts.items() if count]
    one = len(found) == 1 and counts[found[0]] == 1 and found[0] != root / mutant.file
    return found[0].relative_to(root).as_posix() if one else None


def mend(mutants: list[Mutant], folder: Path = HERE, root: Path = ROOT) -> list[str]:
    """Follow lines that moved to another file: rewrite `file` in the lists. Returns what moved."""
    moved = []
    for mutant in mutants:
        path = root / mutant.file
        if path.is_file() and mutant.before in path.read_text(encoding="utf-8"):
            continue
        if (there := elsewhere(mutant, root)) is None:
            continue
        old, new = (
            f"name = {json.dumps(mutant.name, ensure_ascii=False)}\nfile = {json.dumps(file)}\n"
            for file in (mutant.file, there)
        )
        for toml in folder.glob("*.toml"):
            text = toml.read_text(encoding="utf-8")
            if old in text:
                toml.write_text(text.replace(old, new), encoding="utf-8")
                moved.append(f"{mutant.name}: {mutant.file} -> {there}")
    return moved


def _exists(root: Path, test: str) -> bool:
    name, _, function = test.partition("::")
    path = root / "tests" / name
    if not path.is_file():
        return False
    return not function or f"def {function.partition('[')[0]}(" in path.read_text(encoding="utf-8")


def copy_tree(folder: Path) -> None:
    """What git knows of the work tree, with its changes and new files, into an empty folder."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others"]
    command += ["--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file() or (ROOT / name).is_symlink():  # a link to a folder, too
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)


@contextlib.contextmanager
def broken(root: Path, mutant: Mutant) -> Iterator[None]:
    """The copy at `root` with one line changed."""
    assert root.resolve() != ROOT, "only a copy is ever broken"
    path = root / mutant.file
    text = path.read_text(encoding="utf-8")
    assert text.count(mutant.before) == 1, mutant.name
    path.write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")


def run_tests(root: Path, tests: tuple[str, ...], limit: int) -> tuple[str, str, float]:
    """Run the named tests, to the first that fails.

    Returns: (state, the test that failed or the last lines of output, seconds). States: passed,
      failed, endless, error (no test was run).
    """
    # No byte code: two mutants of a file may have one size and one second.
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(root)}
    begin = time.monotonic()
    process = subprocess.Popen(
        [*PYTEST, *(f"tests/{test}" for test in tests)],
        cwd=root,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a test's own processes go with it
    )
    os.setpriority(os.PRIO_PROCESS, process.pid, 10)
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return "endless", f"no end within {limit} s", time.monotonic() - begin
    seconds = time.monotonic() - begin
    if process.returncode == PASSED:
        return "passed", "", seconds
    lines = output.splitlines()
    summary = (line for line in lines if line.startswith(("FAILED ", "ERROR ")))
    failed = next(summary, "").partition(" ")[2].partition(" - ")[0]
    if process.returncode == FAILED and failed:
        return "failed", failed.removeprefix("tests/"), seconds
    return "error", " / ".join(lines[-3:]), seconds


# ----------------------------------------------------------------------------------------- results


def read_results(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def add_result(path: Path, row: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def newest(mutants: list[Mutant], rows: list[dict], root: Path) -> dict[str, dict]:
    """The last result of each mutant that is still valid."""
    last = {row["name"]: row for row in rows if "name" in row}

    def valid(m: Mutant) -> bool:
        if m.name not in last or last[m.name]["digest"] != m.digest(root):
            return False
        noticed = last[m.name]["state"] in ("failed", "endless")
        return noticed or last[m.name].get("tests") == m.tests_digest(root)

    return {m.name: last[m.name] for m in mutants if valid(m)}


def table(mutants: list[Mutant], results: dict[str, dict]) -> str:
    """Markdown: which test noticed what. Line numbers are left out, they change every day."""
    lines = ["| what is wrong | file | noticed by | s |", "|---|---|---|---:|"]
    for mutant in mutants:
        row = results.get(mutant.name)
        if row is None:
            noticed, seconds = "not run", ""
        else:
            words = {"failed": f"`{row['by']}`", "passed": "**nobody**"}
            noticed = words.get(row["state"], row["by"])
            if row["state"] == "passed" and mutant.same:
                noticed = f"nobody: {mutant.same}"
            seconds = f"{row['seconds']:.0f}"
        cells = [mutant.name, mutant.file, noticed, seconds]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def count(mutants: list[Mutant], results: dict[str, dict]) -> str:
    changing = [m for m in mutants if not m.same]
    noticed = [m for m in changing if results.get(m.name, {}).get("state") in ("failed", "endless")]
    lived = [m.name for m in changing if results.get(m.name, {}).get("state") == "passed"]
    text = (
        f"{len(noticed)} of {len(changing)} noticed; {len(mutants) - len(changing)} change nothing"
    )
    return text + (f"; alive: {', '.join(lived)}" if lived else "")


# --------------------------------------------------------------------------------------------- run


def check_unbroken(root: Path, mutants: list[Mutant], results: Path) -> str | None:
    """Run what has not been seen to pass on the unbroken copy, file by file. None: all pass."""
    passed = {test for row in read_results(results) for test in row.get("unbroken", [])}
    missing = sorted({test for mutant in mutants for test in mutant.tests} - passed)
    for name, group in itertools.groupby(missing, lambda test: test.partition("::")[0]):
        tests = tuple(group)
        state, what, seconds = run_tests(root, tests, limit=3600)
        print(f"unbroken {seconds:5.0f} s  {name}: {state}", flush=True)
        if state != "passed":
            return f"{what or state} (on the unbroken tree)"
        add_result(results, {"unbroken": list(tests), "seconds": round(seconds, 1)})
    return None


def run_all(root: Path, mutants: list[Mutant], results: Path) -> int:
    done = newest(mutants, read_results(results), root)
    todo = [mutant for mutant in mutants if mutant.name not in done]
    if todo and (failure := check_unbroken(root, todo, results)):
        print(f"error: {failure}")
        return 2
    for i, mutant in enumerate(todo, 1):
        digest = mutant.digest(root)
        with broken(root, mutant):
            state, by, seconds = run_tests(root, mutant.tests, mutant.limit)
        word = {"failed": "noticed", "endless": "noticed", "passed": "LIVES"}.get(state, "ERROR")
        word = "lives, as it should" if state == "passed" and mutant.same else word
        print(
            f"{i:3d}/{len(todo)} {word:8s} {seconds:5.0f} s  {mutant.file}: {mutant.name}  {by}",
            flush=True,
        )
        row = {"name": mutant.name, "digest": digest, "tests": mutant.tests_digest(root)}
        row |= {"state": state, "by": by, "seconds": round(seconds, 1)}
        add_result(results, row)
    done = newest(mutants, read_results(results), root)
    print(count(mutants, done))
    return int(any((done[m.name]["state"] == "passed") != bool(m.same) for m in mutants))


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="a part of the name or of the file")
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/ttt_jax_mutants"), help="for the copy"
    )
    parser.add_argument("--results", type=Path, help="default: FOLDER/results.jsonl")
    parser.add_argument("--show", action="store_true", help="the table so far, and nothing is run")
    parser.add_argument("--check", action="store_true", help="only whether the list is up to date")
    parser.add_argument("--mend", action="store_true", help="rewrite the files of lines that moved")
    args = parser.parse_args(words)
    if args.mend:
        print("\n".join(mend(load_mutants())) or "nothing moved")
        return 0
    results = args.results or args.folder / "results.jsonl"
    mutants = load_mutants()
    if found := problems(mutants):
        print("\n".join(f"error: {line}" for line in found))
        return 2
    mutants = [m for m in mutants if args.only in m.name or args.only in m.file]
    if args.check:
        print(f"{len(mutants)} mutants, every line is there once")
        return 0
    if args.show:
        done = newest(mutants, read_results(results), ROOT)
        print(table(mutants, done), count(mutants, done), sep="\n\n")
        return 0
    args.folder.mkdir(parents=True, exist_ok=True)
    tree = args.folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    copy_tree(tree)
    return run_all(tree, mutants, results)


if __name__ == "__main__":
    sys.exit(main())
