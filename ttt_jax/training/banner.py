"""What a run says of itself before its first step, and how long it will take once that is known."""

from __future__ import annotations

import jax

from ttt_jax.config import Config
from ttt_jax.flops import device_memory_bytes, device_memory_limit, shard_bytes
from ttt_jax.run.timing import host_memory_bytes
from ttt_jax.training.step import TrainState

_GIB = 2**30


def banner(config: Config, abstract: TrainState, step: int) -> list[str]:
    """Describe model, devices, work, memory and what is kept, a line each.

    Args:
      abstract: shapes, dtypes and shardings of the state.
      step: finished steps.
    """
    return [
        f"model     {_model(config, abstract)}",
        f"devices   {_devices(config)}",
        f"work      {_work(config, step)}",
        f"memory    {_memory(abstract)}",
        f"kept      {_kept(config)}",
    ]


def pace(config: Config, step: int, tokens_per_second: float) -> str:
    """Say how long a step takes, how long the rest will, and how much memory was used so far."""
    seconds = config.data.batch_size * config.data.seq_len / tokens_per_second
    left = duration((config.steps - step) * seconds)
    device, limit = device_memory_bytes(), device_memory_limit()
    used = (
        f"host memory {_size(host_memory_bytes())}"
        if device is None
        else f"device memory {_size(device)}{f' of {_size(limit)}' if limit else ''}"
    )
    return (
        f"{seconds:.3g} s a step, about {left} to go (without evaluations and saves); "
        f"{used} at the most so far"
    )


def duration(seconds: float) -> str:
    """Write a time in the unit that people would use."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _model(config: Config, abstract: TrainState) -> str:
    parameters = sum(x.size for x in jax.tree.leaves(abstract.model))
    ttt, layers = config.model.ttt, config.model.num_layers
    adapts = (
        f"{len(ttt.layers)} of {layers} layers adapt in chunks of {ttt.chunk_size:,} tokens"
        if ttt.layers
        else f"none of {layers} layers adapts"
    )
    return f"{parameters:,} parameters; {adapts}"


def _devices(config: Config) -> str:
    device, count = jax.devices()[0], jax.device_count()
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{count} x {device.device_kind}{processes}, computing in {config.compute_dtype}"


def _work(config: Config, step: int) -> str:
    rows, tokens = config.data.batch_size, config.data.seq_len
    left = config.steps - step
    steps = f"{config.steps:,} steps" if not step else f"{left:,} of {config.steps:,} steps left"
    return (
        f"{rows * tokens:,} tokens a step ({rows:,} rows of {tokens:,}), {steps}, "
        f"{left * rows * tokens:,} tokens"
    )


def _memory(abstract: TrainState) -> str:
    model, state = shard_bytes(abstract.model), shard_bytes((abstract.opt_state, abstract.step))
    limit = device_memory_limit()
    text = f"weights {_size(model)} and optimizer state {_size(state)} on each device"
    return f"{text}, of {_size(limit)}" if limit else text


def _kept(config: Config) -> str:
    names = config.remat_save
    kept = "all activations" if names is None else ", ".join(names) or "no activations"
    again = "" if names is None else "; the rest is computed again"
    return f"{kept} for the backward pass{again} (remat_save)"


def _size(nbytes: float) -> str:
    return f"{nbytes / _GIB:.1f} GiB" if nbytes >= _GIB else f"{nbytes / 2**20:.1f} MiB"
