"""Choosing the next token: greedy, temperature, top-k, top-p, min-p.

B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import numbers

import jax
import jax.numpy as jnp

from ttt_jax.errors import UserError

# Temperatures and top_p below this are as good as 0, and become 0 or infinities in float32.
_SMALL = 1e-30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The filters apply in the order of the fields, as in
    transformers.

    Fields:
      temperature: 0 is greedy.
      top_k: keep the k most likely tokens.
      top_p: keep the smallest set of tokens whose probabilities reach p.
      min_p: keep tokens at least p times as likely as the most likely one.

    Raises: UserError for values out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        def check(name: str, good: bool, what: str) -> None:
            if not good:
                raise UserError(f"{name} = {getattr(self, name)}: {what}")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = numbers.Integral if field.name == "top_k" else numbers.Real
            optional = field.default is None and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, kind)):
                what = "whole number" if field.name == "top_k" else "number"
                raise UserError(f"{field.name} = {value!r:.80}: must be a {what}")
        check("temperature", 0 <= self.temperature < float("inf"), "must be 0 (greedy) or more")
        check(
            "top_k",
            self.top_k is None or self.top_k >= 1,
            "must be at least 1; leave it out to keep all tokens",
        )
        check(
            "top_p", self.top_p is None or 0 < self.top_p <= 1, "must lie above 0 and be at most 1"
        )
        check("min_p", self.min_p is None or 0 <= self.min_p <= 1, "must lie between 0 and 1")


def sample(logits_BV, sampling: Sampling, seed_B, position_B) -> tuple[jax.Array, jax.Array]:
    """Draw a token per row.

    The randomness of a row depends on its seed and its position alone, so its batch mates do not
    change what it gets.

    Args:
      logits_BV: float32.
      seed_B, position_B: int32.

    Returns: ids int32 [B], and their log-probabilities under the model (before temperature and
    filters), float32 [B].
    """
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    if sampling.temperature == 0:
        ids_B = jnp.argmax(logits_BV, axis=-1)
    else:
        filtered_BV = _filter(logits_BV / max(sampling.temperature, _SMALL), sampling)
        draw = lambda seed, position, logits_V: jax.random.categorical(
            jax.random.fold_in(jax.random.key(seed), position), logits_V
        )
        ids_B = jax.vmap(draw)(seed_B, position_B, filtered_BV)
    ids_B = ids_B.astype(jnp.int32)
    return ids_B, jnp.take_along_axis(logprobs_BV, ids_B[:, None], axis=1)[:, 0]


def _filter(logits_BV, sampling: Sampling):
    V = logits_BV.shape[1]
    if sampling.top_k is not None and sampling.top_k < V:
        smallest_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        p_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # the mass before a token does not reach p
        needed_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < max(sampling.top_p, _SMALL)
        smallest_B1 = jnp.min(jnp.where(needed_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    if sampling.min_p:
        best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
        logits_BV = jnp.where(
            logits_BV < best_B1 + jnp.log(jnp.float32(sampling.min_p)), -jnp.inf, logits_BV
        )
    return logits_BV
