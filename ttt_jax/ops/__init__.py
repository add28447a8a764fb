"""The operations of the model, each with interchangeable implementations."""

from ttt_jax.ops.ttt.api import IMPLEMENTATIONS, in_place_ttt, write_chunk
from ttt_jax.ops.ttt.chunk_updates import update_cosine, update_norm

__all__ = ["IMPLEMENTATIONS", "in_place_ttt", "update_cosine", "update_norm", "write_chunk"]
