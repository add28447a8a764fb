"""Plans for TPUs: libtpu compiles the program for devices on paper, and the program is read."""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from ttt_jax.config import Config
from ttt_jax.errors import UserError
from ttt_jax.plan.collectives import read_collectives
from ttt_jax.plan.inference import (
    abstract_decode,
    abstract_prefill,
    decode_reads,
    model_flops,
    roofline,
)
from ttt_jax.plan.result import Plan, advice, notes
from ttt_jax.plan.topology import GB, Topology
from ttt_jax.plan.work import Work, abstract_batch, workload


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


def tpu_devices(topology: Topology) -> list[Any]:
    """The devices of a TPU topology, on paper. Raises `UserError`."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--topology: TPU programs are compiled by libtpu, which is missing; pip install "
            "'ttt-jax[tpu]'"
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


def compile_plan(config: Config, topology: Topology, work: Work) -> Plan:
    """Compile the train step, a prefill or a decode step. May take minutes.

    Raises:
      UserError: libtpu is missing or does not know the topology.
      ConfigError: the config does not fit the number of devices.
    """
    from ttt_jax.flops import shard_bytes
    from ttt_jax.parallel.mesh import make_mesh
    from ttt_jax.training.step_memory import keep_what_fits

    mesh = make_mesh(config.mesh, tpu_devices(topology))
    sizes = {name: int(size) for name, size in mesh.shape.items()}
    rows, tokens = workload(config, sizes, work)
    config, kept = keep_what_fits(config, mesh, topology.memory)
    remarks = [*notes(config, sizes, work), *kept]
    function, args, kinds = _program(config, mesh, rows, tokens, work)
    by_kind = {name: float(shard_bytes(tree)) for name, tree in kinds.items()}
    common = {
        "program": work.program,
        "topology": topology.text,
        "compiled": True,
        "mesh": sizes,
        "rows": rows,
        "tokens": tokens,
        "memory": topology.memory,
        "model_flops": model_flops(config, work, rows, tokens),
    }
    begin = time.perf_counter()
    compiled = _compile(function.lower(*args), sum(by_kind.values()))
    common["compile_seconds"] = time.perf_counter() - begin
    if isinstance(compiled, _Refusal):
        need, usable = compiled
        by_kind["temporaries and code"] = need - sum(by_kind.values())
        refused = f"the compiler refused: {need / GB:.2f} GB needed, {usable / GB:.2f} GB usable"
        return Plan(
            **common,
            bytes_by_kind=by_kind,
            total=need,
            fits=False,
            advice=advice(config, sizes, by_kind, usable, work),
            notes=(*remarks, refused),
        )
    by_kind |= _compiled_bytes(compiled.memory, sum(by_kind.values()))
    total = sum(by_kind.values())
    fits = total <= topology.memory
    traffic = read_collectives(compiled.text)
    sent = float(sum(t.nbytes for t in traffic.kinds.values()))
    read = by_kind["parameters"] if work.decode is None else decode_reads(args[0], args[1])
    return Plan(
        **common,
        bytes_by_kind=by_kind,
        total=total,
        fits=fits,
        advice=() if fits else advice(config, sizes, by_kind, topology.memory, work),
        notes=tuple(remarks),
        program_flops=compiled.flops,
        collectives={kind: (t.count, t.nbytes) for kind, t in traffic.kinds.items()},
        loops_of_unknown_length=traffic.loops_of_unknown_length,
        roofline=roofline(config, topology, work, rows, tokens, read, sent),
    )


class _Refusal(NamedTuple):
    """Bytes that a program needs and may use."""

    need: float
    usable: float


class _Compiled(NamedTuple):
    """What a compiled program tells."""

    memory: Any
    flops: float | None
    text: str


def _program(
    config: Config, mesh: Any, rows: int, tokens: int, work: Work
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A jitted function, its abstract arguments, and these by kind."""
    from ttt_jax.training.step import abstract_state, make_train_step

    if work.decode is not None:
        function, args = abstract_decode(config, mesh, rows, tokens)
        return function, args, {"parameters": args[0], "streams": args[1], "tokens": args[2:]}
    if work.prefill is not None:
        function, args = abstract_prefill(config, mesh, rows, tokens)
        return function, args, {"parameters": args[0], "tokens": args[1]}
    state, optimizer = abstract_state(config, mesh)
    batch = abstract_batch(config, mesh)
    kinds = {
        "parameters": state.model,
        "optimizer state": (state.opt_state, state.step),
        "batch": batch,
    }
    return make_train_step(config, optimizer), (state, batch), kinds


def _compile(lowered: Any, arguments: float) -> _Compiled | _Refusal:
    """Compile, given the bytes of the program's arguments."""
    import jax

    # The text of large TPU programs cannot be had from the executable (libtpu 0.0.4x: "async-update
    # instruction should have 1 operands"), so the compiler writes it into a file.
    with tempfile.TemporaryDirectory(prefix="ttt_jax_plan_") as folder:
        try:
            compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            refused = out_of_memory(str(error), arguments)
            if refused is None:
                raise
            return _Refusal(*refused)
        text = _dumped_text(folder)
    flops = (compiled.cost_analysis() or {}).get("flops")
    return _Compiled(compiled.memory_analysis(), flops, text or compiled.as_text())


def _compiled_bytes(memory: Any, arguments: float) -> dict[str, float]:
    """What the compiler adds to the arguments, by kind."""
    return {
        "temporaries": float(memory.temp_size_in_bytes),
        # What is not written over donated arguments.
        "results": float(memory.output_size_in_bytes - memory.alias_size_in_bytes),
        "code": float(memory.generated_code_size_in_bytes),
        # Arrays in a TPU's memory are padded to tiles; what is counted above is not.
        "padding": max(0.0, memory.argument_size_in_bytes - arguments),
    }


def _dumped_text(folder: str) -> str | None:
    """The optimised program that the compiler has written: the largest, should helpers have been
    compiled beside it.
    """
    found = sorted(
        Path(folder).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size
    )
    return found[-1].read_text(encoding="utf-8") if found else None
