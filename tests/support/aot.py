"""Compiling for TPUs that are not there, in a process of its own: libtpu reads its environment
once, and this one may have initialised another platform already.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

# The smallest training step with the tiles of a TPU, for `default`.
TINY = [
    "--model.d_model=256",
    "--model.num_layers=2",
    "--model.num_heads=4",
    "--model.num_kv_heads=2",
    "--model.head_dim=128",
    "--model.d_ff=512",
    "--model.ttt.layers=[0]",
    "--model.ttt.chunk_size=128",
    "--data.seq_len=1024",
    "--data.batch_size=4",
    "--compute_dtype=bfloat16",
]


def compile_in_a_process(script: str, *words: str) -> dict:
    """What the script printed after REPORT, as JSON."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # beside another process: there is no TPU to share
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_SKIP_MDS_QUERY": "1",
    }
    environment.pop("XLA_FLAGS", None)  # of the tests: they switch optimisations off
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT")]
    return json.loads(lines[0].removeprefix("REPORT"))
