"""Whether kernels that update arrays in place do so in a compiled GPU program: read from its text
and from the buffers that XLA dumps (`xla_dump_to`, `xla_dump_hlo_as_text`).

A launch names operands that its results are (`output_to_operand_aliasing`). That is lost where XLA
fuses the launch with something, and nothing says so: the new state goes where nobody reads it
(docs/lab/2026-11-30-state-of-zero.md).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu_traffic import Instruction, parse
from ttt_jax.plan.collectives import nbytes, trips

_KERNEL = re.compile(r'custom_call_target="(mosaic_gpu\w*|triton_kernel_call|__gpu\$\S*triton)"')
_PAIR = re.compile(r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}\)")
_VALUE = re.compile(r"^<(\d+) ")
_PLACE = re.compile(r"^  ([\w.\-]+)(?:, operand (\d+))?(?: \{([\d,]*)\})?$")
_BUFFER = re.compile(r"^ value: <(\d+) .*\(size=(\d+),offset=(\d+)\)")


class Launches(NamedTuple):
    """Fields:
    kernels: launches in the program's text.
    in_place: those that name operands as their results.
    lost: those of them that stand in a fusion, or whose result lies elsewhere than its operand.
    """

    kernels: int
    in_place: int
    lost: list[str]


def launches(dump: Path) -> Launches:
    """Look at every launch of the one program that was dumped into the folder."""
    (path,) = dump.glob("*gpu_after_optimizations.txt")
    program, _ = parse(path.read_text())
    results, operands, buffers = _buffers(dump)
    fused, kernels, in_place, lost = _fused(program), 0, 0, []
    for computation, instructions in program.items():
        for i in instructions.values():
            if not _KERNEL.search(i.line):
                continue
            kernels += 1
            pairs = _PAIR.findall(i.line.partition("output_to_operand_aliasing=")[2])
            in_place += bool(pairs)
            if pairs and computation in fused:
                lost.append(f"{i.name} stands in {computation}")
                continue
            for result, operand, part in pairs:
                new = buffers[results[i.name, result]]
                old = buffers[operands[i.name, operand, part]]
                if new != old:
                    lost.append(f"{i.name}: result {result} is {new}, operand {operand} is {old}")
    return Launches(kernels, in_place, lost)


def copied_bytes(dump: Path, shape: str) -> int:
    """Bytes of all copies of arrays whose type ends so ("768,2048]"), rounds of loops counted."""
    (path,) = dump.glob("*gpu_after_optimizations.txt")
    program, entry = parse(path.read_text())

    def walk(name: str, times: int) -> int:
        total = 0
        for i in program[name].values():
            if i.op == "while":
                condition = [j.line for j in program[_called(i, "condition")].values()]
                total += walk(_called(i, "body"), times * (trips(i.line, condition) or 1))
            elif i.op == "call":
                total += walk(_called(i, "to_apply"), times)
            elif i.op in ("copy", "copy-start") and shape in i.type:
                total += times * nbytes(i.type)
        return total

    return walk(entry, 1)


def _called(i: Instruction, key: str) -> str:
    name = i.called(key)
    assert name is not None, i.line
    return name


def _fused(program: dict[str, dict[str, Instruction]]) -> set[str]:
    """Computations of fusions, and what those call."""
    found: set[str] = set()
    new = {i.called("calls") for x in program.values() for i in x.values() if "fusion" in i.op}
    while new:
        found |= {name for name in new if name}
        inside = [i for name in found for i in program.get(name, {}).values()]
        keys = "calls", "to_apply", "body", "condition"
        new = {i.called(key) for i in inside for key in keys} - found - {None}
    return found


def _buffers(dump: Path):
    """What the compiler laid where.

    Returns: the value of (launch, result), the value of (launch, operand, part), and of every value
      (allocation, offset, size).
    """
    (values,) = dump.glob("*gpu_after_optimizations-buffer-assignment-values.txt")
    (assignment,) = dump.glob("*gpu_after_optimizations-buffer-assignment.txt")
    results, operands, buffers, value, allocation = {}, {}, {}, "", ""
    for line in values.read_text().splitlines():
        if match := _VALUE.match(line):
            value = match[1]
        elif match := _PLACE.match(line):
            name, operand, part = match.groups(default="")
            if operand:
                operands[name, operand, part] = value
            else:
                results[name, part] = value
    for line in assignment.read_text().splitlines():
        if line.startswith("allocation "):
            allocation = line.split()[1]
        elif match := _BUFFER.match(line):
            number, size, offset = match.groups()
            buffers[number] = allocation, int(offset), int(size)
    return results, operands, buffers
