"""Fast weights of a plain model that gain before any training, found on a text.

P tokens of a piece, Q tokens of a block, D model width, V vocabulary, C chunk size.

TTT is in the last layer alone, and its targets are prediction errors (model/prediction_error.py):

    v_t = s error_t A,    A = (C_p + a m I)^-1 / g

C_p (D D) is the mean covariance of rows of the output weight under the model's own prediction, m
its mean eigenvalue, g the final norm's weight (it divides columns), a = 0.3. So A is a damped step
of Newton on the loss of the next token. s has no unit: with `write: ridge` and s = 1 a chunk's keys
would give the whole step. It is chosen among `SCALES` by the loss of text that C_p has not seen.
The convolution is its tap at the next token (docs/lab/2026-11-30-surprise.md). `read_cap` bounds
what a scale that is too large for a text can do (docs/lab/2026-12-01-read-cap.md).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.config import ModelConfig, TTTConfig, from_dict, to_dict
from ttt_jax.data.tokenizer import load_tokenizer
from ttt_jax.display.progress import progress
from ttt_jax.errors import CheckpointError, ConfigError, DataError, NotFiniteError, UserError
from ttt_jax.model.loss import token_nll
from ttt_jax.model.param_path import param_path
from ttt_jax.model.transformer import State, Transformer
from ttt_jax.model.ttt_mlp import KERNEL

OPTION = "--ttt.calibrate"
SCALES = (0.2, 0.4, 0.8, 1.6)
SHRINK = 0.3  # a
TARGET_RMS = 0.05  # of the elements of W_target, so that AdamW can move it
LOST = 0.01  # relative RMS of what a dtype may lose of W_target; bfloat16 loses 0.002
NEXT = KERNEL // 2 + 1  # the convolution's tap at the next token
STATISTICS, CHOICE = 16_384, 8_192  # tokens that C_p and s are found on, at most
PIECE = 2_048  # tokens read at once, at most
FREE = {"chunk_size": 512, "decay": 0.95, "read_cap": 0.06}  # unless the user names them
FIXED = {"target": "prediction_error", "write": "ridge", "normalize_source": False, "proj": True}
_LOGITS, _ROWS = 256, 8192  # tokens whose logits, and rows of the head that exist at once


class Calibration(NamedTuple):
    """What was found.

    Fields:
      lr: the inner learning rate to write.
      target_DD, conv_D1K: W_target and the convolution, float32.
      s: the scale of the step.
      gains: for each of `SCALES`, loss without the fast weights less the loss with them, nats a
        token over all tokens of the choice.
      errors: of the gains, one standard error over the chunks of the choice.
      loss: without them.
      tokens: of the text.
      statistics, choice: tokens that C_p and s were found on, from the start and the end of the
        text.
      row: the choice was read in rows of so many tokens, each from a fresh state.
      text_sha256: of the text, as UTF-8.
    """

    lr: float
    target_DD: np.ndarray
    conv_D1K: np.ndarray
    s: float
    gains: dict[float, float]
    errors: dict[float, float]
    loss: float
    tokens: int
    statistics: int
    choice: int
    row: int
    text_sha256: str

    def provenance(self) -> dict[str, Any]:
        """What `config.json` says of it, under `ttt_calibration`."""
        names = ("text_sha256", "statistics", "choice", "row", "s", "loss")
        return {name: getattr(self, name) for name in names} | {"gain": self.gains[self.s]}


def calibrated_fields(ttt: dict[str, Any], model: ModelConfig, where: str) -> dict[str, Any]:
    """Complete the fields of `TTTConfig` that a user names by those of a calibrated start.

    Raises: ConfigError naming the field when one contradicts them, or the model adapts already.
    """
    if model.ttt.layers:
        raise ConfigError(
            f"{OPTION}: {where} has TTT layers already, {list(model.ttt.layers)}; start from the "
            "plain checkpoint"
        )
    fixed = {"layers": [model.num_layers - 1]} | FIXED
    given = to_dict(from_dict(TTTConfig, ttt))
    for name in ttt:
        if name in fixed and given[name] != fixed[name]:
            raise ConfigError(
                f"--ttt.{name} {given[name]}: {OPTION} sets {name} to {fixed[name]}; leave "
                f"--ttt.{name} out, or drop {OPTION}"
            )
    if not given["lr"] > 0:
        raise ConfigError(f"--ttt.lr {given['lr']}: {OPTION} needs a positive rate; leave it out")
    return FREE | ttt | fixed


# --------------------------------------------------------------------------------------- the step


def predicted_covariance(
    model: Transformer,
    rows: Sequence[np.ndarray],
    on_tokens: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """Compute C_p over rows of token ids, each read from a fresh state without fast weights.

    Args:
      rows: of equal length.
      on_tokens: called with the tokens of every row that has been read.

    Returns: float64 [D, D].
    """
    w_VD = model.output_weight
    V, D = w_VD.shape
    p_V, second_DD, count = np.zeros(V), np.zeros((D, D)), 0
    for row in rows:
        sums = jax.device_get(_prediction_sums(model, np.asarray(row, np.int32)[None]))
        p_V, second_DD, count = p_V + sums[0], second_DD + sums[1], count + len(row)
        on_tokens(len(row))
    mean_DD = np.zeros((D, D))
    for start in range(0, V, _ROWS):
        part_RD = np.asarray(w_VD[start : start + _ROWS], np.float64)
        mean_DD += (part_RD * p_V[start : start + _ROWS, None]).T @ part_RD
    return (mean_DD - second_DD) / count


@jax.jit
def _prediction_sums(model: Transformer, ids_1P):
    """Sums over the tokens of p_t [V] and of outer products of sum_v p_t(v) w_v [D, D], float32."""
    n_PD = model.hidden(ids_1P, ttt_scale=0.0)[0][0]
    w_VD = model.output_weight.astype(jnp.float32)
    P, D = n_PD.shape
    blocks = -(-P // _LOGITS)
    n_MQD = jnp.pad(n_PD, ((0, blocks * _LOGITS - P), (0, 0))).reshape(blocks, _LOGITS, D)
    real_MQ = (jnp.arange(blocks * _LOGITS) < P).reshape(blocks, _LOGITS)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def block(sums, x):
        n_QD, real_Q = x
        logits_QV = model.logits(n_QD[None])[0].astype(jnp.float32)
        p_QV = jnp.where(real_Q[:, None], jax.nn.softmax(logits_QV, axis=1), 0)
        e_QD = product(p_QV, w_VD)
        return (sums[0] + p_QV.sum(0), sums[1] + product(e_QD.T, e_QD)), None

    start = jnp.zeros(w_VD.shape[0], jnp.float32), jnp.zeros((D, D), jnp.float32)
    return jax.lax.scan(block, start, (n_MQD, real_MQ))[0]


def newton_step(covariance_DD: np.ndarray, g_D: np.ndarray, shrink: float = SHRINK) -> np.ndarray:
    """Make A = (C_p + shrink m I)^-1 / g, float64 [D, D], applied as error @ A.

    Raises: CheckpointError when it is not finite: g has zeros, or all rows are alike;
      NotFiniteError when C_p is not.
    """
    if not np.isfinite(covariance_DD).all():
        raise NotFiniteError(
            f"{OPTION}: the model's predictions on the text are not finite; give another model"
        )
    values, vectors = np.linalg.eigh(np.asarray(covariance_DD, np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse_DD = (vectors / (values + shrink * values.mean())) @ vectors.T
        step_DD = inverse_DD / np.asarray(g_D, np.float64)[None]
    if not np.isfinite(step_DD).all():
        raise CheckpointError(
            f"{OPTION}: the model's final norm has zeros, or its output weight has equal rows; "
            "give another model"
        )
    return step_DD


def as_target(step_DD: np.ndarray, s: float = 1.0) -> tuple[np.ndarray, float]:
    """Split s A into (W_target, rate): elements of W_target have an rms of `TARGET_RMS`, and the
    inner learning rate, to three digits, takes the rest.
    """
    rate = float(f"{s * np.sqrt(np.mean(step_DD**2)) / TARGET_RMS:.3g}")
    return s * step_DD / rate, rate


# ------------------------------------------------------------------------------------- the choice


def calibrate(
    load: Callable[[], Transformer],
    model: ModelConfig,
    text: str,
    tokenizer: str | None,
    lr: float | None,
    dtype: np.dtype,
) -> Calibration:
    """Find W_target and the inner learning rate on a text.

    Args:
      load: the model with its TTT layer, float32 parameters; called when the text is long enough.
      model: its config.
      tokenizer: as `load_tokenizer` takes it; None: the model has none.
      lr: the inner learning rate to keep; None: that of `as_target`.
      dtype: of the tensor that will be written.

    Raises: UserError, one line, for a text that is too short or that nothing gains on; ConfigError
      for a rate with which W_target does not fit into `dtype`.
    """
    ids = _encode(text, tokenizer, model.vocab_size)
    parts = _parts(ids, model)
    here = load()
    total = parts.statistics.size + parts.choice.size
    with progress("calibrating", total, "tokens") as advance_to:
        done = 0

        def count(tokens: int) -> None:
            nonlocal done
            done += tokens
            advance_to(done)

        covariance_DD = predicted_covariance(here, list(parts.statistics), count)
        step_DD = newton_step(covariance_DD, np.asarray(here.norm.scale[...]))
        target_DD = as_target(step_DD)[0].astype(dtype)
        conv_D1K = np.zeros((model.d_model, 1, KERNEL), np.float32)
        conv_D1K[:, :, NEXT] = 1
        set_target(here, target_DD, conv_D1K)
        rates = {s: as_target(step_DD, s)[1] for s in SCALES}
        tried = [0.0, *rates.values()]
        nll_NM, tokens_M = _chunk_nll(here, parts.choice, model.ttt.chunk_size, tried, count)
    off, *on = (nll_NM.sum(1) / tokens_M.sum()).tolist()
    gains = {s: off - loss for s, loss in zip(rates, on, strict=True)}
    gain_SM = (nll_NM[0] - nll_NM[1:]) / tokens_M
    error_S = np.std(gain_SM, axis=1, ddof=1) / np.sqrt(len(tokens_M))
    s = max(gains, key=lambda s: -np.inf if np.isnan(gains[s]) else gains[s])
    if not gains[s] > 0:
        told = ", ".join(f"{s:g}: {gain:+.4f}" for s, gain in gains.items())
        raise UserError(
            f"{OPTION}: nothing gains on the last {parts.choice.size:,} tokens of the text (s and "
            f"gain in nats: {told}); nothing is written; give a longer text, one that repeats "
            "its names and phrases, or train the model"
        )
    rate = rates[s]
    if lr is not None:
        target_DD, rate = _rescaled(target_DD, rate / lr, lr, dtype), lr
    return Calibration(
        rate,
        target_DD.astype(np.float32),
        conv_D1K,
        s,
        gains,
        dict(zip(rates, error_S.tolist(), strict=True)),
        off,
        len(ids),
        parts.statistics.size,
        parts.choice.size,
        parts.choice.shape[1],
        hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest(),
    )


def _rescaled(target_DD: np.ndarray, factor: float, lr: float, dtype: np.dtype) -> np.ndarray:
    """Return W_target for another rate. Raises ConfigError when `dtype` does not hold it."""
    wanted_DD = target_DD.astype(np.float64) * factor
    with np.errstate(over="ignore", invalid="ignore"):
        lost_DD = wanted_DD.astype(dtype).astype(np.float64) - wanted_DD
        lost = np.linalg.norm(lost_DD) / np.linalg.norm(wanted_DD)
    if not lost < LOST:
        raise ConfigError(
            f"--ttt.lr {lr:g}: W_target would have elements of {TARGET_RMS * factor:.1g}, which "
            f"{dtype.name} does not hold; leave it out, or give {lr * factor:.3g} or about that"
        )
    return wanted_DD


def set_target(model: Transformer, target_DD: np.ndarray, conv_D1K: np.ndarray) -> None:
    """Put W_target and the convolution into the model's only TTT layer."""
    [(group, run, _)] = model.ttt_runs()
    target = model.groups[group].blocks[run].mlp.target
    assert target is not None
    assert target.proj is not None
    for param, x in ((target.proj, target_DD), (target.conv, conv_D1K)):
        param[...] = jnp.asarray(x, param[...].dtype).reshape(param[...].shape)


