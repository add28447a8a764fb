"""Pallas and Triton kernels for the hot update path. Imports nothing from `ttt_jax`; empty until the kernel work lands."""
