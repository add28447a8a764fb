"""New models whose fast weights write: with the zero convolution of a real start no test would see
a fast weight.

Imported by conftest.py, so that it holds in every test; `new_target` is what models really start
with.
"""

import jax

from ttt_jax.model import ttt_mlp as ttt

new_target = ttt.initial_target


def awake_target(key, D, std):
    """Draw a convolution and a dense W_target of the size that trained ones have."""
    conv_key, proj_key = jax.random.split(key)
    conv_DK = jax.random.normal(conv_key, (D, ttt.KERNEL), "float32") / (3 * ttt.KERNEL) ** 0.5
    return conv_DK, std * jax.random.normal(proj_key, (D, D), "float32")


ttt.initial_target = awake_target
