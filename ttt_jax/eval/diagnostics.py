"""What the fast weights do while a text is read, and where they help.

D model width, F MLP width, C chunk size, L TTT layers; S the accumulated update of a fast weight, W
the slow weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.errors import UserError
from ttt_jax.inference.prefill import Frozen, needs_capacity, program, read_piece
from ttt_jax.inference.scoring import score
from ttt_jax.model.transformer import State, Transformer
from ttt_jax.ops.numerics import precision_for

_POINTS = 12  # chunks looked at


def fast_weights(
    model: Transformer, ids: np.ndarray, *, points: int = _POINTS
) -> list[dict[str, Any]]:
    """Measure the fast weights of each TTT layer at some chunks of a text read from a fresh state.

    "After chunk m" means S as chunk m + 1 is read with it. `state_ratio` is ||S||_F / ||W||_F.
    `effective_rank` is exp(entropy) of the squared singular values of S, scaled to sum 1: 1 for a
    matrix of rank one, min(D, F) for one with equal singular values. `output_share` is ||z S^T||_F
    / ||z (W + S)^T||_F over the tokens z of chunk m + 1 (all but its last).

    Returns: [{"layer", "chunks": [{"chunk", "state_ratio", "effective_rank", "output_share"}]}],
    empty without TTT layers. Raises: UserError for a text shorter than two chunks, or chunks of one
    token.
    """
    C = model.config.ttt.chunk_size
    if not model.config.ttt.layers:
        return []
    if len(ids) < 2 * C or C < 2:
        raise UserError(
            f"--diagnostics: {len(ids)} tokens at chunk size {C}; give at least two chunks of at "
            "least two tokens"
        )
    whole = len(ids) // C
    marks = sorted({int(m) for m in np.unique(np.geomspace(1, whole - 1, points).round())})
    frozen, state, position = Frozen(model), None, 0
    layers: dict[int, list[dict[str, Any]]] = {layer: [] for layer in _layer_indices(model)}
    for mark in marks:
        state = _read(frozen, model, ids, state, position, mark * C)
        # The pending tokens' activations z are in the state, S is still that of `mark`.
        state = _read(frozen, model, ids, state, mark * C, mark * C + C - 1)
        state, measured = measure(frozen, state)
        values = np.stack([np.asarray(x) for x in measured], axis=1).tolist()
        for layer, (ratio, rank, share) in zip(_layer_indices(model), values, strict=True):
            entry = {"state_ratio": ratio, "effective_rank": rank, "output_share": share}
            layers[layer].append({"chunk": mark} | entry)
        position = mark * C + C
        state = _read(frozen, model, ids, state, position - 1, position)
    return [{"layer": layer, "chunks": layers[layer]} for layer in sorted(layers)]


def _read(
    frozen: Frozen, model: Transformer, ids: np.ndarray, state: State | None, start: int, stop: int
) -> State:
    """Read on from token `start` to `stop`, a chunk's length at a time."""
    C = model.config.ttt.chunk_size
    capacity = len(ids) if needs_capacity(model) else None
    for first in range(start, stop, C):
        ids_1P = ids[first : min(first + C, stop)].astype(np.int32)[None]
        state, *_ = read_piece(
            frozen,
            state,
            jnp.zeros((1, model.config.vocab_size), jnp.float32),
            ids_1P,
            np.full(1, ids_1P.shape[1], np.int32),
            capacity=capacity,
            at_chunk_start=first % C == 0,
            ttt=True,
        )
    assert state is not None
    return state


def _layer_indices(model: Transformer) -> list[int]:
    """List the layer numbers in the order in which `measure` returns them."""
    return [layer for _, _, layers in model.ttt_runs() for layer in layers]


@program(())
def measure(model, state: State):
    """Return (state, (||S|| / ||W||, effective rank of S, share of the output from S)), each
    float32 [L], of the only row.
    """
    C = model.config.ttt.chunk_size
    found = []
    for group, runs in zip(model.groups, state.layers, strict=True):
        for run, block, layer in zip(group.pattern, group.blocks, runs, strict=True):
            if not run.kind.ttt:
                continue
            flat = lambda x: x.reshape(-1, *x.shape[2:])
            assert layer.ttt is not None
            S_LDF, z_LCF = flat(layer.ttt.S_BDF)[:, 0], flat(layer.ttt.z_BCF)[:, 0, : C - 1]
            found.append(jax.lax.map(_measure_layer, (S_LDF, z_LCF, flat(block.mlp.down[...]))))
    return state, tuple(jnp.concatenate(x) for x in zip(*found, strict=True))


