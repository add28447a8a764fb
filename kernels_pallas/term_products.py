"""Batched products of matrices that are sums of bfloat16 terms, on NVIDIA GPUs in Pallas (Triton).

N products of X (R x K) and Y (K x S) in device memory. For the ridge write
(ttt_jax/ops/ttt/writes.py), whose C x C matrices are sums of two bfloat16 arrays: a program has one
tile of one product, reads a tile of each term once, and keeps one sum in float32. cuBLAS needs the
terms side by side in memory, and the other factor once for each.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


@dataclasses.dataclass(frozen=True)
class Tile:
    """A program's part of a result, BM x BN, summed in steps of BK, and how it computes it."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Product:
    """What is summed, and where.

    Attributes:
      form: "nn": X Y. "nt": X Y^T, with Y in memory as S x K. "tn": X^T Y, with X as K x R.
      pairs: terms (i of X, j of Y) whose products are summed.
      symmetric: the result is, and only tiles that touch the lower triangle are computed.
      mirrored: they are written above the diagonal, too.
      lower: X and Y are lower triangular and the form is "tn".
      negative: minus the sum.
      out: dtypes of the results: of several, the terms.
    """

    form: str
    pairs: tuple[tuple[int, int], ...]
    symmetric: bool = False
    mirrored: bool = False
    lower: bool = False
    negative: bool = False
    out: tuple[str, ...] = ("float32",)
    tf32: bool = False


