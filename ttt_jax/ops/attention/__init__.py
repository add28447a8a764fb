"""Attention: one interface, implementations for GPUs, TPUs and anywhere, a KV cache."""
