"""The inner learning rate of new TTT layers, where nobody has named one.

The rule is that of docs/writes.md for `write: sum` with a normalised source: lr * m * T = K,
with m = ||z||^2 of the tokens and T tokens a row. m is measured on the checkpoint: layers of one
model differ tenfold, and models more.

Letters: R rows, T tokens, C chunk, F MLP width, N layers of a run.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.config import Config, TTTConfig, replace
from ttt_jax.config.inner_rate import factor, held_tokens
from ttt_jax.errors import ConfigError
from ttt_jax.model.stack import Runtime
from ttt_jax.model.transformer import abstract_transformer
from ttt_jax.parallel.mesh import Batch
from ttt_jax.pretrained.load import initial_model
from ttt_jax.pretrained.start_config import Start
from ttt_jax.process.multihost import on_first_process, say_on_first_process
from ttt_jax.training.source_size import too_large

_ROWS, _TOKENS = 2, 1024  # that are read


def rate_of(ttt: TTTConfig, square: float, T: float) -> float:
    """Return lr for keys of mean squared norm `square` and T tokens in S, to two digits."""
    return float(f"{factor(ttt) / (square * T):.1e}")


def settled(start: Start, rows: Batch) -> Config:
    """Return the config with an inner learning rate: where it is open, measure, and print the rule.

    Args:
      rows: held-out rows [R, T]; the first ones are read, with TTT off.

    Raises: ConfigError, one line, when the checkpoint is too large for one device, or its keys are
      zero or not finite; as of `initial_model`.
    """
    config = start.config
    if not start.open_rate:
        return config
    squares = on_first_process(lambda: _key_squares(config, rows))
    layer = max(squares, key=lambda layer: squares[layer])
    ttt, m = config.model.ttt, squares[layer]
    T = held_tokens(config.data.seq_len, ttt.chunk_size, ttt.decay)
    if not 0 < m < math.inf:
        raise ConfigError(
            f"config field model.ttt.lr = auto: {config.init_from} gives no scale for it "
            f"(||z||^2 is {m:g} in layer {layer}); check the checkpoint, or set it"
        )
    lr = rate_of(ttt, m, T)
    line = (
        f"init_from {config.init_from}: model.ttt.lr is {lr:g}, {factor(ttt):.0f} / (m T) with m = "
        f"{m:.3g}, the median ||z||^2 of held-out tokens in layer {layer}, and T = {T:.0f}"
    )
    say_on_first_process([line])
    return replace(config, {"model.ttt.lr": lr})


def _key_squares(config: Config, rows: Batch) -> dict[str, float]:
    """Return TTT layer -> median over the tokens of ||z||^2. The mean would be that of a few
    tokens on which attention rests, a thousand times larger.
    """
    if reason := too_large(config.model, config.compute_dtype):
        raise ConfigError(
            f"config field model.ttt.lr = auto: cannot be measured on {config.init_from}: "
            f"{reason}; set it (docs/writes.md)"
        )
    ids_RT = np.asarray(rows["ids"])[:_ROWS, :_TOKENS]
    real_RT = np.asarray(rows["segment_ids"])[:_ROWS, :_TOKENS] > 0
    # No chunk is completed: the state then holds the keys of all tokens.
    reading = replace(config, {"model.ttt.chunk_size": ids_RT.shape[1] + 1})
    runtime = Runtime(dtype=config.compute_dtype)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, config.compute_dtype),
        abstract_transformer(reading.model, runtime),
    )
    model = initial_model(reading, abstract)
    assert model is not None

    @jax.jit
    def squares(model: Any, ids_RT: jax.Array) -> dict[int, jax.Array]:
        _, state, _ = model.hidden(ids_RT, keep_state=True, capacity=ids_RT.shape[1])
        found = {}
        for g, r, layers in model.ttt_runs():
            z = state.layers[g][r].ttt.z_BCF.astype(jnp.float32)
            square = jnp.square(z).sum(-1).reshape(-1, *z.shape[2:4])
            found |= dict(zip(layers, square, strict=True))
        return found

    device = jax.local_devices()[0]
    with jax.default_device(device):
        found = jax.device_get(squares(model, jnp.asarray(ids_RT)))
    return {
        str(layer): float(np.median(square_RC[:, : ids_RT.shape[1]][real_RT]))
        for layer, square_RC in found.items()
    }
