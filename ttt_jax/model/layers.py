"""The parts of a block that do not adapt: parameters, RMSNorm, rotary embedding, attention projections.

B batch, T new tokens, S keys, D model width, N query heads, K KV heads, G = N / K, H head dim.
Weights are stored as Hugging Face stores them, [out, in], so a checkpoint is taken over without a copy.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.ad_checkpoint import checkpoint_name

from ttt_jax.config.fields import ModelConfig, RopeConfig
from ttt_jax.ops.attention import cached as kv_cache
from ttt_jax.ops.attention.api import self_attention
from ttt_jax.ops.attention.cached import KVCache
from ttt_jax.ops.ttt.xla import accumulator, precision_for
from ttt_jax.parallel.shard_mapped import Parallel


@struct.dataclass
class Context:
    """What every layer of one forward pass shares.

    Fields:
      rope: cos and sin, float32 [B or 1, T, H/2].
      start_B: tokens each row has read before this call (int32), None when all start fresh.
      lengths_B: real tokens of each row in this call (int32), None when all T are.
      segment_ids_BT: document of each token, 0 for padding; None for one document per row.
      embed_BTD: token embeddings, the `input_embed` source of the targets.
      ttt_scale: factor on the inner learning rate; the number 0.0 switches TTT off.
      keep_state: whether the caller wants the state back.
      capacity: slots of a full-attention KV cache; None lets it grow with the input.
      at_chunk_start, ends_chunk: what the caller knows of the chunk clock (`Transformer.hidden`).
      probe: whether to measure what costs extra work, for telemetry.
      parallel: the parallel forms of attention and op; None on a single device.
    """

    rope: tuple[jax.Array, jax.Array]
    start_B: jax.Array | None
    lengths_B: jax.Array | None
    segment_ids_BT: jax.Array | None
    embed_BTD: jax.Array
    ttt_scale: jax.Array | float = struct.field(pytree_node=False, default=1.0)
    keep_state: bool = struct.field(pytree_node=False, default=False)
    capacity: int | None = struct.field(pytree_node=False, default=None)
    at_chunk_start: bool = struct.field(pytree_node=False, default=False)
    ends_chunk: bool | None = struct.field(pytree_node=False, default=None)
    probe: bool = struct.field(pytree_node=False, default=False)
    parallel: Parallel | None = struct.field(pytree_node=False, default=None)

    def pin(self, x_BTX, *axes: str | None) -> jax.Array:
        """Where an activation lies on the mesh (`Parallel.pin`); nothing on a single device."""
        return x_BTX if self.parallel is None else self.parallel.pin(x_BTX, *axes)

    @property
    def position_B(self) -> jax.Array:
        """`start_B` of a stream that is read on."""
        assert self.start_B is not None, "a layer state without a position"
        return self.start_B


def param(key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> nnx.Param:
    """A float32 parameter with its logical axes; std 0 gives zeros, and one axis gives ones (a norm scale)."""
    if len(shape) == 1 and std == 1.0:
        value = jnp.ones(shape, jnp.float32)
    else:
        value = std * jax.random.normal(key, shape, jnp.float32) if std else jnp.zeros(shape, jnp.float32)
    return nnx.Param(value, axes=axes)


def linear(x, w_OI, b_O=None):
    """x @ w^T + b in x's dtype."""
    y = jnp.einsum("...i,oi->...o", x, w_OI[...].astype(x.dtype), precision=precision_for(x.dtype))
    return y if b_O is None else y + jnp.broadcast_to(b_O[...].astype(y.dtype), y.shape)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32."""

    def __init__(self, size: int, axis: str, eps: float, *, key: jax.Array):
        self.scale = param(key, (size,), (axis,), 1.0)
        self.eps = eps

    def __call__(self, x):
        acc = accumulator(x.dtype)
        y = x.astype(acc)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * jnp.broadcast_to(self.scale[...].astype(acc), y.shape)).astype(x.dtype)


# ------------------------------------------------------------------------------------------------------------- rope


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[list[float], float]:
    """Inverse wavelengths [H/2] (radians per token) and the factor on cos and sin."""
    exponents = [2 * i / head_dim for i in range(head_dim // 2)]
    plain = [rope.base**-e for e in exponents]
    if rope.kind == "default":
        return plain, 1.0
    length = float(rope.original_max_positions or 0)
    if rope.kind == "llama3":  # long wavelengths are stretched by `factor`, short ones kept, a smooth blend between
        low, high = length / rope.low_freq_factor, length / rope.high_freq_factor
        scaled = []
        for f in plain:
            wavelength = 2 * math.pi / f
            blend = (length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            blend = 1.0 if wavelength < high else 0.0 if wavelength > low else blend
            scaled.append((1 - blend) * f / rope.factor + blend * f)
        return scaled, 1.0

    def dimension(rotations):  # the index whose wavelength makes this many turns over the original context
        return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.base))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
    ramp = [min(max((i - low) / max(high - low, 1e-3), 0.0), 1.0) for i in range(head_dim // 2)]
    scaled = [f / rope.factor * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True)]
    default_attention = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return scaled, rope.attention_factor or default_attention


def rope_tables(rope: RopeConfig, head_dim: int, positions_BT) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, T, H/2]."""
    frequencies, factor = rope_frequencies(rope, head_dim)
    angles = positions_BT.astype(jnp.float32)[:, :, None] * jnp.asarray(frequencies, jnp.float32)[None, None]
    return factor * jnp.cos(angles), factor * jnp.sin(angles)


