"""Grouped-query attention of one layer: projections, rotation, the KV cache.

B batch, T new tokens, D model width, N query heads, K KV heads, H head dim.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ttt_jax.config import ModelConfig
from ttt_jax.model.layers import Context, RMSNorm, apply_rope, linear, param
from ttt_jax.ops.attention import cached as kv_cache
from ttt_jax.ops.attention.cached import KVCache


class Attention(nnx.Module):
    """Grouped-query attention; `window` None is full causal attention."""

    def __init__(self, cfg: ModelConfig, window: int | None, *, key: jax.Array):
        self.cfg, self.window = cfg, window
        D, N, K, H, std = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.init_std
        keys = iter(jax.random.split(key, 6))
        self.q = param(next(keys), (N * H, D), ("heads", "embed"), std)
        self.k = param(next(keys), (K * H, D), ("kv_heads", "embed"), std)
        self.v = param(next(keys), (K * H, D), ("kv_heads", "embed"), std)
        # Residual branches start smaller in deep models (GPT-2).
        self.o = param(
            next(keys), (D, N * H), ("embed", "heads"), std / math.sqrt(2 * cfg.num_layers)
        )
        bias = lambda size, axis: param(key, (size,), (axis,), 0.0)
        self.q_bias = bias(N * H, "heads") if cfg.qkv_bias else None
        self.k_bias = bias(K * H, "kv_heads") if cfg.qkv_bias else None
        self.v_bias = bias(K * H, "kv_heads") if cfg.qkv_bias else None
        self.o_bias = bias(D, "embed") if cfg.o_bias else None
        self.q_norm = RMSNorm(H, "head_dim", cfg.norm_eps, key=next(keys)) if cfg.qk_norm else None
        self.k_norm = RMSNorm(H, "head_dim", cfg.norm_eps, key=next(keys)) if cfg.qk_norm else None

    def __call__(self, x_BTD, ctx: Context, cache: KVCache | None, implementation: str | None):
        """Returns the branch's output [B, T, D] and the cache to continue with (None unless
        ctx.keep_state).
        """
        B, T, _ = x_BTD.shape
        cfg, name = self.cfg, checkpoint_name
        with jax.named_scope("qkv"):
            q_BTNH = linear(x_BTD, self.q, self.q_bias).reshape(B, T, cfg.num_heads, cfg.head_dim)
            k_BTKH = linear(x_BTD, self.k, self.k_bias).reshape(
                B, T, cfg.num_kv_heads, cfg.head_dim
            )
            v_BTKH = linear(x_BTD, self.v, self.v_bias).reshape(
                B, T, cfg.num_kv_heads, cfg.head_dim
            )
            q_axis, kv_axis = ctx.parallel.head_axes(cfg.num_heads, cfg.num_kv_heads)
            q_BTNH = ctx.pin(q_BTNH, q_axis, None)
            k_BTKH, v_BTKH = (ctx.pin(x, kv_axis, None) for x in (k_BTKH, v_BTKH))
            if self.q_norm is not None and self.k_norm is not None:
                q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
            q_BTNH, k_BTKH = apply_rope(q_BTNH, ctx.rope), apply_rope(k_BTKH, ctx.rope)
            q_BTNH, k_BTKH, v_BTKH = name(q_BTNH, "qkv"), name(k_BTKH, "qkv"), name(v_BTKH, "qkv")
        with jax.named_scope("attention"):
            if cache is None:
                o_BTNH = ctx.parallel.attention(
                    q_BTNH,
                    k_BTKH,
                    v_BTKH,
                    window=self.window,
                    segment_ids_BT=ctx.segment_ids_BT,
                    segment_multiple=cfg.ttt.chunk_size,
                    implementation=implementation,
                )
                cache = self._fill(k_BTKH, v_BTKH, ctx) if ctx.keep_state else None
            else:
                o_BTNH, cache = self._continue(q_BTNH, k_BTKH, v_BTKH, ctx, cache, implementation)
        with jax.named_scope("attention_out"):
            y_BTD = linear(o_BTNH.reshape(B, T, -1), self.o, self.o_bias)
        return name(y_BTD, "attention_out"), cache

    def init_cache(self, batch: int, capacity: int, dtype) -> KVCache:
        """An empty cache; a window needs no more slots than itself."""
        return kv_cache.empty(
            batch, self.cfg.num_kv_heads, self.window or capacity, self.cfg.head_dim, dtype
        )

    def _fill(self, k_BTKH, v_BTKH, ctx: Context) -> KVCache:
        B, T = k_BTKH.shape[:2]
        if self.window is None and ctx.capacity in (None, T):
            return KVCache(jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2))
        empty = self.init_cache(B, ctx.capacity or T, k_BTKH.dtype)
        start_B = jnp.zeros((B,), jnp.int32)
        return ctx.parallel.write_cache(
            empty, k_BTKH, v_BTKH, start_B, ctx.lengths_B, ring=self.window is not None
        )

    def _continue(
        self, q_BTNH, k_BTKH, v_BTKH, ctx: Context, cache: KVCache, implementation: str | None
    ):
        ring = self.window is not None
        if not ring and ctx.capacity is None:  # a cache without a capacity grows
            cache = kv_cache.grow(cache, q_BTNH.shape[1])
        return ctx.parallel.cached_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            cache,
            ctx.position_B,
            ctx.lengths_B,
            ring=ring,
            implementation=implementation,
        )
