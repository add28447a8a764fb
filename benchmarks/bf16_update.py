"""How much of a small update survives bfloat16: the adaptation term o - z W^T against a float64
oracle.

    python benchmarks/bf16_update.py

For ||S|| / ||W|| from 1e-6 to 3: relative RMS error of the term, and its cosine with the oracle,
when S is applied by a matmul of its own (what `in_place_ttt` does), when W + S is rounded to one
bfloat16 matrix, and when S is first accumulated in bfloat16 on top of W (the official inference).
Runs anywhere in seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax.numpy as jnp
import numpy as np

from ttt_jax.ops import in_place_ttt


def main() -> None:
    rng = np.random.default_rng(0)
    bf16 = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    T, D, F = 512, 256, 768
    z, w = bf16(rng.standard_normal((T, F))), bf16(rng.standard_normal((D, F)) / np.sqrt(F))
    base = z @ w.T
    print(
        "| norm(S) / norm(W) | two matmuls | cosine | one matrix W + S | cosine | W += delta in "
        "bf16, 16 chunks | cosine |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for ratio in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 3.0):
        deltas = rng.standard_normal((16, D, F))
        S = deltas.sum(0)
        scale = ratio * np.linalg.norm(w) / np.linalg.norm(S)
        S = np.asarray(S * scale, np.float32).astype(np.float64)
        term = z @ S.T
        args = [jnp.asarray(x, jnp.bfloat16) for x in (z[None], np.zeros((1, T, D)))]
        # the op's own adaptation term, before it is added to z W^T
        zero_w = jnp.zeros((D, F), jnp.bfloat16)
        alone, _ = in_place_ttt(
            *args, zero_w, lr=1.0, chunk_size=T + 1, state=jnp.asarray(S[None], jnp.float32)
        )
        running = w
        for delta in deltas * scale:
            running = bf16(running + bf16(delta))
        row = [f"{ratio:g}"]
        for got in (
            np.asarray(alone[0], np.float64),
            z @ bf16(w + S).T - base,
            z @ running.T - base,
        ):
            error = np.linalg.norm(got - term) / np.linalg.norm(term)
            cosine = np.sum(got * term) / max(np.linalg.norm(got) * np.linalg.norm(term), 1e-300)
            row += [f"{error:.1e}", f"{cosine:.3f}"]
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
