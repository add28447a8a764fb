"""Read what earlier code wrote: run folders, sessions, converted models, results.

The files and the numbers are of the code before its modules moved (fixtures/before_rooms).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from ttt_jax import Session, load_pretrained, score

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = ROOT / "tests" / "fixtures" / "before_rooms"
LIMIT = 1e-5  # relative; machines round differently
MODELS = ["hf", "orbax", "jobs/tiny", "jobs/tiny/checkpoints/6"]


@pytest.fixture(scope="module")
def expected():
    return json.loads((WRITTEN / "expected.json").read_text())


@pytest.fixture
def copied(tmp_path):
    """A copy that may be changed, below which relative paths are those of then."""
    return shutil.copytree(WRITTEN, tmp_path / "before")


def run(folder, *words):
    """Run a Python command inside the folder on one device; its output."""
    clean = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    clean |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(rows):
    """Every logged number of every step that is not a time, a rate or a size of memory."""
    noise = ("time/", "tokens_per_second", "host_memory")
    return {
        (row["step"], name): value
        for row in rows
        for name, value in row.items()
        if not name.startswith(noise)
    }


def relative_rms(found, wanted):
    return np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))


def test_a_run_goes_on_as_it_would_have_then(copied, expected):
    tiny = copied / "jobs" / "tiny"
    out = run(copied, str(ROOT / "train.py"), str(tiny / "config.yaml"))
    assert "continuing jobs/tiny from step 6" in out
    rows = [json.loads(line) for line in (tiny / "metrics.jsonl").read_text().splitlines()]
    found, wanted = numbers(rows), numbers(expected["curve"])
    # This row ends with padding, so its last chunk writes nothing. It was measured all the same.
    wanted[11, "ttt/layer_01/update_norm"] = 0.0
    assert found.keys() == wanted.keys()
    assert {step for step, _ in found} == set(range(1, 13))
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=LIMIT), key
    heldout = json.loads((tiny / "report.json").read_text())["heldout"]
    assert heldout["positions"] == expected["heldout"]["positions"]
    for name in ("ttt_on", "ttt_off"):
        np.testing.assert_allclose(heldout[name], expected["heldout"][name], rtol=LIMIT)


@pytest.mark.parametrize("folder", MODELS)
def test_a_model_has_the_logits_of_then(folder, monkeypatch):
    monkeypatch.chdir(WRITTEN)
    model = load_pretrained(folder)
    with np.load(WRITTEN / "scores.npz", allow_pickle=False) as arrays:
        wanted = dict(arrays)
    found = score(model, wanted["ids"], logits=True)
    assert relative_rms(found.logits_BTV, wanted["logits"]) < LIMIT
    assert relative_rms(found.logprobs_BT, wanted["logprobs"]) < LIMIT
    off = score(model, wanted["ids"], ttt=False).logprobs_BT
    assert relative_rms(off, wanted["logprobs_off"]) < LIMIT
    assert relative_rms(off, wanted["logprobs"]) > 100 * LIMIT, "the fast weights do nothing"


@pytest.mark.parametrize("folder", ["hf", "jobs/tiny"])
def test_a_session_goes_on_with_the_tokens_of_then(folder, copied, expected):
    """By the command, as then; the same session in a converted model."""
    words = ["--model", folder, "--json", "--max-new-tokens=12", "--temperature=0.7", "--seed=3"]
    session = ["--ignore-eos", "--session", "session.safetensors", "--keep-session"]
    out = run(copied, "-m", "ttt_jax", "generate", *words, *session)
    assert [json.loads(line)["token_ids"] for line in out.splitlines()] == expected["tokens"]


def test_a_session_is_the_same_after_it_is_written_again(tmp_path):
    model = load_pretrained(WRITTEN / "hf")
    session = Session.load(WRITTEN / "session.safetensors", model)
    assert session.batch_size == 2
    session.save(tmp_path / "again.safetensors")
    # The order of the metadata in the file is not fixed; everything else is compared bit for bit.
    paths = WRITTEN / "session.safetensors", tmp_path / "again.safetensors"
    with safe_open(paths[0], "numpy") as before, safe_open(paths[1], "numpy") as after:
        assert after.metadata() == before.metadata()
        assert set(after.keys()) == set(before.keys())
        for name in before.keys():  # noqa: SIM118 (not a mapping)
            np.testing.assert_array_equal(after.get_tensor(name), before.get_tensor(name))


def test_results_can_be_compared(copied):
    shutil.copytree(copied / "results", copied / "others")
    out = run(copied, "-m", "ttt_jax", "eval", "--compare", "results", "others")
    wanted = json.loads((WRITTEN / "results" / "results.json").read_text())
    assert wanted["perplexity"]
    assert "+0.0000" in out
