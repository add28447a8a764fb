"""`ttt-jax plan`: what one step of a config costs on a topology that is not there.

TPU: the real train step (or prefill) is compiled ahead of time by libtpu for the topology's
devices, and the compiled program is read. GPU: an estimate from shapes and shardings
(plan_estimate.py). Nothing is allocated, no device is needed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from ttt_jax.config import Config
from ttt_jax.errors import ConfigError, UserError

GB = 1e9
# Memory of one jax device in GB, vendors' figures. A TPU compiler keeps a part of it: it names the
# usable size when it refuses.
TPU_MEMORY = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
GPU_MEMORY = {"h100": 80, "h200": 141}


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


def prepare_environment() -> None:
    """What libtpu and jax must find in the environment to compile without a TPU. Call before jax is
    imported.
    """
    # also on a machine with accelerators: a plan must not take them
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in {
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any: the topology is asked for by name
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # beside another process: there is no TPU to share
    }.items():
        os.environ.setdefault(name, value)


def make_plan(config: Config, topology: Topology, prefill: int | None = None) -> Plan:
    """Compile, or estimate, one program. May take minutes.

    Raises:
      UserError: libtpu is missing or does not know the topology.
      ConfigError: the config does not fit the number of devices.
    """
    if topology.kind in GPU_MEMORY:
        from ttt_jax.plan.estimate import estimate

        return estimate(config, topology, prefill)
    return _compile(config, topology, prefill)


def tpu_devices(topology: Topology) -> list[Any]:
    """The devices of a TPU topology, on paper. Raises `UserError`."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--topology: TPU programs are compiled by libtpu, which is missing; pip install libtpu"
        )
    prepare_environment()
    from jax.experimental import topologies

    try:
        return list(
            topologies.get_topology_desc(
                platform="tpu", topology_name=topology.text.lower()
            ).devices
        )
    except Exception as error:  # libtpu's errors have no class of their own
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--topology {topology.text}: libtpu does not offer it ({reason}); use another grid"
        ) from None


def out_of_memory(message: str, arguments: float) -> tuple[float, float] | None:
    """Bytes that a program needs and may use, out of libtpu's words; None if they are about
    something else.

    It has two ways to say it: the first names the whole, the second (a program that is far too
    large) only the temporaries.
    """
    size = r"([\d.]+)([KMGT])"
    whole = re.search(rf"Used {size} of {size} hbm", message)
    temporaries = re.search(
        rf"HLO temporaries \({size}\) exceeds available HBM \({size}\)", message
    )
    found = whole or temporaries
    if found is None:
        return None
    need, usable = (float(found[i]) * 1024.0 ** (1 + "KMGT".index(found[i + 1])) for i in (1, 3))
    return need if whole else need + arguments, usable


