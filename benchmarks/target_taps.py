"""Train with fewer taps of the target's convolution: the ablation "without convolution".

The convolution has five taps, from two tokens before (0) to two after (4), and starts at zero. Here
only some of them get a gradient. The others stay at zero, so a finished run needs nothing of this
file: its checkpoint holds the smaller convolution. With tap 2 alone a token's target is made of the
token itself: that is the model without a convolution, from the same start as every other model (a
convolution that is frozen at its start would be dead, as all its taps are zero).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ttt_jax.model.param_path import param_path
from ttt_jax.model.ttt_mlp import KERNEL
from ttt_jax.training import step


def restricted(
    tx: optax.GradientTransformation, taps: tuple[int, ...]
) -> optax.GradientTransformation:
    """Make `tx` with gradients of zero for all taps but `taps`, before they are clipped."""
    kept_K = jnp.array([float(k in taps) for k in range(KERNEL)])

    def masked(keypath: tuple[Any, ...], grad: jax.Array) -> jax.Array:
        ours = param_path(keypath).endswith(".target.conv")
        return grad * jnp.broadcast_to(kept_K.astype(grad.dtype), grad.shape) if ours else grad

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return tx.update(jax.tree_util.tree_map_with_path(masked, updates), state, params)

    return optax.GradientTransformation(tx.init, update)


@contextlib.contextmanager
def only_taps(taps: tuple[int, ...] | None) -> Iterator[None]:
    """Let runs that start in here train these taps alone; None: all of them."""
    make = step.make_optimizer
    if taps is not None:
        step.make_optimizer = lambda *args: restricted(make(*args), taps)
    try:
        yield
    finally:
        step.make_optimizer = make
