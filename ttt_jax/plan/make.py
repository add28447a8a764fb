"""`ttt-jax plan`: what one step of a config costs on a topology that is not there.

TPU: the real train step (or prefill) is compiled ahead of time by libtpu for the topology's
devices, and the compiled program is read (tpu.py). GPU: an estimate from shapes and shardings
(gpu.py). Nothing is allocated, no device is needed.
"""

from __future__ import annotations

import math

from ttt_jax.config import Config
from ttt_jax.plan import gpu, tpu
from ttt_jax.plan.result import Plan
from ttt_jax.plan.topology import GB, GPU_MEMORY, Topology
from ttt_jax.plan.work import Work


def make_plan(config: Config, topology: Topology, work: Work | None = None) -> Plan:
    """Compile, or estimate, one program; None: the train step. May take minutes.

    Raises:
      UserError: libtpu is missing or does not know the topology.
      ConfigError: the config does not fit the number of devices.
    """
    work = work or Work()
    if topology.kind in GPU_MEMORY:
        return gpu.estimate(config, topology, work)
    return tpu.compile_plan(config, topology, work)


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
    if (roof := plan.roofline) is not None:
        links = "links not known" if roof.links is None else f"links {roof.links * 1e3:.3g} ms"
        lines.append(
            f"roofline: {roof.tokens_per_second:,.0f} tokens/s ({roof.seconds * 1e3:.3g} ms: "
            f"compute {roof.compute * 1e3:.3g} ms, memory {roof.memory * 1e3:.3g} ms, {links})"
        )
    if plan.compile_seconds is not None:
        lines.append(f"compiled in {plan.compile_seconds:.1f} s")
    lines += [f"note: {note}" for note in plan.notes]
    lines.append("verdict: " + ("fits" if plan.fits else "does not fit"))
    lines += [f"  change: {line}" for line in plan.advice]
    return "\n".join(lines)