class _Parts(NamedTuple):
    """Token ids in rows of equal length: those for C_p, and those for s."""

    statistics: np.ndarray
    choice: np.ndarray


def _encode(text: str, tokenizer: str | None, vocab_size: int) -> np.ndarray:
    if tokenizer is None:
        raise CheckpointError(f"{OPTION}: the model has no tokenizer; add its tokenizer.json")
    try:
        ids = np.asarray(load_tokenizer(tokenizer).encode(text), np.int32)
    except DataError as error:
        raise DataError(f"{OPTION}: {error}") from None
    if ids.size and ids.max() >= vocab_size:
        raise DataError(
            f"{OPTION}: the tokenizer makes token {ids.max()} of the text, and the model's "
            f"vocabulary has {vocab_size}; give the tokenizer.json that belongs to the model"
        )
    return ids


def _parts(ids: np.ndarray, model: ModelConfig) -> _Parts:
    """Cut the text: a third of it, at most `CHOICE` tokens, from its end for s, and up to
    `STATISTICS` tokens from its start for C_p.

    Raises: UserError for a text of fewer than five chunks, ConfigError for a chunk of which three
      are longer than the model's positions.
    """
    C, known = model.ttt.chunk_size, model.known_positions
    if known < 3 * C:
        raise ConfigError(
            f"--ttt.chunk_size {C}: {OPTION} reads three chunks in a row, and the model has "
            f"{known:,} positions; give --ttt.chunk_size {max(known // 3, 1)} or less"
        )
    if len(ids) < 5 * C:
        raise UserError(
            f"{OPTION}: the text has {len(ids):,} tokens and needs {5 * C:,}, five chunks of "
            f"{C:,}; give a longer text, or a smaller --ttt.chunk_size"
        )
    last = max(3 * C, min(CHOICE, len(ids) // 3) // C * C)
    row = min(last, known // C * C)
    choice = ids[len(ids) - last :][: last // row * row].reshape(-1, row)
    first = ids[: len(ids) - last][:STATISTICS]
    rows = -(-len(first) // min(PIECE, known))
    length = len(first) // rows
    return _Parts(first[: rows * length].reshape(rows, length), choice)


def _chunk_nll(
    model: Transformer,
    rows_RT: np.ndarray,
    chunk: int,
    rates: Sequence[float],
    on_tokens: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray]:
    """Losses of the tokens behind the first of each row for every inner learning rate, summed over
    what a chunk predicts, each row read from a fresh state.

    Args:
      rates: of the model, whose config says 1; 0 is without fast weights.

    Returns: sums float64 [N, M], and the tokens in each, [M].
    """
    T, size = rows_RT.shape[1], max(PIECE // chunk, 1) * chunk
    rate_N, sums, tokens = jnp.asarray(rates, jnp.float32), [], []
    for row in rows_RT:
        state, next_T = None, np.append(row[1:], 0)
        for start in range(0, T, size):
            piece = slice(start, start + size)
            state, nll_NP = _read(
                model, state, row[None, piece], next_T[None, piece], rate_N, capacity=T
            )
            known_P = np.arange(start, min(start + size, T)) < T - 1  # nothing follows the last one
            known_NP = np.where(known_P, np.asarray(nll_NP, np.float64), 0)
            sums.append(known_NP.reshape(len(rates), -1, chunk).sum(2))
            tokens.append(known_P.reshape(-1, chunk).sum(1))
            on_tokens(len(known_P))
    return np.concatenate(sums, axis=1), np.concatenate(tokens)


@functools.partial(jax.jit, static_argnames="capacity")
def _read(model: Transformer, state: State | None, ids_1P, next_1P, rate_N, *, capacity: int):
    """Read a piece at N inner learning rates. Nothing but the last layer's S depends on them, so
    all below it is computed once.

    Returns: (state, losses [N, P]); S in the state has a first axis N.
    """

    def hidden(state, rate):
        options = {"at_chunk_start": True, "ttt_scale": rate}
        fresh = capacity if state is None else None
        h_1PD, state, _ = model.hidden(ids_1P, state, keep_state=True, capacity=fresh, **options)
        return h_1PD, state

    shape = jax.eval_shape(hidden, state, rate_N[0]) if state is None else (None, state)
    axes = jax.tree_util.tree_map_with_path(_axis, shape[1])
    in_axes = (None if state is None else axes, 0)
    h_N1PD, state = jax.vmap(hidden, in_axes, (0, axes))(state, rate_N)
    nll_N1P = jax.lax.map(lambda h: token_nll(h, model.output_weight, next_1P), h_N1PD)
    return state, nll_N1P[:, 0]


def _axis(path: Any, _: Any) -> int | None:
    return 0 if param_path(path).endswith("S_BDF") else None
