"""What XLA makes of a training step or a prefill on H100s, without one: memory, compile time, and
traffic outside of matmuls.

    python benchmarks/gpu_traffic.py --preset qwen3_1p7b --chunk 1024 --seq 8192 \\
        --batch 4 [--only on] [--rows 20]
    python benchmarks/gpu_traffic.py --preset qwen3_4b_longct_128k --chunk 1024 --prefill 8192 \\
        --model.ttt.implementation=xla
    python benchmarks/gpu_traffic.py --preset qwen3_4b_longct_32k --chunk 1024 --seq 32768 \\
        --batch 8 --devices 8
    python benchmarks/gpu_traffic.py --preset books --seq 16384 --batch 8 --packed

Compiles ahead of time for a description of the GPU, on any machine that has the libraries (`pip
install 'jax[cuda13]'`). "Passes" are all kernels but matmuls and attention: elementwise work,
reductions, copies. Their bytes are read from the compiled program: every array a kernel reads and
writes once, of a slice only the slice, times the rounds of the loops around it. What a matmul or a
Pallas kernel moves is not counted. Matmuls are left to cuBLAS and nothing is tuned, because there
is nothing to time. Needs neither grain nor the command line.
"""

from __future__ import annotations

import argparse
import collections
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.train_step import room_for
from ttt_jax import config as config_lib
from ttt_jax import jax_internals
from ttt_jax.inference import prefill as reading
from ttt_jax.model.stack import Runtime
from ttt_jax.model.transformer import Transformer
from ttt_jax.ops import platform
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.plan import collectives as hlo
from ttt_jax.plan.collectives import nbytes
from ttt_jax.pretrained.start_config import load_start_config
from ttt_jax.training.step import abstract_state, make_train_step
from ttt_jax.training.step_memory import keep_what_fits

ROOT = Path(__file__).resolve().parents[1]
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  core_count: 132  fpus_per_core: 128
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536  registers_per_block_limit: 65536  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9  minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# What jax takes of that memory, if nothing else is said.
USABLE_MEMORY = 0.75 * 84929347584
OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
FREE = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "constant",
    "bitcast",
    "iota",
    "after-all",
    "partition-id",
}


def devices(count: int) -> list:
    """H100s on paper, also where there are real ones. Makes the code under test, and jax's
    attention, believe in them.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)  # the code under test counts devices
    jax_internals.believe_in_cudnn()
    jax_internals.believe_in_hopper()
    platform.compiled_for = lambda: "gpu"
    if count == 1:
        platform.on_one_device = platform.may_be_one_device = lambda: True
    return list(
        topologies.get_topology_desc(
            platform="cuda", target_config=H100, topology=f"1x1x{count}"
        ).devices
    )


def train_step(config: config_lib.Config, found: list, packed: bool):
    """The traced step, as `benchmarks/train_step.py` times it, or with documents."""
    mesh = make_mesh(config.mesh, found)
    config, said = keep_what_fits(config, mesh, USABLE_MEMORY)
    for line in said:
        print(line, flush=True)
    state, tx = abstract_state(config, mesh)
    shape = config.data.batch_size, config.data.seq_len
    rows = NamedSharding(mesh, P(("data", "fsdp"), "context"))
    kinds = {"ids": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    if packed:
        kinds |= {"segment_ids": jnp.int32, "positions": jnp.int32}
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in kinds.items()
    }
    return make_train_step(config, tx).trace(state, batch)


def prefill(config: config_lib.Config, found: list, tokens: int, ttt: bool):
    """The traced first piece of a prompt, as `benchmarks/generate.py` times it."""
    whole = NamedSharding(Mesh(np.array(found[:1]), ("device",)), P())
    struct = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
    runtime = Runtime(dtype="bfloat16", remat_save=None, scan_layers=False)
    model = jax.eval_shape(lambda: Transformer(config.model, runtime, key=jax.random.key(0)))
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: struct(x.shape, jnp.bfloat16), model))
    read_piece = reading.read_piece.__wrapped__

    def piece(leaves, *arrays):
        return read_piece(
            jax.tree.unflatten(tree, leaves),
            None,
            *arrays,
            capacity=tokens,
            at_chunk_start=True,
            ttt=ttt,
        )

    logits = struct((1, config.model.vocab_size), jnp.float32)
    return jax.jit(piece).trace(
        leaves, logits, struct((1, tokens), jnp.int32), struct((1,), jnp.int32)
    )


# ------------------------------------------------------------------------------ reading the program


class Instruction:
    """One line of a computation: its result's type, what it is, the names it reads, and the
    line.
    """

    PATTERN = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")

    def __init__(self, line: str, match: re.Match) -> None:
        self.line, self.root = line, line.startswith("ROOT")
        self.name, self.type, self.op, rest = match.groups()
        self.reads = re.findall(r"%([\w.\-]+)", rest.partition("), ")[0])
        self.number = int(rest.partition(")")[0]) if self.op == "parameter" else -1

    def called(self, key: str) -> str | None:
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.line)
        return found and found[1]


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Computations by name, their instructions by name; and the entry's name."""
    found, entry = hlo.computations(text)
    matches = {
        name: [(line.strip(), Instruction.PATTERN.match(line.strip())) for line in lines]
        for name, lines in found.items()
    }
    return {
        name: {m[1]: Instruction(line, m) for line, m in pairs if m}
        for name, pairs in matches.items()
    }, entry or ""


