"""FLOPs of the model, peak rates of devices, and memory: used, allowed, and of a state."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from ttt_jax.config import ModelConfig


def device_memory_bytes() -> int | None:
    """Peak memory in use on the fullest local device so far; None where the backend does not count
    it (CPU).
    """
    import jax

    peaks = [
        (device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()
    ]
    return max((peak for peak in peaks if peak is not None), default=None)


def device_memory_limit() -> int | None:
    """Memory that this process may use on a local device; None where the backend does not say."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def shard_bytes(tree: Any) -> int:
    """Bytes of one device's share of arrays with shardings, abstract or not."""
    import jax

    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def model_flops_per_token(model: ModelConfig, seq_len: int, training: bool) -> float:
    """Floating-point operations that the model needs for one token of a row of `seq_len` (a
    multiply-add is two).

    Forward, with D, F, N, K, H, V as in the design and L layers:

        projections   2 D (2 N H + 2 K H)          q and o, k and v
        attention     4 N H mean_t min(t + 1, W)   scores and values, causal, W the layer's window
        MLP           6 D F                        gate, up and down; in a TTT layer the apply takes
                                                   the place of down
        TTT           2 D F + 10 D (+ 2 D D)       update v^T z, 5 taps (and W_target)
        logits        2 D V                        embedding tied or not; the look-up is free

    The backward pass takes twice the forward: each of these is bilinear, and has two products of
    the same size in it. That holds for TTT too: apply and update are 4 D F, their backward is dz =
    do (W + S), dz += v G, dv = z G^T and G += do^T z, 8 D F (dW is the sum of the same do^T z).
    What rematerialisation computes again, the closed-form backward's second scan over S included,
    does not count: this is the model's work, for MFU.

    Targets that are prediction errors cost a TTT layer 2 D F + 4 D V more, its output with S = 0
    and logits that are made and averaged over; they have no backward pass.
    """
    forward = _forward_flops(model, functools.partial(_mean_context, seq_len))
    return forward * (3 if training else 1) + _error_flops(model)


def decode_flops(model: ModelConfig, position: int) -> float:
    """The same of the one token behind so many."""
    context = lambda window: float(min(position + 1, window or position + 1))
    return _forward_flops(model, context) + _error_flops(model)


def _error_flops(model: ModelConfig) -> float:
    """Operations of one token's prediction errors in all TTT layers."""
    D, F, V = model.d_model, model.d_ff, model.vocab_size
    return len(model.ttt.error_layers) * (2.0 * D * F + 4.0 * D * V)


def _forward_flops(model: ModelConfig, context: Callable[[int | None], float]) -> float:
    """Operations of one token, forward. `context`: the keys that it sees, by a layer's window."""
    heads = model.num_heads * model.head_dim
    kv_heads = model.num_kv_heads * model.head_dim
    total = 2.0 * model.d_model * model.vocab_size
    for layer in range(model.num_layers):
        window = None if layer in model.full_attention_layers else model.sliding_window
        total += 2 * model.d_model * (2 * heads + 2 * kv_heads)
        total += 4 * heads * context(window)
        total += 6 * model.d_model * model.d_ff
        if layer in model.ttt.layers:
            total += 2 * model.d_model * model.d_ff + 10 * model.d_model
            total += 2 * model.d_model**2 if model.ttt.proj else 0
    return total


def _mean_context(seq_len: int, window: int | None) -> float:
    """Mean over t < seq_len of min(t + 1, window)."""
    window = min(window or seq_len, seq_len)
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


# Dense bfloat16 peak of one jax device, in TFLOP/s (vendors' data sheets). The first name in
# `device_kind` counts.
_PEAK_TFLOPS = (
    ("TPU v4 lite", 138.0),
    ("TPU v4", 275.0),
    ("TPU v5 lite", 197.0),
    ("TPU v5e", 197.0),
    ("TPU v5", 459.0),  # v5p
    ("TPU v6", 918.0),
    ("TPU7x", 1153.5),  # half a chip: jax sees its two chiplets as two devices
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.5),
    ("H100", 989.4),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("MI300X", 1307.4),
)


def peak_flops(device: Any) -> float | None:
    """Dense bfloat16 peak of a `jax.Device` in FLOP/s; None for one that is not in the table, such
    as a CPU.
    """
    kind = device.device_kind
    return next((tflops * 1e12 for name, tflops in _PEAK_TFLOPS if name in kind), None)
