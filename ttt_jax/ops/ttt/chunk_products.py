"""The products of a chunk's C x C matrices, with a matrix as a sum of terms.

N chunks of C tokens, widths D and F, S either of them; P, Q, R and X any sizes. The terms of a
matrix are arrays of the compute dtype whose sum it is: two bfloat16 arrays hold 16 bits, and of
float32 and float64 there is one. Sums are kept in float32 (float64), and the product of two small
terms is left out.

`Matmuls` runs anywhere. On a Hopper GPU bfloat16 models take the kernels of
kernels_pallas/gpu_terms.py, which copy nothing and take results apart into terms as they write
them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ttt_jax.ops import platform
from ttt_jax.ops.numerics import accumulator, dot

Terms = tuple[jax.Array, ...]
_EINSUM = {"nn": "npq,nqr->npr", "nt": "npq,nrq->npr", "tn": "nqp,nqr->npr"}
_SUMMED = {"nn": (2, 1), "nt": (2, 2), "tn": (1, 1)}  # axes of X and of Y


class Products(Protocol):
    """What a ridge write multiplies, in a compute dtype."""

    @property
    def dtype(self) -> Any: ...

    def terms(self, x_NPQ) -> Terms:
        """The terms of what is in float32 (float64), the largest first."""
        ...

    def product(self, kind: str, x: Terms, y: Terms) -> Any:
        """The product in float32 (float64). Kinds: "nn" X Y, "nt" X Y^T, "tn" X^T Y."""
        ...

    def gram(self, z_NCF) -> Any:
        """Z Z^T in float32 (float64), of which the lower triangle is sure to be there."""
        ...

    def square(self, m: Terms) -> Terms:
        """M^T M of a lower triangular M."""
        ...

    def outer(self, x_NCD, y_NCD) -> Any:
        """-(X Y^T + Y X^T), in their dtype."""
        ...

    def apply(self, a: Terms, y_NCS, shift_N=None) -> Any:
        """(A + shift I) Y, in Y's dtype, rounded once."""
        ...


@dataclasses.dataclass(frozen=True)
class Matmuls:
    """Matmuls of XLA. Terms stand side by side, so that one matmul sums them."""

    dtype: Any

    def terms(self, x_NPQ):
        if jnp.dtype(self.dtype).itemsize > 2:
            return (x_NPQ,)
        high = jax.lax.reduce_precision(x_NPQ, 8, 7)  # XLA takes a cast there and back for nothing
        return high.astype(self.dtype), (x_NPQ - high).astype(self.dtype)

    def product(self, kind, x, y):
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if i + j < 2]
        summed_x, summed_y = _SUMMED[kind]
        x = jnp.concatenate([x[i] for i, _ in pairs], axis=summed_x)
        y = jnp.concatenate([y[j] for _, j in pairs], axis=summed_y)
        return dot(_EINSUM[kind], x, y, accumulator(self.dtype))

    def gram(self, z_NCF):
        return self.product("nt", (z_NCF,), (z_NCF,))

    def square(self, m):
        square_NCC = self.product("tn", m[:1], m[:1])
        for low_NCC in m[1:]:
            cross_NCC = self.product("tn", m[:1], (low_NCC,))
            square_NCC += cross_NCC + jnp.swapaxes(cross_NCC, 1, 2)
        return self.terms(square_NCC)

    def outer(self, x_NCD, y_NCD):
        outer_NCC = self.product("nt", (x_NCD,), (y_NCD,))
        return -(outer_NCC + jnp.swapaxes(outer_NCC, 1, 2)).astype(self.dtype)

    def apply(self, a, y_NCS, shift_N=None):
        if shift_N is None:
            a_NCX, y_NXS = jnp.concatenate(a, axis=2), jnp.tile(y_NCS, (1, len(a), 1))
            return dot(_EINSUM["nn"], a_NCX, y_NXS, self.dtype)
        sum_NCS = self.product("nn", a, (y_NCS,))
        return (sum_NCS + shift_N[:, None, None] * y_NCS.astype(sum_NCS.dtype)).astype(self.dtype)


def products_for(dtype, *sizes: int) -> Products:
    """Choose what computes chunks of such sizes (C, D, F) where this is traced."""
    if platform.compiled_for() in ("gpu", "cuda") and platform.on_one_device():
        from ttt_jax.kernels_pallas import gpu_terms

        if gpu_terms.why_not(dtype, *sizes) is None:
            return gpu_terms.Kernels()
    return Matmuls(jnp.dtype(dtype))
