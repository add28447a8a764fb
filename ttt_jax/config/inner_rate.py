"""The inner learning rate that follows from a model's shape: `model.ttt.lr: auto`.

T tokens of a row, C chunk size, D model width, F MLP width, m mean squared norm of the keys z.

What is read back from S is z S^T. With S = lr sum_t v_t z_t^T over the T tokens of a row, and keys
that are all alike, that is (lr m T) times the mean target. So lr m T has no unit: it says the same
for every row length, width and chunk (docs/writes.md):

    sum        lr = K / (m T)  K by `factor`: 300, or 50 without W_target
    ridge      lr = 1           the write is a solution: it has no unit of keys, and hardly any of T

With decay, T is the tokens that S holds at the end of a row, C (1 - decay^M) / (1 - decay).

At the start of training m follows from the config: the MLP's input has rms 1, so z = silu(g) u with
g and u ~ N(0, s^2), s^2 = D init_std^2, and m = F s^2 E[silu(g)^2]. A checkpoint's keys are not
known from its config; there `sum` needs a number.
"""

from __future__ import annotations

import math

from ttt_jax.config.fields import Config, ModelConfig, TTTConfig
from ttt_jax.errors import ConfigError

SUM = 300.0  # lr m T
SUM_WITHOUT_PROJECTION = 50.0


def inner_rate(config: Config) -> float:
    """Compute the rate that `auto` stands for, to two digits.

    Raises: ConfigError where the rule says nothing (`check_rule`), or the norm of the keys is not
    known from the config: that of a checkpoint is measured (training/measured_rate.py).
    """
    ttt, T = config.model.ttt, config.data.seq_len
    if ttt.write == "ridge":
        return 1.0
    check_rule(ttt)
    if config.init_from is not None:
        raise ConfigError(
            "config field model.ttt.lr = auto: is measured on init_from, and follows from init_std "
            "in new models only; give a number"
        )
    tokens = held_tokens(T, ttt.chunk_size, ttt.decay)
    return float(f"{factor(ttt) / (key_square(config.model) * tokens):.2g}")


def factor(ttt: TTTConfig) -> float:
    """Return K = lr m T of `sum`. Entries of W_target are small at the start, and targets without
    it six times larger: that much smaller a rate gives the same ||S||/||W||.
    """
    return SUM if ttt.proj else SUM_WITHOUT_PROJECTION


def check_rule(ttt: TTTConfig) -> None:
    """Raise ConfigError unless the rule of `sum` speaks of these targets: it needs a known size."""
    if ttt.error_layers:
        field = "target" if ttt.target == "prediction_error" else "last_target"
        raise ConfigError(
            f"config field model.ttt.lr = auto: there is no rule for it with model.ttt.{field} = "
            "prediction_error and model.ttt.write = sum; give a number, or set write to ridge"
        )
    if not ttt.normalize_source:
        field = "model.ttt.normalize_source"
        raise ConfigError(
            f"config field model.ttt.lr = auto: there is no rule for it with {field} = false; give "
            f"a number, or set {field} true (docs/writes.md)"
        )


def describe_rate(config: Config) -> list[str]:
    """Say in one line which rate the rule has given; no line where the rate is another one."""
    ttt = config.model.ttt
    try:
        ruled = bool(ttt.layers) and ttt.lr == inner_rate(config)
    except ConfigError:  # there is no rule for this model
        ruled = False
    return [f"model.ttt.lr = {ttt.lr:g}, by the rule for this model and row"] * ruled


def held_tokens(T: int, C: int, decay: float) -> float:
    """Count the tokens in S at the end of a row, each with what decay has left of it."""
    return T if decay == 1 else C * (1 - decay ** (T / C)) / (1 - decay)


def key_square(model: ModelConfig) -> float:
    """Compute m, the mean of ||z||^2 at the start of training from scratch."""
    s = model.init_std * math.sqrt(model.d_model)
    return model.d_ff * s * s * _silu_square(s)


def _silu_square(s: float) -> float:
    """E[silu(g)^2] for g ~ N(0, s^2), by the trapezoidal rule over eight deviations."""
    points = [i / 100 for i in range(-800, 801)]
    weights = [math.exp(-x * x / 2) for x in points]
    silu = [s * x / (1 + math.exp(-max(s * x, -700.0))) for x in points]
    return sum(w * y * y for w, y in zip(weights, silu, strict=True)) / sum(weights)
