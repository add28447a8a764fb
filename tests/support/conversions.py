"""Models to convert, and what two conversions of one model have in common."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import jit

from ttt_jax.model.param_path import param_path

ROOT = Path(__file__).parents[2]


OFFICIAL = ROOT / "tests/golden/model_qwen3_hidden_states"


PLAIN = {"model_type": "llama", "tie_word_embeddings": True}


def same_params(a, b):
    paths = lambda tree: [
        param_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    assert (a.config, a.runtime, paths(a)) == (b.config, b.runtime, paths(b))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(a), jax.tree.leaves(b))


def logits(model):
    ids_BT = jax.random.randint(jax.random.key(0), (2, 40), 0, model.config.vocab_size, jnp.int32)
    return jit(lambda model, ids_BT: model.logits(model.hidden(ids_BT)[0]))(model, ids_BT)
