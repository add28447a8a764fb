"""Uninitialised memory that is easy to see."""

import jax
import jax.numpy as jnp


def show(monkeypatch) -> None:
    """Fill it with NaN, which it may hold on a GPU, instead of the zeros that CPUs give."""

    def nan(shape, dtype, **_):
        return jnp.full(shape, jnp.nan if jnp.issubdtype(dtype, jnp.inexact) else -1, dtype)

    monkeypatch.setattr(jax.lax, "empty", nan)
