"""What saving costs a training run: step time with a checkpoint every N steps against none.

    # the default preset, runs on a CPU
    python benchmarks/checkpointing.py
    python benchmarks/checkpointing.py --preset qwen3_1p7b --seq 8192 --batch 4 \\
        --every 100 500 --dir /fast/disk

An asynchronous save costs its blocking part (the copy of the state to the host) and what the
writing thread takes from the step meanwhile (on a CPU: cores). Both are a fixed sum per save, so
the share falls as 1/N: the benchmark measures seconds per save as (mean step with - mean step
without) * N, over blocks of steps with and without saves in turn, and prints the share for each N,
and the smallest N for which it is 2 %. Before that it restores a checkpoint and compares it with
the state bit for bit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import config as config_lib
from ttt_jax.checkpoint.checkpointer import Checkpointer
from ttt_jax.parallel.mesh import make_mesh, put_batch
from ttt_jax.pretrained.start_config import load_start_config
from ttt_jax.run.provenance import provenance
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
    parser.add_argument("--every", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--saves", type=int, default=3, help="saves in each block")
    parser.add_argument("--blocks", type=int, default=3, help="pairs of blocks per N")
    parser.add_argument("--dir", help="where to write; default: a temporary folder")
    parser.add_argument("--json", help="append the result to this file, one object a line")
    args = parser.parse_args()
    changes = {"data.seq_len": args.seq, "data.batch_size": args.batch, "init_from": None}
    path = ROOT / "configs" / f"{args.preset}.yaml"
    overrides = [
        word for key, value in changes.items() if value for word in (f"--{key}", str(value))
    ]
    config = config_lib.replace(load_start_config(path, overrides), {"init_from": None})
    folder = Path(tempfile.mkdtemp(prefix="checkpointing-", dir=args.dir))
    try:
        result = measure(config, args.every, args.saves, args.blocks, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(result)
    if args.json:
        with Path(args.json).open("a") as file:
            file.write(json.dumps({"args": vars(args), **result, **provenance()}) + "\n")


def measure(
    config: config_lib.Config, every: list[int], saves: int, blocks: int, folder: Path
) -> dict:
    mesh = make_mesh(config.mesh)
    config = settled_remat(config, mesh)
    abstract, tx = abstract_state(config, mesh)
    state, step = init_state(config, abstract, tx), make_train_step(config, tx)
    B, T = config.data.batch_size, config.data.seq_len
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, (B, T + 1)).astype(np.int32)
    ones = np.ones((B, T), np.int32)
    rows = {
        "ids": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": ones.astype(np.float32),
        "segment_ids": ones,
    }
    batch = put_batch(rows | {"positions": np.arange(T, dtype=np.int32)[None] * ones}, mesh)
    blocking: list[float] = []
    with Checkpointer(folder, config.checkpoint) as checkpointer:
        done = 0

        def block(steps: int, save_every: int | None) -> float:
            """Mean seconds of a step. A save of the block may last into its end, and is then waited
            for: it counts.
            """
            nonlocal state, done
            jax.block_until_ready(state)
            begin = time.perf_counter()
            for _ in range(steps):
                state, metrics = step(state, batch)
                done += 1
                if save_every and done % save_every == 0:
                    float(metrics["loss"])  # as train.py, which logs the step that it saves
                    before = time.perf_counter()
                    checkpointer.save(
                        done, model=state.model, opt_state=state.opt_state, data_state={"at": done}
                    )
                    blocking.append(time.perf_counter() - before)
            jax.block_until_ready(state)
            checkpointer.wait()
            return (time.perf_counter() - begin) / steps

        block(4, 2)  # compiles, and creates Orbax's threads
        restored = checkpointer.restore(done, model=abstract.model, opt_state=abstract.opt_state)
        for a, b in zip(jax.tree.leaves(restored[:2]), jax.tree.leaves(state[:2]), strict=True):
            assert bool(jnp.array_equal(a, b)), "the checkpoint is not the state"
        del restored
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state[:2]))
        blocking.clear()
        results = []
        for n in every:
            pairs = []
            for _ in range(blocks):
                # the saves of a block are its last steps of each n; numbers may repeat
                done -= done % n
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                pairs.append((block(n * saves, None), block(n * saves, n)))
            without, with_saves = np.median(np.array(pairs), axis=0)
            costs = [(b - a) * n for a, b in pairs]
            result = {"every": n, "without": float(without), "with": float(with_saves)}
            results.append(result | {"share": float(with_saves / without - 1), "per_save": costs})
    return {"bytes": size, "blocking": blocking, "rows": results}


def show(result: dict) -> None:
    print(
        f"{jax.devices()[0].device_kind}, state of {result['bytes'] / 1e6:.1f} MB, restored bit "
        "for bit"
    )
    print(
        "| N | step without | step with a save every N | share | seconds per save (each pair of "
        "blocks) |"
    )
    print("|---:|---:|---:|---:|---|")
    for row in result["rows"]:
        costs = ", ".join(f"{cost:.3f}" for cost in row["per_save"])
        print(
            f"| {row['every']} | {row['without'] * 1e3:.1f} ms | {row['with'] * 1e3:.1f} ms | "
            f"{row['share']:+.1%} | {costs} |"
        )
    cost = float(np.median([cost for row in result["rows"] for cost in row["per_save"]]))
    without = float(np.median([row["without"] for row in result["rows"]]))
    print(
        f"a save blocks the loop for {np.median(result['blocking']) * 1e3:.0f} ms (median) and "
        f"costs {cost:.3f} s in all;"
    )
    print(
        f"2 % or less from N = {int(np.ceil(cost / (0.02 * without)))} steps, one save in "
        f"{cost / 0.02:.0f} s"
    )


if __name__ == "__main__":
    main()
