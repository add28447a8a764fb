"""Attention of fresh sequences on themselves, and the choice of an implementation: cudnn.py on
GPUs, splash.py on TPUs, xla.py anywhere. Attention on a cache is in cached.py.

B batch, T tokens, N query heads, K KV heads, H head dim. A query at position p sees the keys of its
own document at positions p - window + 1 .. p.
"""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp

from ttt_jax.errors import UserError
from ttt_jax.ops import platform
from ttt_jax.ops.attention import cudnn, splash
from ttt_jax.ops.attention.xla import blocked, windowed

IMPLEMENTATIONS = ("xla", "cudnn", "splash")


def self_attention(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    *,
    window: int | None = None,
    segment_ids_BT=None,
    segment_multiple: int = 1,
    implementation: str | None = None,
) -> jax.Array:
    """Causal attention of a sequence on itself.

    Args:
      q_BTNH, k_BTKH, v_BTKH: rotated queries and keys, values; N is a multiple of K.
      window: tokens a query sees, itself included; None for all.
      segment_ids_BT: document of each token, 0 for padding. Documents do not see each other.
      segment_multiple: documents start at multiples of this many tokens.
      implementation: "cudnn" (CUDA, 16-bit), "splash" (TPU, bfloat16), "xla" (anywhere, memory
        linear in T), None for the fastest that applies. A named one that cannot run raises.

    Returns: o_BTNH in q's dtype. Outputs of padding are finite and meaningless.
    Raises: UserError if the named implementation does not support the call.
    """
    if implementation is None:
        alone = None if platform.on_one_device() else "it runs inside a shard_map or on one device"
        implementation = fastest(
            cudnn=cudnn.why_not(q_BTNH, segment_ids_BT, segment_multiple),
            splash=splash.why_not(q_BTNH) or alone,
        )
    if implementation == "cudnn":
        check_named("cudnn", cudnn.why_not(q_BTNH, segment_ids_BT, segment_multiple))
        return cudnn.cudnn_attention(
            q_BTNH, k_BTKH, v_BTKH, window, segment_ids_BT, segment_multiple
        )
    if implementation == "splash":
        check_named("splash", splash.why_not(q_BTNH))
        return splash.splash_attention(
            q_BTNH, k_BTKH, v_BTKH, window=window, segment_ids_BT=segment_ids_BT
        )
    if implementation != "xla":
        raise UserError(
            f"attention implementation {implementation!r}: unknown; use one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    T = q_BTNH.shape[1]
    position_1T = jnp.arange(T, dtype=jnp.int32)[None]
    if window is not None and 2 * window < T:
        return windowed(q_BTNH, k_BTKH, v_BTKH, window, segment_ids_BT)
    return blocked(
        q_BTNH, k_BTKH, v_BTKH, position_1T, position_1T, segment_ids_BT, segment_ids_BT, window
    )


def uses_cudnn(q_BTNH, implementation: str | None) -> bool:
    """Whether new tokens after older ones, one document per row, go to cuDNN; there is no such
    kernel for TPU.

    Raises: UserError when it is named and cannot run.
    """
    reasons = {
        "cudnn": cudnn.why_not(q_BTNH),
        "splash": "it attends to fresh sequences only, not to a cache",
    }
    if implementation is None:
        return fastest(**reasons) == "cudnn"
    check_named(implementation, reasons.get(implementation))
    return implementation == "cudnn"


def fastest(**reasons: str | None) -> str:
    """The implementation to take when none is named, given why each kernel cannot run; says so
    where it is the slow one.
    """
    for name, reason in reasons.items():
        if reason is None:
            return name
    if (name := platform.compiled_for()) != "cpu":
        reason = reasons["splash" if name == "tpu" else "cudnn"]
        _say_once(
            f"attention: no fast kernel ({reason}); using the XLA path, several times slower on "
            "long sequences"
        )
    return "xla"


def check_named(name: str, reason: str | None) -> None:
    """Raises UserError when the named implementation cannot run."""
    if reason is not None:
        raise UserError(f"attention implementation {name!r}: {reason}")


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
