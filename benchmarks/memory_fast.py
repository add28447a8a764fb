"""Fast weights of many books side by side, as `memory_study.py` handles them.

B books, D model width, F MLP width, K left singular vectors, N layers of a run, R repeats of a
pattern.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax.inference.prefill import needs_capacity
from ttt_jax.model.transformer import State, Transformer, abstract_transformer

Fast = list[Any]  # S of every run that adapts, [R, N, B, D, F], in the order of the layers' states


def runs_of(state: State) -> list[Any]:
    return [x for runs in state.layers for x in runs if x.ttt is not None]


def with_fast(model: Transformer, fast: Fast, batch: int, tokens: int) -> State:
    """A fresh state with copies of these fast weights (programs take the arrays over)."""
    capacity = tokens if needs_capacity(model) else None
    fresh, left = model.init_state(batch, capacity or 1), iter(fast)

    def put(x):
        if x.ttt is None:
            return x
        return x._replace(ttt=x.ttt._replace(S_BDF=jnp.copy(next(left))))

    layers = tuple(tuple(put(x) for x in runs) for runs in fresh.layers)
    return State(fresh.position_B, layers, capacity)


def with_ttt(model: Transformer, **fields: Any) -> Transformer:
    """The same parameters with other settings of TTT, such as `read_cap`."""
    ttt = dataclasses.replace(model.config.ttt, **fields)
    cfg = dataclasses.replace(model.config, ttt=ttt)
    tree = jax.tree.structure(abstract_transformer(cfg, model.runtime))
    return jax.tree.unflatten(tree, jax.tree.leaves(model))


def rolled(fast: Fast) -> Fast:
    """The next book's memory for each."""
    return [jnp.roll(S, -1, axis=2) for S in fast]


def ratio(model: Transformer, S_RNBDF, at: int):
    """||dW|| / ||W|| of run number `at` of those that adapt, [R, N, B]."""
    runs = [b for g in model.groups for r, b in zip(g.pattern, g.blocks, strict=True) if r.kind.ttt]
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(-2, -1)))
    return norm(S_RNBDF) / norm(runs[at].mlp.down[...])[:, :, None]


@jax.jit
def bases_of(S_RNBDF):
    """Left singular vectors of every S, the strongest first, on the smaller side D."""

    def one(S_DF):
        S_DF = S_DF / jnp.maximum(jnp.linalg.norm(S_DF), 1e-30)
        gram = jnp.einsum("df,ef->de", S_DF, S_DF, precision="highest")
        return jnp.linalg.eigh(gram)[1][:, ::-1]

    flat = S_RNBDF.reshape(-1, *S_RNBDF.shape[3:])
    return jax.lax.map(one, flat).reshape(*S_RNBDF.shape[:3], S_RNBDF.shape[3], -1)


def truncated(S_RNBDF, basis_RNBDD, rank: int):
    U = basis_RNBDD[..., :rank]
    product = lambda s, x, y: jnp.einsum(s, x, y, precision="highest")
    return product("rnbdk,rnbkf->rnbdf", U, product("rnbdk,rnbdf->rnbkf", U, S_RNBDF))
