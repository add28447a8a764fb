"""Adapters in SGLang: the log-probabilities of ours with the frozen memory.

pip install sglang      # docs/memory-engines.md says how on a CPU; skipped without
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
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


def test_sglang_serves_adapters_of_several_ranks_in_one_batch(tmp_path):
    """Named at the start, with no other option. One slot fewer than there are adapters: a slot
    that a larger rank had is given to a smaller one, and to the base.
    """
    base, adapters, expected = served(tmp_path, (8, 100, 128))
    paths = {f"rank{rank}": str(folder) for rank, folder in adapters.items()}
    batches = [[None, 128, 8], [100], [8, 128], [None]]
    calls = [[rank and f"rank{rank}" for rank in batch] for batch in batches]
    found = answers(tmp_path, base, calls, lora_paths=paths, max_loras_per_batch=3)
    for batch, rows in zip(batches, found, strict=True):
        for rank, row in zip(batch, rows, strict=True):
            np.testing.assert_allclose(row, expected[rank], atol=1e-4, err_msg=str((batch, rank)))


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
