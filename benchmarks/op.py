"""The op alone: `in_place_ttt` forward and backward, every implementation that runs here, beside
its bound.

    # 4B shapes, C = 1024, 32k tokens
    python benchmarks/op.py
    python benchmarks/op.py --shapes 0.6b,4b --chunks 512,1024 --tokens 8192,131072 \\
        --batch 1,8 --json runs/op.jsonl
    # shape:C:B:T instead of all combinations
    python benchmarks/op.py --cases 4b:1024:1:32768,1.7b:1024:4:8192

All programs of all cases are compiled first, side by side: that takes most of the time, and would
disturb a timing. The program that is timed is checked first, on the inputs that it is timed with:
o, the final state and all gradients against the float32 reference (or, where its memory grows too
large, against `xla` in float32). One that is off by more than 5e-3 relative RMS is not timed, and
the exit code is 1. The bound is 4TDF FLOPs forward and 10TDF backward at the rate of a large bf16
matmul in the same process. `down` is the plain down-projection of the same tokens.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

SHAPES = {
    "0.6b": (1024, 3072),
    "1.7b": (2048, 6144),
    "4b": (2560, 9728),
    "8b": (4096, 12288),
    "14b": (5120, 17408),
}
TOLERANCE = 5e-3
COLUMNS = "implementation forward_ms forward_ratio both_ms both_ratio TFLOP/s GB/s temp_GiB".split()  # noqa: SIM905


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = lambda kind: lambda text: [kind(word) for word in text.split(",")]
    parser.add_argument(
        "--shapes", type=words(str), default=["4b"], help=f"of {', '.join(SHAPES)}, or DxF"
    )
    parser.add_argument("--chunks", type=words(int), default=[1024])
    parser.add_argument("--tokens", type=words(int), default=[32768])
    parser.add_argument("--batch", type=words(int), default=[1])
    parser.add_argument(
        "--cases", type=words(str), help="SHAPE:C:B:T,... instead of the four options above"
    )
    parser.add_argument(
        "--implementations", type=words(str), help="default: all that run here, and None's choice"
    )
    parser.add_argument(
        "--blocks",
        type=words(int),
        help="chunks of a block to compare; default: what the op chooses",
    )
    parser.add_argument(
        "--documents",
        action="store_true",
        help="with segment_ids: a document starts every fourth chunk",
    )
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="append one line per measurement")
    return measure(parser.parse_args(argv))


def measure(args) -> int:
    import jax

    if args.cases:
        named = [
            (shape, int(B), int(T), int(C))
            for shape, C, B, T in (case.split(":") for case in args.cases)
        ]
    else:
        named = [
            (s, B, T, C)
            for s in args.shapes
            for C in args.chunks
            for B in args.batch
            for T in args.tokens
        ]
    work, pool, start = [], concurrent.futures.ThreadPoolExecutor(), time.perf_counter()
    for shape, B, T, C in named:
        D, F = SHAPES[shape] if shape in SHAPES else map(int, shape.split("x"))
        case = Case(B, T, D, F, C, args.documents)
        names = args.implementations or runnable(B, T, D, F, C)
        names = (
            [in_blocks(name, n) for name in names for n in args.blocks] if args.blocks else names
        )
        programs = {
            name: pool.submit(compile_op, name, case, args.forward_only)
            for name in ("down", "exact", *names)
        }
        work.append((shape, case, programs))
    concurrent.futures.wait([program for *_, programs in work for program in programs.values()])
    print(
        f"compiled {sum(len(programs) for *_, programs in work)} variants in "
        f"{time.perf_counter() - start:.0f} s",
        flush=True,
    )
    matmul, copy, wrong = matmul_rate(), copy_rate(), 0
    machine = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    machine |= {"matmul_TFLOPs": matmul / 1e12, "copy_GBs": copy / 1e9}
    print(machine, flush=True)
    for shape, case, programs in work:
        common = machine | {"shape": shape, **case._asdict()}
        heading(common, matmul)
        exact = programs.pop("exact").result()
        for name, program in programs.items():
            errors = check(case, program.result(), exact) if name != "down" else {"o": 0.0}
            if max(errors.values()) <= TOLERANCE:
                row = (
                    common
                    | op(name, case, program.result(), args)
                    | {"error": max(errors.values())}
                )
                report(beside_the_bound(row, matmul), args.json)
            else:
                wrong += 1
                print(f"NOT TIMED, wrong result: {name}: {errors}", flush=True)
    return 1 if wrong else 0


class Case(NamedTuple):
    """What is computed. With documents, one starts every fourth chunk."""

    B: int
    T: int
    D: int
    F: int
    C: int
    documents: bool

    def segment_ids(self):
        import jax.numpy as jnp

        if not self.documents:
            return None
        return jnp.broadcast_to(jnp.arange(self.T) // (4 * self.C) + 1, (self.B, self.T)).astype(
            jnp.int32
        )


def beside_the_bound(row: dict, matmul: float) -> dict:
    D, F, tokens = row["D"], row["F"], row["B"] * row["T"]
    row["bound_forward_ms"], row["bound_both_ms"] = (
        n * tokens * D * F / matmul * 1e3 for n in (4, 14)
    )
    row["forward_ratio"] = row["forward_ms"] / row["bound_forward_ms"]
    if "both_ms" in row:
        row["both_ratio"] = row["both_ms"] / row["bound_both_ms"]
    # W and S are applied by two, which the bound does not count
    products = 1 if row["implementation"] == "down" else 2
    row["TFLOP/s"] = products * 2 * tokens * D * F / row["forward_ms"] / 1e9
    row["GB/s"] = least_bytes(row["B"], row["T"], D, F) / row["forward_ms"] / 1e6
    return row


def runnable(B, T, D, F, C) -> list[str]:
    """All implementations that can run here but the reference, which is for checking."""
    import jax
    import jax.numpy as jnp

    from ttt_jax.errors import UserError
    from ttt_jax.ops import IMPLEMENTATIONS, in_place_ttt

    names = []
    for name in IMPLEMENTATIONS:
        if name == "reference":
            continue
        shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((B, T, F), (B, T, D), (D, F))]
        try:
            jax.eval_shape(
                lambda *a, n=name: in_place_ttt(*a, lr=1.0, chunk_size=C, implementation=n), *shapes
            )
        except UserError as error:
            print(error, flush=True)
        else:
            names.append(name)
    return names


@functools.lru_cache(maxsize=1)
def inputs(B, T, D, F, seed=0):
    """Random z, v, w, state, and cotangents of o and S, at magnitudes where every term counts."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def make():
        keys = jax.random.split(jax.random.key(seed), 6)
        z, v = (
            jax.random.normal(keys[0], (B, T, F), jnp.bfloat16),
            jax.random.normal(keys[1], (B, T, D), jnp.bfloat16),
        )
        w = (jax.random.normal(keys[2], (D, F), jnp.float32) * F**-0.5).astype(jnp.bfloat16)
        state = jax.random.normal(keys[3], (B, D, F), jnp.float32) * 0.3 * F**-0.5
        do, dS = (
            jax.random.normal(keys[4], (B, T, D), jnp.bfloat16),
            jax.random.normal(keys[5], (B, D, F), jnp.float32),
        )
        return z, v, w, state, do, dS

    return make()


