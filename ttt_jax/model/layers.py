"""What every layer is made of: its context, parameters, RMSNorm, rotary embedding.

B batch, T new tokens, N heads, H head dim.
Weights are stored as Hugging Face stores them, [out, in], so a checkpoint is taken over without a
copy.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx, struct

from ttt_jax.config import RopeConfig
from ttt_jax.ops.numerics import accumulator, precision_for
from ttt_jax.parallel.one_device import ONE_DEVICE, Devices


@struct.dataclass
class Head:
    """What predicts the next token, for targets that are prediction errors; without a gradient.

    Fields:
      norm: the final RMSNorm.
      weight_VD: output weight, compute dtype.
      rows_BTD: its rows of the tokens that are read.
    """

    norm: RMSNorm
    weight_VD: jax.Array
    rows_BTD: jax.Array


@struct.dataclass
class Context:
    """What every layer of one forward pass shares.

    Fields:
      rope: cos and sin, float32 [B or 1, T, H/2].
      start_B: tokens each row has read before this call (int32), None when all start fresh.
      lengths_B: real tokens of each row in this call (int32), None when all T are.
      segment_ids_BT: document of each token, 0 for padding; None for one document per row.
      embed_BTD: token embeddings, the `input_embed` source of the targets.
      head: of targets that are prediction errors; None for others.
      ttt_scale: factor on the inner learning rate; the number 0.0 switches TTT off.
      keep_state: whether the caller wants the state back.
      capacity: slots of a full-attention KV cache; None lets it grow with the input.
      at_chunk_start, ends_chunk: what the caller knows of the chunk clock (`Transformer.hidden`).
      probe: whether to measure what costs extra work, for telemetry.
      parallel: how attention and the op run on the devices at hand.
    """

    rope: tuple[jax.Array, jax.Array]
    start_B: jax.Array | None
    lengths_B: jax.Array | None
    segment_ids_BT: jax.Array | None
    embed_BTD: jax.Array
    head: Head | None = None
    ttt_scale: jax.Array | float = struct.field(pytree_node=False, default=1.0)
    keep_state: bool = struct.field(pytree_node=False, default=False)
    capacity: int | None = struct.field(pytree_node=False, default=None)
    at_chunk_start: bool = struct.field(pytree_node=False, default=False)
    ends_chunk: bool | None = struct.field(pytree_node=False, default=None)
    probe: bool = struct.field(pytree_node=False, default=False)
    parallel: Devices = struct.field(pytree_node=False, default=ONE_DEVICE)

    def pin(self, x_BTX, *axes: str | None) -> jax.Array:
        """Keep an activation where it lies on the mesh (`Devices.pin`)."""
        return self.parallel.pin(x_BTX, *axes)

    @property
    def position_B(self) -> jax.Array:
        """`start_B` of a stream that is read on."""
        assert self.start_B is not None, "a layer state without a position"
        return self.start_B


def param(key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> nnx.Param:
    """A float32 parameter with its logical axes; std 0 gives zeros, and one axis gives ones (a norm
    scale).
    """
    if len(shape) == 1 and std == 1.0:
        value = jnp.ones(shape, jnp.float32)
    else:
        value = (
            std * jax.random.normal(key, shape, jnp.float32)
            if std
            else jnp.zeros(shape, jnp.float32)
        )
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


# --------------------------------------------------------------------------------------------- rope


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[list[float], float]:
    """Inverse wavelengths [H/2] (radians per token) and the factor on cos and sin."""
    exponents = [2 * i / head_dim for i in range(head_dim // 2)]
    plain = [rope.base**-e for e in exponents]
    if rope.kind == "default":
        return plain, 1.0
    length = float(rope.original_max_positions or 0)
    # long wavelengths are stretched by `factor`, short ones kept, a smooth blend between
    if rope.kind == "llama3":
        low, high = length / rope.low_freq_factor, length / rope.high_freq_factor
        scaled = []
        for f in plain:
            wavelength = 2 * math.pi / f
            blend = (length / wavelength - rope.low_freq_factor) / (
                rope.high_freq_factor - rope.low_freq_factor
            )
            blend = 1.0 if wavelength < high else 0.0 if wavelength > low else blend
            scaled.append((1 - blend) * f / rope.factor + blend * f)
        return scaled, 1.0

    # the index whose wavelength makes this many turns over the original context
    def dimension(rotations):
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
    angles = (
        positions_BT.astype(jnp.float32)[:, :, None]
        * jnp.asarray(frequencies, jnp.float32)[None, None]
    )
    return factor * jnp.cos(angles), factor * jnp.sin(angles)


@jax.custom_vjp
def apply_rope(x_BTNH, rope):
    """Rotate pairs (i, i + H/2), the Hugging Face layout. No gradient flows to the tables.

    Written with a reversal of the halves, which XLA fuses with what is before it; slices and a
    concatenation it does not.
    """
    B, T, N, H = x_BTNH.shape
    x_BTN2h = x_BTNH.reshape(B, T, N, 2, H // 2).astype(accumulator(x_BTNH.dtype))
    cos, sin = rope
    spread = lambda *halves: jnp.broadcast_to(
        jnp.stack(halves, axis=2)[:, :, None].astype(x_BTN2h.dtype), x_BTN2h.shape
    )
    rotated = x_BTN2h * spread(cos, cos) + jnp.flip(x_BTN2h, axis=3) * spread(-sin, sin)
    return rotated.astype(x_BTNH.dtype).reshape(B, T, N, H)


def _rotate_back(rope, dx_BTNH):
    cos, sin = rope
    return apply_rope(dx_BTNH, (cos, -sin)), None


# The transpose of a rotation. Derived by jax, it would keep the tables spread over batch and heads
# for every layer.
apply_rope.defvjp(lambda x_BTNH, rope: (apply_rope(x_BTNH, rope), rope), _rotate_back)
