"""How a TTT layer goes on with a stream: its state, and the chunk clock of each row.

B batch, T new tokens, D model width, F MLP width, C chunk size, L tokens of a buffer of whole
chunks, S accumulated update (D F).

The chunk clock of a row counts from its first token. A chunk that is not complete yet is pending:
its activations and sources wait in the state until the rest of it comes.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ttt_jax.model.layers import Context
from ttt_jax.ops.numerics import accumulator
from ttt_jax.parallel.one_device import ONE_DEVICE, Devices

# How pending activations and sources lie on a mesh: F is split as the weights that make them.
Z_AXES, SOURCE_AXES = ("step_rows", None, "pending_mlp"), ("step_rows", None, "embed")


class TTTState(NamedTuple):
    """What one TTT layer carries from one call to the next. Position modulo C is the number of
    pending tokens.

    Fields:
      S_BDF: accumulated update of the down-projection, float32.
      z_BCF: MLP activations of the pending chunk, compute dtype; slots from the pending count on
        hold nothing.
      source_BCX: source of the targets of the pending chunk, compute dtype; X is D, or 2 D for
        prediction errors.
    """

    S_BDF: jax.Array
    z_BCF: jax.Array
    source_BCX: jax.Array


class AdaptiveLayer(Protocol):
    """What a stream needs of its layer (`MLP` in ttt_mlp.py)."""

    @property
    def chunk_size(self) -> int: ...

    def inner_rate(self, ctx: Context, acc) -> jax.Array: ...

    def targets(self, z_BTF, source_BTX, ctx: Context, whole_B=None) -> jax.Array: ...

    def op(
        self,
        z_BTF,
        v_BTD,
        lr,
        S_BDF,
        whole_B=None,
        segment_ids_BT=None,
        devices: Devices = ONE_DEVICE,
    ) -> tuple[jax.Array, jax.Array]: ...

    def write(self, z_BCF, v_BCD, lr, S_BDF, whole_B) -> jax.Array: ...

    def stats(self, S_BDF, update_norm_B) -> dict[str, jax.Array]: ...


def empty(batch: int, chunk_size: int, D: int, F: int, width: int, dtype) -> TTTState:
    """The state of streams that have read nothing; `width` is that of the source."""
    return TTTState(
        jnp.zeros((batch, D, F), accumulator(dtype)),
        jnp.zeros((batch, chunk_size, F), dtype),
        jnp.zeros((batch, chunk_size, width), dtype),
    )


def state_behind(
    z_BTF, source_BTX, S_BDF, chunk_size: int, lengths_B=None, before: TTTState | None = None
) -> TTTState:
    """The state behind tokens that were read from a chunk's start on.

    Args:
      S_BDF: with the updates of their whole chunks.
      lengths_B: how many of the T tokens each row has read; None: all.
      before: the state before them, for rows that have read nothing.
    """
    (B, T), C = z_BTF.shape[:2], chunk_size
    if lengths_B is None and T % C == 0:  # nothing is pending
        return TTTState(S_BDF, *(jnp.zeros_like(x_BTX[:, :C]) for x_BTX in (z_BTF, source_BTX)))
    whole_B = jnp.full((B,), T // C, jnp.int32) if lengths_B is None else lengths_B // C
    z_BCF, source_BCX = (_pending(x, whole_B, C) for x in (z_BTF, source_BTX))
    if before is not None and lengths_B is not None:
        # A row that has read nothing keeps its pending chunk.
        idle_B11 = (lengths_B == 0)[:, None, None]
        z_BCF = jnp.where(idle_B11, before.z_BCF, z_BCF)
        source_BCX = jnp.where(idle_B11, before.source_BCX, source_BCX)
    return TTTState(S_BDF, z_BCF, source_BCX)


def read_on(layer: AdaptiveLayer, z_BTF, source_BTX, ctx: Context, state: TTTState):
    """Read any number of new tokens at any place of the chunk clock: put them behind the pending
    ones and run the op.

    Returns: (y_BTD, state, stats), as `MLP.__call__`.
    """
    C, T, devices = layer.chunk_size, z_BTF.shape[1], ctx.parallel
    lr = layer.inner_rate(ctx, state.S_BDF.dtype)
    z_BLF, source_BLX, whole_B = _behind(z_BTF, source_BTX, ctx, state)
    v_BLD = layer.targets(z_BLF, source_BLX, ctx, whole_B)
    y_BLD, S_BDF = layer.op(z_BLF, v_BLD, lr, state.S_BDF, whole_B, devices=devices)
    new = lambda y, n: jax.lax.dynamic_slice_in_dim(y, n, T, axis=0)
    y_BTD = jax.vmap(new)(y_BLD, ctx.position_B % C)
    stats = layer.stats(S_BDF, devices.last_update_norm(z_BLF, v_BLD, lr, C))
    z_BCF, source_BCX = (_pending(x, whole_B, C) for x in (z_BLF, source_BLX))
    return y_BTD, TTTState(S_BDF, z_BCF, source_BCX), stats


def append_token(layer: AdaptiveLayer, z_B1F, source_B1X, ctx: Context, state: TTTState):
    """Read one token: O(D + F) beside the apply. The update runs in the step that completes some
    row's chunk.

    Returns: (y_B1D, state, stats), as `MLP.__call__`.
    """
    C, devices = layer.chunk_size, ctx.parallel
    lr = layer.inner_rate(ctx, state.S_BDF.dtype)
    pending_B = ctx.position_B % C
    read_B = jnp.ones_like(pending_B) if ctx.lengths_B is None else ctx.lengths_B
    # One token of a longer chunk: nothing is written.
    nothing_B1D = jnp.zeros((*z_B1F.shape[:2], state.S_BDF.shape[1]), z_B1F.dtype)
    y_B1D = layer.op(z_B1F, nothing_B1D, lr, state.S_BDF, devices=devices)[0]
    z_BCF, source_BCX = _with_token(z_B1F, source_B1X, ctx, state)
    complete_B = (pending_B == C - 1) & (read_B > 0)

    def write(S_BDF, z_BCF, source_BCX, whole_B):
        v_BCD = layer.targets(z_BCF, source_BCX, ctx, whole_B)
        norm_B = devices.last_update_norm(z_BCF, v_BCD, lr, C)
        return layer.write(z_BCF, v_BCD, lr, S_BDF, whole_B), norm_B

    def all_rows(S_BDF):
        return write(S_BDF, z_BCF, source_BCX, complete_B.astype(jnp.int32))

    def one_row(S_BDF):
        b = jnp.argmax(complete_B)
        row = lambda x_BXY: jax.lax.dynamic_slice_in_dim(x_BXY, b, 1, axis=0)
        one_1 = jnp.ones((1,), jnp.int32)
        S_1DF, norm_1 = write(row(S_BDF), row(z_BCF), row(source_BCX), one_1)
        S_BDF = jax.lax.dynamic_update_slice_in_dim(S_BDF, S_1DF, b, axis=0)
        # The norm is that of the first row.
        return S_BDF, jnp.broadcast_to(jnp.where(b == 0, norm_1, 0), complete_B.shape)

    def update(S_BDF):
        # Rows of other lengths complete their chunks one by one. Split over devices, none is taken
        # out of the others.
        if S_BDF.shape[0] == 1 or ctx.parallel != ONE_DEVICE:
            return all_rows(S_BDF)
        return jax.lax.cond(complete_B.sum() == 1, one_row, all_rows, S_BDF)

    def skip(S_BDF):
        return S_BDF, jnp.zeros(S_BDF.shape[:1], S_BDF.dtype)

    if ctx.ends_chunk is None:
        S_BDF, norm_B = jax.lax.cond(complete_B.any(), update, skip, state.S_BDF)
    else:
        S_BDF, norm_B = (update if ctx.ends_chunk else skip)(state.S_BDF)
    return y_B1D, TTTState(S_BDF, z_BCF, source_BCX), layer.stats(S_BDF, norm_B)


def pass_over(z_BTF, source_BTX, ctx: Context, state: TTTState) -> TTTState:
    """The state behind tokens that are read with TTT off. They write nothing: their keys in the
    pending chunk are zero, and their sources are there for the targets of their neighbours. A chunk
    that ends among them is not written.
    """
    z_BTF, C = jnp.zeros_like(z_BTF), state.z_BCF.shape[1]
    if z_BTF.shape[1] == 1:
        return TTTState(state.S_BDF, *_with_token(z_BTF, source_BTX, ctx, state))
    z_BLF, source_BLX, whole_B = _behind(z_BTF, source_BTX, ctx, state)
    return TTTState(state.S_BDF, _pending(z_BLF, whole_B, C), _pending(source_BLX, whole_B, C))


def _behind(z_BTF, source_BTX, ctx: Context, state: TTTState):
    """New tokens behind the pending ones, from the start of their chunk: z_BLF, source_BLX, and how
    many chunks of each row are whole then.
    """
    (B, T, _), C = z_BTF.shape, state.z_BCF.shape[1]
    pending_B = ctx.position_B % C
    length_B = jnp.full((B,), T, jnp.int32) if ctx.lengths_B is None else ctx.lengths_B
    buffer = -(-(C - 1 + T) // C) * C

    def behind(pending_BCX, new_BTX):
        grown = jnp.pad(pending_BCX, ((0, 0), (0, buffer - C), (0, 0)))
        put = lambda x, y, n: jax.lax.dynamic_update_slice_in_dim(x, y, n, axis=0)
        return jax.vmap(put)(grown, new_BTX, pending_B)

    z_BLF, source_BLX = behind(state.z_BCF, z_BTF), behind(state.source_BCX, source_BTX)
    return z_BLF, source_BLX, (pending_B + length_B) // C


def _with_token(z_B1F, source_B1X, ctx: Context, state: TTTState):
    """The pending chunk with one token more, where a row reads one: z_BCF, source_BCX."""
    C, devices = state.z_BCF.shape[1], ctx.parallel
    slot_B = ctx.position_B % C
    if ctx.lengths_B is not None:
        slot_B = jnp.where(ctx.lengths_B > 0, slot_B, C)  # out of bounds: dropped
    put = jax.vmap(lambda x_CX, y_1X, n: x_CX.at[n].set(y_1X[0], mode="drop"))
    # The slots of a row stay whole, whatever reads them: XLA's partitioner (jax 0.10.2) puts the
    # token of a single row into a slot of every part.
    z_BCF = devices.lay(put(state.z_BCF, z_B1F, slot_B), Z_AXES)
    return z_BCF, devices.lay(put(state.source_BCX, source_B1X, slot_B), SOURCE_AXES)


def _pending(x_BTX, whole_B, C: int):
    """The C slots after each row's whole chunks (zero-padded past the end).

    A choice among chunks, not a slice at a place of each row: XLA's partitioner (jax 0.11.2) ends
    the process at such a gather where rows are split over one axis of a mesh and not over another.
    """
    B, T, X = x_BTX.shape
    M = T // C + 1
    x_BMCX = jnp.pad(x_BTX, ((0, 0), (0, M * C - T), (0, 0))).reshape(B, M, C, X)
    chosen_BM = jnp.arange(M, dtype=jnp.int32)[None] == whole_B[:, None]
    return jnp.sum(jnp.where(chosen_BM[:, :, None, None], x_BMCX, 0), axis=1)
