"""Damaged files for fuzzing: trees of JSON values, bytes, and what may happen when they are
read.
"""

from __future__ import annotations

import json
import warnings

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ttt_jax.errors import UserError

JUNK = [
    b"\0",
    b"\xff\xfe",
    b"{",
    b"[" * 1200,
    b'"',
    b"9" * 5000,
    b"-1",
    b"1e999",
    b"null",
    b"\n",
    b"NaN",
    b"&a *a",
]
PIECES = st.sampled_from(JUNK)
SCALARS = st.none() | st.booleans() | st.integers(-3, 10**13) | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS | st.just(10**400) | st.just("x" * 3000),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)
CHANGES = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 1 << 20), st.integers(0, 7)),
    st.tuples(st.just("cut"), st.integers(0, 1 << 20), st.just(0)),
    st.tuples(st.just("drop"), st.integers(0, 1 << 20), st.integers(1, 40)),
    st.tuples(st.just("insert"), st.integers(0, 1 << 20), PIECES | st.binary(max_size=8)),
    st.tuples(st.just("repeat"), st.integers(0, 1 << 20), st.integers(1, 60)),
)
TREES = st.tuples(st.integers(0, 1 << 16), VALUES, st.booleans())


def damage(data, changes):
    for what, place, how in changes:
        place %= len(data) + 1
        if what == "flip" and data:
            place %= len(data)
            data = data[:place] + bytes([data[place] ^ 1 << how]) + data[place + 1 :]
        elif what == "cut":
            data = data[:place]
        elif what == "drop":
            data = data[:place] + data[place + how :]
        elif what == "insert":
            data = data[:place] + how + data[place:]
        elif what == "repeat":
            data = data[:place] + data[max(0, place - how) : place] + data[place:]
    return data


def replaced(tree, place, value, remove):
    """A copy of a JSON tree in which one node, counted in preorder, is another value or gone."""
    nodes = []

    def walk(node):
        for key in (
            node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        ):
            nodes.append((node, key))
            walk(node[key])

    tree = json.loads(json.dumps(tree))
    walk(tree)
    node, key = nodes[place % len(nodes)]
    if remove:
        del node[key]
    else:
        node[key] = value
    return tree


def fuzz(examples, strategy, check):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    rules = settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=checks,
        derandomize=True,
        database=None,
    )
    rules(given(strategy)(check))()


def fuzz_bytes(examples, path, original, action):
    def check(changes):
        path.write_bytes(damage(original, changes))
        one_line(action)

    fuzz(examples, st.lists(CHANGES, min_size=1, max_size=3), check)


def fuzz_tree(examples, path, tree, dump, action):
    def check(change):
        path.write_text(dump(replaced(tree, *change)), encoding="utf-8", errors="replace")
        one_line(action)

    fuzz(examples, TREES, check)


def one_line(action):
    """Run it; a refusal has to be one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of numpy, for absurd numbers
            return action()
    except UserError as refusal:
        message = str(refusal)
        assert message
        assert "\n" not in message
        assert len(message) < 20_000
