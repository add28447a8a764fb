"""What the probe (`log.probe_every`: loss with TTT on and off, live) costs a training run.

    python benchmarks/probe.py                          # the default preset, runs on a CPU
    python benchmarks/probe.py --preset qwen3_1p7b --seq 8192 --batch 4

Steps and probes in turn, seconds of each (median) and CPU seconds of the process, which other jobs
on the machine change less. The share of the time is that of one probe among N steps. Compilation is
left out: the closing evaluation has the same program. Before that it compares what the probe says
with the loss that the evaluation computes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from ttt_jax import config as config_lib
from ttt_jax.parallel.mesh import make_mesh, put_batch
from ttt_jax.pretrained.start_config import load_start_config
from ttt_jax.run.provenance import provenance
from ttt_jax.training.heldout import evaluate_by_position, make_position_nll, make_probe
from ttt_jax.training.step import abstract_state, init_state, make_train_step
from ttt_jax.training.step_memory import settled_remat

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="default")
    parser.add_argument("--seq", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=10, help="each of five steps and one probe")
    parser.add_argument("--json", help="append the result to this file, one object a line")
    args = parser.parse_args()
    changes = {"data.seq_len": args.seq, "data.batch_size": args.batch}
    overrides = [
        word for key, value in changes.items() if value for word in (f"--{key}", str(value))
    ]
    path = ROOT / "configs" / f"{args.preset}.yaml"
    config = config_lib.replace(load_start_config(path, overrides), {"init_from": None})
    result = measure(config, args.rounds)
    show(result)
    if args.json:
        with Path(args.json).open("a") as file:
            file.write(json.dumps({"args": vars(args), **result, **provenance()}) + "\n")


def measure(config: config_lib.Config, rounds: int) -> dict:
    mesh = make_mesh(config.mesh)
    config = settled_remat(config, mesh)
    abstract, tx = abstract_state(config, mesh)
    state, step, nll = (
        init_state(config, abstract, tx),
        make_train_step(config, tx),
        make_position_nll(mesh),
    )
    B, T = config.data.batch_size, config.data.seq_len
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, (B, T + 1)).astype(np.int32)
    ones = np.ones((B, T), np.int32)
    rows = {
        "ids": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": ones.astype(np.float32),
        "segment_ids": ones,
    }
    rows |= {"positions": np.arange(T, dtype=np.int32)[None] * ones}
    batch, probe = put_batch(rows, mesh), make_probe(nll, rows, mesh, B)
    for _ in range(2):
        state = step(state, batch)[0]
    expected = [float(x.mean()) for x in evaluate_by_position(nll, state.model, rows, mesh, B)]
    found = probe(state.model)
    np.testing.assert_allclose([found["probe/ttt_on"], found["probe/ttt_off"]], expected, rtol=1e-6)

    def timed(action: Callable[[], object]) -> tuple[float, float]:
        begin, cpu = time.perf_counter(), time.process_time()
        action()
        return time.perf_counter() - begin, time.process_time() - cpu

    def five_steps() -> None:
        nonlocal state
        for _ in range(5):
            state, metrics = step(state, batch)
        float(metrics["loss"])

    pairs = [(timed(five_steps), timed(lambda: probe(state.model))) for _ in range(rounds)]
    steps, probes = (np.median([pair[i] for pair in pairs], axis=0) for i in (0, 1))
    return {
        "step": (steps / 5).tolist(),
        "probe": probes.tolist(),
        "probe_every": config.log.probe_every,
    }


def show(result: dict) -> None:
    print(f"{jax.devices()[0].device_kind}, {result['probe_every']} = log.probe_every")
    print(
        "| | step | probe | probe / step | share, every 50 | every 100 "
        "|\n|---|---:|---:|---:|---:|---:|"
    )
    for name, step, probe in zip(("wall", "CPU"), result["step"], result["probe"], strict=True):
        shares = " | ".join(f"{probe / (n * step):.2%}" for n in (50, 100))
        print(
            f"| {name} | {step * 1e3:.0f} ms | {probe * 1e3:.0f} ms | {probe / step:.2f} | "
            f"{shares} |"
        )


if __name__ == "__main__":
    main()
