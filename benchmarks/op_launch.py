"""The Hopper kernel with other launches: stages of the ring, buffers of results, sequences that go
together, all interleaved.

    python benchmarks/op_launch.py 768x2048:512:8:16384:0.9 4,1 4,1,2,6 3,3,2,6

A launch is stages, buffers, sequences together (0: all) and latency of the schedule. Results are
compared with the first launch's before they are timed; packed rows of two documents.
"""

from __future__ import annotations

import concurrent.futures
import functools
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import jax
from step_parts import TOLERANCE, Op, Timed, matmul, relative, taken

from ttt_jax.kernels_pallas import gpu


def launches(text: str) -> Any:
    stages, buffers, together, latency = ([int(x) for x in text.split(",")] + [0, 0])[:4]
    return functools.partial(
        MOSAIC, stages=stages, buffers=buffers, together=together or 1 << 30, latency=latency
    )


MOSAIC: Any = gpu.MosaicLaunches


def main(argv: list[str]) -> int:
    begun, (shape, *variants) = time.perf_counter(), argv
    sizes = shape.replace("x", ":").split(":")
    op = Op(*map(int, sizes[:5]), *map(float, sizes[5:]))
    pool, waiting = concurrent.futures.ThreadPoolExecutor(12), []
    for text in variants:
        for apply in ("split", "fused"):
            for name, function in (("both", op.both), ("forward", op.forward)):
                gpu.MosaicLaunches = launches(text)
                run = functools.partial(function, apply, op.ids)
                arrays = op.arrays if name == "forward" else (op.do, *op.arrays)
                with taken("pallas_gpu:1"):
                    lowered = jax.jit(run).lower(*arrays)
                future = pool.submit(lowered.compile)
                waiting.append((f"{text:12} {apply} {name}", arrays, future))
    programs, expected = [], {}
    for name, arrays, future in waiting:
        try:
            timed = Timed(name, future.result(), arrays)
        except Exception as error:  # a launch may need more shared memory than there is
            print(f"{name}: {str(error).splitlines()[0][:150]}")
            continue
        result, key = timed.warm_up(), name[13:]
        error = relative(result, expected.setdefault(key, result))
        if error > TOLERANCE:
            print(f"NOT TIMED, off by {error:.1e}: {name}", flush=True)
            continue
        programs.append(timed)
    del expected
    multiplied, flops = matmul()
    print(f"compiled after {time.perf_counter() - begun:.0f} s", flush=True)
    for _ in range(7):
        for timed in (multiplied, *programs):
            timed.round()
    rate = flops / multiplied.median * 1e3
    print(f"{op.name}, packed; matmul {rate / 1e12:.0f} TFLOP/s")
    for timed in programs:
        bound = (4 if timed.name.endswith("forward") else 14) * op.work / rate * 1e3
        print(f"{timed.median:9.3f} ms {timed.median / bound:6.2f}x  {timed.name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
