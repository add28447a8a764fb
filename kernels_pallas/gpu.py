"""In-Place TTT on Hopper GPUs in Pallas (Mosaic GPU): the three launches of `chunk_scan.py`.

Letters as there. Blocks stay on the multiprocessors and go through tiles of several products and chunks (`gpu_tiles.py`): apply
tiles, which sum over all of F, run beside updates, which move the state, so that arithmetic and traffic overlap. Which tiles a
pair of blocks computes, in which order, is a table made when the kernel is traced.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from kernels_pallas import chunk_scan
from kernels_pallas.gpu_tiles import BLOCK_K, BLOCKS, MULTIPLIERS, PIECE, ROWS, TILE, Product, read, run_block, schedule

MOST_TILES, MOST_CHUNKS = 16384, 64  # of a launch

_interpreted: contextvars.ContextVar[MosaicLaunches | None] = contextvars.ContextVar("interpreted", default=None)


@contextlib.contextmanager
def interpreted(params, multiprocessors: int = 4):
    """Kernels traced inside run in Pallas' interpreter (`plgpu.InterpretGPUParams`), on any platform. For tests: very slow."""
    token = _interpreted.set(MosaicLaunches(multiprocessors=multiprocessors, interpret=params))
    try:
        yield
    finally:
        _interpreted.reset(token)


def why_not(platform: str, dtype, C: int, D: int, F: int) -> str | None:
    """Why these inputs cannot run here, or None."""
    if _interpreted.get() is None:
        if platform not in ("gpu", "cuda"):
            return f"it needs an NVIDIA GPU, and the platform is {platform}"
        capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))  # without a device: compiling ahead of time
        if not capability.startswith("9."):
            return f"it needs a Hopper GPU (compute capability 9.0), and this one has {capability}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it computes in bfloat16, not in {jnp.dtype(dtype)}"
    for name, size in (("chunk_size", C), ("D", D), ("F", F)):
        if size % TILE:
            return f"{name} = {size} is not a multiple of {TILE}"
    return None


def in_place_ttt_gpu(z_BTF, v_BTD, w_DF, *, lr, chunk_size, state_BDF, keep_BM=None):
    """Same contract as `in_place_ttt_xla`; z, v and W are bfloat16, lr, the state and keep are float32."""
    launches = _interpreted.get() or MosaicLaunches()
    return chunk_scan.in_place_ttt(
        launches, z_BTF, v_BTD, w_DF, lr=lr, chunk_size=chunk_size, state_BDF=state_BDF, keep_BM=keep_BM
    )


