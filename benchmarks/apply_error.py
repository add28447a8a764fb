"""What `model.ttt.apply: fused` costs in precision: errors in bfloat16 by the size of S beside W.

    python benchmarks/apply_error.py                  # a minute on CPUs; on a GPU, its kernel
    python benchmarks/apply_error.py --shape 512x1024 --implementation pallas_gpu

Relative RMS errors against the op in float64 on the same rounded inputs: of the output o, of the
adaptation term o - z W^T (with z and W such that z W^T is zero, or the rounding of o would hide
it), of dz, and of dW. The backward is the same program in both: it rounds W + S anyway.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.ops import in_place_ttt

RATIOS = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)


def inputs(D: int, F: int, C: int, ratio: float, cancel: bool):
    """z, v, W, S_0 and do: two rows of four chunks, each of which adds a fifth of S_0's norm."""
    rng = np.random.default_rng(0)
    z, v, do = (rng.standard_normal((2, 4 * C, X)) for X in (F, D, D))
    w, state = rng.standard_normal((D, F)) / np.sqrt(F), rng.standard_normal((2, D, F))
    if cancel:
        z[:, :, F // 2 :], w[:, F // 2 :] = z[:, :, : F // 2], -w[:, : F // 2]
    state *= ratio * np.linalg.norm(w) / np.linalg.norm(state[0])
    v *= 0.2 * np.linalg.norm(state[0]) / np.linalg.norm(v[0, :C].T @ z[0, :C])
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (z, v, w, do)]
    return *rounded[:3], np.asarray(state, np.float32).astype(np.float64), rounded[3]


def run(C: int, dtype, arrays, **options):
    """o, dz and dW in float64."""
    *arrays, state, do = arrays
    acc = jnp.float64 if dtype == jnp.float64 else jnp.float32
    z, v, w, do = (jnp.asarray(x, dtype) for x in (*arrays, do))
    op = functools.partial(
        in_place_ttt, lr=1.0, chunk_size=C, state=jnp.asarray(state, acc), **options
    )

    @jax.jit
    def both(z, w, do):
        o, pull = jax.vjp(lambda z, w: op(z, v, w)[0], z, w)
        return o, *pull(do)

    return [np.asarray(x, np.float64) for x in both(z, w, do)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="256x512", help="DxF")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--implementation", help="default: what the op takes here")
    args = parser.parse_args()
    D, F = map(int, args.shape.split("x"))
    relative = lambda x, y: np.linalg.norm(x - y) / np.linalg.norm(y)
    columns = ["o split", "o fused", "term split", "term fused", "dz", "dW"]
    print("  ||S||/||W||" + "".join(f"{name:>12}" for name in columns))
    for ratio in RATIOS:
        row = {}
        for cancel in (False, True):
            arrays = inputs(D, F, args.chunk, ratio, cancel)
            with jax.enable_x64(True):
                exact = run(args.chunk, jnp.float64, arrays, implementation="reference")
            for apply in ("split", "fused"):
                options = {"apply": apply, "implementation": args.implementation}
                got = run(args.chunk, jnp.bfloat16, arrays, **options)
                errors = list(map(relative, got, exact))
                row[f"{'term' if cancel else 'o'} {apply}"] = errors[0]
                if not cancel:
                    row |= {"dz": errors[1], "dW": errors[2]}
        print(f"{ratio:13.0e}" + "".join(f"{row[name]:12.1e}" for name in columns), flush=True)


if __name__ == "__main__":
    main()
