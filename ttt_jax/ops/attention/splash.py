"""Attention on TPU: jax's splash attention, which skips the blocks that nobody sees, for full and
sliding-window attention.

B batch, T tokens, A tokens of a block of work, N query heads, K KV heads, H head dim.

The kernel takes one sequence [N, T, H] (vmapped over B), no scale, and whole blocks of a multiple
of 128 tokens. So queries are scaled here, in float32, and sequences padded at their end, where
causality hides the padding from every real query.

`splash_attention` is the whole of it, with gradients. `forward_block` and `backward_block` are what
sharded.py merges: some queries against some keys, and the gradient of that given the
statistics of the whole row.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib

from ttt_jax import jax_internals
from ttt_jax.ops import platform

LANES = 128
BLOCK = 512  # tokens on a side of a block of logits
# For sequences above LONG, because the table of blocks lies in a small scalar memory.
LONG_BLOCK, LONG = 1024, 65536
LONGEST = 262144
# the name under which `remat_save` keeps the kernel's output and log-sum-exp
RESIDUALS = "attention"

_interpreted: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted", default=False)


@contextlib.contextmanager
def interpreted():
    """Kernels traced inside run in Pallas' interpreter, on any platform, in float32 too. For tests:
    slow.
    """
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def why_not(q_BTNH) -> str | None:
    """Why these queries cannot be attended to here, or None."""
    if _interpreted.get():
        return None
    if (name := platform.compiled_for()) != "tpu":
        return f"needs a TPU, this is {name}"
    if q_BTNH.dtype != jnp.bfloat16:
        return f"needs bfloat16, got {q_BTNH.dtype}"
    if q_BTNH.shape[1] > LONGEST:
        return (
            f"takes at most {LONGEST} tokens on a device, got {q_BTNH.shape[1]}; split the "
            "sequence (mesh.context)"
        )
    if not platform.may_be_one_device():
        return (
            "a kernel is not partitioned over a mesh; it runs inside a shard_map over every "
            "mesh axis"
        )
    return None


def why_not_blocks(A: int) -> str | None:
    """Why blocks of A queries and A keys do not go into whole blocks of the kernel, or None."""
    return f"half a shard must be a multiple of {LANES} tokens, got {A}" if A % LANES else None


def splash_attention(
    q_BTNH, k_BTKH, v_BTKH, *, window: int | None = None, segment_ids_BT=None
) -> jax.Array:
    """Causal attention of a sequence on itself, as `ttt_jax.ops.attention.api.self_attention`.

    Args:
      window: tokens a query sees, itself included; None for all.
      segment_ids_BT: document of each token.

    Returns: o_BTNH in q's dtype.
    """
    T, N = q_BTNH.shape[1:3]
    block, padded = block_size(T, window)
    kernel = _kernel(
        _Causal(padded, None if window is None or window >= T else window),
        N,
        block,
        False,
        _interpreted.get(),
    )
    pad = lambda x_BTX: jnp.pad(x_BTX, ((0, 0), (0, padded - T), *((0, 0),) * (x_BTX.ndim - 2)))
    q_BNTH, k_BKTH, v_BKTH = (_by_head(pad(x)) for x in (_scaled(q_BTNH), k_BTKH, v_BTKH))
    ids_BT = None if segment_ids_BT is None else pad(segment_ids_BT)
    return _by_head(_rows(kernel, q_BNTH, k_BKTH, v_BKTH, ids_BT, ids_BT))[:, :T]


def forward_block(
    q_BANH, k_BAKH, v_BAKH, q_ids_BA, k_ids_BA, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """A queries on A keys, the same tokens (`causal`) or all of them earlier ones. No gradient.

    Returns: o_BANH and the log-sum-exp [B, N, A], float32. A query that sees no key has a
    log-sum-exp near float32's lowest.
    """
    kernel = _block_kernel(q_BANH, causal)
    q_BNAH, k_BKAH, v_BKAH = map(_by_head, (_scaled(q_BANH), k_BAKH, v_BAKH))
    o_BNAH, (lse_BNA,) = _rows(kernel, q_BNAH, k_BKAH, v_BKAH, q_ids_BA, k_ids_BA)
    return _by_head(o_BNAH).astype(jnp.float32), lse_BNA


def backward_block(
    q_BANH, k_BAKH, v_BAKH, q_ids_BA, k_ids_BA, causal: bool, o_BANH, lse_BNA, do_BANH
):
    """dq, dk, dv of one block, where o and the log-sum-exp are those of the whole row of blocks."""
    kernel = _block_kernel(q_BANH, causal)

    def one_row(q, k, v, q_ids, k_ids, o, lse, do):
        ids = None if q_ids is None else kernel_lib.SegmentIds(q_ids, k_ids)
        return jax_internals.splash_attention_backward(kernel, q, k, v, ids, o, lse, do)

    q, k, v, o, do = map(_by_head, (_scaled(q_BANH), k_BAKH, v_BAKH, o_BANH, do_BANH))
    dq, dk, dv = map(_by_head, jax.vmap(one_row)(q, k, v, q_ids_BA, k_ids_BA, o, lse_BNA, do))
    return dq.astype(jnp.float32) / math.sqrt(q_BANH.shape[-1]), dk, dv


def _scaled(q_BTNH):
    return (q_BTNH.astype(jnp.float32) / math.sqrt(q_BTNH.shape[-1])).astype(q_BTNH.dtype)


def _by_head(x_BTNH):
    """Exchange tokens and heads; its own inverse."""
    return jnp.swapaxes(x_BTNH, 1, 2)


def _rows(kernel, q_BNTH, k_BKTH, v_BKTH, q_ids_BT, k_ids_BT):
    """The kernel on each row of the batch."""
    if q_ids_BT is None or k_ids_BT is None:
        return jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH)
    one_row = lambda q, k, v, q_ids, k_ids: kernel(q, k, v, kernel_lib.SegmentIds(q_ids, k_ids))
    return jax.vmap(one_row)(q_BNTH, k_BKTH, v_BKTH, q_ids_BT, k_ids_BT)


def block_size(T: int, window: int | None = None) -> tuple[int, int]:
    """Side of a block, and T rounded up to whole blocks. A window has no use for blocks much longer
    than itself.
    """
    longest = LONG_BLOCK if T > LONG else BLOCK
    if window is not None:
        longest = min(longest, _round_up(window, LANES))
    blocks = -(-T // longest)
    block = _round_up(-(-T // blocks), LANES)
    return block, blocks * block


def _block_kernel(q_BANH, causal: bool) -> Any:
    A, N = q_BANH.shape[1:3]
    longest = LONG_BLOCK if A > LONG else BLOCK
    block = next(size for size in range(longest, 0, -LANES) if A % size == 0)
    return _kernel(_Causal(A, None) if causal else _All(A), N, block, True, _interpreted.get())


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@functools.lru_cache(maxsize=64)
def _kernel(mask: mask_lib.Mask, N: int, block: int, statistics: bool, interpret: bool) -> Any:
    """The kernel of one shape, which returns the log-sum-exp too if `statistics`. What it holds are
    NumPy arrays, which any trace may use as constants.
    """
    compute = next(size for size in range(min(block, BLOCK), 0, -LANES) if block % size == 0)
    sizes = kernel_lib.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
        block_q_dq=block,
        block_kv_dq=block,
    )
    with jax.ensure_compile_time_eval():
        kernel = kernel_lib.make_splash_mha(
            mask_lib.MultiHeadMask([mask] * N),
            block_sizes=sizes,
            save_residuals=statistics,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=None if statistics else RESIDUALS,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


class _Causal(mask_lib.Mask):
    """The mask of a window, or of all tokens before.

    jax's own `CausalMask` and `LocalMask` compute every one of the T^2 entries on the host to find
    the blocks that are seen (two minutes for 128k tokens). Of a block only `any` and `all` are
    asked, so a block here consists of those two; entries are computed inside the kernel, by
    `mask_function`.
    """

    def __init__(self, T: int, window: int | None) -> None:
        self.T, self.window = T, T if window is None else window
        self.q_sequence = np.arange(T, dtype=np.int32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.T, self.T

    def __getitem__(self, idx) -> np.ndarray:
        q, k = idx
        # tokens that a key may lie before a query
        least, most = q.start - (k.stop - 1), q.stop - 1 - k.start
        seen = most >= 0 and least < self.window
        return np.array([[seen, seen and least >= 0 and most < self.window]])

    def mask_function(self, q_ids, k_ids):
        seen = q_ids >= k_ids
        return seen if self.window >= self.T else seen & (q_ids - k_ids < self.window)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Causal) and (self.T, self.window) == (other.T, other.window)

    def __hash__(self) -> int:
        return hash((_Causal, self.T, self.window))


class _All(mask_lib.Mask):
    """Every query sees every key."""

    def __init__(self, T: int) -> None:
        self.T = T

    @property
    def shape(self) -> tuple[int, ...]:
        return self.T, self.T

    def __getitem__(self, idx) -> np.ndarray:
        return np.ones((1, 1), bool)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _All) and self.T == other.T

    def __hash__(self) -> int:
        return hash((_All, self.T))
