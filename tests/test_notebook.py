"""The quickstart notebook: every cell runs in an empty folder, from top to bottom, and gives what
its text says.
"""

import ast
import json
import os
from pathlib import Path

import numpy as np
import pytest
from support.compilation import CHEAP

ROOT = Path(__file__).parent.parent
FILE = ROOT / "examples" / "quickstart.ipynb"
# A smaller model and shorter rows than the notebook's own, so that it takes seconds.
SMALL = {
    "--data.seq_len": "256",
    "--model.num_layers": "2",
    "--model.ttt.layers": "1",
    "--eval.rows": "2",
    "--eval.buckets": "2",
    "--log.probe_every": "0",
    "--log.tensorboard": "false",
}


def notebook():
    return json.loads(FILE.read_text(encoding="utf-8"))


def sources(kind):
    return ["".join(cell["source"]) for cell in notebook()["cells"] if cell["cell_type"] == kind]


def test_it_keeps_no_outputs():
    """They would be one machine's, and every run would be a change."""
    found = notebook()
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in found["cells"]}) == len(found["cells"])
    for cell in found["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_the_links_lead_somewhere():
    from test_documents import broken_links

    assert broken_links("\n".join(sources("markdown")), FILE.parent) == []


@pytest.mark.usefixtures("usual_promotion")
def test_every_cell_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", CHEAP)  # one device, as a newcomer has
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    first, *rest = sources("code")
    names = {"__name__": "__main__"}
    assert [n.targets[0].id for n in ast.parse(first).body] == ["STEPS", "OPTIONS"]
    names |= {"STEPS": 2, "OPTIONS": [word for option in SMALL.items() for word in option]}
    for n, source in enumerate(rest):
        exec(compile(source, f"cell {n}", "exec"), names)
    shown = capfd.readouterr().out
    assert names["heldout"]["ttt_on"] != names["heldout"]["ttt_off"]
    assert np.abs(names["on"] - names["off"]).max() > 1e-4
    assert names["again"].position_B.tolist() == [len(names["document"]) - 1]
    assert "the loop and the op agree" in shown
    assert "the same weights: True" in shown
    assert names["asked"].position_B[0] > len(names["document"])
    assert names["session"].position_B.tolist() == [len(names["document"]) - 1]
