"""How attention, the op and the loss are called, whatever the number of devices.

B batch, T tokens, D model width, F MLP width, V vocabulary, N query heads, K KV heads, H head dim,
C chunk size.

The model calls one object, `Runtime.parallel`, for all that a compiler cannot split well by itself.
`OneDevice` calls the ordinary functions; `Parallel` (shard_mapped.py) runs them on a mesh.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import Sharding

from ttt_jax import ops
from ttt_jax.ops.attention import cached
from ttt_jax.ops.attention.api import self_attention
from ttt_jax.ops.attention.cached import KVCache
from ttt_jax.ops.ttt.writes import all_chunks


class Devices(abc.ABC):
    """What `OneDevice` and `Parallel` have in common. Hashable: it is part of the model's
    structure.
    """

    @property
    @abc.abstractmethod
    def shards(self) -> int:
        """The number of parts that a sequence is split into."""

    @property
    @abc.abstractmethod
    def axis(self) -> str | None:
        """The mesh axis that splits sequences, if any."""

    @abc.abstractmethod
    def splits(self, T: int, chunk_size: int = 1) -> bool:
        """Say whether T tokens give every shard the same whole number of chunks (any number of
        tokens on one shard).
        """

    @abc.abstractmethod
    def pin(self, x_BTX, *axes: str | None) -> jax.Array:
        """Keep rows and tokens split, and what follows by its logical `axes` (whole if none are
        given), in the gradient too.
        """

    @abc.abstractmethod
    def sharding(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Sharding | None:
        """Say where an array with these logical axes lies (a stack's axes in front may be left
        out); None on one device.
        """

    def lay(self, x, axes: tuple[str | None, ...]) -> jax.Array:
        """Lay an array where its logical axes say: move it there, or tell the compiler inside of a
        program.
        """
        sharding = self.sharding(x.shape, axes)
        if sharding is None:
            return jnp.asarray(x)
        if isinstance(x, Tracer):
            return jax.lax.with_sharding_constraint(x, sharding)
        return jax.device_put(x, sharding)

    def zeros(self, like: jax.ShapeDtypeStruct, axes: tuple[str | None, ...]) -> jax.Array:
        """Make zeros of a shape and dtype where the logical axes say."""
        return jnp.zeros(like.shape, like.dtype, device=self.sharding(like.shape, axes))

    def abstract(self, like, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        """Describe an array of a shape and dtype that lies where its logical axes say."""
        sharding = self.sharding(like.shape, axes)
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)

    @abc.abstractmethod
    def head_axes(self, N: int, K: int) -> tuple[str | None, str | None]:
        """Logical axes of N query and K KV heads; None for heads that are not split."""

    @abc.abstractmethod
    def embed(self, table_VD, ids_BT) -> jax.Array:
        """Look up rows of the table, [B, T, D]."""

    @abc.abstractmethod
    def attention(self, q_BTNH, k_BTKH, v_BTKH, *, segment_ids_BT=None, **options) -> jax.Array:
        """Call `self_attention`; same arguments and result."""

    @abc.abstractmethod
    def cached_attention(
        self, q_BTNH, k_BTKH, v_BTKH, cache: KVCache, start_B, lengths_B, **options
    ) -> tuple[jax.Array, KVCache]:
        """Call `attend` of ops/attention/cached.py; same arguments and results."""

    @abc.abstractmethod
    def write_cache(
        self, cache: KVCache, k_BTKH, v_BTKH, start_B, lengths_B, *, ring: bool
    ) -> KVCache:
        """Call `write` of ops/attention/cached.py; same arguments and result."""

    @abc.abstractmethod
    def in_place_ttt(self, z_BTF, v_BTD, w_DF, **options) -> tuple[Any, Any]:
        """Call `ttt_jax.ops.in_place_ttt`; same arguments and results.

        Raises: UserError as that does.
        """

    @abc.abstractmethod
    def over_chunks(self, function, *arrays_BMCX, wide: tuple[bool, ...], wide_out) -> Any:
        """Call a function of M chunks of each row, whose results are such arrays, too.

        Args:
          function: (sum_F, *arrays_BMCX) -> array or tuple, each chunk for itself. `sum_F` adds up
            arrays over the devices that split F.
          wide: of each array whether X is F, which may be split; others have it whole.
          wide_out: the same of the results.
        """

    @abc.abstractmethod
    def last_update_norm(self, z_BTF, v_BTD, lr, chunk_size: int) -> jax.Array:
        """Measure the update that the first sequence's last whole chunk writes: its Frobenius norm,
        repeated for each row [B]; 0 without a whole chunk. No gradient flows.
        """

    @abc.abstractmethod
    def update_cosine(self, z_BTF, v_BTD, chunk_size: int, segment_ids_BT=None) -> jax.Array:
        """Call `ttt_jax.ops.update_cosine`, a scalar. On a mesh: pairs of chunks on one device,
        averaged over the devices.
        """

    @abc.abstractmethod
    def over_tokens(self, function, h_BTD, w_VD, *token_data_BT) -> jax.Array:
        """Call a function of the output weight and of tokens one by one.

        Args:
          function: (h_BTD, w_VD, *token_data_BT) -> a sum over tokens.
        """

    @abc.abstractmethod
    def over_vocabulary(self, function, h_BTD, w_VD, *token_data_BT) -> Any:
        """Call `token_nll`, `token_nll_and_hit` or `expected_row`; same arguments and results."""


@dataclasses.dataclass(frozen=True)
class OneDevice(Devices):
    """The ordinary functions, on whole arrays."""

    @property
    def shards(self) -> int:
        return 1

    @property
    def axis(self) -> None:
        return None

    def splits(self, T: int, chunk_size: int = 1) -> bool:
        return True

    def pin(self, x_BTX, *axes: str | None) -> jax.Array:
        return x_BTX

    def sharding(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> None:
        return None

    def head_axes(self, N: int, K: int) -> tuple[None, None]:
        return None, None

    def embed(self, table_VD, ids_BT) -> jax.Array:
        return jnp.take(table_VD, ids_BT, axis=0)

    def attention(self, q_BTNH, k_BTKH, v_BTKH, *, segment_ids_BT=None, **options) -> jax.Array:
        return self_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT=segment_ids_BT, **options)

    def cached_attention(self, q_BTNH, k_BTKH, v_BTKH, cache, start_B, lengths_B, **options):
        return cached.attend(q_BTNH, k_BTKH, v_BTKH, cache, start_B, lengths_B, **options)

    def write_cache(self, cache, k_BTKH, v_BTKH, start_B, lengths_B, *, ring: bool) -> KVCache:
        return cached.write(cache, k_BTKH, v_BTKH, start_B, lengths_B, ring=ring)

    def in_place_ttt(self, z_BTF, v_BTD, w_DF, **options) -> tuple[Any, Any]:
        return ops.in_place_ttt(z_BTF, v_BTD, w_DF, **options)

    def over_chunks(self, function, *arrays_BMCX, wide: tuple[bool, ...], wide_out) -> Any:
        return all_chunks(function, *arrays_BMCX, wide=wide, wide_out=wide_out)

    def last_update_norm(self, z_BTF, v_BTD, lr, chunk_size: int) -> jax.Array:
        B, T = z_BTF.shape[:2]
        end = T // chunk_size * chunk_size
        if end == 0:
            return jnp.zeros((B,), lr.dtype)
        # Of one row: it costs a matmul.
        z_1CF, v_1CD = (x[:1, end - chunk_size : end] for x in (z_BTF, v_BTD))
        stop = jax.lax.stop_gradient
        return jnp.broadcast_to(ops.update_norm(stop(z_1CF), stop(v_1CD), stop(lr)), (B,))

    def update_cosine(self, z_BTF, v_BTD, chunk_size: int, segment_ids_BT=None) -> jax.Array:
        return ops.update_cosine(z_BTF, v_BTD, chunk_size, segment_ids_BT)

    def over_tokens(self, function, h_BTD, w_VD, *token_data_BT) -> jax.Array:
        return function(h_BTD, w_VD, *token_data_BT)

    def over_vocabulary(self, function, h_BTD, w_VD, *token_data_BT) -> Any:
        return function(h_BTD, w_VD, *token_data_BT)


ONE_DEVICE = OneDevice()
