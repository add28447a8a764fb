"""Where the device time of a training step goes, kernel by kernel: what each step takes more than
the one named before it.

    python benchmarks/step_kernels.py                    # books: six layers less "none"
    python benchmarks/step_kernels.py --steps none,6,6+fused --rows 40 --out FOLDER

Steps are named as in `step_parts.py`, on the same packed rows. Each is compiled without command
buffers, which hide what a kernel belongs to, and runs under `jax.profiler`. Kernels are added up by
the operation that they were compiled from; loops, calls and numbers are left out of its name, so
that operations of different programs meet. Tables have the largest differences in ms a step, and
the last one what the project's own kernels take a launch. With --out all operations of each step go
to FOLDER/STEP.tsv: ms a step, launches, ms a launch, operation, one of its kernels.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import itertools
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import jax
from jax.profiler import ProfileData
from step_parts import ROOT, Timed, compiled, step_programs, taken

from ttt_jax.pretrained.start_config import load_start_config

NO_COMMAND_BUFFERS = {"xla_gpu_enable_command_buffer": ""}
# Parts of an operation's name that say how it is run, not what it is.
STRUCTURE = re.compile(
    r"jit\(\w*\)|while|body|cond|closed_call|checkpoint|rematted_computation|custom_vjp_call\w*|"
    r"custom_jvp_call\w*|core_call|remat\d*|pjit|jvp\(\)|transpose\(jvp\(\)\)|branch_\d+_fun"
)
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name=\"([^\"]*)\"", re.MULTILINE)


def operations(text: str) -> dict[str, str]:
    """The operation of every instruction of a compiled program."""
    return dict(INSTRUCTION.findall(text))


def short(operation: str) -> str:
    """An operation's name without what depends on the loops around it."""
    backward = "transpose(" in operation
    again = "rematted_computation" in operation
    parts = [x for x in operation.split("/") if x and not STRUCTURE.fullmatch(x)]
    return ("bwd " if backward else "again " if again else "fwd ") + "/".join(parts)


def kernels(timed: Timed, steps: int):
    """(name, instruction, ms) of every kernel of `steps` runs, and the runs' ms."""
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        start = time.perf_counter()
        for _ in range(steps):
            result = timed.run()
        jax.block_until_ready(result)
        wall = (time.perf_counter() - start) * 1e3
        jax.profiler.stop_trace()
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = list(ProfileData.from_file(str(file)).planes)
    found = []
    for plane in planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                found.append((event.name, str(stats.get("hlo_op", "")), event.duration_ns / 1e6))
    if not found:
        lines = [f"{plane.name}: {[line.name for line in plane.lines]}" for plane in planes]
        raise SystemExit("no kernels in the profile, whose planes are\n" + "\n".join(lines))
    return found, wall


def added_up(found, names: dict[str, str], repeats: int) -> dict[str, list]:
    """By operation: ms a step, launches a step, and the name of a kernel."""
    sums: dict[str, list] = collections.defaultdict(lambda: [0.0, 0.0, ""])
    for kernel, instruction, ms in found:
        operation = short(names[instruction]) if instruction in names else f"? {kernel}"
        sums[operation][0] += ms / repeats
        sums[operation][1] += 1 / repeats
        sums[operation][2] = kernel
    return sums


def table(title: str, first: dict[str, list], second: dict[str, list], rows: int) -> None:
    """Print the largest differences between the second and the first, and the most negative."""
    zero = [0.0, 0, ""]
    difference = {
        key: second.get(key, zero)[0] - first.get(key, zero)[0] for key in {*first, *second}
    }
    print(f"\n{title}\n    more ms   first  second  kernels", flush=True)
    order = sorted(difference, key=difference.__getitem__, reverse=True)
    for key in order[:rows] + order[rows:][-rows // 4 :]:
        before, (after, count, kernel) = first.get(key, zero), second.get(key, zero)
        print(
            f"{difference[key]:11.3f} {before[0]:7.2f} {after:7.2f} {count:8.1f}  "
            f"{key[-90:]}  {kernel[:40]}"
        )


def own_kernels(title: str, sums: dict[str, list]) -> None:
    """Print what a launch of each of the project's kernels takes."""
    print(f"\n{title}\n    ms a launch  launches  kernels", flush=True)
    for key, (ms, count, kernel) in sums.items():
        if kernel.startswith("ttt_"):
            print(f"{ms / count:15.3f} {count:9.1f}  {key[-90:]}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="books", help="name of a file in configs/")
    parser.add_argument("--steps", default="none,6", help="two or more; see step_parts.py")
    parser.add_argument("--rows", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for all operations")
    args, overrides = parser.parse_known_args(argv)
    config = load_start_config(
        ROOT / "configs" / f"{args.preset}.yaml", ["--optimizer.accumulate=1", *overrides]
    )
    pool, waiting = concurrent.futures.ThreadPoolExecutor(8), []
    options = NO_COMMAND_BUFFERS if jax.default_backend() == "gpu" else {}
    for name, variant, function, arguments in step_programs(config, args.steps.split(","), pool):
        with taken(variant):
            lowered = function.lower(arguments[2], arguments[1])
        first = waiting[0][2] if waiting else None
        waiting.append((name, arguments, pool.submit(compiled, lowered, first, options)))
    steps = []
    for name, arguments, future in waiting:
        program, _ = future.result()
        timed = Timed(name, program, arguments)
        timed.warm_up()
        found, wall = kernels(timed, args.repeats)
        sums = added_up(found, operations(program.as_text()), args.repeats)
        steps.append((name, sums))
        busy = sum(ms for ms, *_ in sums.values())
        print(f"{name}: {wall / args.repeats:.1f} ms a step, kernels {busy:.1f} ms", flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            rows = sorted(sums.items(), key=lambda item: -item[1][0])
            text = [
                f"{ms:.3f}\t{n:.1f}\t{ms / n:.4f}\t{k}\t{kernel}" for k, (ms, n, kernel) in rows
            ]
            (args.out / f"{name.replace(' ', '_')}.tsv").write_text("\n".join(text) + "\n")
    for (before, first), (name, second) in itertools.pairwise(steps):
        table(f"{name} less {before}", first, second, args.rows)
    for name, sums in steps:
        own_kernels(name, sums)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
