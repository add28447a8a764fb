from ttt_jax.ops.in_place_ttt import IMPLEMENTATIONS, in_place_ttt, update_cosine, update_norm

__all__ = ["IMPLEMENTATIONS", "in_place_ttt", "update_cosine", "update_norm"]
