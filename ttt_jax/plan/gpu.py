"""Memory of a step on GPUs, estimated from shapes and shardings. XLA's GPU compiler needs a GPU, so
nothing is compiled.

b rows and t tokens of a row on one device at a time, T tokens of a row, D width, F MLP width, N
query and K KV heads, H head dim, V vocabulary, a bytes of the compute dtype, L layers, P ways that
`mesh.tensor` splits heads and F.

Parameters, optimizer state and gradients are exact (shapes and shardings of the real state). The
rest is a sum of the arrays that the step is known to hold; what XLA adds (fragmentation, copies,
collectives' buffers) is not in it. Formulas:

    gradients            float32, split as the parameters; with accumulation twice: the sum's and
                         the micro-batch's
    kept activations     b t a (L D + the arrays that remat_save names in every layer)
    one layer, backward  b t a (8 D + 6 F/P + 2 (N + 2 K) H/P), recomputed, with its gradients
    gathered weights     one layer's in the compute dtype, twice (the next one is on its way), and
                         their gradients
    gathered K/V         b T 2 K H/P (a + 4), when the sequence is split and attention is full
    fast weights         4 float32 arrays b D F/P: S, G, and what the prefix over the context
                         exchanges
    loss                 V D (a + 4) output weight and its gradient, and 1.5 GiB of logits at most
"""

from __future__ import annotations

from typing import Any

from ttt_jax.config import Config
from ttt_jax.plan.common import (
    Plan,
    Topology,
    Work,
    abstract_batch,
    advice,
    notes,
    workload,
)
from ttt_jax.plan.inference import abstract_decode, decode_reads, model_flops, roofline

_LOGITS = 1.5 * 2**30  # one block in float32 (loss.py) and its gradient in the compute dtype


def estimate(config: Config, topology: Topology, work: Work | None = None) -> Plan:
    """Raises: ConfigError when the config does not fit the number of devices."""
    from jax.sharding import AbstractMesh, AxisType

    from ttt_jax.flops import shard_bytes
    from ttt_jax.parallel.mesh import AXES, mesh_shape
    from ttt_jax.training.step import abstract_state

    work = work or Work()
    shape = mesh_shape(config.mesh, topology.devices)
    sizes: dict[str, int] = dict(zip(AXES, shape, strict=True))
    mesh: Any = AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    rows, tokens = workload(config, sizes, work)
    if work.decode is not None:
        _, (model, streams, *_) = abstract_decode(config, mesh, rows, tokens)
        logits = float(rows * config.model.vocab_size * 4)
        by_kind = {"parameters": shard_bytes(model), "streams": shard_bytes(streams)}
        by_kind = {name: float(size) for name, size in by_kind.items()} | {"logits": logits}
        read = decode_reads(model, streams)
    elif work.trains:
        state, _ = abstract_state(config, mesh)
        parameters, read = float(shard_bytes(state.model)), 0.0
        by_kind = {
            "parameters": parameters,
            "optimizer state": float(shard_bytes((state.opt_state, state.step))),
            "batch": float(shard_bytes(abstract_batch(config, mesh))),
            "gradients": parameters * (1 if config.optimizer.accumulate == 1 else 2),
        } | activations(config, sizes)
    else:
        state, _ = abstract_state(config, mesh)
        read = float(shard_bytes(state.model)) / 4 * _itemsize(config)
        by_kind = {"parameters": read} | _prefill(config, sizes, rows, tokens)
    total = sum(by_kind.values())
    fits = total <= topology.memory
    return Plan(
        program=work.program,
        topology=topology.text,
        compiled=False,
        mesh=sizes,
        rows=rows,
        tokens=tokens,
        memory=topology.memory,
        bytes_by_kind=by_kind,
        total=total,
        fits=fits,
        advice=() if fits else advice(config, sizes, by_kind, topology.memory, work),
        notes=tuple(notes(config, sizes, work)),
        model_flops=model_flops(config, work, rows, tokens),
        roofline=roofline(config, topology, work, rows, tokens, read),
    )


