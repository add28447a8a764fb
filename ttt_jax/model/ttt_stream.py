from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class TTTState(NamedTuple):
    """What one TTT layer carries from one call to the next. Position modulo C is the number of
    pending tokens.

    Fields:
      S_BDF: accumulated update of the down-projection, float32.
      z_BCF: MLP activations of the pending chunk, compute dtype; slots from the pending count on
        hold nothing.
      source_BCD: source of the targets of the pending chunk, compute dtype.
    """

    S_BDF: jax.Array
    z_BCF: jax.Array
    source_BCD: jax.Array


def pending(x_BTX, whole_B, C):
    """The C slots after each row's whole chunks (zero-padded past the end)."""
    padded = jnp.pad(x_BTX, ((0, 0), (0, C), (0, 0)))
    return jax.vmap(lambda x, m: jax.lax.dynamic_slice_in_dim(x, m * C, C, axis=0))(padded, whole_B)
