"""Whether two models on disk compute the same: `ttt-jax convert --verify`.

B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import jax
import numpy as np

from ttt_jax.checkpoint.parameters import load_model_params
from ttt_jax.config import replace
from ttt_jax.model.transformer import Transformer, abstract_transformer
from ttt_jax.pretrained.hf_weights import fill
from ttt_jax.pretrained.orbax_folder import OrbaxTensors
from ttt_jax.pretrained.source import Source

_CHUNK = 64


def compare_logits(a: Source, b: Source) -> float:
    """Relative RMS of the logits of two models on random ids, computed in float32.

    Both run with a chunk of at most 64 tokens, so that the fast weights are updated twice on the
    way.
    """
    chunk = min([_CHUNK, *(x.model.ttt.chunk_size for x in (a, b) if x.model.ttt.layers)])
    shape = (2, 2 * chunk + 17)
    ids_BT = jax.random.randint(jax.random.key(0), shape, 0, a.model.vocab_size, np.int32)

    def logits_BTV(source: Source) -> np.ndarray:
        config = replace(source.model, {"ttt.chunk_size": chunk})
        abstract = abstract_transformer(config)
        if isinstance(source.tensors, OrbaxTensors):  # through Orbax's own reader
            model = load_model_params(source.folder, abstract)
        else:
            model = fill(abstract, source.tensors.read)
        return np.asarray(_logits_BTV(model, ids_BT), np.float64)

    x_BTV = logits_BTV(a)
    return float(np.sqrt(np.mean((logits_BTV(b) - x_BTV) ** 2) / np.mean(x_BTV**2)))


@jax.jit  # one function: compiled once when both sides are the same model
def _logits_BTV(model: Transformer, ids_BT: jax.Array) -> jax.Array:
    return model.logits(model.hidden(ids_BT)[0])
