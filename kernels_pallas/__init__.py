"""Kernels of the op for accelerators. Imports nothing from `ttt_jax`."""
