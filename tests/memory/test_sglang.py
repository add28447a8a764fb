"""Adapters in SGLang: the log-probabilities of ours with the frozen memory.

pip install sglang      # docs/memory-engines.md says how on a CPU; skipped without
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.adapters import IDS, served

pytestmark = [
    pytest.mark.usefixtures("usual_promotion"),
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="pip install sglang"),
]
PROGRAM = Path(__file__).with_name("sglang_engine.py")
OPTIONS = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "lora_backend": "torch_native",
    "skip_tokenizer_init": True,
    "disable_radix_cache": True,
    "max_total_tokens": 512,
    "log_level": "warning",
}


def answers(folder: Path, base: Path, calls, **options):
    job = {"options": OPTIONS | options | {"model_path": str(base)}, "ids": IDS.tolist()}
    (folder / "job.json").write_text(json.dumps(job | {"calls": calls}))
    command = [sys.executable, str(PROGRAM), str(folder / "job.json"), str(folder / "answer.json")]
    ran = subprocess.run(
        command,
        env=os.environ | {"SGLANG_USE_CPU_ENGINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads((folder / "answer.json").read_text())


def in_another_layer(adapter: Path, folder: Path) -> Path:
    """The adapter with layer 0's part in layer 1, and none in layer 2."""
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    moved = {name.replace(".0.", ".1."): x for name, x in tensors.items() if ".0." in name}
    save_file(moved, folder / "adapter_model.safetensors")
    return folder


def test_sglang_serves_adapters_of_several_ranks_in_one_batch(tmp_path):
    """Named at the start, with no other option. There are fewer slots than adapters: one that a
    larger rank had is given to a smaller one, to other layers, and to the base.
    """
    base, adapters, expected = served(tmp_path, (8, 100, 128))
    paths = {f"rank{rank}": str(folder) for rank, folder in adapters.items()}
    paths["moved"] = str(in_another_layer(adapters[8], tmp_path / "moved"))
    batches = [["moved"], [None, "rank128", "rank8"], ["rank100"], ["rank8", "rank128", "moved"]]
    batches += [[None]]
    found = answers(tmp_path, base, batches, lora_paths=paths, max_loras_per_batch=3)
    expected = {rank and f"rank{rank}": logprobs for rank, logprobs in expected.items()}
    expected["moved"] = np.array(found[0][0])  # in a slot that nothing had been in
    others = [x for name, x in expected.items() if name != "moved"]
    assert min(np.abs(expected["moved"] - x).max() for x in others) > 0.05
    for batch, rows in zip(batches, found, strict=True):
        for name, row in zip(batch, rows, strict=True):
            np.testing.assert_allclose(row, expected[name], atol=1e-4, err_msg=str((batch, name)))


def test_sglang_loads_an_adapter_later_up_to_the_rank_it_was_told(tmp_path):
    base, adapters, expected = served(tmp_path, (8, 100))
    calls = [{"load": f"rank{rank}", "path": str(path)} for rank, path in adapters.items()]
    calls += [["rank8", None]]
    first, second, rows = answers(
        tmp_path,
        base,
        calls,
        enable_lora=True,
        max_lora_rank=16,
        lora_target_modules=["down_proj"],
    )
    assert first == ""
    assert "with rank 100 is incompatible" in second
    for rank, row in zip((8, None), rows, strict=True):
        np.testing.assert_allclose(row, expected[rank], atol=1e-4)