def in_blocks(name: str, n: int) -> str:
    """Registers the implementation in blocks of n chunks; returns its name, such as `xla x4`."""
    # the package has a function of this name
    module: Any = importlib.import_module("ttt_jax.ops.ttt.api")
    module._FAST[f"{name} x{n}"] = module._FAST[name]._replace(block=lambda call: n)
    module.IMPLEMENTATIONS = (*module.IMPLEMENTATIONS, f"{name} x{n}")
    return f"{name} x{n}"


def functions(name: str, case: Case):
    """Forward; and forward + backward, of (z, v, w, state, do, dS)."""
    import jax
    import jax.numpy as jnp

    from ttt_jax.ops import in_place_ttt

    def run(z, v, w, state, lr):
        options = {"segment_ids": case.segment_ids(), "implementation": name}
        return in_place_ttt(z, v, w, lr=lr, chunk_size=case.C, state=state, **options)

    def forward(z, v, w, state, *_):
        return run(z, v, w, state, jnp.float32(inner_lr(case)))

    def both(z, v, w, state, do, dS):
        out, vjp = jax.vjp(run, z, v, w, state, jnp.float32(inner_lr(case)))
        return out, vjp((do.astype(out[0].dtype), dS))

    return forward, both


def inner_lr(case: Case) -> float:
    """One that gives an update a third of W's norm."""
    return 0.3 * case.F**-0.5 / case.C**0.5


