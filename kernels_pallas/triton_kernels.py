"""Device code of `triton.py`. Needs triton to be installed; nothing else imports it.

u is lr v. Every kernel starts with the five arrays of `chunk_scan.Scalars`. Arrays updated in place
come twice, as operand and as result, and are one buffer. Offsets of whole arrays are 64-bit,
offsets inside a chunk 32-bit.
"""

import triton
import triton.language as tl


@triton.jit
def _tile_of(index, rows: tl.constexpr, columns: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """First row and column of a tile: column by column in bands of eight rows of tiles.

    Neighbours share operands in L2.
    """
    band: tl.constexpr = 8
    M: tl.constexpr = (rows + BM - 1) // BM
    N: tl.constexpr = (columns + BN - 1) // BN
    first = index // (band * N) * band
    height = tl.minimum(M - first, band)
    inside = index % (band * N)
    return (first + inside % height) * BM, (inside // height) * BN


@triton.jit
def _product(
    acc, a, b, m0, n0,
    rows: tl.constexpr, columns: tl.constexpr, length: tl.constexpr,
    a_m: tl.constexpr, a_k: tl.constexpr, b_k: tl.constexpr, b_n: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + sum over k of a[m, k] b[k, n].

    Rows and columns beyond the last read the first ones and are not stored.
    """
    m = m0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    if rows % BM != 0:
        m = tl.where(m < rows, m, 0)
    if columns % BN != 0:
        n = tl.where(n < columns, n, 0)
    if a_m == 1:
        m = tl.max_contiguous(tl.multiple_of(m, BM), BM) if rows % BM == 0 else m
    if b_n == 1:
        n = tl.max_contiguous(tl.multiple_of(n, BN), BN) if columns % BN == 0 else n
    k = tl.arange(0, BK)
    a = a + m[:, None] * a_m + k[None, :] * a_k
    b = b + k[:, None] * b_k + n[None, :] * b_n
    for start in range(0, length, BK):
        if length % BK == 0:
            x = tl.load(a)
            y = tl.load(b)
        else:
            left = length - start
            x = tl.load(a, mask=k[None, :] < left, other=0.0)
            y = tl.load(b, mask=k[:, None] < left, other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
        a += BK * a_k
        b += BK * b_k
    return acc


@triton.jit
def _inside(m0, n0, rows: tl.constexpr, columns: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Offsets of a row-major tile and which of them exist."""
    m = m0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    return m[:, None] * columns + n[None, :], (m[:, None] < rows) & (n[None, :] < columns)


@triton.jit
def _update(
    index, left, right, keep, S_in, S_out, R_out, w,
    C: tl.constexpr, D: tl.constexpr, F: tl.constexpr, WEIGHT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of keep S + left^T right, and of its copy R, with W added where it has one."""
    m0, n0 = _tile_of(index, D, F, BM, BN)
    at, inside = _inside(m0, n0, D, F, BM, BN)
    # The sum starts with S: added later, it would need as many registers again.
    S = keep * tl.load(S_in + at, mask=inside, other=0.0)
    S = _product(S, left, right, m0, n0, D, F, C, 1, D, F, 1, BM, BN, BK, PRECISION)
    tl.store(S_out + at, S, mask=inside)
    if WEIGHT:
        S += tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(R_out + at, S.to(R_out.dtype.element_ty), mask=inside)


@triton.jit
def forward(
    i, row, lr, keep, live, z, u, base, o_in, S_in, R_in, o, S, R,
    B: tl.constexpr, T: tl.constexpr, C: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    M: tl.constexpr, T_BASE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of o = base + z R^T, or of S += u^T z."""
    reads: tl.constexpr = ((C + BM - 1) // BM) * ((D + BN - 1) // BN)
    writes: tl.constexpr = ((D + BM - 1) // BM) * ((F + BN - 1) // BN)
    pid = tl.program_id(0)
    chunk = tl.load(i)
    slot = (chunk % 2).to(tl.int64)
    if pid < B * reads:
        b = (pid // reads).to(tl.int64)
        first = b * T + chunk * C
        m0, n0 = _tile_of(pid % reads, C, D, BM, BN)
        at, inside = _inside(m0, n0, C, D, BM, BN)
        base += (b * T_BASE + tl.load(row)) * D
        acc = tl.load(base + at, mask=inside, other=0.0)
        if tl.load(live + b * M + chunk) != 0:
            fast = R_in + (slot * B + b) * D * F
            acc = _product(
                acc, z + first * F, fast, m0, n0, C, D, F, F, 1, 1, F, BM, BN, BK, PRECISION
            )
        tl.store(o + first * D + at, acc.to(o.dtype.element_ty), mask=inside)
    else:
        pid -= B * reads
        b = (pid // writes).to(tl.int64)
        first = b * T + chunk * C
        kept = tl.load(keep + b * M + chunk)
        state = b * D * F
        other = ((1 - slot) * B + b) * D * F
        _update(
            pid % writes, u + first * D, z + first * F, kept, S_in + state, S + state, R + other,
            S_in, C, D, F, False, BM, BN, BK, PRECISION,
        )  # fmt: skip


@triton.jit
def replay(
    i, row, lr, keep, live, z, u, do, w, dz_in, S_in, R_in, dz, S, R,
    B: tl.constexpr, T: tl.constexpr, C: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    M: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of dz = do R, or of S += u^T z, with R a copy of W + S."""
    reads: tl.constexpr = ((C + BM - 1) // BM) * ((F + BN - 1) // BN)
    writes: tl.constexpr = ((D + BM - 1) // BM) * ((F + BN - 1) // BN)
    pid = tl.program_id(0)
    chunk = tl.load(i)
    slot = (chunk % 2).to(tl.int64)
    if pid < B * reads:
        b = (pid // reads).to(tl.int64)
        first = b * T + chunk * C
        m0, n0 = _tile_of(pid % reads, C, F, BM, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        weight = R_in + (slot * B + b) * D * F
        acc = _product(
            acc, do + first * D, weight, m0, n0, C, F, D, D, 1, F, 1, BM, BN, BK, PRECISION
        )
        at, inside = _inside(m0, n0, C, F, BM, BN)
        tl.store(dz + first * F + at, acc.to(dz.dtype.element_ty), mask=inside)
    else:
        pid -= B * reads
        b = (pid // writes).to(tl.int64)
        first = b * T + chunk * C
        kept = tl.load(keep + b * M + chunk)
        state = b * D * F
        other = ((1 - slot) * B + b) * D * F
        _update(
            pid % writes, u + first * D, z + first * F, kept, S_in + state, S + state, R + other, w,
            C, D, F, True, BM, BN, BK, PRECISION,
        )  # fmt: skip


@triton.jit
def reverse(
    i, row, lr, keep, live, z, u, v, do, dz_in, dv_in, G_in, R_in, dz, dv, G, R, dlr,
    B: tl.constexpr, T: tl.constexpr, C: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    M: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of dv = lr z R^T (and its share of dlr), of dz += u R, or of G += do^T z."""
    to_v: tl.constexpr = ((C + BM - 1) // BM) * ((D + BN - 1) // BN)
    to_z: tl.constexpr = ((C + BM - 1) // BM) * ((F + BN - 1) // BN)
    writes: tl.constexpr = ((D + BM - 1) // BM) * ((F + BN - 1) // BN)
    pid = tl.program_id(0)
    chunk = tl.load(i)
    factor = tl.load(lr)
    slot = (chunk % 2).to(tl.int64)
    if pid < B * to_v:
        b = (pid // to_v).to(tl.int64)
        first = b * T + chunk * C
        m0, n0 = _tile_of(pid % to_v, C, D, BM, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        fast = R_in + (slot * B + b) * D * F
        acc = _product(acc, z + first * F, fast, m0, n0, C, D, F, F, 1, 1, F, BM, BN, BK, PRECISION)
        at, inside = _inside(m0, n0, C, D, BM, BN)
        value = tl.load(v + first * D + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dlr + pid, tl.sum(tl.sum(value * acc, axis=1), axis=0))
        tl.store(dv + first * D + at, (factor * acc).to(dv.dtype.element_ty), mask=inside)
    elif pid < B * (to_v + to_z):
        pid -= B * to_v
        b = (pid // to_z).to(tl.int64)
        first = b * T + chunk * C
        m0, n0 = _tile_of(pid % to_z, C, F, BM, BN)
        at, inside = _inside(m0, n0, C, F, BM, BN)
        acc = tl.load(dz_in + first * F + at, mask=inside, other=0.0).to(tl.float32)
        fast = R_in + (slot * B + b) * D * F
        acc = _product(acc, u + first * D, fast, m0, n0, C, F, D, D, 1, F, 1, BM, BN, BK, PRECISION)
        tl.store(dz + first * F + at, acc.to(dz.dtype.element_ty), mask=inside)
    else:
        pid -= B * (to_v + to_z)
        b = (pid // writes).to(tl.int64)
        first = b * T + chunk * C
        kept = tl.load(keep + b * M + chunk)
        state = b * D * F
        other = ((1 - slot) * B + b) * D * F
        _update(
            pid % writes, do + first * D, z + first * F, kept, G_in + state, G + state, R + other,
            G_in, C, D, F, False, BM, BN, BK, PRECISION,
        )  # fmt: skip
