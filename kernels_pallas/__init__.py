"""Kernels of the op for accelerators. They import nothing from `ttt_jax`."""
