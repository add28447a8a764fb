"""The mesh, and where everything lies on it. The only file that names mesh axes.

Mesh axes, outermost first: `data` (replicas), `fsdp` (batch and parameter shards), `context`
(sequence), `tensor` (heads and MLP width). The model declares logical axes; `RULES` maps them to
mesh axes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ttt_jax.config import MeshConfig
from ttt_jax.errors import ConfigError

AXES = ("data", "fsdp", "context", "tensor")

# Logical axis -> mesh axes. Names that are not listed are replicated.
RULES: dict[str, tuple[str, ...]] = {
    # parameters, and S as W_down: devices that share a sequence need not hold them twice
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "batch": ("data", "fsdp"),
    # the rows of a step that reads one token each: weights stay where they are, and the few
    # activations move
    "step_rows": ("data",),
    # activations of a pending chunk, of which such a step writes one token of every row
    "pending_mlp": ("tensor", "fsdp"),
    "tokens": ("context",),
    # the loss has no heads and no F to split, so it splits the tokens further: over `tensor`, and
    # over what rows leave
    "loss_tokens": ("context", "tensor", "fsdp", "data"),
}


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh over all devices (or the given ones, which may exist on paper only).

    Raises: `ConfigError` when the sizes do not multiply to the number of devices, or `data` does
    not split over TPU slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    if (
        len(devices) > 1
        and devices[0].platform == "gpu"
        and hasattr(jax.config, "jax_use_shardy_partitioner")
    ):
        # XLA's GPU compiler crashes (jax 0.11, 0.12) on a `shard_map` without inputs, and jax
        # hoists constants of a scanned layer into such ones. Shardy's pass is what crashes; the
        # older partitioner compiles the same program.
        jax.config.update("jax_use_shardy_partitioner", False)
    return Mesh(_grid(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Sizes of `AXES` on so many devices. Raises `ConfigError` when they do not multiply to that
    number.
    """
    sizes = dataclasses.asdict(config)
    free = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if devices % known:
            raise ConfigError(
                f"config field mesh: {sizes} does not divide {devices} devices; change a size"
            )
        sizes[free[0]] = devices // known
    elif known != devices:
        raise ConfigError(
            f"config field mesh: {sizes} needs {known} devices, there are {devices}; set one axis "
            "to -1"
        )
    return tuple(sizes[axis] for axis in AXES)


def _grid(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """Devices laid out so that the inner axes are neighbours. Unlike `jax.make_mesh` it splits an
    axis of a TPU's torus over two of the mesh where the sizes ask for it, and puts the slices of a
    multi-slice job on the `data` axis.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise ConfigError(
            f"config field mesh.data = {shape[0]}: must be a multiple of the {slices} TPU slices"
        )
    inside, across = (shape[0] // slices, *shape[1:]), (slices, *(1,) * (len(shape) - 1))
    return mesh_utils.create_hybrid_device_mesh(
        inside, across, devices, allow_split_physical_axes=True
    )


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    """PartitionSpec of an array with these logical axes; a stack axis in front stays whole.

    Of the mesh axes of a rule the first ones that divide the size are used; none when the first
    does not divide it.
    """
    axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
    parts: list[Any] = []
    used: set[str] = set()
    for name, size in zip(axes, shape, strict=True):
        names = [a for a in RULES.get(name or "", ()) if mesh.shape[a] > 1 and a not in used]
        while names and size % math.prod(mesh.shape[a] for a in names):
            names.pop()
        if names:
            parts.append(tuple(names) if len(names) > 1 else names[0])
            used |= set(names)
        else:
            parts.append(None)
    return P(*parts)


def model_shardings(model: Any, mesh: Mesh) -> Any:
    """A model-shaped tree of shardings, from each parameter's `axes`. Vectors are replicated."""

    def place(variable):
        axes = variable.get_metadata()["axes"]
        if len(axes) < 2:
            axes = (None,) * len(axes)
        return jax.tree.map(
            lambda leaf: NamedSharding(mesh, spec(axes, leaf.shape, mesh)), variable
        )

    return jax.tree.map(place, model, is_leaf=lambda x: isinstance(x, nnx.Variable))


def abstract_parameters(model: Any, dtype: Any, mesh: Mesh | None) -> Any:
    """A model-shaped tree of what its arrays will be: shape, `dtype`, and where they lie on the
    mesh (None: on one device).
    """
    if mesh is None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), model)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding),
        model,
        model_shardings(model, mesh),
    )


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """For arrays [B, T] of token data."""
    return NamedSharding(mesh, spec(("batch", "tokens"), shape, mesh))


def mesh_axes(name: str, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes (larger than one) that a logical axis is split over."""
    return tuple(axis for axis in RULES[name] if mesh.shape[axis] > 1)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def on_one_device(x: jax.Array) -> jax.Array:
    """The whole array on this process' first device. All processes together; for a moment each of
    the mesh's devices holds all of it.
    """
    if len(x.sharding.device_set) == 1:
        return x
    assert isinstance(x.sharding, NamedSharding)
    assert isinstance(x.sharding.mesh, Mesh)
    shards = jax.device_put(x, replicated(x.sharding.mesh)).addressable_shards
    return next(shard.data for shard in shards if shard.device == jax.local_devices()[0])


Batch = dict[str, Any]


def local_rows(mesh: Mesh, shape: tuple[int, int]) -> tuple[int, ...]:
    """The rows of a batch [B, T] of which this process' devices hold some tokens, in order.

    Processes hold the same rows when the context axis spans them, and all rows when rows do not
    split over the mesh.
    """
    places = batch_sharding(mesh, shape).addressable_devices_indices_map(shape).values()
    return tuple(
        sorted({row for index in places if index is not None for row in range(shape[0])[index[0]]})
    )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int | None = None) -> Batch:
    """Global arrays [B, T] from this process' rows, `local_rows` of them (`batch_size` is B; None:
    all are here).
    """

    def put(x_RT: np.ndarray) -> jax.Array:
        shape = (batch_size or x_RT.shape[0], x_RT.shape[1])
        sharding = batch_sharding(mesh, shape)
        place = {row: i for i, row in enumerate(local_rows(mesh, shape))}

        def part(index: Any) -> np.ndarray:
            rows, tokens = index
            return x_RT[[place[row] for row in range(shape[0])[rows]], tokens]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: put(x) for name, x in batch.items()}
