"""Sampling: filters against a written-out version, frequencies, and independence of batch mates."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit

from ttt_jax.errors import UserError
from ttt_jax.inference.sampling import Sampling, _filter, sample

LOGITS = np.array([[2.0, 1.0, 0.5, -1.0, 3.0, 0.0], [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]], np.float32)


def kept(sampling, logits=LOGITS):
    return np.isfinite(np.asarray(_filter(jnp.asarray(logits), sampling)))


def test_filters_keep_what_they_say():
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    np.testing.assert_array_equal(
        kept(Sampling(1.0, top_k=2)), [[1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]]
    )
    for top_p in (0.1, 0.5, 0.62, 0.9, 0.999, 1.0):
        for row, p_V in zip(kept(Sampling(1.0, top_p=top_p)), p, strict=True):
            order = np.argsort(-p_V)
            needed = (
                int(np.searchsorted(np.cumsum(p_V[order]), top_p - 1e-7)) + 1
                if top_p < 1
                else len(p_V)
            )
            assert set(np.flatnonzero(row)) == set(order[:needed]), top_p
    for min_p in (0.0, 0.05, 0.3, 1.0):
        np.testing.assert_array_equal(
            kept(Sampling(1.0, min_p=min_p)), p >= min_p * p.max(1, keepdims=True) - 1e-9
        )
    both = kept(Sampling(1.0, top_k=3, top_p=0.7))
    np.testing.assert_array_equal(both, [[1, 0, 0, 0, 1, 0], [0, 0, 0, 1, 1, 1]])


def draw(sampling, logits, seeds, positions):
    run = jit(lambda logits, seeds, positions: sample(logits, sampling, seeds, positions))
    return [np.asarray(x) for x in run(*(jnp.asarray(x) for x in (logits, seeds, positions)))]


def test_greedy():
    ids, logprobs = draw(Sampling(), LOGITS, np.zeros(2, np.int32), np.zeros(2, np.int32))
    assert ids.tolist() == [4, 5]
    np.testing.assert_allclose(
        logprobs, (LOGITS - np.log(np.exp(LOGITS).sum(1, keepdims=True)))[[0, 1], [4, 5]], rtol=1e-6
    )


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1e-40), Sampling(1e-320), Sampling(1e-37), Sampling(1.0, top_p=1e-50)],
    ids=["subnormal", "zero in float32", "tiny", "top_p of zero in float32"],
)
def test_next_to_nothing_is_the_most_likely_token(sampling):
    """Not the first one, as of infinities."""
    logits = 40 * LOGITS
    ids, logprobs = draw(sampling, logits, np.zeros(2, np.int32), np.zeros(2, np.int32))
    assert ids.tolist() == [4, 5]
    assert np.isfinite(logprobs).all()


def test_frequencies_follow_the_distribution():
    n = 20_000
    positions = np.arange(n, dtype=np.int32)
    ids, _ = draw(
        Sampling(0.7, top_k=4), np.tile(LOGITS[:1], (n, 1)), np.zeros(n, np.int32), positions
    )
    p = np.where(kept(Sampling(1.0, top_k=4))[0], np.exp(LOGITS[0] / 0.7), 0)
    p /= p.sum()
    found = np.bincount(ids, minlength=6) / n
    assert (np.abs(found - p) < 4 * np.sqrt(p * (1 - p) / n) + 1e-12).all(), (found, p)


def test_a_row_depends_on_its_seed_and_position_alone():
    logits = np.random.default_rng(0).standard_normal((8, 50)).astype(np.float32)
    seeds, positions = np.arange(8, dtype=np.int32), np.arange(10, 18, dtype=np.int32)
    together, _ = draw(Sampling(1.0), logits, seeds, positions)
    for b in range(8):
        alone, _ = draw(Sampling(1.0), logits[b : b + 1], seeds[b : b + 1], positions[b : b + 1])
        assert alone[0] == together[b]
    same = np.tile(logits[:1], (64, 1))
    assert (
        len(
            set(draw(Sampling(1.0), same, np.arange(64, dtype=np.int32), np.zeros(64, np.int32))[0])
        )
        > 5
    )
    assert (
        len(
            set(draw(Sampling(1.0), same, np.zeros(64, np.int32), np.arange(64, dtype=np.int32))[0])
        )
        > 5
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (name, x)
        for name in ("temperature", "top_p", "min_p")
        for x in (-0.1, float("nan"), float("inf"))
    ]
    + [(name, x) for name, x in (("top_k", 0), ("top_p", 0.0), ("top_p", 1.5), ("min_p", 2.0))]
    + [("top_k", 1.5), ("top_k", True), ("temperature", "1"), ("temperature", None)],
)
def test_values_out_of_range(field, value):
    with pytest.raises(UserError, match=f"{field} = "):
        Sampling(**{"temperature": 1.0, field: value})


def test_temperature_comes_before_the_filters():
    """At temperature 2 the most likely token has less of the mass, so top-p keeps more tokens."""
    n, softmax = 2000, lambda x: np.exp(x) / np.exp(x).sum()
    logits, positions = np.tile(LOGITS[:1], (n, 1)), np.arange(n, dtype=np.int32)
    ids, logprobs = draw(Sampling(2.0, top_p=0.6), logits, np.zeros(n, np.int32), positions)
    needed = lambda p: int(np.searchsorted(np.cumsum(np.sort(p)[::-1]), 0.6)) + 1
    hot = softmax(LOGITS[0] / 2)
    assert needed(hot) > needed(softmax(LOGITS[0]))
    assert set(ids.tolist()) == set(np.argsort(-hot)[: needed(hot)].tolist())
    # The log-probabilities are the model's own.
    np.testing.assert_allclose(logprobs, np.log(softmax(LOGITS[0]))[ids], rtol=1e-5)