@jax.custom_vjp
def apply_rope(x_BTNH, rope):
    """Rotate pairs (i, i + H/2), the Hugging Face layout. No gradient flows to the tables.

    Written with a reversal of the halves, which XLA fuses with what is before it; slices and a concatenation it does not.
    """
    B, T, N, H = x_BTNH.shape
    x_BTN2h = x_BTNH.reshape(B, T, N, 2, H // 2).astype(accumulator(x_BTNH.dtype))
    cos, sin = rope
    spread = lambda *halves: jnp.broadcast_to(jnp.stack(halves, axis=2)[:, :, None].astype(x_BTN2h.dtype), x_BTN2h.shape)
    rotated = x_BTN2h * spread(cos, cos) + jnp.flip(x_BTN2h, axis=3) * spread(-sin, sin)
    return rotated.astype(x_BTNH.dtype).reshape(B, T, N, H)


def _rotate_back(rope, dx_BTNH):
    cos, sin = rope
    return apply_rope(dx_BTNH, (cos, -sin)), None


# The transpose of a rotation. Derived by jax, it would keep the tables spread over batch and heads for every layer.
apply_rope.defvjp(lambda x_BTNH, rope: (apply_rope(x_BTNH, rope), rope), _rotate_back)


# -------------------------------------------------------------------------------------------------------- attention


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
        self.o = param(next(keys), (D, N * H), ("embed", "heads"), std / math.sqrt(2 * cfg.num_layers))
        bias = lambda size, axis: param(key, (size,), (axis,), 0.0)
        self.q_bias = bias(N * H, "heads") if cfg.qkv_bias else None
        self.k_bias = bias(K * H, "kv_heads") if cfg.qkv_bias else None
        self.v_bias = bias(K * H, "kv_heads") if cfg.qkv_bias else None
        self.o_bias = bias(D, "embed") if cfg.o_bias else None
        self.q_norm = RMSNorm(H, "head_dim", cfg.norm_eps, key=next(keys)) if cfg.qk_norm else None
        self.k_norm = RMSNorm(H, "head_dim", cfg.norm_eps, key=next(keys)) if cfg.qk_norm else None

    def __call__(self, x_BTD, ctx: Context, cache: KVCache | None, implementation: str | None):
        """Returns the branch's output [B, T, D] and the cache to continue with (None unless ctx.keep_state)."""
        B, T, _ = x_BTD.shape
        cfg, name = self.cfg, checkpoint_name
        with jax.named_scope("qkv"):
            q_BTNH = linear(x_BTD, self.q, self.q_bias).reshape(B, T, cfg.num_heads, cfg.head_dim)
            k_BTKH = linear(x_BTD, self.k, self.k_bias).reshape(B, T, cfg.num_kv_heads, cfg.head_dim)
            v_BTKH = linear(x_BTD, self.v, self.v_bias).reshape(B, T, cfg.num_kv_heads, cfg.head_dim)
            if ctx.parallel is not None:
                q_axis, kv_axis = ctx.parallel.head_axes(cfg.num_heads, cfg.num_kv_heads)
                q_BTNH = ctx.pin(q_BTNH, q_axis, None)
                k_BTKH, v_BTKH = (ctx.pin(x, kv_axis, None) for x in (k_BTKH, v_BTKH))
            if self.q_norm is not None and self.k_norm is not None:
                q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
            q_BTNH, k_BTKH = apply_rope(q_BTNH, ctx.rope), apply_rope(k_BTKH, ctx.rope)
            q_BTNH, k_BTKH, v_BTKH = name(q_BTNH, "qkv"), name(k_BTKH, "qkv"), name(v_BTKH, "qkv")
        with jax.named_scope("attention"):
            if cache is None:
                attend = self_attention if ctx.parallel is None else ctx.parallel.attention
                o_BTNH = attend(
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
        return kv_cache.empty(batch, self.cfg.num_kv_heads, self.window or capacity, self.cfg.head_dim, dtype)

    def _fill(self, k_BTKH, v_BTKH, ctx: Context) -> KVCache:
        B, T = k_BTKH.shape[:2]
        if self.window is None and ctx.capacity in (None, T):
            return KVCache(jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2))
        empty = self.init_cache(B, ctx.capacity or T, k_BTKH.dtype)
        start_B = jnp.zeros((B,), jnp.int32)
        return kv_cache.write(empty, k_BTKH, v_BTKH, start_B, ctx.lengths_B, ring=self.window is not None)

    def _continue(self, q_BTNH, k_BTKH, v_BTKH, ctx: Context, cache: KVCache, implementation: str | None):
        T, start_B, ring = q_BTNH.shape[1], ctx.position_B, self.window is not None
        if not ring and ctx.capacity is None:  # a cache without a capacity grows
            cache = kv_cache.grow(cache, T)
        old, cache = cache, kv_cache.write(cache, k_BTKH, v_BTKH, start_B, ctx.lengths_B, ring=ring)
        new = (q_BTNH, k_BTKH, v_BTKH)
        if T == 1:
            o_BTNH = kv_cache.decode(q_BTNH, cache, start_B, ring=ring)
        elif ring:
            o_BTNH = kv_cache.extend_window(*new, old, start_B, implementation=implementation)
        else:
            o_BTNH = kv_cache.extend(*new, cache, start_B, implementation=implementation)
        return o_BTNH, cache
