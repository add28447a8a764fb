"""Transform the targets of a chunk before the ordinary update S += lr v^T z.

B batch, T tokens, D model width, F MLP width, C chunk size, M chunks, N = B M.
Z is a chunk's keys (C F), V its targets (C D), G = Z Z^T (C C).

    sum        V^T Z                                      the paper's rule; similar keys add up
    ridge      V^T Z (Z^T Z + lambda m I)^-1              least squares: z U^T closest to v
             = (A^-1 V)^T Z with A = G + lambda m I       m = mean ||z||^2: no units in lambda, lr
    spectral   the nearest matrix with singular values 1  Newton-Schulz on V^T Z, as in Muon

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
    """Compute A^-1 v for symmetric positive definite A. One factorisation serves the backward, too.

    All of it is float32 at least. Where a chunk's keys are alike, A^-1 is the identity less a
    matrix of nearly the same size, and in bf16 nothing true would be left of the difference.
    """
    return _solve_forward(a_NCC, v_NCD)[0]


def _applied(root_NCC, v_NCD):
    """M^T (M v)"""
    x_NCD = dot("nck,nkd->ncd", root_NCC, v_NCD, root_NCC.dtype)
    return dot("nkc,nkd->ncd", root_NCC, x_NCD, root_NCC.dtype)


def _solve_forward(a_NCC, v_NCD):
    root_NCC = inverse_root(a_NCC)
    x_NCD = _applied(root_NCC, v_NCD)
    return x_NCD, (root_NCC, x_NCD)


def _solve_backward(residuals, dx_NCD):
    root_NCC, x_NCD = residuals
    dv_NCD = _applied(root_NCC, dx_NCD)
    return -dot("ncd,nkd->nck", dv_NCD, x_NCD, dx_NCD.dtype), dv_NCD


solve.defvjp(_solve_forward, _solve_backward)


def inverse_root(a_NCC):
    """Lower triangular M with A^-1 = M^T M for symmetric positive definite A: the inverse of the
    Cholesky factor, by halves.

    Matmuls, which every device and mesh does well. With A = [[P, Q^T], [Q, R]], P^-1 = H^T H and L
    = Q H^T, the Schur complement is R - L L^T, symmetric whatever rounding does. An inverse by
    halves of inverses is not: what was skew in its error grew from half to half, and with 512 keys,
    many of them the same token's, A^-1 v came out 200 times too large.
    """
    C = a_NCC.shape[1]
    if C <= LEAF:
        return _swept(a_NCC)
    half, acc = C // 2, a_NCC.dtype
    product = lambda subscripts, x, y: dot(subscripts, x, y, acc)
    first_NHH = inverse_root(a_NCC[:, :half, :half])
    below_NLH = product("nlh,nkh->nlk", a_NCC[:, half:, :half], first_NHH)
    last_NLL = inverse_root(a_NCC[:, half:, half:] - product("nlh,nmh->nlm", below_NLH, below_NLH))
    below_NLH = -product("nlm,nmh->nlh", last_NLL, product("nlk,nkh->nlh", below_NLH, first_NHH))
    above_NHC = jnp.pad(first_NHH, ((0, 0), (0, 0), (0, C - half)))
    return jnp.concatenate([above_NHC, jnp.concatenate([below_NLH, last_NLL], axis=2)], axis=1)


def _swept(a_NCC):
    """The same by elimination: what takes A to L^T takes the identity to L^-1. Positive definite
    matrices need no pivots.
    """
    C = a_NCC.shape[1]
    place_C = jnp.arange(C)

    def sweep(k, both_NCX):
        row_NX = jax.lax.dynamic_index_in_dim(both_NCX, k, 1, keepdims=False)
        column_NC = jax.lax.dynamic_index_in_dim(both_NCX, k, 2, keepdims=False)
        scale_N1 = jax.lax.rsqrt(jax.lax.dynamic_index_in_dim(row_NX, k, 1))
        row_NX = row_NX * scale_N1
        below_NC = jnp.where(place_C[None] > k, column_NC * scale_N1, 0)
        both_NCX = both_NCX - below_NC[:, :, None] * row_NX[:, None]
        return jnp.where((place_C == k)[None, :, None], row_NX[:, None], both_NCX)

    eye_NCC = jnp.broadcast_to(jnp.eye(C, dtype=a_NCC.dtype), a_NCC.shape)
    return jax.lax.fori_loop(0, C, sweep, jnp.concatenate([a_NCC, eye_NCC], axis=2))[:, :, C:]


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
