"""The adaptive MLP: SwiGLU whose down-projection is a fast weight, and its target module.

B batch, T new tokens, D model width, F MLP width, C chunk size, M chunks, S accumulated update (D
F). In-Place TTT, https://arxiv.org/abs/2604.06169, section 3. How a stream goes on in the middle of
a chunk is in ttt_stream.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ttt_jax.config import ModelConfig, TargetSource
from ttt_jax.model import prediction_error, ttt_stream
from ttt_jax.model.layers import Context, linear, param
from ttt_jax.model.ttt_stream import TTTState
from ttt_jax.ops import write_chunk
from ttt_jax.ops.numerics import accumulator, precision_for
from ttt_jax.ops.ttt.chunk_updates import written_chunks
from ttt_jax.ops.ttt.targets import convolved
from ttt_jax.ops.ttt.writes import TARGET, transformed
from ttt_jax.parallel.one_device import ONE_DEVICE, Devices

KERNEL = 5  # taps of the target convolution: two past tokens, the token itself, two future tokens


def initial_target(key: jax.Array, D: int, std: float) -> tuple[jax.Array, jax.Array]:
    """Make the target's parameters: convolution [D, KERNEL] of zeros, diagonal W_target [D, D] ~
    N(0, std^2).

    Both are float32. The model starts as if it had no fast weights (paper, appendix; the same from
    scratch and for continual training, where hf_weights.py reads it row by row).
    """
    diagonal_D = std * jax.random.normal(key, (D,), jnp.float32)
    return jnp.zeros((D, KERNEL), jnp.float32), jnp.diag(diagonal_D)


class Target(nnx.Module):
    """Targets v = conv(source) @ W_target: a depthwise convolution inside each chunk, then an
    optional projection.

    The convolution is centred: it sees two *future* tokens. That is causal all the same, because
    the update of a chunk reaches only later chunks; the zero padding at both edges of every chunk
    keeps it inside.
    """

    def __init__(self, cfg: ModelConfig, source: TargetSource, *, key: jax.Array):
        D = cfg.d_model
        # errors are made of rows that are normalised; the size of an error says how much is new
        self.normalize_source = cfg.ttt.normalize_source and source != "prediction_error"
        conv_DK, proj_DD = initial_target(key, D, cfg.init_std)
        self.conv = nnx.Param(conv_DK[:, None], axes=("embed", "conv_in", "conv_taps"))
        self.proj = nnx.Param(proj_DD, axes=("embed", "embed_out")) if cfg.ttt.proj else None

    def __call__(
        self,
        source_BTD,
        chunk_size: int,
        pin: Callable[[jax.Array], jax.Array] = lambda x: x,
        written_BM=None,
    ):
        """Targets [B, T, D] for whole chunks (T a multiple of the chunk), in the source's dtype.
        `pin`: see `Context.pin`; `written_BM`: as in `convolved`.
        """
        dtype = source_BTD.dtype
        with jax.named_scope("ttt_target"):
            options = self.conv[...], chunk_size, self.normalize_source, written_BM
            t_BTD = pin(convolved(source_BTD, *options))
            # t @ W as the checkpoint stores it, not t @ W^T as an nn.Linear would
            if self.proj is not None:
                weight = self.proj[...].astype(dtype)
                t_BTD = pin(
                    jnp.einsum("btd,de->bte", t_BTD, weight, precision=precision_for(dtype))
                )
        return t_BTD


class MLP(nnx.Module):
    """SwiGLU. With a `source` of targets its down-projection adapts to the sequence."""

    def __init__(self, cfg: ModelConfig, source: TargetSource | None, *, key: jax.Array):
        self.cfg = cfg
        self.source: TargetSource | None = source
        D, F, std = cfg.d_model, cfg.d_ff, cfg.init_std
        keys = jax.random.split(key, 4)
        self.gate = param(keys[0], (F, D), ("mlp", "embed"), std)
        self.up = param(keys[1], (F, D), ("mlp", "embed"), std)
        self.down = param(keys[2], (D, F), ("embed", "mlp"), std / math.sqrt(2 * cfg.num_layers))
        bias = lambda size, axis: param(key, (size,), (axis,), 0.0)
        self.gate_bias = bias(F, "mlp") if cfg.mlp_bias else None
        self.up_bias = bias(F, "mlp") if cfg.mlp_bias else None
        self.down_bias = bias(D, "embed") if cfg.mlp_bias else None
        self.target = Target(cfg, source, key=keys[3]) if source is not None else None

    def __call__(self, x_BTD, ctx: Context, state: TTTState | None, h_BTD=None):
        """Returns (y_BTD, state, stats); state and stats are None for an MLP that does not adapt.

        `h_BTD`: what y is added to, which prediction errors and the read cap are made of.

        `stats` holds per sequence ||S||_F / ||W||_F after the call, and the Frobenius norm of the
        update of the first sequence's last whole chunk, as it was written: clipped, and 0 where the
        chunk holds padding.
        """
        with jax.named_scope("mlp_up"):
            gate_BTF = checkpoint_name(linear(x_BTD, self.gate, self.gate_bias), "mlp_gate")
            up_BTF = checkpoint_name(linear(x_BTD, self.up, self.up_bias), "mlp_up")
            z_BTF = checkpoint_name(ctx.pin(jax.nn.silu(gate_BTF) * up_BTF, "mlp"), "mlp_hidden")
        if self.target is None or (isinstance(ctx.ttt_scale, float) and ctx.ttt_scale == 0.0):
            if state is not None:
                source_BTX = self._source(x_BTD, z_BTF, h_BTD, ctx)
                state = ttt_stream.pass_over(z_BTF, source_BTX, ctx, state)
            with jax.named_scope("mlp_down"):
                return linear(z_BTF, self.down, self.down_bias), state, None
        source_BTX = self._source(x_BTD, z_BTF, h_BTD, ctx)
        if state is None or ctx.at_chunk_start:
            y_BTD, state, stats = self._from_boundary(z_BTF, source_BTX, ctx, state)
        elif z_BTF.shape[1] == 1:
            y_BTD, state, stats = ttt_stream.append_token(self, z_BTF, source_BTX, ctx, state)
        else:
            y_BTD, state, stats = ttt_stream.read_on(self, z_BTF, source_BTX, ctx, state)
        if self.cfg.ttt.read_cap is not None:  # the op has read S alone
            assert h_BTD is not None
            with jax.named_scope("ttt_read_cap"):
                slow_BTD = linear(z_BTF, self.down, self.down_bias)
                read_BTD = capped(y_BTD, h_BTD + slow_BTD, self.cfg.ttt.read_cap)
                return slow_BTD + read_BTD, state, stats
        if self.down_bias is not None:
            y_BTD = y_BTD + jnp.broadcast_to(self.down_bias[...].astype(y_BTD.dtype), y_BTD.shape)
        return y_BTD, state, stats

    def init_state(self, batch: int, dtype) -> TTTState:
        """The state of streams that have read nothing; z and source in `dtype`."""
        cfg = self.cfg
        width = source_width(cfg.d_model, self.source)
        return ttt_stream.empty(batch, cfg.ttt.chunk_size, cfg.d_model, cfg.d_ff, width, dtype)

    @property
    def chunk_size(self) -> int:
        return self.cfg.ttt.chunk_size

    def inner_rate(self, ctx: Context, acc) -> jax.Array:
        return jnp.asarray(self.cfg.ttt.lr, acc) * jnp.asarray(ctx.ttt_scale, acc)

    def op(
        self,
        z_BTF,
        v_BTD,
        lr,
        S_BDF,
        whole_B=None,
        segment_ids_BT=None,
        devices: Devices = ONE_DEVICE,
    ):
        """Apply and write: `ttt_jax.ops.in_place_ttt` with the layer's slow weight and settings.
        With a read cap W is zero, so that z S^T comes alone, in one product.
        `whole_B`: the chunks of each row that are written; None: all.
        """
        ttt, weight_DF, apply = self.cfg.ttt, self.down[...], self.cfg.ttt.apply
        if ttt.read_cap is not None:
            weight_DF, apply = jnp.zeros_like(weight_DF), "fused"
        if ttt.decay != 1 and S_BDF is not None:
            B, M = z_BTF.shape[0], z_BTF.shape[1] // ttt.chunk_size
            written_B = jnp.full((B,), M, jnp.int32) if whole_B is None else whole_B
            whole_B = _written(written_B, lr)
        return devices.in_place_ttt(
            z_BTF,
            v_BTD,
            weight_DF,
            lr=lr,
            chunk_size=ttt.chunk_size,
            state=S_BDF,
            segment_ids=segment_ids_BT,
            written=self._documents_written(segment_ids_BT),
            decay=ttt.decay,
            whole_chunks=whole_B,
            clip_norm=ttt.clip_norm,
            apply=apply,
            implementation=ttt.implementation,
        )

    def write(self, z_BCF, v_BCD, lr, S_BDF, whole_B):
        """Write one whole chunk of the rows whose `whole_B` is 1: `ttt_jax.ops.write_chunk`."""
        ttt = self.cfg.ttt
        return write_chunk(
            z_BCF,
            v_BCD,
            S_BDF,
            lr=lr,
            decay=ttt.decay,
            whole_chunks=_written(whole_B, lr),
            clip_norm=ttt.clip_norm,
        )

    def _source(self, x_BTD, z_BTF, h_BTD, ctx: Context):
        """What targets are made of, [B, T, `source_width`]."""
        if self.source == "hidden_states":
            return x_BTD
        if self.source == "input_embed":
            return ctx.embed_BTD
        assert ctx.head is not None
        # With a read cap __call__ has this product, too; XLA computes it once.
        return prediction_error.source(h_BTD + linear(z_BTF, self.down, self.down_bias), ctx.head)

    def targets(self, z_BTF, source_BTX, ctx: Context, whole_B=None):
        """Make the op's targets: what whole chunks write, zeros for the rest, and for chunks that
        hold padding. `whole_B` limits the chunks of each row.
        """
        ttt, C, devices = self.cfg.ttt, self.cfg.ttt.chunk_size, ctx.parallel
        B, T, _ = source_BTX.shape
        M = T // C
        if self.target is None or M == 0:
            return jnp.zeros((B, T, self.cfg.d_model), source_BTX.dtype)
        source_BTX = source_BTX[:, : M * C]
        if self.source == "prediction_error":
            assert ctx.head is not None
            options = {"normalize": ttt.normalize_source, "devices": devices}
            error_BTD = prediction_error.prediction_error(source_BTX, ctx.head, C, **options)
            source_BTX = checkpoint_name(devices.pin(error_BTD), TARGET)
        written_BM = self._documents_written(ctx.segment_ids_BT)
        if written_BM is not None:
            written_BM = written_BM[:, :M]
        v_BTD = self.target(source_BTX, C, devices.pin, written_BM)
        if ttt.write == "sum":
            v_BTD = checkpoint_name(v_BTD, TARGET)
        else:
            options = {"ridge": ttt.ridge, "over_chunks": devices.over_chunks}
            v_BTD = devices.pin(transformed(ttt.write, z_BTF[:, : M * C], v_BTD, C, **options))
        if whole_B is not None:
            written_BT = (jnp.arange(M * C, dtype=jnp.int32) // C)[None] < whole_B[:, None]
            v_BTD = jnp.where(written_BT[:, :, None], v_BTD, 0)
        return jnp.pad(v_BTD, ((0, 0), (0, T - M * C), (0, 0)))

    def _documents_written(self, segment_ids_BT):
        """`written_chunks` of packed rows. No write makes anything of a chunk whose targets are
        zero.
        """
        return None if segment_ids_BT is None else written_chunks(segment_ids_BT, self.chunk_size)

    def _slow_norm(self, acc):
        """||W||_F, without a gradient."""
        return jnp.sqrt(jnp.sum(jnp.square(jax.lax.stop_gradient(self.down[...]).astype(acc))))

    def stats(self, S_BDF, update_norm_B) -> dict[str, jax.Array]:
        """What `__call__` reports, given the norm of the last update before it was clipped."""
        if self.cfg.ttt.clip_norm is not None:
            update_norm_B = jnp.minimum(update_norm_B, self.cfg.ttt.clip_norm)
        slow = self._slow_norm(S_BDF.dtype)
        fast_B = jnp.sqrt(jnp.sum(jnp.square(S_BDF), axis=(1, 2)))
        return {
            "state_ratio_B": jax.lax.stop_gradient(fast_B / slow),
            "update_norm_B": update_norm_B,
        }

    def _from_boundary(self, z_BTF, source_BTX, ctx: Context, state: TTTState | None):
        """Every row starts, or stands at the start of a chunk (or reads nothing)."""
        B, C = z_BTF.shape[0], self.chunk_size
        lr = self.inner_rate(ctx, accumulator(z_BTF.dtype))
        whole_B = None if ctx.lengths_B is None else ctx.lengths_B // C
        v_BTD = self.targets(z_BTF, source_BTX, ctx, whole_B)
        devices = ctx.parallel
        S_BDF = None if state is None else state.S_BDF
        y_BTD, S_BDF = self.op(z_BTF, v_BTD, lr, S_BDF, whole_B, ctx.segment_ids_BT, devices)
        norm_B = devices.last_update_norm(z_BTF, v_BTD, lr, C)
        if ctx.segment_ids_BT is not None and (M := z_BTF.shape[1] // C):
            ids_C = ctx.segment_ids_BT[0, (M - 1) * C : M * C]
            norm_B = jnp.where((ids_C[0] != 0) & (ids_C == ids_C[0]).all(), norm_B, 0)
        stats = self.stats(S_BDF, norm_B)
        if ctx.probe:
            cosine = devices.update_cosine(z_BTF, v_BTD, C, ctx.segment_ids_BT)
            stats["update_cosine_B"] = jnp.broadcast_to(cosine, (B,))
        if not ctx.keep_state:
            return y_BTD, None, stats
        state = ttt_stream.state_behind(z_BTF, source_BTX, S_BDF, C, ctx.lengths_B, state)
        return y_BTD, state, stats


def capped(read_BTD, h_BTD, cap: float):
    """Limit what tokens read from S: r / sqrt(1 + (rms(r) / (cap rms(h)))^2), in r's dtype.

    Small reads stay as they are, and none is larger than `cap` times the layer's output without S,
    h, by rms. So a word that S has learnt too well costs a bounded number of nats. An h below 5e-7
    by rms counts as that (float32), so that gradients stay finite.
    """
    acc = accumulator(read_BTD.dtype)
    square = lambda x: jnp.mean(jnp.square(x), axis=2, keepdims=True)
    size_BT1 = jnp.maximum(square(h_BTD.astype(acc)), float(jnp.finfo(acc).tiny) ** (1 / 3))
    ratio_BT1 = square(read_BTD.astype(acc) * (1 / cap)) / size_BT1
    return (read_BTD.astype(acc) * jax.lax.rsqrt(1 + ratio_BT1)).astype(read_BTD.dtype)


def source_width(D: int, source: TargetSource | None) -> int:
    """The number of channels of a target's source: D, and twice that for prediction errors."""
    return D * (2 if source == "prediction_error" else 1)


def _written(whole_B, lr):
    """The chunks of each row that are written. At a rate of 0, as for a memory that is only
    applied, none is, and nothing decays.
    """
    return jnp.where(lr == 0, 0, whole_B)
