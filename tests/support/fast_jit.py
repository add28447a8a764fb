"""`jax.jit` for tests: tiny programs compile twice as fast without LLVM's optimisations and compute
the same.
"""

import functools

import jax

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