def _measure_layer(x):
    S_DF, z_CF, w_DF = x
    z_CF, w_DF = z_CF.astype(S_DF.dtype), w_DF.astype(S_DF.dtype)
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x)))
    # Squared singular values of S are the eigenvalues of its Gram matrix on the smaller side; S is
    # scaled to norm 1 before.
    scale = norm(S_DF)
    unit_DF = S_DF / jnp.where(scale > 0, scale, 1)
    side = "df,ef->de" if S_DF.shape[0] <= S_DF.shape[1] else "df,dg->fg"
    gram = jnp.einsum(side, unit_DF, unit_DF, precision="highest")
    p = jnp.maximum(jnp.linalg.eigvalsh(gram), 0)
    p = p / jnp.maximum(jnp.sum(p), jnp.finfo(p.dtype).tiny)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0))
    apply = lambda m_DF: jnp.einsum("cf,df->cd", z_CF, m_DF, precision=precision_for(S_DF.dtype))
    fast_CD = apply(S_DF)
    share = norm(fast_CD) / jnp.maximum(norm(fast_CD + apply(w_DF)), jnp.finfo(p.dtype).tiny)
    rank = jnp.where(scale > 0, jnp.exp(entropy), 0)
    return tuple(x.astype(jnp.float32) for x in (scale / norm(w_DF), rank, share))


def repeated_ngrams(ids: Sequence[int] | np.ndarray, n: int) -> np.ndarray:
    """Return bool [T - 1]: whether the n tokens that end with token t + 1 stand somewhere before in
    `ids`.
    """
    seen, repeated = set(), np.zeros(max(len(ids) - 1, 0), bool)
    row = np.asarray(ids).tolist()
    for end in range(n, len(row) + 1):
        gram = tuple(row[end - n : end])
        if end >= 2:
            repeated[end - 2] = gram in seen
        seen.add(gram)
    return repeated


def ngram_gain(ids: np.ndarray, on_T: np.ndarray, off_T: np.ndarray, n: int = 4) -> dict[str, Any]:
    """Loss on the tokens that complete an n-gram which the text held before, and on the others.

    Args:
      on_T, off_T: log-probabilities [T - 1] with TTT on and off.
    """
    repeated_T = repeated_ngrams(ids, n)
    result: dict[str, Any] = {"n": n}
    for name, chosen_T in (("repeated", repeated_T), ("novel", ~repeated_T)):
        on, off = (
            -float(x[chosen_T].mean(dtype=np.float64)) if chosen_T.any() else None
            for x in (on_T, off_T)
        )
        gain = None if on is None or off is None else off - on
        result[name] = {"tokens": int(chosen_T.sum()), "on": on, "off": off, "gain": gain}
    return result


def diagnose(
    model: Transformer, ids: np.ndarray, *, piece: int | None = None
) -> tuple[dict[str, Any], list]:
    """Make the "diagnostics" part of results.json for one text, and the pieces that
    `page.text_page` colours.
    """
    on_T, off_T = (
        score(model, [ids], ttt=ttt, piece=piece).logprobs_BT[0] for ttt in (True, False)
    )
    part = {
        "tokens": len(ids),
        "layers": fast_weights(model, ids),
        "ngrams": ngram_gain(ids, on_T, off_T),
    }
    return part, text_pieces(model, ids, on_T, off_T)


def text_pieces(model: Transformer, ids: np.ndarray, on_T: np.ndarray, off_T: np.ndarray):
    """Return (text, log p on, log p off) per token; those of tokens that are parts of one character
    are joined and summed.
    """
    pieces, held, sums = [], [], np.zeros(2)
    for t, token in enumerate(ids.tolist()):
        held.append(token)
        if t:
            sums = sums + np.array([on_T[t - 1], off_T[t - 1]], np.float64)
        text = f"{token} " if model.tokenizer is None else model.tokenizer.decode(held)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(held) < 4 and t + 1 < len(ids):
            continue
        pieces.append(
            (text, float(sums[0]), float(sums[1])) if t >= len(held) else (text, None, None)
        )
        held, sums = [], np.zeros(2)
    return pieces