def _compile(config: Config, topology: Topology, prefill: int | None) -> Plan:
    import jax

    from ttt_jax.flops import model_flops_per_token
    from ttt_jax.parallel.mesh import make_mesh
    from ttt_jax.plan.collectives import read_collectives
    from ttt_jax.training.step import abstract_state, make_train_step

    mesh = make_mesh(config.mesh, tpu_devices(topology))
    sizes = {name: int(size) for name, size in mesh.shape.items()}
    rows, tokens = workload(config, sizes, prefill)
    notes = row_notes(config, sizes) if prefill is None else prefill_notes(config, prefill)
    if prefill is None:
        state, tx = abstract_state(config, mesh)
        batch = abstract_batch(config, mesh)
        function, args = make_train_step(config, tx), (state, batch)
        kinds = {
            "parameters": state.model,
            "optimizer state": (state.opt_state, state.step),
            "batch": batch,
        }
    else:
        function, args = abstract_prefill(config, mesh, rows, tokens)
        kinds = {"parameters": args[0], "tokens": args[1]}
    by_kind = {name: float(shard_bytes(tree)) for name, tree in kinds.items()}
    common = {
        "program": "train step" if prefill is None else f"prefill of {tokens} tokens",
        "topology": topology.text,
        "compiled": True,
        "mesh": sizes,
        "rows": rows,
        "tokens": tokens,
        "memory": topology.memory,
        "model_flops": rows
        * tokens
        * model_flops_per_token(config.model, tokens, training=prefill is None),
    }
    begin = time.perf_counter()
    lowered = function.lower(*args)
    # The text of large TPU programs cannot be had from the executable (libtpu 0.0.4x: "async-update
    # instruction should have 1 operands"), so the compiler writes it into a file.
    folder = tempfile.TemporaryDirectory(prefix="ttt_jax_plan_")
    try:
        compiled = lowered.compile({"xla_dump_to": folder.name, "xla_dump_hlo_as_text": True})
        text = _dumped_text(folder.name)
    except jax.errors.JaxRuntimeError as error:
        refused = out_of_memory(str(error), sum(by_kind.values()))
        if refused is None:
            raise
        need, usable = refused
        by_kind["temporaries and code"] = need - sum(by_kind.values())
        return Plan(
            **common,
            bytes_by_kind=by_kind,
            total=need,
            fits=False,
            advice=advice(config, sizes, by_kind, usable, prefill),
            notes=(
                *notes,
                f"the compiler refused: {need / GB:.2f} GB needed, {usable / GB:.2f} GB usable",
            ),
            compile_seconds=time.perf_counter() - begin,
        )
    finally:
        folder.cleanup()
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    by_kind |= {
        "temporaries": float(memory.temp_size_in_bytes),
        "results": float(fresh),  # what is not written over donated arguments
        "code": float(memory.generated_code_size_in_bytes),
        # Arrays in a TPU's memory are padded to tiles; what is counted above is not.
        "padding": max(0.0, memory.argument_size_in_bytes - sum(by_kind.values())),
    }
    total = sum(by_kind.values())
    traffic = read_collectives(text or compiled.as_text())
    flops = (compiled.cost_analysis() or {}).get("flops")
    fits = total <= topology.memory
    return Plan(
        **common,
        bytes_by_kind=by_kind,
        total=total,
        fits=fits,
        advice=() if fits else advice(config, sizes, by_kind, topology.memory, prefill),
        notes=tuple(notes),
        program_flops=flops,
        collectives={kind: (t.count, t.nbytes) for kind, t in traffic.kinds.items()},
        loops_of_unknown_length=traffic.loops_of_unknown_length,
        compile_seconds=seconds,
    )


def _dumped_text(folder: str) -> str | None:
    """The optimised program that the compiler has written: the largest, should helpers have been
    compiled beside it.
    """
    found = sorted(
        Path(folder).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size
    )
    return found[-1].read_text(encoding="utf-8") if found else None


# ----------------------------------------------------------------------------------------- programs


def workload(config: Config, sizes: dict[str, int], prefill: int | None) -> tuple[int, int]:
    """(rows, tokens of a row). A prefill reads one row on each group of devices that shares one.

    Raises: ConfigError when the tokens do not split over the context axis in whole chunks.
    """
    if prefill is None:
        return config.data.batch_size, config.data.seq_len
    shards = sizes["context"] * (config.model.ttt.chunk_size if config.model.ttt.layers else 1)
    if sizes["context"] > 1 and prefill % shards:
        raise ConfigError(
            f"--prefill {prefill}: must be a multiple of mesh.context * model.ttt.chunk_size = "
            f"{shards}"
        )
    return sizes["data"] * sizes["fsdp"], prefill


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


