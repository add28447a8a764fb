"""The numbers of a finished run, as its report takes them."""

from __future__ import annotations

from ttt_jax.config import Config, replace

CONFIG = replace(Config(), {"model.ttt.layers": [1]})


POSITIONS = [[0, 512], [512, 1024], [1024, 1536]]


HELDOUT = {"positions": POSITIONS, "ttt_on": [2.5, 2.25, None], "ttt_off": [2.5, 2.5, 2.6]}


CURVE = [{"step": step, "loss": 3 / step, "grad_norm": 1.0} for step in range(1, 41)] + [
    {"step": 40, "heldout/x": 1}
]