@dataclasses.dataclass(frozen=True)
class MosaicLaunches:
    """The three launches, and how they are laid out in 227 KiB of shared memory (docs/performance.md)."""

    stages: int = 4  # of the ring
    staged: int = 1  # pieces of a multiplier on their way from shared to device memory
    multiprocessors: int | None = None  # None: as many as the device has
    interpret: Any = None

    def written(self, v_BTD, lr):
        """Sums are multiplied by lr: no array of lr v is made, and none is rounded."""
        return v_BTD

    def span(self, B, C, D, F):
        """As many as keep the table of tiles small.

        Tiles of several chunks wait for each other, so all blocks must run at the same time: one chunk where other kernels,
        NCCL's, may hold multiprocessors. And in the interpreter, which has no semaphores.
        """
        if self.interpret or jax.sharding.get_abstract_mesh().size > 1:
            return 1
        tiles = D * F + 2 * C * (D + F)  # at most, in the backward
        return max(1, min(MOST_CHUNKS, MOST_TILES * TILE**2 // (B * tiles)))

    def forward(self, C, n, scalars, z_BTF, u_BTD, base_BTD, o_BTD, S_BDF, R_2BDF):
        F, D = z_BTF.shape[2], u_BTD.shape[2]

        def products(at, z, u, base, o, S, R):
            def finish(b, m0, n0):
                return lambda k, n, sums, base, _: at.write(k, (o.at[b, _rows(at.token + m0), n], base + sums))

            source, fast = lambda b: (z.at[b], at.token), lambda b: (R.at[at.slot, b], 0)
            beside = lambda b: (base.at[b], None)
            return [
                Product("nt", C, D, F, source, fast, finish, beside, at.row, lambda b: at.live(b)),
                _update(at, C, D, F, u, z, S, R, at.lr),
            ]

        return self._call("ttt_forward", C, n, scalars, products, (z_BTF, u_BTD, base_BTD), (o_BTD, S_BDF, R_2BDF))

    def replay(self, C, n, scalars, z_BTF, u_BTD, do_BTD, w_DF, dz_BTF, S_BDF, R_2BDF):
        F, D = z_BTF.shape[2], u_BTD.shape[2]

        def products(at, z, u, do, w, dz, S, R):
            def finish(b, m0, n0):
                return lambda k, n, sums, _, __: at.write(k, (dz.at[b, _rows(at.token + m0), n], sums))

            weight = lambda b: (R.at[at.slot, b], 0)
            return [
                Product("nn", C, F, D, lambda b: (do.at[b], at.token), weight, finish, lambda b: (None, None)),
                _update(at, C, D, F, u, z, S, R, at.lr, w),
            ]

        return self._call("ttt_replay", C, n, scalars, products, (z_BTF, u_BTD, do_BTD, w_DF), (dz_BTF, S_BDF, R_2BDF))

    def reverse(self, C, n, scalars, z_BTF, u_BTD, v_BTD, do_BTD, dz_BTF, dv_BTD, dw_BDF, G_BDF, R_2BDF):
        (B, _, F), D = z_BTF.shape, v_BTD.shape[2]
        collects = dw_BDF is not None

        def products(at, z, v, do, dz, dv, G, R, dlr, dw=None):
            def finish_v(b, m0, n0):
                by_row = []

                def piece(k, n, sums, _, v):
                    by_row.append(jnp.sum(v.astype(jnp.float32) * sums, axis=1))
                    at.write(k, (dv.at[b, _rows(at.token + m0), n], at.lr * sums))
                    if k == TILE // PIECE - 1:
                        dlr[b, n0 // TILE, _rows(at.step * C + m0)] = sum(by_row)

                return piece

            def finish_z(b, m0, n0):
                return lambda k, n, sums, _, dz_before: at.write(
                    k, (dz.at[b, _rows(at.token + m0), n], dz_before.astype(jnp.float32) + at.lr * sums)
                )

            fast = lambda b: (R.at[at.slot, b], 0)
            of = lambda array: lambda b: (array.at[b], at.token)
            return [
                Product("nt", C, D, F, of(z), fast, finish_v, lambda b: (None, v.at[b]), at.token),
                Product("nn", C, F, D, of(v), fast, finish_z, lambda b: (None, dz.at[b]), at.token),
                _update(at, C, D, F, do, z, G, R, collected=dw),
            ]

        partial_dlr = jnp.zeros((B, D // TILE, n * C), jnp.float32)
        in_place = (dz_BTF, dv_BTD, G_BDF, R_2BDF, partial_dlr, *((dw_BDF,) if collects else ()))
        results = self._call("ttt_reverse", C, -n, scalars, products, (z_BTF, v_BTD, do_BTD), in_place)
        dz_BTF, dv_BTD, G_BDF, R_2BDF, partial_dlr, *dw = results
        return dz_BTF, dv_BTD, dw[0] if collects else None, G_BDF, R_2BDF, partial_dlr

    def _call(self, name, C, n, scalars, products, operands, in_place):
        """|n| chunks, backwards where n is negative. Results are the arrays of `in_place`, updated."""
        B, M = scalars.keep_BM.shape
        sms = self.multiprocessors or _multiprocessors()
        # The shapes of the products do not depend on what they read.
        sizes = products(_Place(C), *[None] * (len(operands) + len(in_place)))
        shapes = tuple((p.rows, p.columns, p.length, p.updates) for p in sizes)
        table = jnp.asarray(schedule(shapes, B, sms // BLOCKS, abs(n)))

        def body(table, i, row, lr, keep, live, *arrays):
            *arrays, left_k, right_k, full, empty, low, high = arrays
            finished = pl.get_global(plgpu.SemaphoreType.REGULAR((abs(n), B, 2))) if abs(n) > 1 else None

            def products_of(step):
                chunk = i[0] + (step if n > 0 else -step)
                at = _Place(C, M, step, chunk, row[0] + step * C, lr[0], keep, live, (low, high), self.staged)
                return products(at, *arrays)

            run_block(products_of, table, finished, self.stages, left_k, right_k, full, empty)

        swizzled = functools.partial(
            plgpu.SMEM, dtype=jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        )
        staging = lambda dtype, bytes: plgpu.SMEM(
            (MULTIPLIERS, self.staged, ROWS, PIECE),
            dtype,
            transforms=(plgpu.TilingTransform((8, min(PIECE, 128 // bytes))), plgpu.SwizzleTransform(min(128, PIECE * bytes))),
        )
        views = lambda size: (swizzled((self.stages, size, BLOCK_K)), swizzled((self.stages, BLOCK_K, size)))
        float32 = plgpu.SMEM(
            (self.stages, TILE // BLOCKS, BLOCK_K),
            jnp.float32,
            transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
        )
        # The interpreter watches a union as a whole, and takes the use of one slot for that of another.
        one_ring = (lambda *views: views) if self.interpret else plgpu.RefUnion
        scratch = (
            one_ring(*views(TILE // BLOCKS)),
            one_ring(*views(TILE), float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=self.stages),
            plgpu.ClusterBarrier(collective_axes=("block",), num_arrivals=MULTIPLIERS, num_barriers=self.stages),
            staging(jnp.bfloat16, 2),
            staging(jnp.float32, 4),
        )
        mesh = plgpu.Mesh(
            grid=(sms // BLOCKS,),
            grid_names=("pair",),
            cluster=(BLOCKS,),
            cluster_names=("block",),
            num_threads=MULTIPLIERS + 1,
            thread_name="wg",
        )
        kernel = pl.kernel(
            lambda *arrays: pl.run_scoped(functools.partial(body, *arrays), *scratch, collective_axes="wg"),
            mesh=mesh,
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=self.interpret or False,
            name=name,
        )
        flat_scalars = tuple(x.reshape(-1) for x in scalars)

        def launch(*arrays):
            refs = [jax.new_ref(x) for x in arrays[: len(in_place)]]
            kernel(*arrays[len(in_place) :], *refs)
            return tuple(ref[...] for ref in refs)

        arrays = (*in_place, table, *flat_scalars, *operands)
        if self.interpret:
            return launch(*arrays)
        program = _Program(launch, self, name, C, n, tuple((x.shape, x.dtype) for x in arrays))
        return tuple(_launch.bind(*arrays, launch=program, results=len(in_place)))


class _Program:
    """A launch. Equal ones, of two layers say, are lowered once in a module; lowering one takes a second."""

    def __init__(self, run, *key):
        self.run, self.key = run, key

    def __call__(self, *arrays):
        return self.run(*arrays)

    def __eq__(self, other):
        return isinstance(other, _Program) and self.key == other.key

    def __hash__(self):
        return hash(self.key)


# jax's rematerialisation takes programs apart and cannot hand on a ref; it leaves primitives whole.
_launch = Primitive("ttt_launch")
_launch.multiple_results = True
_launch.def_impl(lambda *arrays, launch, results: jax.jit(launch)(*arrays))
_launch.def_abstract_eval(lambda *avals, launch, results: avals[:results])


def _lower(ctx, *arrays, launch, results):
    """As the program of one device, which it is, also inside a `shard_map`: jax lets no ref vary over mesh axes."""
    plain = lambda avals: [ShapedArray(x.shape, x.dtype) for x in avals]
    ctx = ctx.replace(avals_in=plain(ctx.avals_in), avals_out=plain(ctx.avals_out))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return mlir.lower_fun(lambda *arrays: launch(*arrays), multiple_results=True)(ctx, *arrays)


mlir.register_lowering(_launch, _lower, platform="cuda")


def _one_after_the_other(arrays, axes, **params):
    """`jax.vmap`: a launch for each. The batch that a kernel computes at once is B."""
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    spread = lambda x, axis: jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
    arrays = [spread(x, axis) for x, axis in zip(arrays, axes, strict=True)]
    results = jax.lax.map(lambda one: tuple(_launch.bind(*one, **params)), tuple(arrays))
    return list(results), [0] * len(results)


batching.primitive_batchers[_launch] = _one_after_the_other


class _Place:
    """Which chunk this is, what belongs to it, and the way out of shared memory."""

    def __init__(
        self, C, M=0, step: Any = 0, i: Any = 0, row: Any = 0, lr=None, keep: Any = None, live: Any = None, staging=(), staged=0
    ):
        self.step, self.token, self.row, self.slot, self.slot_written = step, i * C, row, i % 2, (i + 1) % 2
        self.lr = lr
        self.keep = lambda b: keep[b * M + i]
        self.live = lambda b: live[b * M + i]
        self.staging, self.staged = staging, staged

    def write(self, k, *parts):
        """Piece k of a tile, (destination, values) each, through shared memory: registers would write eight bytes at a time."""
        wg, slot = jax.lax.axis_index("wg"), k % self.staged
        plgpu.wait_smem_to_gmem(self.staged - 1, wait_read_only=True)
        for ref, values in parts:
            self.staging[ref.dtype == jnp.float32][wg, slot] = values.astype(ref.dtype)
        plgpu.commit_smem()
        for ref, _ in parts:
            plgpu.copy_smem_to_gmem(self.staging[ref.dtype == jnp.float32].at[wg, slot], ref, commit_group=False)
        plgpu.commit_smem_to_gmem_group()


def _rows(start):
    """Of a multiplier."""
    return pl.ds(pl.multiple_of(start, ROWS), ROWS)


def _update(at, C, D, F, left, right, state, R, scale: Any = 1.0, w=None, collected: Any = None) -> Product:
    """keep (state + scale left^T right), and its copy R, with W added where there is one."""

    def finish(b, m0, n0):
        kept = at.keep(b)

        def piece(k, n, sums, before, w_piece):
            part = b, _rows(m0), n
            total = before + scale * sums
            value = kept * total
            copy = value if w is None else value + w_piece.astype(jnp.float32)
            at.write(k, (state.at[part], value), (R.at[at.slot_written, *part], copy))
            if collected is not None:  # where a document starts at this chunk, G is the whole of its share of dW

                @pl.when(kept != 1)
                def _():
                    collected[part] = read(collected, part) + (1 - kept) * total

        return piece

    token = lambda array: lambda b: (array.at[b], at.token)
    return Product("tn", D, F, C, token(left), token(right), finish, lambda b: (state.at[b], w))


def _multiprocessors() -> int:
    return getattr(jax.devices()[0], "core_count", 132)
