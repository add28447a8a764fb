"""Types of what differs between devices inside a `shard_map`, for kernels and custom gradients, which do not carry them."""

from __future__ import annotations

import jax


def varying_alike(*arrays):
    """All arrays marked as varying over the mesh axes that one of them varies over; None stays None.

    A kernel's results do, and so do the gradients that its backward returns; the transpose of `pcast` sums those of what all
    devices share.
    """
    union = frozenset().union(*(_axes(x) for x in arrays if x is not None))
    return [None if x is None else _mark(x, union) for x in arrays]


def varying_like(x, results):
    """`results`, marked as varying over the mesh axes that x varies over: a custom call does not say so itself."""
    return jax.tree.map(lambda result: _mark(result, _axes(x)), results)


def _axes(x) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying


def _mark(x, axes: frozenset):
    missing = tuple(axes - _axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
