"""Run the parts of the model that GSPMD cannot split well on a mesh: one `shard_map` around each of
them.

B batch, T tokens, D model width, F MLP width, V vocabulary, N query heads, K KV heads, H head dim,
C chunk size, P context shards, X rows of S that one context shard holds, Y devices that split F.

Attention, the In-Place TTT op and the loss run per device here, so that each device calls an
ordinary implementation (kernels included) on its share, and the only communication is the one
written down. Everything else, norms, projections, the target's convolution, is left to GSPMD. Mesh
axes are named in mesh.py only. What the methods have in common with one device's is documented in
one_device.py.

`check_vma=False`: kernels and the scans of the op carry no types of varying axes. Then the gradient
of an argument that is whole on several devices is summed over them by `shard_map` itself; results
that are partial sums come out with an axis of their own and are summed outside, so that no gradient
is summed twice.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ttt_jax.ops.attention import cached
from ttt_jax.ops.attention.api import self_attention
from ttt_jax.ops.attention.cached import KVCache
from ttt_jax.ops.attention.cached_shard import attend_shard
from ttt_jax.ops.attention.sharded import attention_shard
from ttt_jax.ops.numerics import accumulator
from ttt_jax.ops.ttt.chunk_updates import last_update_square, update_cosine
from ttt_jax.ops.ttt.sharded import in_place_ttt_shard, slice_rows
from ttt_jax.parallel.mesh import mesh_axes, spec
from ttt_jax.parallel.one_device import ONE_DEVICE, Devices


@dataclasses.dataclass(frozen=True)
class Parallel(Devices):
    """The parallel forms of attention, op and loss on one mesh."""

    mesh: Mesh

    @property
    def shards(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in mesh_axes("tokens", self.mesh))

    @property
    def axis(self) -> str | None:
        axes = mesh_axes("tokens", self.mesh)
        return axes[0] if axes else None

    def splits(self, T: int, chunk_size: int = 1) -> bool:
        return self.shards == 1 or T % (self.shards * chunk_size) == 0

    def pin(self, x_BTX, *axes: str | None) -> jax.Array:
        """Pin them by a sharding constraint: left alone, GSPMD may split activations like
        parameters, or gather all tokens for a weight's gradient.
        """
        axes = axes or (None,) * (x_BTX.ndim - 2)
        axes = (_rows(x_BTX), "tokens", *axes)
        sharding = NamedSharding(self.mesh, spec(axes, x_BTX.shape, self.mesh))
        return jax.lax.with_sharding_constraint(x_BTX, sharding)

    def sharding(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> NamedSharding:
        return NamedSharding(self.mesh, spec(axes, shape, self.mesh))

    def embed(self, table_VD, ids_BT) -> jax.Array:
        """Look up where V lies: a token's row comes from the device that has it. Rows of the table
        are whole for devices that have tokens of their own; GSPMD would look up with D split and
        then gather all tokens.
        """
        V, D = table_VD.shape
        rows, tokens, deep = spec((_rows(ids_BT), "tokens", "embed"), (*ids_BT.shape, D), self.mesh)
        (high,) = spec(("vocab",), (V,), self.mesh)

        def local(table_VD, ids_BT):
            if high is None:
                return jnp.take(table_VD, ids_BT, axis=0)[None]
            ids_BT = jnp.where(ids_BT < 0, ids_BT + V, ids_BT)  # as `jnp.take` counts
            here_BT = ids_BT - jax.lax.axis_index(high) * table_VD.shape[0]
            own_BT = (here_BT >= 0) & (here_BT < table_VD.shape[0])
            x_BTD = jnp.take(table_VD, jnp.where(own_BT, here_BT, 0), axis=0)
            lost_BT = (ids_BT < 0) | (ids_BT >= V)
            other_BT1 = jnp.where(lost_BT, jnp.nan, 0).astype(x_BTD.dtype)[..., None]
            return jnp.where(own_BT[..., None], x_BTD, other_BT1)[None]

        in_specs, out_specs = (P(high, deep), P(rows, tokens)), P(high, rows, tokens, deep)
        x_YBTD = self._map(local, in_specs, out_specs)(table_VD, ids_BT)
        return x_YBTD.sum(axis=0) if high else x_YBTD[0]

    def attention(self, q_BTNH, k_BTKH, v_BTKH, *, segment_ids_BT=None, **options) -> jax.Array:
        """Split rows, tokens and heads; every shard computes all of a length that does not
        divide.
        """
        axis = self.axis if self.splits(q_BTNH.shape[1]) else None
        q, kv = self._head_specs(q_BTNH, k_BTKH, None if axis is None else "tokens")

        def local(q_BTNH, k_BTKH, v_BTKH, ids_BT):
            if axis is None:
                return self_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT=ids_BT, **options)
            split = {"axis": axis, "shards": self.shards}
            return attention_shard(
                q_BTNH, k_BTKH, v_BTKH, segment_ids_BT=ids_BT, **split, **options
            )

        return self._map(local, (q, kv, kv, P(*q[:2])), q)(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)

    def cached_attention(self, q_BTNH, k_BTKH, v_BTKH, cache, start_B, lengths_B, **options):
        """Split rows, heads and slots, and many tokens. Where there is one token or their number
        does not divide, every shard has all of them.
        """
        T, L = q_BTNH.shape[1], cache.k_BKLH.shape[2]
        split = {
            "split_tokens": self.shards > 1 and T > 1 and self.splits(T),
            "split_slots": self.shards > 1 and self.splits(L),
        }
        q, kv = self._head_specs(q_BTNH, k_BTKH, "tokens" if split["split_tokens"] else None)
        rows = P(q[0])
        slots = P(q[0], kv[2], self.axis if split["split_slots"] else None, None)
        attend = functools.partial(cached.attend, **options)
        if self.axis is not None:
            split |= {"axis": self.axis, "shards": self.shards}
            attend = functools.partial(attend_shard, **split, **options)
        run = self._map(attend, (q, kv, kv, slots, rows, rows), (q, slots))
        return run(q_BTNH, k_BTKH, v_BTKH, cache, start_B, lengths_B)

    def write_cache(self, cache, k_BTKH, v_BTKH, start_B, lengths_B, *, ring: bool) -> KVCache:
        """Split rows and heads: left alone, GSPMD may gather a cache to write into it."""
        _, kv = self._head_specs(k_BTKH, k_BTKH, None)
        rows, slots = P(kv[0]), P(kv[0], kv[2], None, None)
        run = self._map(
            functools.partial(cached.write, ring=ring), (slots, kv, kv, rows, rows), slots
        )
        return run(cache, k_BTKH, v_BTKH, start_B, lengths_B)

    def _head_specs(self, q_BTNH, k_BTKH, tokens: str | None) -> tuple[P, P]:
        """How queries lie, and keys and values."""
        heads = self.head_axes(q_BTNH.shape[2], k_BTKH.shape[2])
        q, kv = (
            spec(("batch", tokens, h, None), x.shape, self.mesh)
            for h, x in zip(heads, (q_BTNH, k_BTKH), strict=True)
        )
        return q, kv

    def in_place_ttt(
        self,
        z_BTF,
        v_BTD,
        w_DF,
        *,
        lr,
        chunk_size,
        state=None,
        segment_ids=None,
        written=None,
        decay=1.0,
        whole_chunks=None,
        clip_norm=None,
        apply="split",
        implementation=None,
    ):
        """Split rows, tokens and F, and D over devices that hold the same rows and tokens: W, S, v
        and o split by it, and nothing else knows of it. The state lies as W_down does.

        Tokens that do not give every shard the same whole chunks are whole on all of them.
        """
        del written  # each shard looks at its own documents
        D, mesh = v_BTD.shape[2], self.mesh
        shards = self.shards if self.splits(z_BTF.shape[1], chunk_size) else 1
        axis, by_tokens = (self.axis, "tokens") if shards > 1 else (None, None)
        rows, tokens, wide = spec((_rows(z_BTF), by_tokens, "mlp"), z_BTF.shape, mesh)
        deep = _axes(spec((_rows(z_BTF), by_tokens, "embed"), v_BTD.shape, mesh)[2:])
        if D // math.prod(mesh.shape[name] for name in deep) % shards:
            deep = ()  # a context shard's slice of S would not be a slice of one device's D
        X = slice_rows(D, shards)
        state_spec = P(rows, (*deep, *_axes((axis,))) or None, wide)
        deep = deep or None
        if state is not None:
            state = jnp.pad(state, ((0, 0), (0, shards * X - D), (0, 0)))
        # The slow weight is cast before it is gathered.
        w_DF, lr = w_DF.astype(z_BTF.dtype), jnp.asarray(lr, accumulator(z_BTF.dtype))

        def local(z_BTF, v_BTD, w_DF, lr, state_BXF, ids_BT, whole_B):
            options = {
                "lr": lr,
                "chunk_size": chunk_size,
                "decay": decay,
                "whole_chunks_B": whole_B,
                "clip_norm": clip_norm,
                "apply": apply,
                "implementation": implementation,
            }
            over = _axes((wide, deep))
            sum_DF = functools.partial(jax.lax.psum, axis_name=over) if over else None
            split = {"axis": axis, "shards": shards, "sum_DF": sum_DF}
            o_BTD, S_BXF = in_place_ttt_shard(
                z_BTF, v_BTD, w_DF, state_BXF=state_BXF, segment_ids_BT=ids_BT, **split, **options
            )
            return o_BTD[None], S_BXF

        in_specs = (
            P(rows, tokens, wide),
            P(rows, tokens, deep),
            P(deep, wide),
            P(),
            state_spec,
            P(rows, tokens),
            P(rows),
        )
        out_specs = (P(wide, rows, tokens, deep), state_spec)
        o_YBTD, S_BXF = self._map(local, in_specs, out_specs)(
            z_BTF, v_BTD, w_DF, lr, state, segment_ids, whole_chunks
        )
        return (o_YBTD.sum(axis=0) if wide else o_YBTD[0]), S_BXF[:, :D]

    def over_chunks(self, function, *arrays_BMCX, wide: tuple[bool, ...], wide_out):
        """Split rows, chunks as tokens are split, and F. No gradient goes through."""
        axes = "batch", "tokens", None, "mlp"
        specs = [spec(axes, x.shape, self.mesh) for x in arrays_BMCX]
        rows, tokens = specs[0][:2]
        split_F = next((s[3] for s, is_wide in zip(specs, wide, strict=True) if is_wide), None)
        sum_F = functools.partial(jax.lax.psum, axis_name=split_F) if split_F else lambda x: x
        place = lambda is_wide: P(rows, tokens, None, split_F if is_wide else None)
        run = self._map(
            functools.partial(function, sum_F),
            tuple(map(place, wide)),
            jax.tree.map(place, wide_out),
        )
        return run(*arrays_BMCX)

    def last_update_norm(self, z_BTF, v_BTD, lr, chunk_size: int) -> jax.Array:
        whole_chunks = z_BTF.shape[1] and z_BTF.shape[1] % chunk_size == 0
        if not whole_chunks or not self.splits(z_BTF.shape[1], chunk_size):
            return ONE_DEVICE.last_update_norm(z_BTF, v_BTD, lr, chunk_size)
        rows, tokens, wide = spec(("batch", "tokens", "mlp"), z_BTF.shape, self.mesh)
        split = _axes((rows, tokens, wide))

        def local(z_BTF, v_BTD, lr):
            square = last_update_square(
                z_BTF, v_BTD, lr, chunk_size, axis=self.axis, shards=self.shards
            )
            for axis in _axes((rows,)):
                square = jnp.where(jax.lax.axis_index(axis) == 0, square, 0)
            return jnp.sqrt(jax.lax.psum(square, split)) if split else jnp.sqrt(square)

        in_specs = (P(rows, tokens, wide), P(rows, tokens, None), P())
        stop = jax.lax.stop_gradient
        norm = self._map(local, in_specs, P())(stop(z_BTF), stop(v_BTD), stop(lr))
        return jnp.broadcast_to(norm, z_BTF.shape[:1])

    def update_cosine(self, z_BTF, v_BTD, chunk_size: int, segment_ids_BT=None) -> jax.Array:
        by_tokens = "tokens" if self.splits(z_BTF.shape[1], chunk_size) else None
        rows, tokens, wide = spec(("batch", by_tokens, "mlp"), z_BTF.shape, self.mesh)
        sum_F = functools.partial(jax.lax.psum, axis_name=wide) if wide else None

        def local(z_BTF, v_BTD, ids_BT):
            cosine = update_cosine(z_BTF, v_BTD, chunk_size, ids_BT, sum_F)
            return jax.lax.pmean(cosine, axes) if (axes := _axes((rows, tokens))) else cosine

        in_specs = (P(rows, tokens, wide), P(rows, tokens, None), P(rows, tokens))
        return self._map(local, in_specs, P())(z_BTF, v_BTD, segment_ids_BT)

    def over_tokens(self, function, h_BTD, w_VD, *token_data_BT) -> jax.Array:
        """Give every device tokens of its own."""
        tokens = spec(("batch", "loss_tokens"), h_BTD.shape[:2], self.mesh)
        local = lambda *xs: function(*xs)[None]
        in_specs = (P(*tokens, None), P(None, None), *(tokens for _ in token_data_BT))
        return self._map(local, in_specs, P(_axes(tokens)))(h_BTD, w_VD, *token_data_BT).sum()

    def over_vocabulary(self, function, h_BTD, w_VD, *token_data_BT):
        """Split V as it lies, and tokens over the other devices. Left alone, GSPMD multiplies where
        D is split and adds up logits: V numbers for a token instead of the weight's D.
        """
        shape = (w_VD.shape[0], *h_BTD.shape[:2])
        high, *tokens = spec(("vocab", "batch", "loss_tokens"), shape, self.mesh)
        tokens, w_VD = P(*tokens), w_VD.astype(h_BTD.dtype)  # cast before it is gathered
        run = self._map(
            functools.partial(function, axis=high),
            (P(*tokens, None), P(high, None), *(tokens for _ in token_data_BT)),
            tokens,
        )
        return run(h_BTD, w_VD, *token_data_BT)

    def head_axes(self, N: int, K: int) -> tuple[str | None, str | None]:
        """Split both or none: one alone would tear the groups apart."""
        ways = math.prod(self.mesh.shape[axis] for axis in mesh_axes("kv_heads", self.mesh))
        return ("heads", "kv_heads") if N % ways == 0 and K % ways == 0 else (None, None)

    def _map(self, function, in_specs, out_specs):
        alone = tuple(axis for axis, size in self.mesh.shape.items() if size == 1)

        def name_all(spec: P) -> P:
            """Mesh axes of one device are named too, or gradients would be "summed" over them,
            which XLA may not remove.
            """
            return P((*alone, *_axes(spec[:1])), *spec[1:]) if len(spec) else spec

        specs = jax.tree.map(name_all, (in_specs, out_specs), is_leaf=lambda x: isinstance(x, P))
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False
        )


def _rows(x_BTX) -> str:
    """The logical axis of the rows of activations."""
    return "batch" if x_BTX.shape[1] > 1 else "step_rows"


def _axes(parts) -> tuple[str, ...]:
    """The mesh axes in the entries of a PartitionSpec."""
    return tuple(
        axis for part in parts for axis in ((part,) if isinstance(part, str) else part or ())
    )


def make_parallel(mesh: Mesh) -> Devices:
    """Choose what fits the mesh; one device needs none of the `shard_map`s."""
    return Parallel(mesh) if mesh.size > 1 else ONE_DEVICE
