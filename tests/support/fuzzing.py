"""Damage to the bytes and JSON of checkpoints and converted folders, drawn by hypothesis."""

from __future__ import annotations

import contextlib
import tracemalloc

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SMALL = {
    "model_type": "qwen3",
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 6,
    "tie_word_embeddings": True,
    "ttt_mode": True,
    "ttt_layers": [1],
    "ttt_chunk": 4,
    "ttt_lr": 0.5,
    "ttt_proj": True,
    "ttt_target": "hidden_states",
}


def fuzz(examples):
    checks = [
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.differing_executors,
    ]
    return settings(
        max_examples=examples,
        deadline=10_000,
        suppress_health_check=checks,
        derandomize=True,
        database=None,
    )


def flip(data, places):
    data = bytearray(data)
    for place, bit in places:
        data[place % len(data)] ^= 1 << bit
    return bytes(data)


FLIPS = st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 7)), min_size=1, max_size=3)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**13)
    | st.floats()
    | st.text(max_size=8)
    | st.just(10**400),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3)
    ),
    max_leaves=5,
)


MEMORY = 20_000_000  # bytes that Python and numpy may hold at once


@contextlib.contextmanager
def changed(path, data):
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


@contextlib.contextmanager
def small_memory():
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