def split(x):
    """Two bfloat16 arrays whose sum is x to 16 bits."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnames=("what", "tile", "interpret"))
def multiply(xs, ys, what: Product, tile: Tile, *, start=None, scale_N=None, interpret=False):
    """Compute scale * start + or - the sum of products of terms.

    Args:
      xs, ys: terms, bfloat16 [N, ., .]; or one float32 array, split where it is loaded.
      start, scale_N: [N, R, S] to begin the sum with, and a float32 factor of it for each product.
    """
    N = xs[0].shape[0]
    R = xs[0].shape[2 if what.form == "tn" else 1]
    K = xs[0].shape[1 if what.form == "tn" else 2]
    S = ys[0].shape[1 if what.form == "nt" else 2]
    whole = lambda x: pl.BlockSpec((None, *x.shape[1:]), lambda n, i, j: (n, 0, 0))
    one = pl.BlockSpec((1,), lambda n, i, j: (n,))
    extra = [x for x in (start, scale_N) if x is not None]
    shapes = [jax.ShapeDtypeStruct((N, R, S), dtype) for dtype in what.out]
    return pl.pallas_call(
        functools.partial(
            _tile, what, tile, K, len(xs), len(ys), start is not None, scale_N is not None
        ),
        grid=(N, R // tile.BM, S // tile.BN),
        in_specs=[whole(x) if x.ndim == 3 else one for x in (*xs, *ys, *extra)],
        out_specs=[whole(x) for x in shapes],
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="ttt_term_product",
    )(*xs, *ys, *extra)


def _tile(what: Product, tile: Tile, K, count_x, count_y, has_start, has_scale, *refs):
    xs, ys, rest = refs[:count_x], refs[count_x : count_x + count_y], refs[count_x + count_y :]
    start = rest[0] if has_start else None
    scale = rest[1] if has_scale else None
    outs = rest[has_start + has_scale :]
    BM, BN, BK = tile.BM, tile.BN, tile.BK
    i, j = pl.program_id(1), pl.program_id(2)
    rows, columns = pl.ds(i * BM, BM), pl.ds(j * BN, BN)

    def terms(refs, at):
        found = [ref[at] for ref in refs]
        return split(found[0]) if found[0].dtype == jnp.float32 and not what.tf32 else found

    def step(k, acc):
        ks = pl.ds(k * BK, BK)
        x = terms(xs, (ks, rows) if what.form == "tn" else (rows, ks))
        y = terms(ys, (columns, ks) if what.form == "nt" else (ks, columns))
        for a, b in what.pairs:
            x_, y_ = x[a], y[b]
            if what.form == "tn":
                x_ = x_.T
            if what.form == "nt":
                y_ = y_.T
            acc += jnp.dot(
                x_,
                y_,
                preferred_element_type=jnp.float32,
                precision=jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if what.tf32 else None,
            )
        return acc

    def run():
        first = jnp.maximum(i * BM, j * BN) // BK if what.lower else 0
        acc = jax.lax.fori_loop(first, K // BK, step, jnp.zeros((BM, BN), jnp.float32))
        if what.negative:
            acc = -acc
        if start is not None:
            begin = start[rows, columns].astype(jnp.float32)
            acc += begin if scale is None else scale[0] * begin
        results = split(acc) if len(outs) > 1 else (acc,)
        for out, result in zip(outs, results, strict=True):
            out[rows, columns] = result.astype(out.dtype)
            if what.mirrored:
                pl.when(i * BM >= (j + 1) * BN)(
                    functools.partial(_mirror, out, columns, rows, result)
                )

    if what.symmetric:
        pl.when((i + 1) * BM > j * BN)(run)
    else:
        run()


def _mirror(out, columns, rows, result):
    out[columns, rows] = result.T.astype(out.dtype)


TERMS = ("bfloat16", "bfloat16")
THREE = ((0, 0), (0, 1), (1, 0))  # of two terms and two, without the product of the small ones


def why_not(dtype, *sizes: int) -> str | None:
    """Say why chunks of such sizes cannot run on the GPUs here, or None."""
    capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))
    if capability.partition(".")[0] != "9":
        return f"its tiles are for compute capability 9, not {capability}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it computes in bfloat16, not in {jnp.dtype(dtype)}"
    unit = 64
    return (
        None if all(size % unit == 0 for size in sizes) else f"{sizes} are no multiples of {unit}"
    )


@dataclasses.dataclass(frozen=True)
class Kernels:
    """`Products` of ttt_jax/ops/ttt/chunk_products.py in bfloat16."""

    tile: Tile = Tile(128, 128, 64, 8, 3)
    block_tile: Tile = Tile(128, 128, 32, 4, 3)
    interpret: bool = False

    def gram(self, z_NCF):
        return self._run((z_NCF,), (z_NCF,), Product("nt", ((0, 0),), symmetric=True))[0]

    def square(self, m_NCC):
        what = Product("tn", THREE, symmetric=True, mirrored=True, lower=True, out=TERMS)
        return self._run((m_NCC,), (m_NCC,), what)

    def outer(self, x_NCD, y_NCD):
        what = Product("nt", ((0, 0), (1, 1)), symmetric=True, mirrored=True, out=TERMS)
        return self._run((x_NCD, y_NCD), (y_NCD, x_NCD), what)

    def sandwich(self, a, b):
        half = self._run(a, b, Product("nn", THREE, out=TERMS))
        what = Product("nn", THREE, symmetric=True, mirrored=True, negative=True, out=TERMS)
        return self._run(half, a, what)

    def apply(self, a, y_NCS, shift_N=None):
        what = Product("nn", ((0, 0), (1, 0)), out=("bfloat16",))
        start = None if shift_N is None else y_NCS
        return self._run(a, (y_NCS,), what, start=start, scale_N=shift_N)[0]

    def block(self, form, x_NPQ, y_NQR, minus_from=None):
        what = Product(form, THREE, symmetric=x_NPQ is y_NQR, negative=minus_from is not None)
        return self._run((x_NPQ,), (y_NQR,), what, self.block_tile, start=minus_from)[0]

    def _run(self, xs, ys, what, tile=None, **options):
        tile = tile or self.tile
        R = xs[0].shape[2 if what.form == "tn" else 1]
        S = ys[0].shape[1 if what.form == "nt" else 2]
        fit = lambda most, size: most if size % most == 0 else math.gcd(most, size)
        BM, BN = fit(tile.BM, R), fit(tile.BN, S)
        if what.symmetric:
            BN = BM
        tile = dataclasses.replace(tile, BM=BM, BN=BN)
        return tuple(multiply(xs, ys, what, tile, interpret=self.interpret, **options))
