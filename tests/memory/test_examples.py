"""The examples of docs/memory.md, and that of README.md if it is there, as they stand."""

import re
from pathlib import Path

import numpy as np
import pytest
from support.byte_models import byte_model

from ttt_jax import Session, load_pretrained, score
from ttt_jax.memory.memory import Memory

pytestmark = pytest.mark.usefixtures("usual_promotion")
ROOT = Path(__file__).parents[2]
TEXT = "It was the best of times, it was the worst of times."


def examples(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return {"PeftModel" in block: block for block in blocks if "memory" in block}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """MODEL, book.txt and other.memory, in the folder where the example runs."""
    monkeypatch.chdir(tmp_path)
    byte_model(tmp_path / "MODEL", d_model=32, d_ff=48)
    (tmp_path / "book.txt").write_text(TEXT)
    session = Session(load_pretrained("MODEL"))
    session.read(["another text"])
    session.memory(name="other").save("other.memory")


@pytest.mark.usefixtures("folder")
def test_what_a_memory_does():
    names = {}
    exec(examples("docs/memory.md")[False], names)  # what the document says, and nothing else
    assert Memory.load("book.memory") == names["book"]
    assert names["small"].terms[0].rank == 32
    assert names["frozen"].adapts == "frozen"


@pytest.mark.usefixtures("folder")
@pytest.mark.filterwarnings("ignore")  # of torch, transformers and peft
@pytest.mark.parametrize(
    "name", [n for n in ("docs/memory.md", "README.md") if True in examples(n)]
)
def test_a_book_becomes_an_adapter(name):
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package, reason="pip install torch transformers peft")
    import torch

    names = {}
    exec(examples(name)[True], names)
    ids = np.array([load_pretrained("MODEL").tokenizer.encode("the age of wisdom")])
    with torch.no_grad():
        got = names["model"](torch.from_numpy(ids)).logits.numpy()
    model, memory = load_pretrained("MODEL"), names["session"].memory()
    expected = score(model, ids, ttt=False, memory=memory, logits=True).logits_BTV
    np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max())
    without = score(model, ids, ttt=False, logits=True).logits_BTV
    assert np.abs(got - without).max() > 1e-2 * np.abs(expected).max()