def compile_op(name: str, case: Case, forward_only: bool) -> list:
    """The programs that are timed: forward, and forward + backward. "down" is the plain
    down-projection; "exact" is the reference in float32, forward + backward.
    """
    import jax

    arrays = jax.eval_shape(lambda: inputs.__wrapped__(*case[:4]))
    made = down() if name == "down" else functions(name, case)
    if name == "exact":
        # the reference's backward holds one for every chunk
        states = 4 * case.B * case.D * case.F * (case.T // case.C)
        made = functions("reference" if states < 2**34 else "xla", case)[1:]
        arrays = [jax.ShapeDtypeStruct(x.shape, "float32") for x in arrays]
    return [
        jax.jit(function).lower(*arrays).compile() for function in made[: 1 if forward_only else 2]
    ]


@functools.lru_cache(maxsize=1)
def exact_results(case: Case, program):
    """What forward + backward give in float32."""
    return program(*(x.astype("float32") for x in inputs(*case[:4])))


def check(case: Case, compiled: list, exact_program: list) -> dict[str, float]:
    """Relative RMS errors of what the compiled programs give."""
    import jax
    import jax.numpy as jnp

    arrays, exact = inputs(*case[:4]), exact_results(case, exact_program[0])
    error = jax.jit(
        lambda a, b: (
            jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.linalg.norm(b.ravel())
        )
    )
    names = ("o", "S", "dz", "dv", "dw", "dstate", "dlr")
    found = {
        n: float(error(a, b))
        for n, a, b in zip(names, compiled[0](*arrays), exact[0], strict=False)
    }
    if len(compiled) > 1:
        got = compiled[1](*arrays)
        both = zip(names, jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)
        found = {n: max(float(error(a, b)), found.get(n, 0)) for n, a, b in both}
        # The gradient of lr is an inner product, <v, dv> / lr, which may cancel: its error counts
        # beside what it sums.
        sizes = [
            float(jnp.linalg.norm(x.astype(jnp.float32).ravel())) for x in (arrays[1], exact[1][1])
        ]
        scale = max(sizes[0] * sizes[1] / inner_lr(case), abs(float(exact[1][4])))
        found["dlr"] = abs(float(got[1][4]) - float(exact[1][4])) / scale
    # max() of errors must not lose a NaN
    return {n: e if e == e else float("inf") for n, e in found.items()}


def op(name: str, case: Case, compiled: list, args) -> dict:
    arrays = inputs(*case[:4])
    row: dict = {
        "implementation": name,
        "forward_ms": milliseconds(compiled[0], arrays, args.repeats),
    }
    if len(compiled) > 1:
        row["both_ms"] = milliseconds(compiled[1], arrays, args.repeats)
    row["temp_GiB"] = compiled[-1].memory_analysis().temp_size_in_bytes / 2**30
    return row


def down():
    """The plain down-projection's forward; and forward + backward."""
    import jax

    forward = lambda z, w: z @ w.T

    def both(z, v, w, state, do, dS):
        out, vjp = jax.vjp(forward, z, w)
        return out, vjp(do)

    return lambda z, v, w, *_: forward(z, w), both


def least_bytes(B, T, D, F) -> int:
    """Of a forward: z, v and o once, W and both ends of S once."""
    return 2 * B * T * (F + 2 * D) + 2 * D * F + 8 * B * D * F


def milliseconds(function, arrays, repeats) -> float:
    """Median over `repeats` of the mean of a batch of calls long enough to hide the host."""
    import jax

    jax.block_until_ready(function(*arrays))
    start = time.perf_counter()
    jax.block_until_ready(function(*arrays))
    once = time.perf_counter() - start
    calls = max(1, min(20, int(0.1 / once)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*arrays)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return sorted(times)[len(times) // 2] * 1e3


def matmul_rate(n: int = 8192) -> float:
    import jax
    import jax.numpy as jnp

    x, y = (jax.random.normal(jax.random.key(k), (n, n), jnp.bfloat16) for k in range(2))
    return 2 * n**3 / milliseconds(jax.jit(lambda x, y: x @ y), (x, y), 5) * 1e3


def copy_rate() -> float:
    import jax
    import jax.numpy as jnp

    x = jnp.ones(2**29, jnp.float32)
    return 2 * x.nbytes / milliseconds(jax.jit(lambda x: x + 1), (x,), 5) * 1e3


def heading(case: dict, matmul: float) -> None:
    forward, both = (
        n * case["B"] * case["T"] * case["D"] * case["F"] / matmul * 1e3 for n in (4, 14)
    )
    print(
        f"\n{case['shape']} D={case['D']} F={case['F']} C={case['C']} B={case['B']} T={case['T']}"
        f"{' documents' if case['documents'] else ''}: bound {forward:.2f} + "
        f"{both - forward:.2f} ms"
    )
    print("  ".join(f"{name:>14}" for name in COLUMNS), flush=True)


def report(row: dict, path: Path | None) -> None:
    cells = [row.get(name, "") for name in COLUMNS]
    print(
        "  ".join(f"{cell:14.3f}" if isinstance(cell, float) else f"{cell:>14}" for cell in cells),
        flush=True,
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main(sys.argv[1:]))
