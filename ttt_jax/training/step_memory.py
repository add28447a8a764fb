"""Memory of a train step, estimated from shapes and shardings, and which activations it can keep.

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
    loss                 V D (a + 4) output weight and its gradient, and 1.9 GiB of logits at most

They are all counted at once, though gradients come as activations go: 1.7B at 4 x 8k tokens took
40.0 GiB of an H100 where this says 41.7, and 56.3 where it says 62.7 (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from ttt_jax.config import OPEN_REMAT, Config, replace
from ttt_jax.flops import device_memory_limit, shard_bytes
from ttt_jax.process.multihost import on_first_process, say_on_first_process
from ttt_jax.training.step import TrainState, abstract_state

_LOGITS = 1.9 * 2**30  # a block's in float32 and the gradients of a group of blocks (model/loss.py)
_USABLE = 0.95  # of the memory, by an estimate that was 4 to 11 % above what was measured

# What `remat_save: auto` keeps, the first that fits. Every array that is named spares the backward
# the matmul that makes it, 2 D FLOPs a number (and "attention" the attention).
_TO_KEEP = (
    ("attention", "qkv", "attention_out", "mlp_gate", "mlp_up", "ttt_target"),
    ("attention", "mlp_gate", "mlp_up", "ttt_target"),
    ("attention", "ttt_target"),
)
# Tried before them where layers are not in loops, so that keeping copies nothing.
_WITHOUT_LOOPS = ("attention", "mlp_gate", "mlp_up", "mlp_hidden", "ttt_target")
_GIB = 2**30


def settled_remat(config: Config, mesh: Mesh) -> Config:
    """Return the config with `remat_save: auto` replaced by what the devices at hand have room for,
    and say it. Without `auto`, the config as it is.
    """
    if config.remat_save != OPEN_REMAT:
        return config
    # Processes must not choose different programs.
    memory = on_first_process(device_memory_limit)
    config, lines = keep_what_fits(config, mesh, memory)
    say_on_first_process(lines)
    return config


def keep_what_fits(config: Config, mesh: Any, memory: float | None) -> tuple[Config, list[str]]:
    """As `settled_remat`, for a mesh that may be abstract, of devices with `memory` bytes (None:
    not known). Returns the config and the lines that say what was chosen.
    """
    if config.remat_save != OPEN_REMAT:
        return config, []
    chosen = replace(config, {"remat_save": _TO_KEEP[-1]})
    reason = "the least, because the device does not say how much memory it has"
    if memory is not None:
        state, _ = abstract_state(chosen, mesh)
        sizes = {name: int(size) for name, size in mesh.shape.items()}
        for names in _to_keep(config):
            chosen = replace(config, {"remat_save": names})
            need = sum(step_bytes(chosen, sizes, state).values())
            if need <= _USABLE * memory:
                break
        reason = f"an estimated {need / _GIB:.1f} of {memory / _GIB:.1f} GiB on each device"
    kept = ", ".join(chosen.remat_save or ())
    return chosen, [f"remat_save: auto keeps {kept} for the backward pass ({reason})"]


def _to_keep(config: Config) -> tuple[tuple[str, ...], ...]:
    if not config.unroll_layers:
        return _TO_KEEP
    states = ("ttt_states",) if config.model.ttt.apply == "fused" else ()
    return ((*_WITHOUT_LOOPS, *states), *_TO_KEEP)


def step_bytes(config: Config, sizes: Mapping[str, int], state: TrainState) -> dict[str, float]:
    """Bytes on each device by kind, the batch left out.

    Args:
      sizes: of the mesh's axes, by name.
      state: abstract, with shardings; its parameters and moments do not depend on `remat_save`.
    """
    parameters = float(shard_bytes(state.model))
    return {
        "parameters": parameters,
        "optimizer state": float(shard_bytes((state.opt_state, state.step))),
        "gradients": parameters * (1 if config.optimizer.accumulate == 1 else 2),
    } | activations(config, sizes)


def activations(config: Config, sizes: Mapping[str, int]) -> dict[str, float]:
    """The estimated kinds of a train step, by the formulas above."""
    model, a = config.model, itemsize(config)
    ways = sizes["data"] * sizes["fsdp"]
    micro = config.data.batch_size // config.optimizer.accumulate
    b = micro // ways if micro % ways == 0 else micro  # rows that do not split are on every device
    T, D, V = config.data.seq_len, model.d_model, model.vocab_size
    t = T // sizes["context"]
    F, heads, kv, N = split(config, sizes)
    ttt_layers = len(model.ttt.layers)
    # a chunk's inverse of C x C, kept with its targets: 4 bytes an element (ops/ttt/writes.py)
    inverse = model.ttt.chunk_size * 4 / a if model.ttt.write == "ridge" else 0
    errors = D * len(model.ttt.error_layers)  # kept, or logits are made again
    # a copy of W + S for each chunk; `kernels_pallas/gpu_sweep.py` has those of short rows alone
    states = D * F / model.ttt.chunk_size if model.ttt.apply == "fused" else 0
    # elements a token, by the names of remat_save; TTT targets only where there are targets
    width = {
        "attention": heads + 4 * N / a,
        "qkv": heads + 2 * kv,
        "attention_out": D,
        "mlp_gate": F,
        "mlp_up": F,
        "mlp_hidden": F,
        "ttt_target": ((D + inverse) * ttt_layers + errors) / model.num_layers,
        "ttt_states": states * ttt_layers / model.num_layers,
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


def split(config: Config, sizes: Mapping[str, int]) -> tuple[int, int, int, int]:
    """F, N H, K H and N on one device. KV heads that do not divide leave all heads whole."""
    model, ways = config.model, sizes["tensor"]
    by_heads = ways if model.num_heads % ways == 0 and model.num_kv_heads % ways == 0 else 1
    N, K = model.num_heads // by_heads, model.num_kv_heads // by_heads
    F = model.d_ff // ways if model.d_ff % ways == 0 else model.d_ff
    return F, N * model.head_dim, K * model.head_dim, N


def itemsize(config: Config) -> int:
    """Bytes of the compute dtype."""
    return {"float32": 4, "bfloat16": 2}[config.compute_dtype]
