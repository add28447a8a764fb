"""The products of a chunk's C x C matrices, with a matrix as a sum of terms.

N chunks of C tokens, widths D and F, S either of them, P x Q x R any blocks. The terms of a matrix
are arrays of the compute dtype whose sum it is: two bfloat16 arrays hold 16 bits, and of float32
and float64 there is one. Sums are kept in float32 (float64), and the product of two small terms is
left out.

`Matmuls` runs anywhere. On an NVIDIA GPU bfloat16 models take the kernels of
kernels_pallas/term_products.py: they read each term once, copy nothing, and compute symmetric
results by half.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ttt_jax.ops import platform
from ttt_jax.ops.numerics import accumulator, dot

Terms = tuple[jax.Array, ...]
_FORMS = {"nn": "npq,nqr->npr", "nt": "npq,nrq->npr", "tn": "nqp,nqr->npr"}


class Products(Protocol):
    """What a ridge write multiplies."""

    def gram(self, z_NCF) -> Any:
        """Z Z^T in float32 (float64), of which the lower triangle is sure to be there."""

    def square(self, m_NCC) -> Terms:
        """M^T M of a lower triangular M in float32 (float64)."""

    def outer(self, x_NCD, y_NCD) -> Terms:
        """X Y^T + Y X^T."""

    def sandwich(self, a: Terms, b: Terms) -> Terms:
        """-A B A, for symmetric A and B."""

    def apply(self, a: Terms, y_NCS, shift_N=None) -> Any:
        """(A + shift I) Y, in Y's dtype, rounded once."""

    def block(self, form: str, x_NPQ, y_NQR, minus_from=None) -> Any:
        """X Y, or what is left of another block less it, all in float32 (float64).

        `form` says which is transposed: "nn", "nt" (Y), "tn" (X).
        """


@dataclasses.dataclass(frozen=True)
class Matmuls(Products):
    """Matmuls of XLA in the compute dtype. Terms stand side by side: one matmul sums them."""

    dtype: Any

    def gram(self, z_NCF):
        return dot("ncf,nkf->nck", z_NCF, z_NCF, accumulator(self.dtype))

    def square(self, m_NCC):
        high, *low = self._terms(m_NCC)
        square_NCC = self.block("tn", high, high)
        for low_NCC in low:
            cross_NCC = self.block("tn", high, low_NCC)
            square_NCC += cross_NCC + jnp.swapaxes(cross_NCC, 1, 2)
        return self._terms(square_NCC)

    def outer(self, x_NCD, y_NCD):
        outer_NCC = self.block("nt", x_NCD, y_NCD)
        return self._terms(outer_NCC + jnp.swapaxes(outer_NCC, 1, 2))

    def sandwich(self, a, b):
        half = self._terms(self._product(a, b))
        return self._terms(-self._product(half, a))

    def apply(self, a, y_NCS, shift_N=None):
        """With the terms of A side by side and Y below itself."""
        a_NCX, y_NXS = jnp.concatenate(a, axis=2), jnp.tile(y_NCS, (1, len(a), 1))
        if shift_N is None:
            return dot("ncx,nxs->ncs", a_NCX, y_NXS, self.dtype)
        shifted_NCS = shift_N[:, None, None] * y_NCS.astype(shift_N.dtype)
        return (self.block("nn", a_NCX, y_NXS) + shifted_NCS).astype(self.dtype)

    def block(self, form, x_NPQ, y_NQR, minus_from=None):
        xy_NPR = dot(_FORMS[form], x_NPQ, y_NQR, accumulator(self.dtype))
        return xy_NPR if minus_from is None else minus_from - xy_NPR

    def _terms(self, x_NCC) -> Terms:
        """x as a sum of arrays, the largest first: two of bfloat16, else one."""
        if jnp.dtype(self.dtype).itemsize > 2:
            return (x_NCC,)
        high = jax.lax.reduce_precision(x_NCC, 8, 7)  # XLA takes a cast there and back for nothing
        return high.astype(self.dtype), (x_NCC - high).astype(self.dtype)

    def _product(self, a: Terms, b: Terms):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if i + j < 2]
        a_NCX = jnp.concatenate([a[i] for i, _ in pairs], axis=2)
        b_NXC = jnp.concatenate([b[j] for _, j in pairs], axis=1)
        return self.block("nn", a_NCX, b_NXC)


def products_for(dtype, *sizes: int) -> Products:
    """Choose what computes chunks of such sizes (C, D, F) where this is traced."""
    if platform.compiled_for() in ("gpu", "cuda") and platform.on_one_device():
        from ttt_jax.kernels_pallas import term_products

        if term_products.why_not(dtype, *sizes) is None:
            return term_products.Kernels()
    return Matmuls(jnp.dtype(dtype))
