"""Inference on the accelerators of one host: equal to one of them, and how fast.

    python benchmarks/inference_mesh.py --preset qwen3_1p7b --prompt 8192 --rows 4 --steps 96

First a small float32 model with a mesh's kernels is compared with one device, token by token; a
difference ends the run. Then random bfloat16 weights of the preset read prompts and write, for
`tensor` = 1, 2, 4, ... as far as devices and KV heads go, each twice: the second time is reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from benchmarks.generate import ROOT, random_model
from ttt_jax import config as config_lib
from ttt_jax.inference.generation import Session, generate
from ttt_jax.inference.memory_reading import on_mesh
from ttt_jax.inference.scoring import score
from ttt_jax.model.transformer import Transformer
from ttt_jax.parallel.inference_mesh import inference_mesh
from ttt_jax.pretrained.start_config import load_start_config


def placed(model: Transformer, **sizes: int) -> Transformer:
    return on_mesh(model, inference_mesh(config_lib.MeshConfig(**({"fsdp": 1} | sizes))))


def check(cfg: config_lib.ModelConfig, tensor: int) -> None:
    """A small model reads and writes on the mesh what it does on one device."""
    small = {"d_model": 256, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64}
    small |= {"d_ff": 1024, "vocab_size": 512, "full_attention_layers": ()}
    small = dataclasses.replace(cfg, **small)
    small = config_lib.replace(small, {"ttt.layers": [0, 2], "ttt.chunk_size": 128})
    one = random_model(small, "float32")
    rows = [np.random.default_rng(0).integers(0, 512, n) for n in (700, 130)]
    want = generate(one, rows, max_new_tokens=140, eos_ids=())
    scores = score(one, rows, piece=256).logprobs_BT
    for sizes in ({"tensor": tensor}, {"fsdp": tensor}):
        model = placed(one, **sizes)
        found = generate(model, rows, max_new_tokens=140, eos_ids=())
        same = [x.token_ids == y.token_ids for x, y in zip(found, want, strict=True)]
        error = float(np.nanmax(np.abs(score(model, rows, piece=256).logprobs_BT - scores)))
        print(f"check {sizes}: ids equal {same}, log-probabilities differ by {error:.1e}")
        if not all(same) or not error < 1e-4:
            raise SystemExit("the mesh and one device differ")


def measure(model: Transformer, prompt: int, rows: int, steps: int) -> tuple[float, float, float]:
    """Tokens a second of reading and of writing, and GiB at most on the fullest device."""
    for _ in range(2):
        session = Session(model, rows)
        ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (rows, prompt))
        session.extend(ids)
        session.generate(steps, eos_ids=())
        timings = session.timings
    read = timings.read_tokens / timings.read_seconds
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.devices()]
    return read, timings.decode_tokens / timings.decode_seconds, max(peaks) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="qwen3_1p7b", help="name of a file in configs/")
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=96)
    args = parser.parse_args()
    cfg = load_start_config(ROOT / "configs" / f"{args.preset}.yaml").model
    devices = len(jax.devices())
    print(f"{devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    if devices > 1:
        check(cfg, 2)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model, tensor = random_model(cfg, dtype), 1
    print("tensor  read tok/s  write tok/s  peak GiB so far")
    while tensor <= devices and cfg.num_kv_heads % tensor == 0:
        share = model if tensor == 1 else placed(model, tensor=tensor)
        read, write, peak = measure(share, args.prompt, args.rows, args.steps)
        print(f"{tensor:6}  {read:10,.0f}  {write:11,.0f}  {peak:8.1f}", flush=True)
        tensor *= 2


if __name__ == "__main__":
    main()
