"""Does reading with a state write on this device? By implementation, decay and length.

    python benchmarks/gpu_write_check.py [RUN]        # a minute on a GPU

On 2026-11-30 a run of configs/books.yaml gained 0.23 from TTT in its own report, and read from its
checkpoint on an H200 its S stayed exactly 0. This tells where: the parameters (norms of the targets'
convolution and projection), the op (||S|| alone), or a model's reading (||S||/||W|| after a piece).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.config.loading import load_config
from ttt_jax.eval.reader import Reader
from ttt_jax.memory.fast_weights import only_fast_weights
from ttt_jax.model.param_path import param_path
from ttt_jax.model.stack import Runtime
from ttt_jax.model.transformer import Transformer, abstract_transformer
from ttt_jax.ops.ttt.api import in_place_ttt
from ttt_jax.pretrained.load import load_model

D, F, C = (768, 2048, 512) if jax.default_backend() == "gpu" else (64, 128, 64)
KERNELS = ("xla", "pallas_gpu") if jax.default_backend() == "gpu" else ("xla",)


def op(implementation: str, chunks: int, decay: float, B: int, donated: bool) -> float:
    """||S|| of the first row of the op alone, from a state of zeros."""
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.standard_normal((B, chunks * C, F)), jnp.bfloat16)
    v = jnp.asarray(rng.standard_normal((B, chunks * C, D)) / C, jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((D, F)), jnp.bfloat16)
    options = {"chunk_size": C, "decay": decay, "implementation": implementation}
    call = lambda S, whole, z, v, w: in_place_ttt(
        z, v, w, lr=1.0, state=S, whole_chunks=whole, **options
    )[1]
    run = jax.jit(call, donate_argnums=(0,) if donated else ())
    S = run(jnp.zeros((B, D, F), jnp.float32), jnp.full((B,), chunks, jnp.int32), z, v, w)
    return float(jnp.linalg.norm(S[0]))


def with_ttt(model: Transformer, **fields) -> Transformer:
    """The same parameters with other TTT settings."""
    cfg = model.config
    cfg = dataclasses.replace(cfg, ttt=dataclasses.replace(cfg.ttt, **fields))
    tree = jax.tree.structure(abstract_transformer(cfg, model.runtime))
    return jax.tree.unflatten(tree, jax.tree.leaves(model))


def largest_ratio(model: Transformer, chunks: int, batch: int) -> float:
    """||S|| / ||W|| after a piece of this many chunks, as `eval` reads."""
    T = chunks * model.config.ttt.chunk_size
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, T), np.int32)
    reader = Reader(model, T)
    state = only_fast_weights(model, None, batch, None)
    state = reader.read(ids, 0, T, state, T, ttt=True)
    reader.watch.check("row")
    assert state is not None
    runs = [x.ttt.S_BDF for group in state.layers for x in group if x.ttt is not None]
    return max(float(jnp.max(jnp.abs(S))) for S in runs)


def norms(model: Transformer) -> None:
    for path, x in jax.tree_util.tree_flatten_with_path(model)[0]:
        if "target" in param_path(path):
            x = jnp.asarray(x, jnp.float32)
            each = jnp.sqrt(jnp.sum(x**2, axis=tuple(range(2, x.ndim)))).reshape(-1)
            print(f"  {param_path(path)} {x.shape}: norms {np.asarray(each)}")


def main() -> None:
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    if len(sys.argv) > 1:
        print("run: target parameters", flush=True)
        norms(load_model(sys.argv[1], "bfloat16"))
    print("op alone, ||S||; the kernel's next to XLA's", flush=True)
    for B, chunks, decay, donated in [
        (2, 1, 1.0, False),
        (2, 1, 0.9, False),
        (2, 8, 0.9, False),
        (20, 8, 0.9, True),
        (30, 1, 0.9, True),
    ]:
        found = [op(name, chunks, decay, B, donated) for name in KERNELS]
        print(f"  B={B} chunks={chunks} decay={decay} donated={donated}: {found}", flush=True)
    small = [] if jax.default_backend() == "gpu" else SMALL
    cfg = load_config("books", ["--model.ttt.lr=1.0", *small]).model
    runtime = Runtime(dtype="bfloat16")
    fresh = jax.jit(functools.partial(Transformer, cfg, runtime))(key=jax.random.key(0))
    # A fresh convolution is zero, and writes nothing.
    fresh = jax.tree_util.tree_map_with_path(
        lambda path, x: (x + 0.01 * param_path(path).endswith("conv")).astype(jnp.bfloat16), fresh
    )
    models = {"random": fresh}
    if len(sys.argv) > 1:
        models["run"] = load_model(sys.argv[1], "bfloat16")
    for name, model in models.items():
        print(f"{name}: largest |S| after a piece", flush=True)
        for fields in [{"implementation": "xla"}, {}]:
            for chunks, batch in [(1, 4), (8, 20)]:
                found = largest_ratio(with_ttt(model, **fields), chunks, batch)
                print(f"  {fields or 'as it is'} chunks={chunks}: {found:.3e}", flush=True)


SMALL = [
    "--model.d_model=64",
    "--model.d_ff=128",
    "--model.num_layers=4",
    "--model.num_heads=2",
    "--model.num_kv_heads=2",
    "--model.head_dim=32",
    "--model.vocab_size=300",
    "--model.ttt.chunk_size=64",
    "--model.ttt.layers=[1,3]",
]

if __name__ == "__main__":
    main()
