"""The programs that write: the choice of a token from logits, and the step that reads it and
chooses the next.

B batch, V vocabulary, L TTT layers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ttt_jax.inference.prefill import program, ttt_scale
from ttt_jax.inference.sampling import Sampling, sample
from ttt_jax.inference.watch import state_ratios
from ttt_jax.model.transformer import State


@functools.partial(jax.jit, static_argnames=("sampling", "eos"))
def first_token(
    logits_BV, position_B, alive_B, seed_B, *, sampling: Sampling, eos: tuple[int, ...]
):
    """Sample. Returns (token_B, logprob_B, alive_B before, alive_B after, None).

    A row that is not alive has written nothing. One whose log-probability is not finite ends.
    """
    token_B, logprob_B = sample(logits_BV, sampling, seed_B, position_B)
    ended_B = ~jnp.isfinite(logprob_B)
    for token in eos:
        ended_B |= token_B == token
    return token_B, logprob_B, alive_B, alive_B & ~ended_B, None


@program(("sampling", "eos", "ends_chunk", "ttt"))
def decode_step(model, state: State, token_B, alive_B, seed_B, *, sampling, eos, ends_chunk, ttt):
    """Read the token of each row that is alive, and sample the next.

    Returns: (state, as `first_token`, but last ||S||/||W|| [L, B] where a chunk may have been
      completed).
    """
    h_B1D, new_state, stats = model.hidden(
        token_B[:, None],
        state,
        lengths=alive_B.astype(jnp.int32),
        ttt_scale=ttt_scale(ttt),
        ends_chunk=ends_chunk,
    )
    logits_BV = model.logits(h_B1D)[:, 0]
    out = first_token(logits_BV, new_state.position_B, alive_B, seed_B, sampling=sampling, eos=eos)
    return new_state, (*out[:4], state_ratios(stats) if ends_chunk else None)
