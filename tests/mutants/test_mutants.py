"""The list of mutants is up to date, and the script does what it says.

Running it all takes most of an hour: `python tests/mutants/run.py`.
"""

import contextlib
import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("mutants_run", HERE / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants_run"] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mutants_run"]


def test_every_line_is_there_once_and_every_test_exists(script):
    """When this fails: the line was reworded. Give the mutant the new text, or take another line
    that means the same.
    """
    mutants = script.load_mutants()
    assert script.problems(mutants) == []
    assert len(mutants) >= 55
    covered = {mutant.file for mutant in mutants}
    assert {
        "train.py",
        "kernels_pallas/tpu.py",
        "ttt_jax/ops/ttt/xla.py",
        "ttt_jax/model/ttt_mlp.py",
    } <= covered


def test_what_is_out_of_date_is_named(script, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "a.py").write_text("x = 1\ny = 1\n")
    (tmp_path / "tests/test_a.py").write_text("def test_x():\n    assert True\n")
    make = lambda name, before, after, test="test_a.py::test_x[1-a]", file="a.py": script.Mutant(
        name, file, before, after, (test,)
    )
    right = make("right", "x = 1", "x = 2")
    assert script.problems([right], tmp_path) == []
    wrong = {
        "gone": (make("gone", "z = 1", "z = 2"), "occurs 0 times, not once"),
        "twice": (make("twice", "= 1", "= 2"), "occurs 2 times, not once"),
        "nothing": (make("nothing", "x = 1", "x = 1"), "changes nothing"),
        "test": (make("test", "x = 1", "x = 2", "test_a.py::test_y"), "no test test_a.py::test_y"),
        "file": (make("file", "x = 1", "x = 2", file="b.py"), "there is no such file"),
    }
    for name, (mutant, words) in wrong.items():
        (line,) = script.problems([right, mutant], tmp_path)
        assert line.startswith(f"{name}: ")
        assert words in line
    assert "two mutants have this name" in script.problems([right, right], tmp_path)[0]


def test_a_line_that_moved_is_followed(script, tmp_path):
    (tmp_path / "ttt_jax").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text("")
    (tmp_path / "ttt_jax/a.py").write_text("x = 1\n")
    (tmp_path / "ttt_jax/b.py").write_text("y = 1\n")
    entry = '[[mutant]]\nname = "moved"\nfile = "ttt_jax/a.py"\nbefore = "y = 1"\nafter = "y = 2"\n'
    (tmp_path / "list.toml").write_text(entry + 'tests = ["test_a.py"]\n')
    (line,) = script.problems(script.load_mutants(tmp_path), tmp_path)
    assert line.endswith("occurs 0 times, not once; now in ttt_jax/b.py: --mend")
    moved = script.mend(script.load_mutants(tmp_path), tmp_path, tmp_path)
    assert moved == ["moved: ttt_jax/a.py -> ttt_jax/b.py"]
    (mutant,) = script.load_mutants(tmp_path)
    assert mutant.file == "ttt_jax/b.py"
    assert script.problems([mutant], tmp_path) == []
    (tmp_path / "ttt_jax/c.py").write_text("x = 1\ny = 1\n")
    (tmp_path / "ttt_jax/b.py").write_text("")
    assert script.mend([mutant], tmp_path, tmp_path) == ["moved: ttt_jax/b.py -> ttt_jax/c.py"]
    (tmp_path / "ttt_jax/b.py").write_text("y = 1\n" * 2)
    assert script.mend([mutant], tmp_path, tmp_path) == [], "in two places: nobody knows which"


def test_the_copy_is_broken_and_mended_again_and_the_work_tree_never(script, tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    mutant = script.Mutant("m", "a.py", "x = 1", "x = 2", ("test_a.py",))
    with contextlib.suppress(KeyError), script.broken(tmp_path, mutant):
        assert (tmp_path / "a.py").read_text() == "x = 2\n"
        raise KeyError
    assert (tmp_path / "a.py").read_text() == "x = 1\n"
    with pytest.raises(AssertionError, match="only a copy"), script.broken(script.ROOT, mutant):
        pass


def test_results_are_gone_on_with_until_something_changes(script, tmp_path, monkeypatch):
    """Three mutants of one line: one noticed, one not, one that may not be; none is run twice."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # most of a start of pytest
    (tmp_path / "tests").mkdir()
    (tmp_path / "a.py").write_text("x = 1  # one\n")
    (tmp_path / "tests/test_a.py").write_text(
        "from a import x\n\ndef test_x():\n    assert x == 1\n"
    )
    make = lambda name, before, after, same="": script.Mutant(
        name, "a.py", before, after, ("test_a.py::test_x",), same
    )
    mutants = [
        make("dead", "x = 1", "x = 2"),
        make("alive", "# one", "# two"),
        make("same", "# one", "#", "a comment"),
    ]
    results = tmp_path / "results.jsonl"
    assert script.run_all(tmp_path, mutants, results) == 1, "one lives"
    rows = script.read_results(results)
    assert [row.get("state") for row in rows] == [None, "failed", "passed", "passed"]
    assert rows[1]["by"] == "test_a.py::test_x"
    assert script.run_all(tmp_path, mutants, results) == 1
    assert script.read_results(results) == rows
    done = script.newest(mutants, rows, tmp_path)
    assert script.count(mutants, done) == "1 of 2 noticed; 1 change nothing; alive: alive"
    text = script.table(mutants, done)
    assert "| dead | a.py | `test_a.py::test_x` |" in text
    assert "| alive | a.py | **nobody** |" in text
    assert "| same | a.py | nobody: a comment |" in text
    (tmp_path / "tests/test_a.py").write_text(
        "def test_x():\n    assert '# one' in open('a.py').read()\n"
    )
    assert set(script.newest(mutants, rows, tmp_path)) == {"dead"}, (
        "who lived is tried again when the tests change"
    )
    (tmp_path / "tests/test_a.py").write_text("def test_x():\n    assert False\n")
    new = [make("new", "x = 1", "x = 3")]
    assert script.run_all(tmp_path, new, results) == 0, "its test was seen to pass before"
    results.unlink()
    assert script.run_all(tmp_path, new, results) == 2, "a test that fails anyway kills nothing"
