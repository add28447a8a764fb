"""A real pretrained model: TTT layers that were never trained change nothing, and the harness
scores it as transformers does.

TTT_JAX_SMOLLM2=checkpoints/smollm2 pytest -m slow tests/eval/test_smollm2.py

examples/smollm2.md tells where the model is from.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "TTT_JAX_SMOLLM2" not in os.environ, reason="TTT_JAX_SMOLLM2 does not name its folder"
    ),
    pytest.mark.filterwarnings("ignore"),  # of the harness, torch and their packages
]


def python(*words):
    """In a process of its own: this one compiles without optimisations (conftest.py), which suits
    tiny models only.
    """
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(*words):
    python("-m", "ttt_jax", *words)


NEEDLES = """
import json, sys
import lm_eval
import ttt_jax.eval.harness  # registers the model

model, folder = sys.argv[1:]
run = lm_eval.simple_evaluate(
    model=model,
    model_args={"pretrained": folder, "dtype": "float32"},
    tasks=["niah_single_1"],
    metadata={"pretrained": folder, "max_seq_lengths": [4096]},
    limit=2,
    batch_size=1,
    device="cpu",
)
samples = sorted(run["samples"]["niah_single_1"], key=lambda sample: sample["doc_id"])
print("REPORT" + json.dumps([(s["doc"]["input"], s["filtered_resps"], s["4096"]) for s in samples]))
"""


def test_untrained_ttt_layers_change_nothing(tmp_path):
    model = tmp_path / "model"
    ttt = ["--ttt.layers", "0,12,24", "--ttt.chunk_size", "64", "--ttt.lr", "0.1"]
    command("convert", os.environ["TTT_JAX_SMOLLM2"], model, "--to", "hf", *ttt)
    options = [
        "--lengths",
        "256,512",
        "--documents",
        "2",
        "--batch-size",
        "2",
        "--out",
        tmp_path / "out",
    ]
    command("eval", "--model", model, "--perplexity", "stdlib", *options)
    part = json.loads((tmp_path / "out/results.json").read_text())["perplexity"]
    for entry in part["lengths"] + part["positions"]:
        losses = entry["per_document"]
        assert losses["on"] == losses["off"] == losses["shuffled"]
        assert 0 < entry["off"]["mean"] < 6


def test_needles_as_transformers_finds_them():
    """RULER's niah_single_1 at 4k, float32 on both sides: the same answers to the same prompts."""
    for package in ("torch", "transformers", "accelerate", "lm_eval", "wonderwords"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    folder, found = Path(os.environ["TTT_JAX_SMOLLM2"]).resolve(), {}
    assert (folder / "tokenizer_config.json").is_file(), (
        "transformers needs it; make the folder with examples/smollm2.py again"
    )
    for model in ("hf", "ttt_jax"):
        printed = python("-c", NEEDLES, model, folder)
        found[model] = json.loads(printed.rpartition("REPORT")[2])
    assert found["ttt_jax"] == found["hf"]
    assert found["hf"][0][2] == 1.0