def fusion_bytes(inner: dict[str, Instruction]) -> int:
    """What a fused kernel reads and writes: of slices only the slice, of an update in place only
    the update.
    """
    total = sum(nbytes(i.type) for i in inner.values() if i.root)
    updated = set()
    for i in inner.values():
        if i.op == "dynamic-update-slice":
            total += nbytes(inner[i.reads[1]].type) - nbytes(i.type)
            place = i.reads[0]
            while inner[place].op in ("bitcast", "convert", "copy"):
                place = inner[place].reads[0]
            updated.add(place)
    for parameter in (i for i in inner.values() if i.op == "parameter" and i.name not in updated):
        users = [i for i in inner.values() if parameter.name in i.reads]
        through = [
            j for i in users if i.op == "bitcast" for j in inner.values() if i.name in j.reads
        ]
        last = [i for i in users if i.op != "bitcast"] + through
        sliced = last and all(i.op in ("dynamic-slice", "slice", "gather") for i in last)
        size = nbytes(parameter.type)
        total += min(size, sum(nbytes(i.type) for i in last)) if sliced else size
    return max(total, 0)


def traffic(text: str) -> list[tuple[int, int, str, str, str]]:
    """(bytes, rounds, loops around, result, operation) of every pass, the largest first."""
    computations, entry = parse(text)
    found = []

    def walk(name: str, times: int, path: str) -> None:
        here = computations[name]
        for i in here.values():
            if i.op == "while":
                condition = [j.line for j in computations[i.called("condition")].values()]
                rounds = hlo.trips(i.line, condition) or 1
                walk(i.called("body"), times * rounds, f"{path}/{rounds}")
            elif i.op == "call":
                walk(i.called("to_apply"), times, path)
            elif i.op == "conditional":
                branches = re.search(r"branch_computations=\{%?([\w.\-]+)", i.line)
                walk(branches[1] if branches else i.called("true_computation"), times, path)
            elif i.op in FREE or i.op.endswith("-done") or i.op == "custom-call":
                continue
            else:
                kernel = i
                if i.op == "fusion-start":
                    kernel = next(j for j in computations[i.called("calls")].values() if j.root)
                    kernel = kernel if kernel.op == "fusion" else i
                if kernel.op.startswith("fusion"):
                    inner = computations[kernel.called("calls")]
                    if (
                        any(j.op == "custom-call" for j in inner.values())
                        or "__triton" in kernel.line
                    ):
                        continue  # a matmul with its slices
                    size = fusion_bytes(inner)
                elif i.op in ("dynamic-slice", "slice"):
                    size = 2 * nbytes(i.type)
                elif i.op == "dynamic-update-slice":
                    size = 2 * nbytes(here[i.reads[1]].type)
                else:
                    size = nbytes(i.type) + sum(
                        nbytes(here[name].type) for name in i.reads if name in here
                    )
                operation = re.search(r'op_name="([^"]*)"', i.line)
                found.append(
                    (size * times, times, path, i.type, operation[1] if operation else i.op)
                )

    walk(entry, 1, "")
    return sorted(found, reverse=True)


def report(name: str, traced, rows: int) -> None:
    start = time.perf_counter()
    lowered = traced.lower(lowering_platforms=("cuda",))
    seconds = time.perf_counter() - start
    compiled = lowered.compile(OPTIONS)
    memory, passes = compiled.memory_analysis(), traffic(compiled.as_text())
    print(
        f"TTT {name}: temporaries {memory.temp_size_in_bytes / 2**30:.2f} GiB, arguments "
        f"{memory.argument_size_in_bytes / 2**30:.2f} GiB; passes "
        f"{sum(row[0] for row in passes) / 1e9:.1f} GB; lowered in "
        f"{seconds:.0f} s, compiled in {time.perf_counter() - start - seconds:.0f} s",
        flush=True,
    )
    by_loop = collections.Counter()
    for size, _, path, *_ in passes:
        by_loop[path or "outside of loops"] += size
    print(
        "  GB by the loops around: "
        + ", ".join(f"{k} {v / 1e9:.1f}" for k, v in by_loop.most_common() if v > 1e8)
    )
    for size, times, path, kind, operation in passes[:rows]:
        kind = re.sub(r"{[^}]*}", "", kind)[:60]
        print(f"  {size / 1e9:7.2f} GB x {times:<4} {path:10} {kind:60} {operation[-70:]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", required=True, help="name of a file in configs/")
    parser.add_argument("--seq", type=int, default=8192, help="tokens per row of a training step")
    parser.add_argument("--batch", type=int, default=1, help="rows of a training step")
    parser.add_argument(
        "--prefill",
        type=int,
        help="the first piece of a prompt of so many tokens instead of a training step",
    )
    parser.add_argument("--chunk", type=int, help="TTT chunk size")
    parser.add_argument("--packed", action="store_true", help="rows of several documents")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--only", choices=["on", "off"], help="TTT on or off alone")
    parser.add_argument("--rows", type=int, default=0, help="list so many of the largest passes")
    args, overrides = parser.parse_known_args()  # dotted config fields
    words = [
        "--data.pack=false",
        "--optimizer.accumulate=1",
        f"--data.seq_len={args.seq}",
        f"--data.batch_size={args.batch}",
    ]
    path = ROOT / "configs" / f"{args.preset}.yaml"
    words += [*room_for(path, max(args.seq, args.prefill or 0)), *overrides]
    if args.chunk:
        words.append(f"--model.ttt.chunk_size={args.chunk}")
    on = load_start_config(path, words)
    found = devices(args.devices)
    for name in ("off", "on") if args.only is None else (args.only,):
        config = on if name == "on" else config_lib.replace(on, {"model.ttt.layers": []})
        traced = (
            train_step(config, found, args.packed)
            if args.prefill is None
            else prefill(on, found, args.prefill, name == "on")
        )
        report(name, traced, args.rows)


if __name__ == "__main__":
    main()
