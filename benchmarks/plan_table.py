"""The TPU table of docs/scaling.md: the memory of Qwen3 train steps by model, row length and
topology. No TPU is needed.

    python benchmarks/plan_table.py \\
        --out rows.jsonl [--models 4B,8B,14B] [--rows 32768,131072,1048576] [--topologies v5p:4x4x4]

Each row is one `ttt-jax plan`, stopped as soon as libtpu's compiler has written its memory report
(arguments included): memory is assigned before machine code is generated, in a small part of the
time. One row at a time for each group of `context` devices. A row that `--out` has already is not
computed again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GB = 1e9

EIGHT = "configs/qwen3_8b_longct.yaml"
MODELS = {
    "4B": ["configs/qwen3_4b_longct_128k.yaml"],
    "8B": [EIGHT],
    "14B": [
        EIGHT,
        "--model.d_model=5120",
        "--model.d_ff=17408",
        "--model.num_layers=40",
        "--model.num_heads=40",
        "--model.ttt.layers=[0,6,12,18,24,30,36]",
    ],
}
TOPOLOGIES = ["v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8", "v6e:16x16"]
CHUNK = 4096


def context_size(topology: str, tokens: int) -> int:
    """About 16k tokens a device, 8k where memory is small; at most all devices."""
    a_device = 8192 if topology.startswith("v6e") else 16384
    return min(max(tokens // a_device, 1), devices_of(topology))


def devices_of(topology: str) -> int:
    return math.prod(int(size) for size in topology.partition(":")[2].split("x"))


def measure(model: str, tokens: int, topology: str, context: int, timeout: float) -> dict:
    """One row of the table: bytes of a device, and whether the attention in the program is the
    splash kernel.
    """
    fsdp = devices_of(topology) // context
    config, *words = MODELS[model]
    words += [
        f"--data.seq_len={tokens}",
        f"--model.max_positions={tokens}",
        f"--data.batch_size={fsdp}",
        "--optimizer.accumulate=1",
        "--remat_save=[attention,ttt_target]",
        f"--model.ttt.chunk_size={CHUNK}",
        "--mesh.fsdp=-1",
        f"--mesh.context={context}",
    ]
    about = {
        "model": model,
        "tokens": tokens,
        "topology": topology,
        "fsdp": fsdp,
        "context": context,
    }
    command = [
        sys.executable,
        "-m",
        "ttt_jax",
        "plan",
        "--config",
        config,
        "--topology",
        topology,
        "--json",
        *words,
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    begin = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        # the compiler's dump goes below it
        environment |= {"TMPDIR": folder, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err)
        try:
            while process.poll() is None and time.perf_counter() - begin < timeout:
                time.sleep(0.5)
                if (total := _reported(Path(folder))) is not None:
                    about |= {
                        "total": total,
                        "how": "memory report",
                        "splash": _has_splash(Path(folder)),
                    }
                    return about | {"seconds": round(time.perf_counter() - begin, 1)}
        finally:
            process.kill()
            process.wait()
        about |= {"seconds": round(time.perf_counter() - begin, 1)}
        out.seek(0)
        err.seek(0)
        lines = out.read().splitlines()
        # refused before there was a report, or done between two looks
        if process.returncode in (0, 1) and lines:
            plan = json.loads(lines[-1])
            return about | {"total": plan["total"], "how": "plan", "notes": plan["notes"]}
        return about | {
            "total": None,
            "how": (err.read().splitlines() or ["no report in time"])[-1][:300],
        }


def _reported(folder: Path) -> int | None:
    """Bytes in HBM by the largest report that is complete, of the step's program."""
    totals = []
    for path in folder.rglob("*train_step*memory-usage-report.txt"):
        text = path.read_text(encoding="utf-8")
        if text.endswith("\n") and (
            found := re.search(r"Memory Space: default.*\nTotal bytes: (\d+)", text)
        ):
            totals.append(int(found[1]))
    return max(totals, default=None)


def _has_splash(folder: Path) -> bool:
    texts = [
        path.read_text(encoding="utf-8")
        for path in folder.rglob("*train_step*before_optimizations.txt")
    ]
    return all(
        any(f"splash_mha_{kernel}" in text for text in texts) for kernel in ("fwd", "dq", "dkv")
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, help="JSON lines, added to")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rows", default="32768,131072,1048576")
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("--context", type=int, help="instead of the size that suits the row length")
    parser.add_argument("--timeout", type=float, default=600.0)
    args = parser.parse_args()
    keys = ("model", "tokens", "topology", "context")
    old = (
        [json.loads(line) for line in args.out.read_text().splitlines()]
        if args.out.is_file()
        else []
    )
    known = {tuple(row[key] for key in keys) for row in old if row["total"] is not None}
    for topology in args.topologies.split(","):
        for tokens in map(int, args.rows.split(",")):
            context = args.context or context_size(topology, tokens)
            for model in args.models.split(","):
                if (model, tokens, topology, context) in known:
                    continue
                row = measure(model, tokens, topology, context, args.timeout)
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                size = f"{row['total'] / GB:.1f} GB" if row["total"] else "failed"
                where = f"{topology:10} {row['fsdp']} x {context}"
                print(
                    f"{model:4} {tokens:8} {where}: {size} ({row['how']}, {row['seconds']} s)",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
