"""The site: every document is a page of it, every link leads somewhere, and the docstrings are
readable.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


def load(name):
    """A file of docs/site, which is no package."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / f"docs/site/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings():
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def test_the_navigation_names_documents_and_forgets_none():
    pages, config = load("pages"), settings()
    named = pages.named(config["nav"])
    assert {*named, *config["extra_css"]} <= set(pages.documents())
    assert not any(name.startswith("docs/lab/") for name in named)
    whole = pages.on_config(config)["nav"]
    assert pages.named(whole) == {n for n in pages.documents() if n.endswith(".md")}
    (lab,) = whole[-1].values()
    assert lab == sorted(lab, reverse=True)
    assert len(lab) > 10
    without = {"nav": [{"Start": "README.md"}]}
    assert "docs/api.md" in pages.on_config(without)["nav"][1]["More"]


def test_files_that_documents_link_to_are_on_the_site():
    """A strict build refuses them otherwise, where mkdocs is installed."""
    pages = load("pages").documents()
    for name in (name for name in pages if name.endswith(".md")):
        text = (ROOT / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([\w./-]+)[)#]", re.sub(r"^    .*$", "", text, flags=re.M)):
            path = ((ROOT / name).parent / link).resolve()
            if path.is_file():
                assert path.relative_to(ROOT.resolve()).as_posix() in pages, (name, link)


def test_the_names_of_the_python_page_exist():
    """Also those of the package that it leaves out are found out."""
    import ttt_jax

    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    for name in shown:
        home, _, last = name.rpartition(".")
        module = __import__(home, fromlist=[last])
        assert getattr(module, last).__doc__, name
    public = {n for n in ttt_jax.__all__ if not n.startswith("_")}
    assert public <= {name.rpartition(".")[2] for name in shown}


DOCSTRING = """Do it.

It does more: much more.

Args:
  one: first,
    more of it.
  two, *three: rest.

Returns: a thing. Raises: UserError for
  this; that.

Raises:
  DataError: never.

Behind: all."""
MARKDOWN = """Do it.

It does more: much more.


**Args**

- `one`: first,
    more of it.

- `two`, `*three`: rest.


**Returns** a thing.

**Raises** UserError for
    this; that.


**Raises**

- `DataError`: never.

Behind: all."""


def test_sections_of_docstrings_become_lists():
    assert load("docstrings").to_markdown(DOCSTRING) == MARKDOWN


def test_lists_are_those_of_github():
    """Code keeps its lines, and so does what mkdocs takes for a list already."""
    change = load("pages").as_mkdocs_reads_it
    text = "Text:\n- a\n  more\n  - b\n- c\n"
    assert change(text) == "Text:\n\n- a\n  more\n    - b\n- c\n"
    for same in ("# Head\n- a\n- b\n", "- a\n\n  more\n- b\n", "```\nx\n- a\n  - b\n```\n"):
        assert change(same) == same


def test_the_site_builds(tmp_path):
    """Strictly: a broken link or a name that is gone ends it."""
    if importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("needs the extra `docs`; the workflow builds the site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "docs/api/index.html").read_text(encoding="utf-8")
    assert "<strong>Raises</strong> UserError" in page
    assert "Continue prompts, adapting while reading" in page
    start = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<math" in start
    assert "qquad" not in start
    assert (tmp_path / "docs/lab/2026-11-22-smollm2/index.html").is_file()
    assert (tmp_path / "docs/default_run.png").is_file()
