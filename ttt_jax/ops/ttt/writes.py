"""What a chunk writes for its targets: transforms of v inside a chunk, before the ordinary update S
+= lr v^T z.

B batch, T tokens, D model width, F MLP width, C chunk size, M chunks, N = B M, Z a chunk's keys (C
F), V its targets (C D), G = Z Z^T (C C).

    sum        V^T Z                                       the paper's rule; similar keys add up
    ridge      V^T Z (Z^T Z + lambda m I)^-1               least squares: what makes z U^T closest to v on the chunk
             = (A^-1 V)^T Z with A = G + lambda m I        m = mean ||z||^2, so lambda and lr have no unit
    spectral   the nearest matrix with singular values 1   Newton-Schulz on V^T Z, as Muon takes its steps

All are C x C algebra on v: the op, its kernels, its backward, streams and shards know nothing of
them, and the writes of chunks still add up. A chunk's write depends on that chunk alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ttt_jax.ops.numerics import accumulator, dot

# the quintic of Muon: singular values from 0.003 to 1 go to 0.7 .. 1.2
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
LEAF = 32  # size from which on a matrix is inverted element by element


def transformed(
    write: str,
    z_BTF,
    v_BTD,
    chunk_size: int,
    *,
    ridge: float = 1.0,
    unit: jax.typing.ArrayLike = 1.0,
):
    """Make targets v' such that v'^T z is what `write` writes for (z, v); in v's dtype.

    Args:
      z_BTF, v_BTD: keys and targets of whole chunks (T a multiple of `chunk_size`), one dtype.
      ridge: lambda of the ridge write.
      unit: size of the singular values of the spectral write, a number or a scalar array.
    """
    B, T, D = v_BTD.shape
    if write == "sum":
        return v_BTD
    z_NCF, v_NCD = (
        x.reshape(B * (T // chunk_size), chunk_size, x.shape[2]) for x in (z_BTF, v_BTD)
    )
    acc = accumulator(v_BTD.dtype)
    with jax.named_scope(f"ttt_write_{write}"):
        gram_NCC = dot("ncf,nkf->nck", z_NCF, z_NCF, acc)
        out_NCD = (
            _ridge(gram_NCC, v_NCD, ridge) if write == "ridge" else _spectral(gram_NCC, v_NCD, unit)
        )
    return out_NCD.astype(v_BTD.dtype).reshape(B, T, D)


def _ridge(gram_NCC, v_NCD, ridge: float):
    """(G + lambda m I)^-1 v."""
    C = gram_NCC.shape[1]
    mean_N11 = jnp.trace(gram_NCC, axis1=1, axis2=2)[:, None, None] / C
    mean_N11 = jnp.maximum(mean_N11, _smallest(gram_NCC.dtype))  # a chunk of zeros writes nothing
    scaled_NCC = gram_NCC / mean_N11 + ridge * jnp.eye(C, dtype=gram_NCC.dtype)[None]
    return solve(scaled_NCC, v_NCD.astype(gram_NCC.dtype)) / mean_N11


def _smallest(dtype):
    """Get a positive number far below any that matters, whose inverse squared still exists."""
    return float(jnp.finfo(dtype).tiny) ** 0.25


# -------------------------------------------------------------------------------------------- ridge


@jax.custom_vjp
def solve(a_NCC, v_NCD):
    """Compute A^-1 v for symmetric positive definite A. One inverse serves the backward, too.

    All of it is float32 at least. Where a chunk's keys are alike, A^-1 is the identity less a
    matrix of nearly the same size, and in bf16 nothing true would be left of the difference.
    """
    return _solve_forward(a_NCC, v_NCD)[0]


def _refined(a_NCC, inverse_NCC, v_NCD):
    """A^-1 v with the error of the product with an explicit inverse, cond^2 eps, taken out once
    more.
    """
    x_NCD = dot("nck,nkd->ncd", inverse_NCC, v_NCD, a_NCC.dtype)
    rest_NCD = v_NCD - dot("nck,nkd->ncd", a_NCC, x_NCD, a_NCC.dtype)
    return x_NCD + dot("nck,nkd->ncd", inverse_NCC, rest_NCD, a_NCC.dtype)


def _solve_forward(a_NCC, v_NCD):
    inverse_NCC = inverse(a_NCC)
    x_NCD = _refined(a_NCC, inverse_NCC, v_NCD)
    return x_NCD, (a_NCC, inverse_NCC, x_NCD)


def _solve_backward(residuals, dx_NCD):
    a_NCC, inverse_NCC, x_NCD = residuals
    dv_NCD = _refined(a_NCC, inverse_NCC, dx_NCD)
    return -dot("ncd,nkd->nck", dv_NCD, x_NCD, dx_NCD.dtype), dv_NCD


solve.defvjp(_solve_forward, _solve_backward)


def inverse(a_NCC):
    """Inverse of symmetric positive definite matrices by halves: matmuls, which every device and
    mesh does well.

    With A = [[P, Q^T], [Q, R]] and the Schur complement X = R - Q P^-1 Q^T, the lower right corner
    of A^-1 is X^-1.
    """
    C = a_NCC.shape[1]
    if C <= LEAF:
        return _swept(a_NCC)
    half, acc = C // 2, a_NCC.dtype
    product = lambda subscripts, x, y: dot(subscripts, x, y, acc)
    first_NHH, below_NLH, last_NLL = (
        a_NCC[:, :half, :half],
        a_NCC[:, half:, :half],
        a_NCC[:, half:, half:],
    )
    first_NHH = inverse(first_NHH)
    q_NLH = product("nlh,nhk->nlk", below_NLH, first_NHH)
    last_NLL = inverse(last_NLL - product("nlh,nmh->nlm", q_NLH, below_NLH))
    below_NLH = -product("nlm,nmh->nlh", last_NLL, q_NLH)
    first_NHH = first_NHH - product("nlh,nlk->nhk", q_NLH, below_NLH)
    above_NHC = jnp.concatenate([first_NHH, jnp.swapaxes(below_NLH, 1, 2)], axis=2)
    return jnp.concatenate([above_NHC, jnp.concatenate([below_NLH, last_NLL], axis=2)], axis=1)


def _swept(a_NCC):
    """Inverse by Gauss-Jordan elimination in place; positive definite matrices need no pivots."""
    C = a_NCC.shape[1]

    def sweep(k, a_NCC):
        here_C = jnp.arange(C) == k
        row_NC = jax.lax.dynamic_index_in_dim(a_NCC, k, 1, keepdims=False)
        column_NC = jax.lax.dynamic_index_in_dim(a_NCC, k, 2, keepdims=False)
        pivot_N1 = jax.lax.dynamic_index_in_dim(row_NC, k, 1)
        row_NC = jnp.where(here_C[None], 1, row_NC) / pivot_N1
        rest_NCC = jnp.where(here_C[None, None], 0, a_NCC) - column_NC[:, :, None] * row_NC[:, None]
        return jnp.where(here_C[None, :, None], row_NC[:, None], rest_NCC)

    return jax.lax.fori_loop(0, C, sweep, a_NCC)


# ----------------------------------------------------------------------------------------- spectral


def _spectral(gram_NCC, v_NCD, unit):
    """unit M^T v with M from Newton-Schulz on U = V^T M Z, where U U^T U = V^T (M G M^T V V^T
    M) Z.
    """
    a, b, c = NEWTON_SCHULZ
    C, acc = gram_NCC.shape[1], gram_NCC.dtype
    # Everything from here on is of size one: Z and V are divided by their Frobenius norms.
    gram_NCC, key_N11 = _unit_trace(gram_NCC)
    targets_NCC, target_N11 = _unit_trace(dot("ncd,nkd->nck", v_NCD, v_NCD, acc))
    square_N11 = jnp.sum(gram_NCC * targets_NCC, axis=(1, 2), keepdims=True)  # ||V^T Z||_F^2
    some_N11 = square_N11 > _smallest(acc)
    first_N11 = jnp.where(some_N11, jax.lax.rsqrt(jnp.where(some_N11, square_N11, 1)), 0)
    # token space squares the condition number: no bf16
    product = lambda x, y: dot("nck,nkl->ncl", x, y, acc)
    m_NCC = first_N11 * jnp.eye(C, dtype=acc)[None]
    for _ in range(ROUNDS):
        x_NCC = product(product(product(m_NCC, gram_NCC), jnp.swapaxes(m_NCC, 1, 2)), targets_NCC)
        xm_NCC = product(x_NCC, m_NCC)
        m_NCC = a * m_NCC + b * xm_NCC + c * product(x_NCC, xm_NCC)
    return (
        jnp.asarray(unit, acc)
        * product(jnp.swapaxes(m_NCC, 1, 2), v_NCD.astype(acc))
        / (key_N11 * target_N11)
    )


def _unit_trace(gram_NCC):
    """G / trace G and sqrt(trace G); a G of zeros stays zeros."""
    trace_N11 = jnp.trace(gram_NCC, axis1=1, axis2=2)[:, None, None]
    trace_N11 = jnp.maximum(trace_N11, _smallest(gram_NCC.dtype))
    return gram_NCC / trace_N11, jnp.sqrt(trace_N11)
