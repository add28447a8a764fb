"""Types of what differs between devices inside a `shard_map`.

Kernels and custom gradients do not carry them by themselves.
"""

from __future__ import annotations

import jax


def varying_alike(*arrays):
    """Mark all arrays as varying over the mesh axes that one of them varies over; None stays None.

    A kernel's results do, and so do the gradients that its backward returns. The transpose of
    `pcast` sums those of what all devices share.
    """
    union = frozenset().union(*(_axes(x) for x in arrays if x is not None))
    return [None if x is None else _mark(x, union) for x in arrays]


def varying_like(x, results):
    """Mark `results` as varying over the mesh axes that x varies over.

    A custom call does not say so itself.
    """
    return jax.tree.map(lambda result: _mark(result, _axes(x)), results)


def _axes(x) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying


def _mark(x, axes: frozenset):
    missing = tuple(axes - _axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
