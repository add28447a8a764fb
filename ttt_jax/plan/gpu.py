"""Memory of a step on GPUs, estimated from shapes and shardings. XLA's GPU compiler needs a GPU, so
nothing is compiled.

The formulas of a train step are those of training/step_memory.py. A prefill holds the parameters in
the compute dtype, its KV cache and fast weights, and one layer's activations and gathered weights.
"""

from __future__ import annotations

from typing import Any

from ttt_jax.config import Config
from ttt_jax.plan.inference import abstract_decode, decode_reads, model_flops, roofline
from ttt_jax.plan.result import Plan, advice, notes
from ttt_jax.plan.topology import Topology
from ttt_jax.plan.work import Work, abstract_batch, workload


def estimate(config: Config, topology: Topology, work: Work | None = None) -> Plan:
    """Raises: ConfigError when the config does not fit the number of devices."""
    from jax.sharding import AbstractMesh, AxisType

    from ttt_jax.flops import shard_bytes
    from ttt_jax.parallel.mesh import AXES, mesh_shape
    from ttt_jax.training.step import abstract_state
    from ttt_jax.training.step_memory import itemsize, keep_what_fits, step_bytes

    work = work or Work()
    shape = mesh_shape(config.mesh, topology.devices)
    sizes: dict[str, int] = dict(zip(AXES, shape, strict=True))
    mesh: Any = AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    rows, tokens = workload(config, sizes, work)
    config, kept = keep_what_fits(config, mesh, topology.memory)
    if work.decode is not None:
        _, (model, streams, *_) = abstract_decode(config, mesh, rows, tokens)
        logits = float(rows * config.model.vocab_size * 4)
        by_kind = {"parameters": shard_bytes(model), "streams": shard_bytes(streams)}
        by_kind = {name: float(size) for name, size in by_kind.items()} | {"logits": logits}
        read = decode_reads(model, streams)
    elif work.trains:
        state, _ = abstract_state(config, mesh)
        by_kind, read = step_bytes(config, sizes, state), 0.0
        by_kind["batch"] = float(shard_bytes(abstract_batch(config, mesh)))
    else:
        state, _ = abstract_state(config, mesh)
        read = float(shard_bytes(state.model)) / 4 * itemsize(config)
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
        notes=(*notes(config, sizes, work), *kept),
        model_flops=model_flops(config, work, rows, tokens),
        roofline=roofline(config, topology, work, rows, tokens, read),
    )


def _prefill(config: Config, sizes: dict[str, int], rows: int, tokens: int) -> dict[str, float]:
    from ttt_jax.training.step_memory import itemsize, split

    model, a = config.model, itemsize(config)
    ways = sizes["data"] * sizes["fsdp"]
    b, t = rows // ways if rows % ways == 0 else rows, tokens // sizes["context"]
    F, heads, kv, _ = split(config, sizes)
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
