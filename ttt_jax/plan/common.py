"""What every plan is made of: topologies, the plan itself, the work, and advice.

The numbers come from tpu.py (compiled) or gpu.py (estimated).
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, NamedTuple

from ttt_jax.config import Config
from ttt_jax.errors import ConfigError, UserError

GB = 1e9
# Memory of one jax device in GB, vendors' figures. A TPU compiler keeps a part of it: it names the
# usable size when it refuses.
TPU_MEMORY = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
GPU_MEMORY = {"h100": 80, "h200": 141}


class Rates(NamedTuple):
    """What one jax device can do a second at most, vendors' figures: bfloat16 FLOPs, bytes of its
    memory, bytes that it sends to others of its slice or host.
    """

    flops: float
    memory: float
    links: float


RATES = {
    "v4": Rates(275e12, 1228e9, 300e9),
    "v5e": Rates(197e12, 819e9, 200e9),
    "v5p": Rates(459e12, 2765e9, 600e9),
    "v6e": Rates(918e12, 1640e9, 400e9),
    "h100": Rates(989.4e12, 3350e9, 450e9),
    "h200": Rates(989.4e12, 4800e9, 450e9),
}


@dataclasses.dataclass(frozen=True)
class Roofline:
    """How fast a program of inference can be, see inference.py. Seconds are of one call.

    Fields:
      tokens_per_second: of all rows together.
      compute, memory, links: seconds of each bound; links None: not known.
    """

    tokens_per_second: float
    seconds: float
    compute: float
    memory: float
    links: float | None


@dataclasses.dataclass(frozen=True)
class Topology:
    """A kind of chip and how many; `grid` is empty for GPUs."""

    text: str
    kind: str
    devices: int
    grid: tuple[int, ...] = ()

    @property
    def memory(self) -> float:
        """Bytes of one device."""
        return (TPU_MEMORY | GPU_MEMORY)[self.kind] * GB


@dataclasses.dataclass(frozen=True)
class Plan:
    """One program on one topology. Byte counts are of one device; FLOPs of all devices, except
    those of the program.
    """

    program: str  # "train step" or "prefill of N tokens"
    topology: str
    compiled: bool  # False: an estimate
    mesh: dict[str, int]
    rows: int
    tokens: int  # of a row
    memory: float
    bytes_by_kind: dict[str, float]
    total: float
    fits: bool
    advice: tuple[str, ...]
    notes: tuple[str, ...]
    model_flops: float
    program_flops: float | None = None  # of one device's program, a loop's body counted once
    collectives: dict[str, tuple[int, int]] | None = None
    loops_of_unknown_length: int = 0
    compile_seconds: float | None = None
    roofline: Roofline | None = None


@dataclasses.dataclass(frozen=True)
class Work:
    """What is planned: a train step, or one program of inference.

    Fields:
      prefill: tokens that are read at once. decode: tokens of the streams of which a step writes
        one. At most one of them; without, a train step.
      rows: of inference; None: one on each group of devices that shares one.
    """

    prefill: int | None = None
    decode: int | None = None
    rows: int | None = None

    @property
    def trains(self) -> bool:
        return self.prefill is None and self.decode is None

    @property
    def program(self) -> str:
        if self.decode is not None:
            return f"decode step at {self.decode} tokens"
        return "train step" if self.prefill is None else f"prefill of {self.prefill} tokens"


def parse_topology(text: str) -> Topology:
    """`v5p:4x4x4`, `v6e:16x16`, `h100:8`. Raises `UserError`."""
    kind, _, size = text.lower().partition(":")
    known = ", ".join(
        [
            *(f"{k}:{'x'.join('2' * _dimensions(k))}" for k in TPU_MEMORY),
            *(f"{k}:8" for k in GPU_MEMORY),
        ]
    )
    if kind not in TPU_MEMORY | GPU_MEMORY or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise UserError(f"--topology {text}: unknown; write one such as {known}")
    grid = tuple(int(n) for n in size.split("x"))
    if kind in GPU_MEMORY:
        if len(grid) != 1:
            raise UserError(f"--topology {text}: give the number of GPUs, such as {kind}:8")
        return Topology(text, kind, grid[0])
    if len(grid) != (d := _dimensions(kind)):
        raise UserError(
            f"--topology {text}: {kind} is a grid of {d} sizes, such as {kind}:{'x'.join('4' * d)}"
        )
    return Topology(text, kind, math.prod(grid), grid)


def _dimensions(kind: str) -> int:
    return 3 if kind in ("v4", "v5p") else 2


def workload(config: Config, sizes: dict[str, int], work: Work) -> tuple[int, int]:
    """(rows, tokens of a row). Inference has one row on each group of devices that shares one, if
    nothing else is asked for.

    Raises: ConfigError when the tokens do not split over the context axis in whole chunks, and for
    a mesh that decoding does not use or that does not suit the model.
    """
    prefill, rows = work.prefill, work.rows or sizes["data"] * sizes["fsdp"]
    if work.decode is not None:
        from ttt_jax.parallel.inference_mesh import check_model, check_rows

        check_model(config.model, sizes)
        check_rows(rows, sizes["data"], "--rows")
        return rows, work.decode
    if prefill is None:
        return config.data.batch_size, config.data.seq_len
    shards = sizes["context"] * (config.model.ttt.chunk_size if config.model.ttt.layers else 1)
    if sizes["context"] > 1 and prefill % shards:
        raise ConfigError(
            f"--prefill {prefill}: must be a multiple of mesh.context * model.ttt.chunk_size = "
            f"{shards}"
        )
    return rows, prefill


def abstract_batch(config: Config, mesh: Any) -> dict[str, Any]:
    """Shapes and shardings of a batch of the loader."""
    import jax
    import jax.numpy as jnp

    from ttt_jax.parallel.mesh import batch_sharding

    shape = config.data.batch_size, config.data.seq_len
    sharding = batch_sharding(mesh, shape)
    names = ("ids", "targets", "segment_ids", "positions", "weights")
    dtypes = {"weights": jnp.float32}
    return {
        name: jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.int32), sharding=sharding)
        for name in names
    }


def notes(config: Config, sizes: dict[str, int], work: Work) -> list[str]:
    """Remarks on what is legal, and perhaps not meant."""
    name, tokens = ("prefill", work.prefill) if work.prefill else ("decode", work.decode)
    if tokens is None:
        micro = config.data.batch_size // config.optimizer.accumulate
        ways = sizes["data"] * sizes["fsdp"]
        if micro % ways == 0:
            return []
        return [
            f"{micro} rows at a time (data.batch_size / optimizer.accumulate) do not split over "
            f"data x fsdp = {ways} devices: rows are computed more than once; change "
            "data.batch_size or move devices from mesh.fsdp to mesh.context"
        ]
    if tokens <= (known := config.model.known_positions):
        return []
    return [
        f"--{name} {tokens}: the config knows {known} positions (model.max_positions, "
        "model.rope); RoPE extrapolates"
    ]


def advice(
    config: Config,
    sizes: dict[str, int],
    by_kind: dict[str, float],
    memory: float,
    work: Work,
) -> tuple[str, ...]:
    """What to change so that it fits, the most effective first."""
    stored = by_kind["parameters"] + by_kind.get("optimizer state", 0.0)
    lines = []
    if stored > memory / 2:
        lines.append(
            "more devices: parameters and optimizer are split over mesh.fsdp x mesh.context (and "
            "mesh.tensor); or freeze some "
            "with optimizer.groups, which drops their moments"
        )
    if work.decode is not None:
        return (*lines, "fewer --rows, a larger mesh.tensor (heads, F), or mesh.fsdp (D, rows)")
    if work.prefill is not None:
        return (
            *lines,
            f"a larger mesh.context than {sizes['context']} (tokens of a device), or read in "
            "pieces",
        )
    ways = sizes["data"] * sizes["fsdp"]
    local = config.data.batch_size // config.optimizer.accumulate / ways
    if local > 1:
        lines.append(
            f"optimizer.accumulate above {config.optimizer.accumulate}: {local:g} rows a device "
            "at a time now, not 1"
        )
    if config.remat_save is None or config.remat_save:
        kept = "all activations" if config.remat_save is None else ", ".join(config.remat_save)
        lines.append(
            f"remat_save: [] (now kept for the backward pass: {kept}), which costs another "
            "forward pass"
        )
    shards, chunk = sizes["context"], config.model.ttt.chunk_size if config.model.ttt.layers else 1
    most = config.data.seq_len // chunk
    if shards < most:
        lines.append(
            f"mesh.context above {shards} (at most {most}: shards hold whole chunks of {chunk}): "
            "fewer tokens a device"
        )
    elif chunk > 512 and config.model.ttt.layers:
        lines.append(f"a smaller model.ttt.chunk_size than {chunk}, to allow a larger mesh.context")
    lines.append("mesh.tensor above 1: heads and F are split, for little batch and long rows")
    return tuple(lines)