def activations(config: Config, sizes: dict[str, int]) -> dict[str, float]:
    """The estimated kinds of a train step, by the formulas above."""
    model, a = config.model, _itemsize(config)
    ways = sizes["data"] * sizes["fsdp"]
    micro = config.data.batch_size // config.optimizer.accumulate
    b = micro // ways if micro % ways == 0 else micro  # rows that do not split are on every device
    T, D, V = config.data.seq_len, model.d_model, model.vocab_size
    t = T // sizes["context"]
    F, heads, kv, N = _split(config, sizes)
    ttt_layers = len(model.ttt.layers)
    # a chunk's inverse of C x C, kept with its targets: 4 bytes an element (ops/ttt/writes.py)
    inverse = model.ttt.chunk_size * 4 / a if model.ttt.write == "ridge" else 0
    # elements a token, by the names of remat_save; TTT targets only where there are targets
    width = {
        "attention": heads + 4 * N / a,
        "qkv": heads + 2 * kv,
        "attention_out": D,
        "mlp_gate": F,
        "mlp_up": F,
        "mlp_hidden": F,
        "ttt_target": (D + inverse) * ttt_layers / model.num_layers,
    }
    names = tuple(width) if config.remat_save is None else config.remat_save
    kept = D + sum(width[name] for name in names) + (4 * D if config.remat_save is None else 0)
    layer = D * (2 * heads + 2 * kv + 3 * F)
    full_attention = model.sliding_window is None or bool(model.full_attention_layers)
    gathered_kv = b * T * 2 * kv * (a + 4) if sizes["context"] > 1 and full_attention else 0
    return {
        "kept activations": float(b * t * a * model.num_layers * kept),
        "one layer, backward": float(b * t * a * (8 * D + 6 * F + 2 * (heads + 2 * kv))),
        "gathered weights": float(layer * (2 * a + 4)),
        "gathered keys and values": float(gathered_kv),
        "fast weights": float(4 * b * D * F * 4 if ttt_layers else 0),
        "loss": V * D * (a + 4) + min(_LOGITS, 1.5 * b * t * V * 4),
    }


def _prefill(config: Config, sizes: dict[str, int], rows: int, tokens: int) -> dict[str, float]:
    model, a = config.model, _itemsize(config)
    ways = sizes["data"] * sizes["fsdp"]
    b, t = rows // ways if rows % ways == 0 else rows, tokens // sizes["context"]
    F, heads, kv, _ = _split(config, sizes)
    D, S = model.d_model, len(model.ttt.layers) * b * model.d_model * F * 4
    windowed = (
        0 if model.sliding_window is None else model.num_layers - len(model.full_attention_layers)
    )
    cached = (
        b
        * 2
        * kv
        * a
        * ((model.num_layers - windowed) * t + windowed * min(t, model.sliding_window or t))
    )
    return {
        "KV cache": float(cached),
        "fast weights": float(S),
        "one layer": float(b * t * a * (4 * D + 3 * F + heads + 2 * kv)),
        "gathered weights": float(
            D * (2 * heads + 2 * kv + 3 * F) * 2 * a + model.vocab_size * D * a
        ),
    }


def _split(config: Config, sizes: dict[str, int]) -> tuple[int, int, int, int]:
    """F, N H, K H and N on one device. KV heads that do not divide leave all heads whole."""
    model, ways = config.model, sizes["tensor"]
    by_heads = ways if model.num_heads % ways == 0 and model.num_kv_heads % ways == 0 else 1
    N, K = model.num_heads // by_heads, model.num_kv_heads // by_heads
    F = model.d_ff // ways if model.d_ff % ways == 0 else model.d_ff
    return F, N * model.head_dim, K * model.head_dim, N


def _itemsize(config: Config) -> int:
    return {"float32": 4, "bfloat16": 2}[config.compute_dtype]
