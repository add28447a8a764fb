"""Attention of fresh sequences on themselves, and the implementations behind it (kv_cache.py has attention on a cache,
splash.py the kernel for TPU).

B batch, T queries, S keys, N query heads, K KV heads, G = N / K, H head dim, Q queries in a block.
A query at position p sees the keys of its own document at positions p - window + 1 .. p.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import splash
from ttt_jax.blocks import join_tokens, split_tokens
from ttt_jax.errors import UserError
from ttt_jax.ops import target
from ttt_jax.ops.xla import accumulator, precision_for

IMPLEMENTATIONS = ("xla", "cudnn", "splash")
_BLOCK_BYTES = 64 * 2**20  # logits that the XLA path holds at a time
MASKED = -1e30


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
      implementation: "cudnn" (CUDA, 16-bit), "splash" (TPU, bfloat16), "xla" (anywhere, memory linear in T), None for the
        fastest that applies. A named one that cannot run raises.

    Returns: o_BTNH in q's dtype. Outputs of padding are finite and meaningless.
    Raises: UserError if the named implementation does not support the call.
    """
    if implementation is None:
        alone = None if target.on_one_device() else "it runs inside a shard_map or on one device"
        implementation = fastest(
            cudnn=_why_not_cudnn(q_BTNH, segment_ids_BT, segment_multiple), splash=splash.why_not(q_BTNH) or alone
        )
    if implementation == "cudnn":
        check_named("cudnn", _why_not_cudnn(q_BTNH, segment_ids_BT, segment_multiple))
        return _cudnn(q_BTNH, k_BTKH, v_BTKH, window, segment_ids_BT, segment_multiple)
    if implementation == "splash":
        check_named("splash", splash.why_not(q_BTNH))
        return splash.splash_attention(q_BTNH, k_BTKH, v_BTKH, window=window, segment_ids_BT=segment_ids_BT)
    if implementation != "xla":
        raise UserError(f"attention implementation {implementation!r}: unknown; use one of {', '.join(IMPLEMENTATIONS)}")
    T = q_BTNH.shape[1]
    position_1T = jnp.arange(T, dtype=jnp.int32)[None]
    if window is not None and 2 * window < T:
        return _windowed(q_BTNH, k_BTKH, v_BTKH, window, segment_ids_BT)
    return blocked(q_BTNH, k_BTKH, v_BTKH, position_1T, position_1T, segment_ids_BT, segment_ids_BT, window)


def uses_cudnn(q_BTNH, implementation: str | None) -> bool:
    """Whether new tokens after older ones, one document per row, go to cuDNN; there is no such kernel for TPU.

    Raises: UserError when it is named and cannot run.
    """
    reasons = {"cudnn": _why_not_cudnn(q_BTNH, None, 1), "splash": "it attends to fresh sequences only, not to a cache"}
    if implementation is None:
        return fastest(**reasons) == "cudnn"
    check_named(implementation, reasons.get(implementation))
    return implementation == "cudnn"


def fastest(**reasons: str | None) -> str:
    """The implementation to take when none is named, given why each kernel cannot run; says so where it is the slow one."""
    for name, reason in reasons.items():
        if reason is None:
            return name
    if (platform := target.platform()) != "cpu":
        reason = reasons["splash" if platform == "tpu" else "cudnn"]
        _say_once(f"attention: no fast kernel ({reason}); using the XLA path, several times slower on long sequences")
    return "xla"


def check_named(name: str, reason: str | None) -> None:
    """Raises UserError when the named implementation cannot run."""
    if reason is not None:
        raise UserError(f"attention implementation {name!r}: {reason}")


# -------------------------------------------------------------------------------------------------------------- XLA


