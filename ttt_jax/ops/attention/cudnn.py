"""Attention on GPUs: cuDNN's flash attention, in 16 bits.

B batch, T queries, S keys, L slots of a cache, A tokens of a block of a split sequence, N query
heads, K KV heads, G = N / K, H head dim, M documents a row may hold.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax import jax_internals
from ttt_jax.ops import platform

# What the backward of one packed call may take beside its arrays.
_WORKSPACE_BYTES = 4 * 2**30


def why_not(q_BTNH, segment_ids_BT=None, segment_multiple: int = 1) -> str | None:
    """Why these queries cannot be attended to here, or None. Arguments as in `self_attention`."""
    if (name := platform.compiled_for()) != "gpu":
        return f"needs a CUDA device, this is {name}"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, got {q_BTNH.dtype}"
    if q_BTNH.shape[-1] % 8 or q_BTNH.shape[-1] > 128:
        return f"needs a head size of at most 128 and a multiple of 8, got {q_BTNH.shape[-1]}"
    if segment_ids_BT is None:
        return None
    if segment_multiple < 64:
        return (
            f"packed documents must start at multiples of 64 tokens or more, got {segment_multiple}"
        )
    T, H = segment_ids_BT.shape[1], q_BTNH.shape[-1]
    M = -(-T // segment_multiple)
    if M > 1 and (bytes_ := _workspace_bytes(M, T, H)) > _WORKSPACE_BYTES:
        least = -(-T // max(1, _WORKSPACE_BYTES // _workspace_bytes(1, T, H)))
        return (
            f"packed documents must start at multiples of {least} tokens or more in rows of {T}, "
            f"got {segment_multiple}: "
            f"one head's backward would take {bytes_ / 2**30:.1f} GiB"
        )
    return None


def cudnn_attention(q_BTNH, k_BTKH, v_BTKH, window, segment_ids_BT, segment_multiple) -> Any:
    """Causal attention of a sequence on itself; arguments as in `self_attention`."""
    # Room for one document only.
    if segment_ids_BT is None or segment_ids_BT.shape[1] <= segment_multiple:
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
      offsets_BM: [B, M + 1] int32, starts of up to M documents, -1 behind them. sizes_BM: [B, M]
        int32, -1 behind them.

    Returns: o_BTNH in q's dtype.
    """
    (B, T, N, H), K, M = q_BTNH.shape, k_BTKH.shape[2], sizes_BM.shape[1]
    # One document a row comes from a stream (cached.py), which has no backward and so no
    # workspace.
    rows, heads = _split_call(B, M, T, N, K, H) if M > 1 else (B, N)
    if (rows, heads) == (B, N):
        return _cudnn_call(q_BTNH, k_BTKH, v_BTKH, offsets_BM, sizes_BM, window)
    o_rows = []
    for r in _parts(B, rows):  # not lax.map, which took a sixth more time and memory
        o_heads = [
            _cudnn_call(
                q_BTNH[r, :, n],
                k_BTKH[r, :, k],
                v_BTKH[r, :, k],
                offsets_BM[r],
                sizes_BM[r],
                window,
            )
            for n, k in _head_parts(N, K, heads)
        ]
        o_rows.append(jnp.concatenate(o_heads, axis=2))
    return jnp.concatenate(o_rows)


def _workspace_bytes(M: int, T: int, H: int) -> int:
    """What cuDNN's backward takes for one query head of one row: a float32 gradient of the whole
    row for each document.

    As much again in calls whose KV heads serve several query heads each. Both fit what was measured
    (docs/performance.md).
    """
    return 4 * M * T * H


