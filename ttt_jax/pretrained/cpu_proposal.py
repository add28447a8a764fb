"""What the preset `continual` proposes where jax finds no accelerator.

Its own rows are made for a GPU: a step of 135M parameters with 4 rows of 4,096 tokens takes two
CPU cores minutes. Here rows are as many and as long as a few seconds allow, and a small model keeps
what it has. bfloat16 stays: a step took as many CPU seconds as in float32, with AVX-512 and with
AVX2.

Letters: B rows of a step, T tokens of a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ttt_jax.config import ModelConfig, Written
from ttt_jax.config.suggest import ROW
from ttt_jax.config.written import value_at
from ttt_jax.flops import model_flops_per_token

STEP = 5e11  # FLOPs of a training step: a few seconds on two cores
SHORTEST = 512  # T
HELDOUT = 8  # rows of the closing evaluation, which reads them twice, where steps are cut


class Proposal(NamedTuple):
    """Fields: values of the preset, as a tree; T of a row, as `suggestions` takes it."""

    preset: dict[str, Any]
    row: int


def cpu_proposal(written: Written, model: ModelConfig) -> Proposal | None:
    """Return what the preset says on a CPU, or None where its own rows will do.

    Fewer rows come before shorter ones: fast weights learn along a row. What a user wrote counts,
    also in the sum.

    Args:
      written: the preset, which has `data.batch_size`, with what a user wrote.
      model: the checkpoint's.
    """
    user_B, user_T = written.of_user("data.batch_size"), written.of_user("data.seq_len")
    parts = written.of_user("optimizer.accumulate") or 1
    if not all(type(n) is int and n > 0 for n in (user_B or 1, user_T or 1, parts)):
        return None  # said with the field's own check
    most = value_at(written.preset, "data.batch_size")
    batches = [user_B] if user_B else [B for B in _halves(most, 1) if B % parts == 0] or [most]
    lengths = [user_T] if user_T else _halves(ROW, SHORTEST)
    shapes = [(B, T) for T in lengths for B in batches]
    B, T = shape = next((shape for shape in shapes if _flops(model, *shape) <= STEP), shapes[-1])
    if shape == shapes[0]:
        return None
    return Proposal({"data": {"batch_size": B}, "eval": {"rows": HELDOUT}}, T)


def _halves(most: int, least: int) -> list[int]:
    found = [most]
    while found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return found


def _flops(model: ModelConfig, B: int, T: int) -> float:
    """Count those of a training step; a row is not longer than the model's positions."""
    T = min(T, model.max_positions)
    return B * T * model_flops_per_token(model, T, training=True)