def _attend(q_BQNH, k_BSKH, v_BSKH, seen_BQS):
    """Softmax attention with an explicit mask, logits in float32."""
    B, Q, N, H = q_BQNH.shape
    K = k_BSKH.shape[2]
    acc = accumulator(q_BQNH.dtype)
    q_BQKGH = q_BQNH.reshape(B, Q, K, N // K, H)
    dot = functools.partial(jnp.einsum, preferred_element_type=acc, precision=precision_for(q_BQNH.dtype))
    logits_BKGQS = dot("bqkgh,bskh->bkgqs", q_BQKGH, k_BSKH) / math.sqrt(H)
    logits_BKGQS = jnp.where(jnp.broadcast_to(seen_BQS[:, None, None], logits_BKGQS.shape), logits_BKGQS, MASKED)
    p_BKGQS = jax.nn.softmax(logits_BKGQS, axis=-1).astype(v_BSKH.dtype)
    return dot("bkgqs,bskh->bqkgh", p_BKGQS, v_BSKH).astype(q_BQNH.dtype).reshape(B, Q, N, H)


def _seen(q_position_BQ, k_position_BS, q_segment_BQ, k_segment_BS, window):
    distance_BQS = q_position_BQ[:, :, None] - k_position_BS[:, None, :]
    seen_BQS = distance_BQS >= 0
    if window is not None:
        seen_BQS &= distance_BQS < window
    if q_segment_BQ is not None:
        seen_BQS &= q_segment_BQ[:, :, None] == k_segment_BS[:, None, :]
    return seen_BQS


def blocked(q_BTNH, k_BSKH, v_BSKH, q_position, k_position, q_segment=None, k_segment=None, window=None):
    """Blocks of queries against all keys; the backward recomputes each block's probabilities."""
    B, T, N, _ = q_BTNH.shape
    S = k_BSKH.shape[1]
    Q = max(1, min(T, _BLOCK_BYTES // (4 * B * N * S)))
    if Q >= T:
        return _attend(q_BTNH, k_BSKH, v_BSKH, _seen(q_position, k_position, q_segment, k_segment, window))

    @jax.checkpoint
    def block(x):
        q_BQNH, position_BQ, segment_BQ = x
        return _attend(q_BQNH, k_BSKH, v_BSKH, _seen(position_BQ, k_position, segment_BQ, k_segment, window))

    split = functools.partial(split_tokens, size=Q)
    o_blocks = jax.lax.map(block, (split(q_BTNH), split(q_position), None if q_segment is None else split(q_segment)))
    return join_tokens(o_blocks, T)


def _windowed(q_BTNH, k_BTKH, v_BTKH, window, segment_ids_BT):
    """Blocks of `window` queries against their own and the previous block: cost linear in T."""
    B, T = q_BTNH.shape[:2]
    segment_BT = jnp.ones((B, T), jnp.int32) if segment_ids_BT is None else segment_ids_BT + 1  # 0: before the first token
    before = lambda x: jnp.pad(x, ((0, 0), (window, 0), *((0, 0),) * (x.ndim - 2)))
    return windowed_after(q_BTNH, before(k_BTKH), before(v_BTKH), window, segment_BT, before(segment_BT))


def windowed_after(q_BTNH, k_BSKH, v_BSKH, window, q_segment_BT, k_segment_BS):
    """The same for T queries and S = window + T keys, of which the first `window` lie before the first query."""
    B, T, N, _ = q_BTNH.shape
    W = window

    def own_and_previous(x_BSX):
        blocks = split_tokens(x_BSX, W)  # one more than there are blocks of queries
        return jnp.concatenate([blocks[:-1], blocks[1:]], axis=2)

    q_position_1Q, k_position_1S = jnp.arange(W, 2 * W)[None], jnp.arange(2 * W)[None]

    @jax.checkpoint
    def block(x):
        q, k, v, q_segment, k_segment = x
        return _attend(q, k, v, _seen(q_position_1Q, k_position_1S, q_segment, k_segment, window))

    keys, values, key_segments = map(own_and_previous, (k_BSKH, v_BSKH, k_segment_BS))
    xs = (split_tokens(q_BTNH, W), keys, values, split_tokens(q_segment_BT, W), key_segments)
    together = max(1, _BLOCK_BYTES // (4 * B * N * 2 * W * W))
    o_blocks = jax.lax.map(block, xs, batch_size=min(together, xs[0].shape[0]))
    return join_tokens(o_blocks, T)


# ------------------------------------------------------------------------------------------------------------ cuDNN


def _why_not_cudnn(q_BTNH, segment_ids_BT, segment_multiple) -> str | None:
    if (platform := target.platform()) != "gpu":
        return f"needs a CUDA device, this is {platform}"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, got {q_BTNH.dtype}"
    if q_BTNH.shape[-1] % 8 or q_BTNH.shape[-1] > 128:
        return f"needs a head size of at most 128 and a multiple of 8, got {q_BTNH.shape[-1]}"
    if segment_ids_BT is not None and segment_multiple < 64:
        return f"packed documents must start at multiples of 64 tokens or more, got {segment_multiple}"
    return None


def _cudnn(q_BTNH, k_BTKH, v_BTKH, window, segment_ids_BT, segment_multiple) -> Any:
    if segment_ids_BT is None or segment_ids_BT.shape[1] <= segment_multiple:  # room for one document only
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    offsets_BM, sizes_BM = _document_offsets(segment_ids_BT, segment_multiple)
    return cudnn_documents(q_BTNH, k_BTKH, v_BTKH, offsets_BM, sizes_BM, window)


def cudnn_documents(q_BTNH, k_BTKH, v_BTKH, offsets_BM, sizes_BM, window) -> Any:
    """Causal attention inside each document. The public function takes no offsets, the one below it does.

    Args:
      offsets_BM: [B, M + 1] int32, starts of up to M documents, -1 behind them. sizes_BM: [B, M] int32, -1 behind them.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    if sizes_BM.shape[1] == 1:  # jax ignores the offset of an only document; a second one, which is not there, makes it look
        offsets_BM, sizes_BM = (jnp.pad(x, ((0, 0), (0, 1)), constant_values=-1) for x in (offsets_BM, sizes_BM))
    return cudnn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        q_seqlen=sizes_BM,
        kv_seqlen=sizes_BM,
        q_offsets=offsets_BM,
        kv_offsets=offsets_BM,
        scale=1 / math.sqrt(q_BTNH.shape[-1]),
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
        sliding_window_length=window,
    )


def _document_offsets(segment_ids_BT, multiple):
    """Start [B, M+1] and size [B, M] of each document, -1 where there are fewer; padding joins the document before it.

    The last column of the starts is always -1: cuDNN's wrapper takes it for the end of the whole batch.
    """
    B, T = segment_ids_BT.shape
    M = -(-T // multiple)
    first_BM = segment_ids_BT[:, ::multiple]
    new_BM = jnp.concatenate([jnp.ones((B, 1), bool), first_BM[:, 1:] != first_BM[:, :-1]], axis=1)
    starts_BM = jnp.where(new_BM, jnp.arange(M, dtype=jnp.int32)[None] * multiple, T)
    starts_BM = jnp.sort(starts_BM, axis=1)
    ends_BM = jnp.concatenate([starts_BM[:, 1:], jnp.full((B, 1), T, jnp.int32)], axis=1)
    real_BM = starts_BM < T
    offsets_BM = jnp.pad(jnp.where(real_BM, starts_BM, -1), ((0, 0), (0, 1)), constant_values=-1)
    return offsets_BM, jnp.where(real_BM, ends_BM - starts_BM, -1)


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
