"""A launch of a Mosaic GPU kernel as one primitive of jax.

jax's rematerialisation takes programs apart and cannot hand on a ref. It leaves primitives whole.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


def apart(kernel, *arrays):
    """Results of a kernel that updates some of its arrays in place, between barriers.

    Where one of them, a state or a weight, is a slice of a stack of layers, XLA's slice fusion
    takes the slice and the custom call into one operation, and forgets that results are operands:
    the new state went where nobody read it, and S stayed zero (jax 0.11.2).
    """
    return jax.lax.optimization_barrier(kernel(*jax.lax.optimization_barrier(arrays)))


class Launch:
    """What a launch runs. Equal ones, of two layers say, are lowered once in a module.

    Lowering one takes a second.
    """

    def __init__(self, run, *key):
        self.run, self.key = run, key

    def __call__(self, *arrays):
        return self.run(*arrays)

    def __eq__(self, other):
        return isinstance(other, Launch) and self.key == other.key

    def __hash__(self):
        return hash(self.key)


launch_p = Primitive("ttt_launch")
launch_p.multiple_results = True
launch_p.def_impl(lambda *arrays, launch, results: jax.jit(launch)(*arrays))
launch_p.def_abstract_eval(lambda *avals, launch, results: avals[:results])


def _lower(ctx, *arrays, launch, results):
    """Lower as the program of one device, which it is, also inside a `shard_map`.

    jax lets no ref vary over mesh axes.
    """

    def plain(avals):
        return [ShapedArray(x.shape, x.dtype) for x in avals]

    ctx = ctx.replace(avals_in=plain(ctx.avals_in), avals_out=plain(ctx.avals_out))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        lower = mlir.lower_fun(functools.partial(apart, launch), multiple_results=True)
        return lower(ctx, *arrays)


mlir.register_lowering(launch_p, _lower, platform="cuda")


def _one_after_the_other(arrays, axes, **params):
    """Under `jax.vmap`: a launch for each. The batch that a kernel computes at once is B."""
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)

    def spread(x, axis):
        return jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)

    arrays = [spread(x, axis) for x, axis in zip(arrays, axes, strict=True)]
    results = jax.lax.map(lambda one: tuple(launch_p.bind(*one, **params)), tuple(arrays))
    return list(results), [0] * len(results)


batching.primitive_batchers[launch_p] = _one_after_the_other
