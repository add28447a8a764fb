"""Whether a checkpoint can be read on one device, beside what is there already."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ttt_jax.config import ModelConfig
from ttt_jax.model.transformer import abstract_transformer


def too_large(model: ModelConfig, dtype: str) -> str | None:
    """Say why one device cannot hold the parameters in `dtype`; None: it can, in half of its
    memory.
    """
    sizes = (x.size for x in jax.tree.leaves(abstract_transformer(model)))
    nbytes = sum(sizes) * jnp.dtype(dtype).itemsize
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None or nbytes <= limit / 2:
        return None
    return f"its {nbytes / 2**30:.1f} GiB are more than half of one device"
