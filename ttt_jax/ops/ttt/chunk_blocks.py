"""Several chunks per step of the scan: the exact dual form inside a block, so that the state moves
once per block.

B batch, T tokens, D model width, F MLP width, C chunk size, M chunks (a trailing partial one
included), n chunks of a block (a power of two), L = nC its tokens, N blocks, X steps: blocks, and
the chunks behind them one by one; P pairs of halves of a block, of H tokens each.

The chunks of a block read the state at its start, and what the chunks before them in the block
write is applied to them without being written: for chunk i of a block that starts with S,

    o_i = z_i (W + S)^T + lr sum_{j<i} (z_i z_j^T) v_j          then  S += lr sum_j v_j^T z_j

The first term and the update are the same op with chunks of L tokens, whatever implements it. The
sum is taken by halves: the second C tokens of a pair read the first ones, the second 2C those
before them, and so on, so that every product is dense and no entry is computed for nothing. It
costs T C (n - 1) (D + F) FLOPs.

Documents start with a chunk, and the state returns to zero there. In a block that is a mask: a
chunk reads what chunks of its own document wrote; it reads the state at the block's start if its
document began before; what it writes stays in the state if its document goes on behind the block.
The first is a mask on scores, the last one on v. For the second, the op runs as if all chunks read
the state, and those that do not are computed again with W alone. They are few: those behind the
first document that starts inside of a block.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from ttt_jax.kernels_pallas.varying import varying_alike
from ttt_jax.ops.numerics import dot
from ttt_jax.ops.ttt.xla import scaled

# Computed inside their blocks at one time, so that temporaries do not grow with T.
TOKENS = 16384
# Computed without a state at one time: what fills a machine.
SOME_TOKENS = 2048


def in_blocks(
    run,
    n: int,
    z_BTF,
    v_BTD,
    w_DF,
    *,
    lr,
    chunk_size: int,
    state_BDF,
    keep_BM=None,
    decay_BM=None,
):
    """Run the op in steps of `n` chunks; those that fill no block one by one behind the others.

    Args:
      run: an implementation, as `in_place_ttt_xla`.
      keep_BM: 0 at a document's first chunk, else 1, a trailing partial chunk included; 1 for the
        first chunk, which reads `state_BDF`. v is zero in the chunk before a document's first.
        None: every row is one document.
      decay_BM: what each chunk's update multiplies the state before it by; only with n = 1. None:
        ones.

    Returns: o_BTD, and the state after the last whole chunk: that of the last chunk's document.
    """
    number_BM = None if keep_BM is None else jnp.cumsum(keep_BM == 0, axis=1)
    arrays = (z_BTF, v_BTD, w_DF, lr, state_BDF, number_BM)
    if n == 1 or z_BTF.shape[1] < n * chunk_size:
        return _between(run, 1, chunk_size, *arrays, decay_BM)
    results: Any = _in_blocks(run, n, chunk_size, *varying_alike(*arrays))
    return results


class _Documents(NamedTuple):
    """What documents leave of the op in steps, as factors."""

    keep_BX: jax.Array  # the state at a step's start is still there at the next one's
    writes_BM: jax.Array  # what the chunk writes is still there at the next step's start
    reads_BM: jax.Array  # the chunk reads the state at its step's start; or that state is zero


def _documents(n: int, C: int, T: int, number_BM) -> _Documents:
    """Compare numbers of documents: of every chunk, of its step's first and of the next step's."""
    M, blocks = number_BM.shape[1], _blocks(n, C, T)
    first_X = np.concatenate([np.arange(blocks) * n, np.arange(blocks * n, M)])
    step_M = np.searchsorted(first_X, np.arange(M), side="right") - 1
    now_BX, last_B1 = number_BM[:, first_X], number_BM[:, -1:]
    next_BX = jnp.concatenate([now_BX[:, 1:], last_B1], axis=1)
    # A document that starts with a step reads zeros there, and so do those behind it.
    before_BX = number_BM[:, np.maximum(first_X - 1, 0)]
    reads_BM = (number_BM == now_BX[:, step_M]) | (before_BX != now_BX)[:, step_M]
    return _Documents(now_BX == next_BX, number_BM == next_BX[:, step_M], reads_BM)


def _blocks(n: int, C: int, T: int) -> int:
    """N: of a row. Single chunks are no blocks."""
    return T // (n * C) if n > 1 else 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _in_blocks(run, n, C, z_BTF, v_BTD, w_DF, lr, state_BDF, number_BM):
    o_BTD, S_BDF = _between(run, n, C, z_BTF, v_BTD, w_DF, lr, state_BDF, number_BM)
    if number_BM is not None:
        reads_BM = _documents(n, C, z_BTF.shape[1], number_BM).reads_BM
        o_BTD = _without_state(C, o_BTD, z_BTF, w_DF, reads_BM, lr.dtype)
    return _inside(n, C, o_BTD, z_BTF, v_BTD, lr, number_BM), S_BDF


def _forward(run, n, C, *arrays):
    arrays = jax.tree.map(lambda primal: primal.value, arrays)
    return _in_blocks(run, n, C, *arrays), arrays


def _backward(run, n, C, arrays, cotangents):
    z_BTF, v_BTD, w_DF, lr, _, number_BM = arrays
    do_BTD, dS_BDF = cotangents
    if isinstance(do_BTD, SymbolicZero):
        do_BTD = jnp.zeros(v_BTD.shape, z_BTF.dtype)
    reads_BM = None
    if number_BM is not None:
        reads_BM = _documents(n, C, z_BTF.shape[1], number_BM).reads_BM
    dz_BTF, dv_BTD, dw_DF, dlr, dstate_BDF = _between_backward(
        run, n, C, arrays, _masked(do_BTD, reads_BM, C), dS_BDF
    )
    if reads_BM is not None:
        dz_BTF, dw_DF = _without_state_backward(C, dz_BTF, dw_DF, do_BTD, z_BTF, w_DF, reads_BM, lr)
    dz_BTF, dv_BTD, dlr = _inside_backward(
        n, C, dz_BTF, dv_BTD, dlr, do_BTD, z_BTF, v_BTD, lr, number_BM
    )
    dnumber = None if number_BM is None else np.zeros(number_BM.shape, jax.dtypes.float0)
    return dz_BTF, dv_BTD, dw_DF, dlr, dstate_BDF, dnumber


_in_blocks.defvjp(_forward, _backward, symbolic_zeros=True)


def _between(run, n, C, z_BTF, v_BTD, w_DF, lr, state_BDF, number_BM, decay_BX=None):
    """All but what chunks read of their own block, as if every chunk read the state at its step's
    start.
    """
    T = z_BTF.shape[1]
    N = _blocks(n, C, T)
    keep_BX = decay_BX
    if number_BM is not None:
        documents = _documents(n, C, T, number_BM)
        keep_BX = documents.keep_BX.astype(lr.dtype)
        keep_BX = keep_BX if decay_BX is None else keep_BX * decay_BX
        # A step of one chunk whose document ends has a v of zeros.
        v_BTD = _masked(v_BTD, documents.writes_BM, C) if n > 1 else v_BTD

    def steps(size, tokens, some, state_BDF):
        return run(
            z_BTF[:, tokens],
            v_BTD[:, tokens],
            w_DF,
            lr=lr,
            chunk_size=size,
            state_BDF=state_BDF,
            keep_BM=None if keep_BX is None else keep_BX[:, some],
        )

    if N == 0:
        return steps(C, slice(None), slice(None), state_BDF)
    whole = N * n * C
    o_BTD, S_BDF = steps(n * C, slice(whole), slice(N), state_BDF)
    if whole < T:
        behind_BTD, S_BDF = steps(C, slice(whole, None), slice(N, None), S_BDF)
        o_BTD = jnp.concatenate([o_BTD, behind_BTD], axis=1)
    return o_BTD, S_BDF


def _between_backward(run, n, C, arrays, do_BTD, dS_BDF):
    """Gradients of `_between`. Nothing is computed with the zeros of a final state that nobody
    reads.
    """
    *arrays, number_BM = arrays
    between = functools.partial(_between, run, n, C, number_BM=number_BM)
    if isinstance(dS_BDF, SymbolicZero):
        _, pull = jax.vjp(lambda *arrays: between(*arrays)[0], *arrays)
        return pull(do_BTD)
    _, pull = jax.vjp(between, *arrays)
    return pull((do_BTD, dS_BDF))


# ---------------------------------------------------- chunks that read no state, and all that write


def _masked(x_BTX, mask_BM, C):
    """x with zeros in chunks whose mask is False; no mask: x."""
    if mask_BM is None:
        return x_BTX
    mask_BT = jnp.repeat(mask_BM, C, axis=1)[:, : x_BTX.shape[1]]
    return jnp.where(mask_BT[:, :, None], x_BTX, 0)


class _Chunks(NamedTuple):
    """K chunks of any rows. The last one fills the places of those that are missing."""

    C: int
    row_K: jax.Array
    chunk_K: jax.Array
    exists_K: jax.Array  # False in these places

    def take(self, x_BTX):
        """[K, C, X]."""
        size = 1, self.C, x_BTX.shape[2]
        one = lambda b, i: jax.lax.dynamic_slice(x_BTX, (b, i * self.C, 0), size)[0]
        return jax.vmap(one)(self.row_K, self.chunk_K)

    def once(self, x_KCX):
        """For sums over K."""
        return jnp.where(self.exists_K[:, None, None], x_KCX, 0)

    def put(self, x_BTX, x_KCX):
        """x with these chunks in place of its own. The same value may be written twice: a choice
        of what to write would be a pass over all of x.
        """
        for k in range(x_KCX.shape[0]):
            start = self.row_K[k], self.chunk_K[k] * self.C, 0
            piece = x_KCX[k].astype(x_BTX.dtype)[None]
            x_BTX = jax.lax.dynamic_update_slice(x_BTX, piece, start)
        return x_BTX


def _for_each(mask_BM, C, step, carry):
    """`carry` after `step(carry, chunks)` for all chunks whose mask is True, some at a time."""
    B, M = mask_BM.shape
    K = max(1, min(SOME_TOKENS // C, B * M))
    order, count = jnp.argsort(~mask_BM.reshape(-1), stable=True), mask_BM.sum()

    def group(k, carry):
        number_K = k * K + jnp.arange(K)
        place_K = order[jnp.minimum(number_K, count - 1)]
        return step(carry, _Chunks(C, place_K // M, place_K % M, number_K < count))

    return jax.lax.fori_loop(0, (count + K - 1) // K, group, carry)


@jax.named_scope("ttt_without_state")
def _without_state(C, o_BTD, z_BTF, w_DF, reads_BM, acc):
    """o, and z W^T in its place for chunks that read no state."""

    def step(o_BTD, chunks):
        return chunks.put(o_BTD, dot("kcf,df->kcd", chunks.take(z_BTF), w_DF, acc))

    return _for_each(~reads_BM, C, step, o_BTD)


@jax.named_scope("ttt_without_state")
def _without_state_backward(C, dz_BTF, dw_DF, do_BTD, z_BTF, w_DF, reads_BM, lr):
    """dz and dW with the shares of `_without_state` added to them."""

    def step(carry, chunks):
        dz_BTF, dw_DF = carry
        do_KCD = chunks.take(do_BTD)
        dz_KCF = chunks.take(dz_BTF).astype(lr.dtype) + dot("kcd,df->kcf", do_KCD, w_DF, lr.dtype)
        dw_DF = dw_DF + dot("kcd,kcf->df", chunks.once(do_KCD), chunks.take(z_BTF), lr.dtype)
        return chunks.put(dz_BTF, dz_KCF), dw_DF

    dz_BTF, sum_DF = _for_each(~reads_BM, C, step, (dz_BTF, dw_DF.astype(lr.dtype)))
    return dz_BTF, sum_DF.astype(dw_DF.dtype)


# ------------------------------------------------------------- what chunks read of their own block


@jax.named_scope("ttt_inside_blocks")
def _inside(n, C, o_BTD, z_BTF, v_BTD, lr, number_BM):
    """o + lr sum_{j<i} (z_i z_j^T) v_j over the chunks j before chunk i in its block."""

    def add(_, o_NLD, z_NLF, v_NLD, number_NL1):
        total_NLD, u_NLD = o_NLD.astype(lr.dtype), scaled(v_NLD, lr)
        for H in _halves(n, C):
            z_NP2HF, u_NP2HD = _paired(z_NLF, H), _paired(u_NLD, H)
            scores_NPHH = _scores(z_NP2HF, number_NL1, lr.dtype)
            read_NPHD = dot("nphk,npkd->nphd", scores_NPHH, u_NP2HD[:, :, 0], lr.dtype)
            total_NLD += jnp.stack([jnp.zeros_like(read_NPHD), read_NPHD], axis=2).reshape(
                total_NLD.shape
            )
        return None, total_NLD

    others = z_BTF, v_BTD, _of_tokens(number_BM, C, z_BTF.shape[1])
    _, o_BTD = _by_groups(n * C, add, None, (o_BTD,), others)
    return o_BTD


@jax.named_scope("ttt_inside_blocks")
def _inside_backward(n, C, dz_BTF, dv_BTD, dlr, do_BTD, z_BTF, v_BTD, lr, number_BM):
    """dz, dv and dlr with the shares of `_inside` added to them. Scores are made again, not
    kept.
    """
    dtype = z_BTF.dtype

    def add(dlr, dz_NLF, dv_NLD, do_NLD, z_NLF, v_NLD, number_NL1):
        u_NLD, du_NLD = scaled(v_NLD, lr), jnp.zeros(v_NLD.shape, lr.dtype)
        for H in _halves(n, C):
            z_NP2HF, u_NP2HD, do_NPHD = (
                _paired(z_NLF, H),
                _paired(u_NLD, H),
                _paired(do_NLD, H)[:, :, 1],
            )
            dscores_NPHH = dot("nphd,npkd->nphk", do_NPHD, u_NP2HD[:, :, 0], lr.dtype)
            dscores_NPHH = _of_one_document(dscores_NPHH, number_NL1).astype(dtype)
            # Both now, so that either half of z is gone after one more product.
            dscores_NPHH, scores_NPHH = jax.lax.optimization_barrier(
                (dscores_NPHH, _scores(z_NP2HF, number_NL1, lr.dtype))
            )
            second_NPHF = dot("nphk,npkf->nphf", dscores_NPHH, z_NP2HF[:, :, 0], dtype)
            first_NPHF = dot("nphk,nphf->npkf", dscores_NPHH, z_NP2HF[:, :, 1], dtype)
            dz_NLF += jnp.stack([first_NPHF, second_NPHF], axis=2).reshape(dz_NLF.shape)
            du_NPHD = dot("nphk,nphd->npkd", scores_NPHH, do_NPHD, lr.dtype)
            du_NLD += jnp.stack([du_NPHD, jnp.zeros_like(du_NPHD)], axis=2).reshape(du_NLD.shape)
        return (
            dlr + jnp.sum(du_NLD * v_NLD.astype(lr.dtype)),
            dz_NLF,
            dv_NLD.astype(lr.dtype) + lr * du_NLD,
        )

    others = do_BTD, z_BTF, v_BTD, _of_tokens(number_BM, C, z_BTF.shape[1])
    dlr, dz_BTF, dv_BTD = _by_groups(n * C, add, dlr, (dz_BTF, dv_BTD), others)
    return dz_BTF, dv_BTD, dlr


def _scores(z_NP2HF, number_NL1, acc):
    """Of the second half of every pair with the first."""
    scores_NPHH = dot("nphf,npkf->nphk", z_NP2HF[:, :, 1], z_NP2HF[:, :, 0], acc)
    return _of_one_document(scores_NPHH, number_NL1).astype(z_NP2HF.dtype)


def _of_one_document(scores_NPHH, number_NL1):
    """Scores, and zeros between tokens of two documents; no numbers: one document."""
    if number_NL1 is None:
        return scores_NPHH
    number_NP2H = _paired(number_NL1, scores_NPHH.shape[2])[..., 0]
    same_NPHH = number_NP2H[:, :, 1, :, None] == number_NP2H[:, :, 0, None, :]
    return jnp.where(same_NPHH, scores_NPHH, 0)


def _of_tokens(number_BM, C, T):
    """[B, T, 1] from numbers of chunks."""
    return None if number_BM is None else jnp.repeat(number_BM, C, axis=1)[:, :T, None]


def _halves(n, C) -> list[int]:
    """C, 2C, .. half a block."""
    return [C << k for k in range(n.bit_length() - 1)]


def _paired(x_NLX, H):
    return x_NLX.reshape(x_NLX.shape[0], -1, 2, H, x_NLX.shape[2])


def _by_groups(L, add, total, updated, others):
    """`total, *updated = add(total, *updated, *others)` of some blocks after others; blocks know
    nothing of each other.

    Args:
      add: takes and returns arrays [N, L, ..]; of `others`, None stays None.
      updated, others: arrays [B, T, ..]; what lies behind the last whole block of a row is left as
        it is.
    """
    B, T = updated[0].shape[:2]
    N, whole = B * (T // L), T // L * L
    some = max(1, TOKENS // L)
    flat = lambda x: x[:, :whole].reshape(N, L, x.shape[2])
    others = jax.tree.map(flat, others)

    def group(size, first, carry):
        total, *done = carry
        some = lambda x: jax.lax.dynamic_slice_in_dim(x, first, size)
        total, *new = add(total, *jax.tree.map(some, (*done, *others)))
        put = lambda x, piece: jax.lax.dynamic_update_slice_in_dim(
            x, piece.astype(x.dtype), first, axis=0
        )
        return [total, *map(put, done, new)]

    carry = [total, *map(flat, updated)]
    if some <= N:
        carry = jax.lax.fori_loop(
            0, N // some, lambda i, carry: group(some, i * some, carry), carry
        )
    if N % some:
        carry = group(N % some, N // some * some, carry)
    total, *done = carry
    done = [x.reshape(B, whole, x.shape[2]) for x in done]
    if whole < T:
        done = [
            jnp.concatenate([x, before[:, whole:]], axis=1)
            for x, before in zip(done, updated, strict=True)
        ]
    return total, *done
