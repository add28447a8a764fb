"""Meshes for inference: which devices they take, and which models and rows they suit.

B rows, D model width, F MLP width, N query heads, K KV heads.

`tensor` splits heads and F, `fsdp` the parameters by D (and rows, where they divide), `data` rows,
`context` the tokens of long pieces, the slots of caches and, as `fsdp`, the parameters by D. What
lies where is said by `RULES` of mesh.py, as in training.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from ttt_jax.config import MeshConfig, ModelConfig
from ttt_jax.errors import ConfigError, UserError
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.parallel.one_device import Devices
from ttt_jax.parallel.shard_mapped import Parallel


def inference_mesh(config: MeshConfig) -> Mesh:
    """Make a mesh of the first devices of this process, as many as the sizes say.

    Args:
      config: sizes; -1 is what is left of the devices.

    Raises: ConfigError for more devices than there are.
    """
    devices, sizes = jax.local_devices(), dataclasses.asdict(config)
    wanted = math.prod(sizes.values())
    if wanted > len(devices):
        asked = " x ".join(f"mesh.{axis} {size}" for axis, size in sizes.items() if size > 1)
        raise ConfigError(
            f"{asked}: needs {wanted} devices, there are {len(devices)}; choose smaller sizes"
        )
    return make_mesh(config, devices if -1 in sizes.values() else devices[:wanted])


def check_model(model: ModelConfig, sizes: Mapping[str, int]) -> None:
    """Raise ConfigError for a model that a mesh of these sizes would not split: heads, F or D that
    do not divide.
    """
    split = {
        ("tensor",): ("num_kv_heads", "num_heads", "d_ff"),
        ("fsdp", "context"): ("d_model",),
    }
    for axes, fields in split.items():
        ways = math.prod(sizes[axis] for axis in axes)
        asked = " x ".join(f"mesh.{axis} {sizes[axis]}" for axis in axes if sizes[axis] > 1)
        for name in fields:
            if getattr(model, name) % ways:
                raise ConfigError(
                    f"{asked}: does not divide model.{name} = {getattr(model, name)}; choose a "
                    "divisor"
                )


def check_rows(rows: int, data: int, what: str) -> None:
    """Raise UserError for rows that `data` does not divide: every device would compute all of them.

    Args:
      what: the rows are, for the message.
    """
    if rows % data:
        raise UserError(
            f"mesh.data = {data}: does not divide the {rows} {what}; choose a divisor, or split "
            "the model with mesh.tensor or mesh.fsdp"
        )


def warn_of_rows(rows: int, devices: Devices) -> None:
    """Say, once, that rows do not split over `data`."""
    mesh = mesh_of(devices)
    if mesh is not None and rows % mesh.shape["data"]:
        _say_rows(rows, mesh.shape["data"])


@functools.cache
def _say_rows(rows: int, data: int) -> None:
    warnings.warn(
        f"mesh.data = {data} does not divide {rows} rows: every device computes all of them; give "
        "a multiple of it",
        stacklevel=4,
    )


def mesh_of(devices: Devices) -> Mesh | None:
    """The mesh that a model is computed on; None: one device."""
    return devices.mesh if isinstance(devices, Parallel) else None
