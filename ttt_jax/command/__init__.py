"""The commands of `ttt-jax`, and how they meet a terminal, a signal and a full disk."""
