"""What a run from a checkpoint does where nobody has said anything: rows, TTT layers, chunks.

The inner learning rate needs the checkpoint's activations; training/measured_rate.py has the
rule for it.

Letters: T tokens of a row, C chunk.
"""

from __future__ import annotations

from typing import Any

from ttt_jax.config.fields import ModelConfig
from ttt_jax.config.written import AUTO, Written

ROW = 4096  # tokens, where the model has positions for them
SHARE = 16  # chunks of a row
FEW = 4  # chunks, which a row has at least where the model has positions for them
MIN_CHUNK = 16


def suggested_row(max_positions: int, chunk: int | None, row: int = ROW) -> int:
    """Return T: what the model has positions for, up to `row`, in whole chunks.

    Args:
      chunk: C, where it is known already; a row then has room for a few of them.
    """
    unit = min(chunk or MIN_CHUNK, max_positions)
    return min(max(row, FEW * unit), max_positions) // unit * unit


def suggested_chunk(T: int, shards: int = 1) -> int:
    """Return C: the largest divisor of a shard's tokens that is at most a sixteenth of a row, as in
    the paper's rows of 64k; 16 tokens at least.
    """
    tokens, limit = max(T // max(shards, 1), 1), max(T // SHARE, 1)
    divisors = (size for size in range(min(limit, tokens), 0, -1) if tokens % size == 0)
    return max(next(divisors), MIN_CHUNK)


def suggestions(written: Written, model: ModelConfig, row: int = ROW) -> dict[str, Any]:
    """Return a tree for a checkpoint with this model: `data.seq_len`, up to `row` tokens, and TTT
    layers where it has none.
    """
    ttt = model.ttt
    positions, T = _number(written, "model.max_positions"), written.get("data.seq_len")
    C = _number(written, "model.ttt.chunk_size") or (ttt.chunk_size if ttt.layers else None)
    if T is None:
        T = suggested_row(positions or model.max_positions, C, row)
    tree: dict[str, Any] = {"data": {"seq_len": T}}
    if ttt.layers or type(T) is not int:
        return tree
    fields: dict[str, Any] = {"layers": AUTO, "lr": AUTO, "normalize_source": True}
    fields["chunk_size"] = suggested_chunk(T, _number(written, "mesh.context") or 1)
    return tree | {"model": {"ttt": fields}}


def _number(written: Written, field: str) -> int | None:
    """Return a positive whole number that stands at a field; None for anything else, which the
    field's own check tells.
    """
    value = written.get(field)
    return value if type(value) is int and value > 0 else None
