"""In-Place TTT on NVIDIA GPUs in Triton, through jax-triton: the launches of `chunk_scan.py`.

Why it exists: it is the implementation named "triton", for users of jax-triton, and it runs what
`gpu.py` cannot: GPUs that are not Hopper, float32, sizes that are no multiple of 256. It runs only
where it is named; `implementation=None` never takes it. It was not measured to be the fastest
anywhere: on an H100 at 4B shapes it lies between `gpu.py` and XLA (docs/performance.md), and what
`gpu.py` cannot run was not measured.

Letters as there. A program computes one output tile. Tiles with the longest sums come first, and
the hardware hands the rest to whichever multiprocessor is free. Sizes need not fill tiles: what is
beyond is masked.

Imported only where it is used: jax-triton needs a jax with GPU support, and the extra `gpu`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp

from ttt_jax.kernels_pallas import chunk_scan


@dataclasses.dataclass(frozen=True)
class Tile:
    """An output tile of BM x BN, summed in k-steps of BK, and how a program computes it."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


BF16, FLOAT32 = Tile(128, 256, 64, 8, 3), Tile(64, 64, 32, 4, 2)


def why_not(platform: str, dtype, apply: str = "split") -> str | None:
    """Say why these inputs cannot run here, or None."""
    if platform not in ("gpu", "cuda"):
        return f"it needs an NVIDIA GPU, and the platform is {platform}"
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"it computes in float32 and bfloat16, not in {jnp.dtype(dtype)}"
    if apply != "split":
        return f"it applies W and S in two products (apply='split'), not apply={apply!r}"
    missing = [name for name in ("jax_triton", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (pip install 'ttt-jax[gpu]')"
    return None


def in_place_ttt_triton(
    z_BTF, v_BTD, w_DF, *, lr, chunk_size, state_BDF, keep_BM=None, tile: Tile | None = None
):
    """Apply and update the fast weight: section 3 of arXiv 2604.06169, o_i = z_i (W + S_i)^T.

    Same contract as `in_place_ttt_xla`.

    Args:
      z_BTF, v_BTD, w_DF: of one dtype, float32 or bfloat16.
      lr: float32 scalar.
      chunk_size: C.
      state_BDF: float32, S_0.
      keep_BM: float32, 0 where the state before an update is dropped; None: no documents.
      tile: None: the one of the dtype.

    Returns:
      o_BTD in the dtype of z, and the state after the last whole chunk, float32.
    """
    tile = tile or (BF16 if z_BTF.dtype == jnp.bfloat16 else FLOAT32)
    return chunk_scan.in_place_ttt(
        TritonLaunches(tile),
        z_BTF,
        v_BTD,
        w_DF,
        lr=lr,
        chunk_size=chunk_size,
        state_BDF=state_BDF,
        keep_BM=keep_BM,
    )


@dataclasses.dataclass(frozen=True)
class TritonLaunches:
    """The three launches; `chunk_scan.Launches` says what each computes."""

    tile: Tile

    def forward(self, C, scalars, z_BTF, u_BTD, base_BTD, o_BTD, S_BDF, R_2BDF):
        """Return o, S, R."""
        (B, T, F), D = z_BTF.shape, u_BTD.shape[2]
        tiles = self._count(C, D), self._count(D, F)
        operands = (*scalars, z_BTF, u_BTD, base_BTD, o_BTD, S_BDF, R_2BDF)
        sizes = {
            "T": T,
            "C": C,
            "D": D,
            "F": F,
            "M": scalars.keep_BM.shape[1],
            "T_BASE": base_BTD.shape[1],
        }
        return self._call(_kernels().forward, operands, 3, B, tiles, **sizes)

    def replay(self, C, scalars, z_BTF, u_BTD, do_BTD, w_DF, dz_BTF, S_BDF, R_2BDF):
        """Return dz, S, R."""
        (B, T, F), D = z_BTF.shape, u_BTD.shape[2]
        tiles = self._count(C, F), self._count(D, F)
        operands = (*scalars, z_BTF, u_BTD, do_BTD, w_DF, dz_BTF, S_BDF, R_2BDF)
        return self._call(
            _kernels().replay, operands, 3, B, tiles, T=T, C=C, D=D, F=F, M=scalars.keep_BM.shape[1]
        )

    def reverse(self, C, scalars, z_BTF, u_BTD, v_BTD, do_BTD, dz_BTF, dv_BTD, G_BDF, R_2BDF):
        """Return dz, dv, G, R and dlr of each tile."""
        (B, T, F), D = z_BTF.shape, u_BTD.shape[2]
        tiles = self._count(C, D), self._count(C, F), self._count(D, F)
        operands = (*scalars, z_BTF, u_BTD, v_BTD, do_BTD, dz_BTF, dv_BTD, G_BDF, R_2BDF)
        partial_dlr = jax.ShapeDtypeStruct((B * tiles[0],), jnp.float32)
        sizes = {"T": T, "C": C, "D": D, "F": F, "M": scalars.keep_BM.shape[1]}
        return self._call(_kernels().reverse, operands, 4, B, tiles, extra=(partial_dlr,), **sizes)

    def _count(self, rows: int, columns: int) -> int:
        return -(-rows // self.tile.BM) * -(-columns // self.tile.BN)

    def _call(self, kernel, operands, in_place: int, B, tiles, extra=(), **sizes):
        """Run a kernel of `triton_kernels.py` over all sequences.

        The last `in_place` operands are updated in place; `extra` are results of their own.
        """
        import jax_triton  # pyright: ignore[reportMissingImports]

        dtype, start = operands[len(chunk_scan.Scalars._fields)].dtype, len(operands) - in_place
        operands = [*operands[:start], *jax.lax.optimization_barrier(tuple(operands[start:]))]
        out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[start:]] + list(extra)
        t = self.tile
        results = jax_triton.triton_call(
            *operands,
            kernel=kernel,
            out_shape=out_shape,
            grid=(B * sum(tiles),),
            num_warps=t.warps,
            num_stages=t.stages,
            input_output_aliases={start + k: k for k in range(in_place)},
            B=B,
            **sizes,
            BM=t.BM,
            BN=t.BN,
            BK=t.BK,
            PRECISION="ieee" if dtype == jnp.float32 else "tf32",
        )
        return jax.lax.optimization_barrier(tuple(results))  # see gpu_launch.apart


@functools.cache
def _kernels():
    from ttt_jax.kernels_pallas import triton_kernels

    return triton_kernels
