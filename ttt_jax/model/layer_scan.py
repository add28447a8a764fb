"""Stacked layers, scanned in place: every layer reads its parameters from the stacks and writes its
gradients into them. Or one after the other in the program, without loops.

R repeats of a pattern, N layers of a run in it, B batch, T tokens, D model width.

A `jax.lax.scan` over the layers of a run inside one over the repeats of a pattern is the same
computation, but XLA then copies a repeat's parameters and saved activations out of their stacks
before the inner loop, and activations and gradients into them after it: at Qwen3-1.7B, 4 x 8192
tokens, 65 GB a step (docs/performance.md). Here both loops carry the whole stacks. For that the
backward is written out: a layer is linearised where it runs, what its backward needs and the caller
does not have anyway is saved, and the backward runs the same loops in reverse.

What a layer saves is still copied into a stack, and out of it where a kernel reads it, because no
kernel writes into a part of a stack. A program without loops has no stacks: of a step of `books`
(110M, 8 x 16k tokens) that is 53 GB of 258. It takes several times as long to compile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ttt_jax.ops import platform

# (parameters, h_BTD, source_BTD, rest) -> (h_BTD, stats)
Layer = Callable[..., tuple[jax.Array, Any]]

_ZERO = np.int32(0)  # an index that is known needs no check at run time: half of the trace


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Recipe:
    """How the backward of a layer is put together: leaf i is constants[i], or the known one of this
    number, or (None) the next of those that were saved.
    """

    treedef: Any
    constants: dict[int, Any]
    known: tuple[int | None, ...]

    def saved(self, leaves):
        return [
            leaf
            for j, leaf in enumerate(leaves)
            if self.known[j] is None and j not in self.constants
        ]

    def leaves(self, known, saved):
        saved = iter(saved)
        order = enumerate(self.known)
        return [
            self.constants[j] if j in self.constants else next(saved) if k is None else known[k]
            for j, k in order
        ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan_layers(layers: tuple[Layer, ...], stacks: tuple[Any, ...], h_BTD, source_BTD, rest):
    """Apply `R` times: for every run of the pattern, its `N` layers one after the other.

    Args:
      layers: what a layer of each run computes.
      stacks: parameters of each run, leaves [R, N, ...]. Every leaf of one run has the same R and
        N.
      h_BTD: what the first layer reads.
      source_BTD: an array that every layer may read; differentiable.
      rest: a pytree of arrays that every layer may read; not differentiated.

    Returns: (h_BTD, stats of each run, leaves [R, N, ...]). No gradient flows through the stats.
    """

    def layer(i, r, n, h_BTD, _):
        h_BTD, stats = layers[i](_at(stacks[i], r, n), h_BTD, source_BTD, rest)
        return h_BTD, stats, None

    h_BTD, stats, _ = _loops(layer, stacks, h_BTD, (None,) * len(layers))
    return h_BTD, stats


def layers_in_a_row(layers, stacks, h_BTD, source_BTD, rest):
    """As `scan_layers`, without loops. Layers that are computed again in the backward must see to
    it themselves that the compiler does not undo that.
    """
    rest = jax.tree.map(jax.lax.stop_gradient, rest)
    leaves, trees = zip(*(jax.tree.flatten(stack) for stack in stacks), strict=True)
    parts = [[_unstacked(x) for x in run] for run in leaves]
    stats: list[list[Any]] = [[] for _ in stacks]
    for r in range(_counts(stacks[0])[0]):
        for i, stack in enumerate(stacks):
            for n in range(_counts(stack)[1]):
                params = jax.tree.unflatten(trees[i], [part[r][n] for part in parts[i]])
                h_BTD, one = layers[i](params, h_BTD, source_BTD, rest)
                stats[i].append(jax.tree.map(jax.lax.stop_gradient, one))
    stacked = [
        jax.tree.map(
            lambda *x, stack=stack: jnp.stack(x).reshape(*_counts(stack), *x[0].shape), *each
        )
        for stack, each in zip(stacks, stats, strict=True)
    ]
    return h_BTD, tuple(stacked)


@jax.custom_vjp
def _unstacked(x):
    """The parts [R][N] of a stack. Their gradients are put together once, not added R N times."""
    R, N = x.shape[:2]
    return [[x[r, n] for n in range(N)] for r in range(R)]


_unstacked.defvjp(
    lambda x: (_unstacked(x), None),
    lambda _, parts: (jnp.stack([jnp.stack(part) for part in parts]),),
)


def _forward(layers, stacks, h_BTD, source_BTD, rest):
    def layer(i, r, n, h_BTD, kept):
        h_BTD, stats, leaves, _ = _linearize(
            layers[i], _at(stacks[i], r, n), h_BTD, source_BTD, rest
        )
        saved = recipes[i].saved(leaves)
        return (
            h_BTD,
            stats,
            [_put(stack, r, n, leaf) for stack, leaf in zip(kept, saved, strict=True)],
        )

    empty, recipes = [], []
    for function, stack in zip(layers, stacks, strict=True):
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), stack)

        def trace(*args, function=function):
            _, _, leaves, recipe = _linearize(function, *args)
            return recipe.saved(leaves), recipe

        saved, recipe = jax.eval_shape(trace, one, h_BTD, source_BTD, rest)
        # Every layer writes its own part.
        empty.append([platform.empty((*_counts(stack), *x.shape), x.dtype) for x in saved])
        recipes.append(recipe)
    h_BTD, stats, kept = _loops(layer, stacks, h_BTD, tuple(empty))
    return (h_BTD, stats), (stacks, source_BTD, rest, kept, tuple(recipes))


def _backward(layers, residuals, cotangents):
    stacks, source_BTD, rest, kept, recipes = residuals
    dh_BTD, _ = cotangents

    def layer(i, r, n, carry, dstack):
        dh_BTD, dsource_BTD = carry
        known = _known(_at(stacks[i], r, n), source_BTD, rest)
        leaves = recipes[i].leaves(known, [_at(x, r, n) for x in kept[i]])
        dparams, dh_BTD, dsource = jax.tree.unflatten(recipes[i].treedef, leaves)(dh_BTD)
        return (dh_BTD, dsource_BTD + dsource), None, _put(dstack, r, n, dparams)

    zeros = jax.tree.map(jnp.zeros_like, stacks)
    carry, _, dstacks = _loops(
        layer, stacks, (dh_BTD, jnp.zeros_like(source_BTD)), zeros, reverse=True
    )
    return dstacks, *carry, None


scan_layers.defvjp(_forward, _backward)


def _linearize(layer: Layer, params, h_BTD, source_BTD, rest):
    """The layer's outputs, the leaves that its backward is made of, and the recipe for that (of
    abstract values only).
    """
    h_BTD, pullback, stats = jax.vjp(
        lambda *args: layer(*args, rest), params, h_BTD, source_BTD, has_aux=True
    )
    leaves, treedef = jax.tree.flatten(pullback)
    place = {id(x): k for k, x in enumerate(_known(params, source_BTD, rest))}
    known = tuple(place.get(id(leaf)) for leaf in leaves)
    constants = {j: leaf for j, leaf in enumerate(leaves) if not isinstance(leaf, Tracer)}
    return h_BTD, stats, leaves, _Recipe(treedef, constants, known)


def _known(params, source_BTD, rest) -> list[jax.Array]:
    return jax.tree.leaves((params, source_BTD, rest))


def _loops(layer, stacks, carry, per_run: tuple[Any, ...], reverse: bool = False):
    """`carry, stats, per_run[i] = layer(i, r, n, carry, per_run[i])` for every layer in order;
    stats come back stacked.
    """
    order = range(len(stacks))

    def scan(body, carry, length):
        if length > 1:
            return jax.lax.scan(body, carry, jnp.arange(length, dtype=jnp.int32), reverse=reverse)
        carry, stats = body(carry, jnp.int32(0))  # without a loop it compiles faster
        return carry, jax.tree.map(lambda x: x[None], stats)

    def repeat(outer, r):
        carry, per_run = outer
        per_run, stats = list(per_run), [None] * len(stacks)
        for i in reversed(order) if reverse else order:

            def one(inner, n, i=i):
                carry, stats, mine = layer(i, r, n, *inner)
                return (carry, mine), stats

            (carry, per_run[i]), stats[i] = scan(one, (carry, per_run[i]), _counts(stacks[i])[1])
        return (carry, tuple(per_run)), tuple(stats)

    (carry, per_run), stats = scan(repeat, (carry, per_run), _counts(stacks[0])[0])
    return carry, stats, per_run


def _counts(stack) -> tuple[int, int]:
    """(R, N)"""
    return jax.tree.leaves(stack)[0].shape[:2]


def _at(tree, r, n):
    def one(x):
        start = (r, n, *(_ZERO,) * (x.ndim - 2))
        return jax.lax.dynamic_slice(x, start, (1, 1, *x.shape[2:])).reshape(x.shape[2:])

    return jax.tree.map(one, tree)


def _put(tree, r, n, piece):
    def one(x, y):
        return jax.lax.dynamic_update_slice(x, y[None, None], (r, n, *(_ZERO,) * y.ndim))

    return jax.tree.map(one, tree, piece)