def _split_call(B: int, M: int, T: int, N: int, K: int, H: int) -> tuple[int, int]:
    """Rows and query heads of the largest call, such that its workspace stays within
    `_WORKSPACE_BYTES`.

    Several rows with all heads; or of one row the query heads of several KV heads; or some of one
    KV head. At least one head of one row, however large: `why_not` refuses those beforehand.
    """
    G = N // K
    fit = max(1, _WORKSPACE_BYTES // (_workspace_bytes(M, T, H) * (1 if G == 1 else 2)))
    if fit >= N:
        return _even(B, fit // N), N
    return 1, G * _even(K, fit // G) if fit >= G else _even(G, fit)


def _even(total: int, at_most: int) -> int:
    """Size of the largest part, when there are as few parts of at most `at_most` as can be, and
    equal up to one.
    """
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
    return [
        (slice(k * G + g.start, k * G + g.stop), slice(k, k + 1))
        for k in range(K)
        for g in _parts(G, heads)
    ]


def _cudnn_call(q_BTNH, k_BTKH, v_BTKH, offsets_BM, sizes_BM, window) -> Any:
    # jax ignores the offset of an only document; a second one, which is not there, makes it look.
    if sizes_BM.shape[1] == 1:
        offsets_BM, sizes_BM = (
            jnp.pad(x, ((0, 0), (0, 1)), constant_values=-1) for x in (offsets_BM, sizes_BM)
        )
    return jax_internals.cudnn_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        mask="PADDING_CAUSAL",
        q_seqlen=sizes_BM,
        kv_seqlen=sizes_BM,
        q_offsets=offsets_BM,
        kv_offsets=offsets_BM,
        scale=1 / math.sqrt(q_BTNH.shape[-1]),
        sliding_window_length=window,
    )


def _document_offsets(segment_ids_BT, multiple):
    """Start [B, M+1] and size [B, M] of each document, -1 where there are fewer; padding joins the
    document before it.

    The last column of the starts is always -1: cuDNN's wrapper takes it for the end of the whole
    batch.
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


def extend(q_BTNH, k_BTKH, v_BTKH, k_BKLH, v_BKLH, start_B):
    """Attention of new tokens on `start_B` older ones, in a cache, and on themselves.

    Two calls, merged by their log-sum-exps, because cuDNN's causal mask aligns the first query with
    the first key.
    """
    attend = functools.partial(
        jax_internals.cudnn_attention, scale=1 / math.sqrt(q_BTNH.shape[-1]), return_residual=True
    )
    own_BTNH, own_lse_BNT = attend(q_BTNH, k_BTKH, v_BTKH, mask="CAUSAL")
    # At least one key, so that a row without older tokens yields numbers, which get no weight.
    old_BNTH, old_lse_BNT = attend(
        jnp.swapaxes(q_BTNH, 1, 2),
        k_BKLH,
        v_BKLH,
        mask="PADDING",
        q_seqlen=jnp.full_like(start_B, q_BTNH.shape[1]),
        kv_seqlen=jnp.maximum(start_B, 1),
        qkv_layout="BNTH",
    )
    old_share_BNT = jax.nn.sigmoid(
        old_lse_BNT.astype(jnp.float32) - own_lse_BNT.astype(jnp.float32)
    )
    old_share_BNT = jnp.where((start_B > 0)[:, None, None], old_share_BNT, 0)
    old_share_BTN1 = jnp.swapaxes(old_share_BNT, 1, 2)[..., None]
    own_acc, old_acc = (
        own_BTNH.astype(jnp.float32),
        jnp.swapaxes(old_BNTH, 1, 2).astype(jnp.float32),
    )
    return (own_acc + old_share_BTN1 * (old_acc - own_acc)).astype(q_BTNH.dtype)


def forward_block(q_BANH, k_BAKH, v_BAKH, q_ids_BA, k_ids_BA, causal: bool):
    """A queries on A keys: the same tokens (`causal`), or all of them earlier ones. No gradient, no
    documents.

    Returns: o_BANH and the log-sum-exp [B, N, A], float32.
    """
    mask, scale = "CAUSAL" if causal else "NO_MASK", 1 / math.sqrt(q_BANH.shape[-1])
    o_BANH, lse_BNA = jax_internals.cudnn_attention(
        q_BANH, k_BAKH, v_BAKH, mask=mask, scale=scale, return_residual=True
    )
    return o_BANH.astype(lse_BNA.dtype), lse_BNA


def backward_block(
    q_BANH, k_BAKH, v_BAKH, q_ids_BA, k_ids_BA, causal: bool, o_BANH, lse_BNA, do_BANH
):
    """dq, dk, dv of one block, where o and the log-sum-exp are those of the whole row of blocks."""
    mask, scale = "CAUSAL" if causal else "NO_MASK", 1 / math.sqrt(q_BANH.shape[-1])
    return jax_internals.cudnn_attention_backward(
        q_BANH, k_BAKH, v_BAKH, lse_BNA, o_BANH, do_BANH, mask=mask, scale=scale
    )
