"""`ttt-jax score`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from ttt_jax.command.io import (
    check_rows,
    encode,
    keep_inputs,
    load_memories,
    read_ids,
    read_text,
)
from ttt_jax.command.options import (
    DTYPE,
    EXISTING,
    IDS,
    MEMORY,
    MODEL,
    NO_TTT,
    PIECE,
    Command,
    examples,
    mesh_options,
)
from ttt_jax.errors import NotFiniteError, UserError
from ttt_jax.process.output_lock import one_writer
from ttt_jax.terminal import printable


@click.command(
    cls=Command,
    epilog=examples(
        "ttt-jax score --model checkpoints/qwen3 --ids tokens.npy --out scores.npz",
        "ttt-jax score --model checkpoints/qwen3 --text book.txt --no-ttt --out off.npz",
    ),
)
@MODEL
@IDS
@click.option("--text", type=EXISTING, help="UTF-8 text, tokenised with the model's tokenizer.")
@click.option(
    "--out",
    required=True,
    type=EXISTING,
    help="Result: logprobs [B, T-1] float32, log p(token t+1 | 0..t).",
)
@click.option("--logits", is_flag=True, help="Also write logits [B, T, V] float32.")
@click.option("--overwrite", is_flag=True, help="Replace an existing result.")
@NO_TTT
@MEMORY
@DTYPE
@PIECE
@mesh_options
def score(folder, ids, text, out, logits, overwrite, no_ttt, memory, dtype, piece, mesh) -> None:
    """Log-probabilities of given tokens, any length, adapting while reading."""
    if (ids is None) == (text is None):
        raise click.UsageError("give the input by --ids FILE.npy or by --text FILE, one of them")
    click.get_current_context().with_resource(one_writer(out, "--out"))
    if out.exists() and not overwrite:
        raise UserError(f"--out {out}: exists already; choose another file or pass --overwrite")
    keep_inputs(out, "--out", ids, text)
    rows = None if ids is None else read_ids(ids, "--ids")
    document = None if text is None else read_text(text, "--text")
    check_rows(1 if rows is None else len(rows), mesh, "rows")
    start = load_memories(memory)

    import numpy as np

    from ttt_jax.display.progress import progress
    from ttt_jax.inference.scoring import score as score_rows
    from ttt_jax.pretrained.load import load_model

    model = load_model(folder, dtype, mesh=mesh)
    if document is not None:
        rows = [encode(model, document, "--text")]
    assert rows is not None
    failure = None
    try:
        with progress("scoring", max(len(row) for row in rows), "tokens") as advance_to:
            result = score_rows(
                model,
                rows,
                ttt=not no_ttt,
                logits=logits,
                piece=piece,
                memory=start,
                on_progress=advance_to,
            )
    except NotFiniteError as error:
        failure, result = error, error.partial
    arrays = {"logprobs": result.logprobs_BT} | ({"logits": result.logits_BTV} if logits else {})
    _write_arrays(out, arrays)
    if failure is not None:
        raise NotFiniteError(f"{failure}; {out} holds what was computed")
    tokens = sum(len(row) for row in rows)
    shape = printable(f"{len(rows)} x {tokens // len(rows)} tokens")
    if result.logprobs_BT.size:  # the rows of a file are equally long
        nats = -float(result.logprobs_BT.mean(dtype=np.float64))
        shape += f", mean loss {nats:.4f} nats, perplexity {np.exp(nats):.3f}"
    print(printable(f"{shape}: {out}"))


def _write_arrays(out: Path, arrays: dict[str, Any]) -> None:
    """Write an .npz file, complete or not at all. Raises UserError."""
    import numpy as np

    part = out.with_name(f".{out.name}.tmp.npz")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        np.savez(part, **arrays)
        part.rename(out)
    except BaseException as error:  # Ctrl-C, too: nothing half-written stays behind
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"--out {out}: could not be written ({error}); free space or choose another file"
        ) from None
