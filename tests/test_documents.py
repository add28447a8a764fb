"""Check the documents: width, length, links, and the files that they name."""

import functools
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_COLUMNS = 100
MAX_BYTES = 12_000
CODE_SPAN = re.compile(r"`([^`]+)`")
FILE_NAME = re.compile(r"\.?[\w-][\w.-]*(?:/[\w.-]+)+\.(?:py|md|yaml|sh)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)|^\[[^\]]+\]: (\S+)$", re.MULTILINE)
GENERATED = ("runs", "checkpoints")  # folders that commands make


@functools.cache
def documents() -> tuple[str, ...]:
    """Return every Markdown file that git knows, new ones included."""
    command = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    listed = subprocess.run([*command, "*.md"], capture_output=True, text=True, check=False)
    if listed.returncode:  # a release without its history
        names = [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.md")]
        return tuple(sorted(n for n in names if not n.startswith((".", "runs/"))))
    return tuple(sorted(n for n in set(listed.stdout.split("\0")) if n and (ROOT / n).is_file()))


def is_record(name: str) -> bool:
    """Tell whether a document records a day, and so may be long and name files of that day."""
    return name.startswith("docs/lab/") or name == "CHANGELOG.md"


def without_code_blocks(text: str) -> str:
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^(?: {4}|\t).*$", "", text, flags=re.MULTILINE)


def wide_lines(text: str) -> list[int]:
    return [n for n, line in enumerate(text.splitlines(), 1) if len(line) > MAX_COLUMNS]


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def anchors(text: str) -> set[str]:
    return {slug(line.lstrip("#")) for line in text.splitlines() if line.startswith("#")}


def broken_links(text: str, folder: Path) -> list[str]:
    """Return relative links without a file, or without a heading where they name one."""
    broken = []
    for match in LINK.finditer(without_code_blocks(text)):
        link = match[1] or match[2]
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        file = folder / path if path else None
        if file is not None and not file.exists():
            broken.append(link)
        elif anchor:
            target = text if file is None else file.read_text(encoding="utf-8")
            if anchor not in anchors(target):
                broken.append(link)
    return broken


def named_files(text: str) -> set[str]:
    """Return the paths of files in code spans; PLACEHOLDERS and generated folders are left out."""
    words = {
        word.partition("::")[0]
        for span in CODE_SPAN.findall(without_code_blocks(text))
        for word in span.split()
    }
    names = {word for word in words if FILE_NAME.fullmatch(word)}
    parts = {name: name.removesuffix(Path(name).suffix).split("/") for name in names}
    return {
        name
        for name in names
        if parts[name][0] not in GENERATED and not any(part.isupper() for part in parts[name])
    }


def missing_files(text: str, root: Path) -> list[str]:
    return sorted(name for name in named_files(text) if not (root / name).is_file())


def test_the_checks_find_what_they_look_for(tmp_path):
    assert wide_lines("x" * 100 + "\n" + "x" * 101 + "\n") == [2]
    (tmp_path / "there.md").write_text("# What is there?\n")
    text = (
        "[a](there.md) [b](gone.md) [c](there.md#what-is-there) [d](there.md#gone) [e](#here)\n"
        "![f](gone.png) [g](https://example.org/gone.md) [h]\n\n    [in code](gone.md)\n\n"
        "# Here\n\n[h]: also/gone.md\n"
    )
    expected = ["gone.md", "there.md#gone", "gone.png", "also/gone.md"]
    assert broken_links(text, tmp_path) == expected
    text = (
        "`a/gone.py` `there.md` `python b/gone.py --x` `a/there.py::test_x` `configs/NAME.yaml`\n"
        "`RUN/config.yaml` `runs/default/report.md` `a/gone.txt`\n\n    `c/gone.py`\n"
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "there.py").write_text("")
    assert missing_files(text, tmp_path) == ["a/gone.py", "b/gone.py"]


@pytest.mark.parametrize("name", documents())
def test_no_line_is_wider_than_the_page(name):
    assert wide_lines((ROOT / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", [n for n in documents() if not is_record(n)])
def test_no_document_for_users_is_long(name):
    assert len((ROOT / name).read_bytes()) <= MAX_BYTES, "move measurements to docs/lab/"


@pytest.mark.parametrize("name", documents())
def test_every_link_leads_somewhere(name):
    path = ROOT / name
    assert broken_links(path.read_text(encoding="utf-8"), path.parent) == []


@pytest.mark.parametrize("name", [n for n in documents() if not is_record(n)])
def test_every_file_that_is_named_exists(name):
    assert missing_files((ROOT / name).read_text(encoding="utf-8"), ROOT) == []


@pytest.mark.parametrize("folder", ["benchmarks", "docs/lab"])
def test_an_index_names_every_file_of_its_folder(folder):
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    files = {p.name for p in (ROOT / folder).iterdir() if p.is_file() and p.name != "README.md"}
    assert sorted(files - set(re.findall(r"[`(]([\w.-]+)[`)]", text))) == []
