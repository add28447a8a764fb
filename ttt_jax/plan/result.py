"""What a plan says: bytes, FLOPs and traffic, with remarks and advice. The numbers come from tpu.py
(compiled) or gpu.py (estimated).
"""

from __future__ import annotations

import dataclasses

from ttt_jax.config import Config
from ttt_jax.plan.work import Work


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
