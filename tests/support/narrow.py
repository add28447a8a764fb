"""Presets made narrow enough for a CPU, and ||S||/||W|| over their first steps."""

from __future__ import annotations

import lzma
import math
from pathlib import Path

import jax
import numpy as np

from ttt_jax.config import Config, load_config, replace
from ttt_jax.parallel.mesh import make_mesh, put_batch
from ttt_jax.training.step import abstract_state, init_state, make_train_step

# Code of this project on 2026-11-30, the same with every version of it and of Python.
TEXT = Path(__file__).resolve().parents[1] / "golden" / "code.txt.xz"


def narrow(preset: str, width: int, chunk: int, *words: str) -> Config:
    """The preset with everything that makes it large cut, and what decides ||S||/||W|| kept.

    Widths are cut in proportion. `init_std` and the outer rate grow with the root of the cut, so
    that projections keep their scale and steps their relative size. Chunk, window and row are cut
    in proportion, so that the number of chunks stays. Layers, write, decay and the inner rate's
    rule stay. One row of bytes a step, and a warm-up of ten steps, so that few steps show what
    happens.
    """
    config = load_config(preset)
    model, C = config.model, config.model.ttt.chunk_size
    root = math.sqrt(model.d_model / width)
    T = config.data.seq_len * chunk // C
    fields = {
        "model.vocab_size": 257,
        "model.d_model": width,
        "model.d_ff": model.d_ff * width // model.d_model,
        "model.num_heads": 2,
        "model.num_kv_heads": 2,
        "model.head_dim": width // 2,
        "model.init_std": model.init_std * root,
        "model.sliding_window": max(2, (model.sliding_window or 0) * chunk // C),
        "model.ttt.chunk_size": chunk,
        "model.ttt.lr": "auto",
        "data.seq_len": T,
        "data.batch_size": 1,
        "data.tokenizer": "bytes",
        "optimizer.lr": config.optimizer.lr * root,
        "optimizer.warmup_steps": 10,
        "optimizer.schedule": "constant",
        "optimizer.accumulate": 1,
        "compute_dtype": "float32",
        "remat_save": "[]",
    }
    return load_config(preset, [f"--{name}={value}" for name, value in fields.items()] + [*words])


def ratios(config: Config, steps: int) -> np.ndarray:
    """||S||/||W|| [steps, TTT layers], mean over rows, of the first steps of training on text."""
    config = replace(config, {"steps": 10_000})
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    abstract, tx = abstract_state(config, mesh)
    state, step = init_state(config, abstract, tx), make_train_step(config, tx)
    B, T = config.data.batch_size, config.data.seq_len
    ids = np.frombuffer(lzma.decompress(TEXT.read_bytes()), np.uint8).astype(np.int32)
    rng, found = np.random.default_rng(0), []
    for _ in range(steps):
        rows = np.stack([ids[i : i + T + 1] for i in rng.integers(0, len(ids) - T - 1, B)])
        batch = {
            "ids": rows[:, :-1],
            "targets": rows[:, 1:],
            "weights": np.ones((B, T), np.float32),
        }
        state, metrics = step(state, put_batch(batch, mesh))
        found.append([float(v) for k, v in sorted(metrics.items()) if k.endswith("state_ratio")])
    return np.array(found)