def abstract_prefill(
    config: Config, mesh: Any, rows: int, tokens: int
) -> tuple[Any, tuple[Any, Any]]:
    """A jitted `(model, ids) -> (logits of the last token, state)` and its abstract arguments, in
    the compute dtype.
    """
    import jax
    import jax.numpy as jnp

    from ttt_jax.model.transformer import Transformer
    from ttt_jax.parallel.mesh import batch_sharding, model_shardings
    from ttt_jax.training.step import runtime_of

    runtime, dtype = runtime_of(config, mesh), jnp.dtype(config.compute_dtype)
    model = jax.eval_shape(lambda: Transformer(config.model, runtime, key=jax.random.key(0)))
    model = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
        model,
        model_shardings(model, mesh),
    )
    ids = jax.ShapeDtypeStruct(
        (rows, tokens), jnp.int32, sharding=batch_sharding(mesh, (rows, tokens))
    )

    def prefill(model: Transformer, ids_BT):
        h_BTD, state, _ = model.hidden(ids_BT, keep_state=True)
        return model.logits(h_BTD[:, -1:]), state

    return jax.jit(prefill), (model, ids)


def shard_bytes(tree: Any) -> int:
    """Bytes of one device's share of abstract arrays with shardings."""
    import jax

    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


# -------------------------------------------------------------------------------------------- words


def row_notes(config: Config, sizes: dict[str, int]) -> list[str]:
    """Rows that do not split are computed on several devices at once: legal, and a waste."""
    micro, ways = (
        config.data.batch_size // config.optimizer.accumulate,
        sizes["data"] * sizes["fsdp"],
    )
    if micro % ways == 0:
        return []
    return [
        f"{micro} rows at a time (data.batch_size / optimizer.accumulate) do not split over data "
        f"x fsdp = {ways} devices: "
        "rows are computed more than once; change data.batch_size or move devices from mesh.fsdp "
        "to mesh.context"
    ]


def prefill_notes(config: Config, tokens: int) -> list[str]:
    """A prefill may be longer than the rows of the config, which are checked."""
    if tokens <= (known := config.model.known_positions):
        return []
    return [
        f"--prefill {tokens}: the config knows {known} positions (model.max_positions, "
        "model.rope); RoPE extrapolates"
    ]


def advice(
    config: Config,
    sizes: dict[str, int],
    by_kind: dict[str, float],
    memory: float,
    prefill: int | None,
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
    if prefill is not None:
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


def describe(plan: Plan) -> str:
    """The plan as text."""
    how = "compiled ahead of time" if plan.compiled else "ESTIMATE, nothing was compiled"
    mesh = " ".join(f"{name}={size}" for name, size in plan.mesh.items())
    lines = [
        f"{plan.program} on {plan.topology} ({how})",
        f"  mesh {mesh}; {plan.rows} rows of {plan.tokens} tokens",
    ]
    lines.append("bytes on each device:")
    lines += [f"  {name:28} {size / GB:10.3f} GB" for name, size in plan.bytes_by_kind.items()]
    lines.append(
        f"  {'total':28} {plan.total / GB:10.3f} GB of {plan.memory / GB:.0f} GB "
        f"({plan.total / plan.memory:.0%})"
    )
    devices = math.prod(plan.mesh.values())
    lines.append(
        f"model FLOPs: {plan.model_flops:.3e}, on each device {plan.model_flops / devices:.3e}"
    )
    if plan.program_flops is not None:
        lines.append(
            f"program FLOPs on each device, XLA's count: {plan.program_flops:.3e} (kernels left "
            "out, loops once)"
        )
    if plan.collectives is not None:
        lines.append("collectives on each device (times run, bytes of the results):")
        lines += [
            f"  {kind:28} {count:8} x {nbytes / GB:10.3f} GB"
            for kind, (count, nbytes) in plan.collectives.items()
        ]
        if not plan.collectives:
            lines.append("  none")
        if plan.loops_of_unknown_length:
            lines.append(
                f"  ({plan.loops_of_unknown_length} loops of unknown length counted once, as in "
                "the program's text)"
            )
    if plan.compile_seconds is not None:
        lines.append(f"compiled in {plan.compile_seconds:.1f} s")
    lines += [f"note: {note}" for note in plan.notes]
    lines.append("verdict: " + ("fits" if plan.fits else "does not fit"))
    lines += [f"  change: {line}" for line in plan.advice]
    return "\n".join(lines)
