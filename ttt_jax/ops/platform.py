"""What a traced call is compiled for: which platform, and whether as a program of one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def compiled_for() -> str:
    """The platform of the mesh's devices where a mesh is set (they may exist on paper only), or of
    the default device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_one_device() -> bool:
    """Whether arrays here are one device's own, so that nothing is left for the compiler to
    partition.

    Outside a shard_map over all axes nothing tells whether the program is for one device or for all
    of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = not mesh.empty and set(mesh.manual_axes) == set(mesh.axis_names)
    return manual or (mesh.empty and jax.device_count() == 1)


def one_of_several() -> bool:
    """Whether this is one device's part of a program for several, whose collectives run beside
    it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def may_be_one_device() -> bool:
    """Whether a kernel that the caller has named can be taken at its word: not inside a mesh that
    the compiler partitions.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1 or on_one_device()


def empty(shape, dtype) -> jax.Array:
    """Memory for what is written before it is read: of any content on one GPU, where zeros would be
    a pass over it. On a mesh zeros, which the compiler splits; it keeps uninitialised memory whole
    on every device.
    """
    on_a_gpu = compiled_for() in ("gpu", "cuda") and on_one_device()
    return jax.lax.empty(shape, dtype) if on_a_gpu else jnp.zeros(shape, dtype)
