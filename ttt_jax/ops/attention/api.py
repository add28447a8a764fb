"""Attention of fresh sequences on themselves, and the implementations behind it (kv_cache.py has attention on a cache,
splash.py the kernel for TPU).

B batch, T queries, S keys, N query heads, K KV heads, G = N / K, H head dim, Q queries in a block, M documents a row may hold.
A query at position p sees the keys of its own document at positions p - window + 1 .. p.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax.errors import UserError
from ttt_jax.ops import platform
from ttt_jax.ops.attention import splash
from ttt_jax.ops.numerics import join_tokens, split_tokens
from ttt_jax.ops.ttt.xla import accumulator, precision_for

IMPLEMENTATIONS = ("xla", "cudnn", "splash")
_BLOCK_BYTES = 64 * 2**20  # logits that the XLA path holds at a time
_WORKSPACE_BYTES = 4 * 2**30  # what the backward of one packed cuDNN call may take beside its arrays
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
    if segment_ids_BT is None:
        return None
    if segment_multiple < 64:
        return f"packed documents must start at multiples of 64 tokens or more, got {segment_multiple}"
    T, H = segment_ids_BT.shape[1], q_BTNH.shape[-1]
    M = -(-T // segment_multiple)
    if M > 1 and (bytes_ := _workspace_bytes(M, T, H)) > _WORKSPACE_BYTES:
        least = -(-T // max(1, _WORKSPACE_BYTES // _workspace_bytes(1, T, H)))
        return (
            f"packed documents must start at multiples of {least} tokens or more in rows of {T}, got {segment_multiple}: "
            f"one head's backward would take {bytes_ / 2**30:.1f} GiB"
        )
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
    """Causal attention inside each document, in as many calls as `_WORKSPACE_BYTES` asks for.

    Args:
      offsets_BM: [B, M + 1] int32, starts of up to M documents, -1 behind them. sizes_BM: [B, M] int32, -1 behind them.

    Returns: o_BTNH in q's dtype.
    """
    (B, T, N, H), K, M = q_BTNH.shape, k_BTKH.shape[2], sizes_BM.shape[1]
    # One document a row comes from a stream (kv_cache.py), which has no backward and so no workspace.
    rows, heads = _split_call(B, M, T, N, K, H) if M > 1 else (B, N)
    if (rows, heads) == (B, N):
        return _cudnn_call(q_BTNH, k_BTKH, v_BTKH, offsets_BM, sizes_BM, window)
    o_rows = []
    for r in _parts(B, rows):  # not lax.map, which took a sixth more time and memory
        o_heads = [
            _cudnn_call(q_BTNH[r, :, n], k_BTKH[r, :, k], v_BTKH[r, :, k], offsets_BM[r], sizes_BM[r], window)
            for n, k in _head_parts(N, K, heads)
        ]
        o_rows.append(jnp.concatenate(o_heads, axis=2))
    return jnp.concatenate(o_rows)


def _workspace_bytes(M: int, T: int, H: int) -> int:
    """What cuDNN's backward takes for one query head of one row: a float32 gradient of the whole row for each document.

    As much again in calls whose KV heads serve several query heads each. Both fit what was measured (docs/performance.md).
    """
    return 4 * M * T * H


def _split_call(B: int, M: int, T: int, N: int, K: int, H: int) -> tuple[int, int]:
    """Rows and query heads of the largest call, such that its workspace stays within `_WORKSPACE_BYTES`.

    Several rows with all heads; or of one row the query heads of several KV heads; or some of one KV head. At least one head
    of one row, however large: `_why_not_cudnn` refuses those beforehand.
    """
    G = N // K
    fit = max(1, _WORKSPACE_BYTES // (_workspace_bytes(M, T, H) * (1 if G == 1 else 2)))
    if fit >= N:
        return _even(B, fit // N), N
    return 1, G * _even(K, fit // G) if fit >= G else _even(G, fit)


def _even(total: int, at_most: int) -> int:
    """Size of the largest part, when there are as few parts of at most `at_most` as can be, and equal up to one."""
    return -(-total // -(-total // at_most))


def _parts(total: int, size: int) -> list[slice]:
    """The fewest parts of at most `size`, equal up to one."""
    n = -(-total // size)
    return [slice(i * total // n, (i + 1) * total // n) for i in range(n)]


def _head_parts(N: int, K: int, heads: int) -> list[tuple[slice, slice]]:
    """(query heads, their KV heads) of each call."""
    G = N // K
    if heads >= G:
        return [(slice(k.start * G, k.stop * G), k) for k in _parts(K, heads // G)]
    return [(slice(k * G + g.start, k * G + g.stop), slice(k, k + 1)) for k in range(K) for g in _parts(G, heads)]


def _cudnn_call(q_BTNH, k_BTKH, v_BTKH, offsets_BM, sizes_BM, window) -> Any:
    """One call. The public function takes no offsets, the one below it does."""
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
