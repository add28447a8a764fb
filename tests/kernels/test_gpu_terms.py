"""The Hopper kernels of ridge writes without a GPU: which tiles they compute, lowering for CUDA,
and (slow) Mosaic's interpreter. tests/gpu has them on a device.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from support.tolerance import assert_close

from ttt_jax.kernels_pallas import gpu_terms
from ttt_jax.ops import platform
from ttt_jax.ops.ttt import inverse_root, writes
from ttt_jax.ops.ttt.chunk_products import Matmuls, products_for

N, C, D, F = 1, 768, 256, 256  # nine tiles of a symmetric matrix, of which six are computed
HAS_INTERPRETER = hasattr(plgpu, "InterpretGPUParams")  # jax 0.11 and later


@pytest.mark.parametrize("triangular", [False, True])
@pytest.mark.parametrize("lower", [False, True])
def test_tiles_hold_all_that_is_asked_for(lower, triangular):
    """Every element of the lower triangle, or all; and every k at which both factors may be other
    than zero.
    """
    sums = gpu_terms.Sums("tn", gpu_terms.OF_FOUR, lower=lower, triangular=triangular)
    seen = np.zeros((768, 768), int)
    for m, n, first in sums.tiles(768, 768):
        seen[m : m + 256, n : n + 256] += 1
        assert first * 64 <= (max(m, n) if triangular else 0)
    assert seen.max() == 1
    assert np.tril(seen).sum() == 768 * 769 // 2
    assert (seen.sum() == 768**2) != lower


def test_a_symmetric_matrix_is_read_below_the_diagonal():
    """A tile's sum, put together as the ranges say; with NaN in the tiles that are not computed."""
    rng = np.random.default_rng(0)
    whole, y = rng.random((2, C, C))
    whole = whole + whole.T
    above = np.kron(np.triu(np.ones((3, 3)), 1), np.ones((256, 256))) > 0
    x = np.where(above, np.nan, whole)
    sums = gpu_terms.Sums("nn", gpu_terms.ONE, symmetric=True)
    for m, n, first in sums.tiles(C, C):
        rows, columns, total, done = slice(m, m + 256), slice(n, n + 256), 0.0, 0
        parts = [part for part in sums.ranges(m, first, C // 64) if part[1] < part[2]]
        for kind, begin, end in parts:
            assert begin == done
            k = slice(int(begin) * 64, int(end) * 64)
            left = x[k, rows].T if kind == "tn" else x[rows, k]
            total, done = total + left @ y[k, columns], end
        assert done == C // 64
        np.testing.assert_allclose(total, (whole @ y)[rows, columns])


@pytest.mark.parametrize(
    ("sizes", "dtype", "reason"),
    [
        ((512, 768, 2048), "bfloat16", None),
        ((512, 768, 2048), "float32", "bfloat16"),
        ((128, 768, 2048), "bfloat16", "multiples of 256"),
    ],
)
def test_what_kernels_cannot_run_are_matmuls(monkeypatch, sizes, dtype, reason):
    monkeypatch.setattr(platform, "compiled_for", lambda: "gpu")
    assert isinstance(products_for(dtype, *sizes), Matmuls)  # of a mesh the compiler partitions
    monkeypatch.setattr(platform, "on_one_device", lambda: True)
    got = gpu_terms.why_not(dtype, *sizes)
    assert got is None if reason is None else reason in got
    assert isinstance(products_for(dtype, *sizes), Matmuls) == (reason is not None)


def arrays(seed=0):
    """bfloat16 keys about one direction, targets and cotangents; and the gradient of what is
    written, from which the op has the cotangents.
    """
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((1, N, C, F)) + 1
    v, G = rng.standard_normal((1, N, C, D)), rng.standard_normal((F, D))
    return *(jnp.asarray(x, "bfloat16") for x in (z, v, z @ G)), G


def all_three(z, v, do):
    out, vjp = jax.vjp(lambda z, v: writes.least_squares(z, v, 1.0), z, v)
    return out, *vjp(do)


def test_a_write_and_its_gradients_lower_for_cuda(monkeypatch):
    """Six products, and no matmul of XLA's between them."""
    matmuls = Matmuls("bfloat16")
    monkeypatch.setattr(writes, "products_for", lambda *_: gpu_terms.Kernels())
    monkeypatch.setattr(writes, "inverse_root", lambda a, *_: matmuls.terms(jnp.tril(a)))
    traced = jax.jit(lambda *x: all_three(*x)).trace(*arrays()[:3])
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert launches(text) == 6
    assert "dot_general" not in text


def launches(text: str) -> int:
    """Count launches of a lowered program. jax 0.11 makes equal ones a function, called twice."""
    total = 0
    for function in text.split("func.func ")[1:]:
        name = function.partition("@")[2].partition("(")[0]
        times = 1 if name == "main" else text.count(f"call @{name}(")
        total += times * function.count("custom_call @mosaic_gpu")
    return total


def test_a_vmapped_product_is_one_launch():
    """What it computes is tested with a launch that runs anywhere."""
    x = jax.ShapeDtypeStruct((3, N, C, F), jnp.bfloat16)
    traced = jax.jit(jax.vmap(gpu_terms.Kernels().gram)).trace(x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1


def test_a_vmapped_product_takes_what_is_not_mapped_for_each(monkeypatch):
    def launch(sums, count_x, count_y, interpret, arrays):
        return [jnp.einsum("nij,njk->nik", *arrays)]

    monkeypatch.setattr(gpu_terms, "_launch", launch)
    rng = np.random.default_rng(0)
    x_3NCC, y_NCC = rng.standard_normal((3, N, 4, 4)), rng.standard_normal((N, 4, 4))
    sums = gpu_terms.Sums("nn", gpu_terms.ONE, ("float32",))
    with jax.disable_jit():
        (got,) = jax.vmap(lambda x: gpu_terms.multiply((x,), (y_NCC,), sums))(jnp.asarray(x_3NCC))
    np.testing.assert_allclose(got, x_3NCC @ y_NCC, rtol=1e-4)


def root_of_lower_triangle(a_NCC, shift_N, products):
    """As the root's kernel, which reads no more. Memory that nothing wrote is NaN there."""
    whole_NCC = jnp.tril(a_NCC) + jnp.swapaxes(jnp.tril(a_NCC, -1), 1, 2)
    return products.terms(inverse_root.swept(whole_NCC, shift_N))


@pytest.mark.skipif(not HAS_INTERPRETER, reason="this jax does not offer the GPU interpreter")
@pytest.mark.slow
def test_a_write_and_its_gradients_match_float64_in_the_interpreter(monkeypatch, capfd):
    interpreted = gpu_terms.Kernels(interpret=plgpu.InterpretGPUParams(detect_races=True))
    monkeypatch.setattr(writes, "products_for", lambda *_: interpreted)
    monkeypatch.setattr(writes, "inverse_root", root_of_lower_triangle)
    z, v, do, G = arrays()
    got = jax.jit(lambda *x: all_three(*x))(z, v, do)
    assert "RACE DETECTED" not in capfd.readouterr().out  # jax 0.11 prints them, 0.12 raises
    z, v, do = (np.asarray(x, np.float64) for x in (z, v, do))
    gram = z @ np.swapaxes(z, 2, 3)
    mean = np.trace(gram, axis1=2, axis2=3)[..., None, None] / C
    inverse = np.linalg.inv(gram + mean * np.eye(C))
    out, dv = inverse @ v, inverse @ do
    by_a = -dv @ np.swapaxes(out, 2, 3)
    trace = np.trace(by_a, axis1=2, axis2=3)[..., None, None]
    dz = (by_a + np.swapaxes(by_a, 2, 3)) @ z + 2 / C * trace * z
    assert_close("targets", got[0], out, 2e-3)  # one rounding: 1.7e-3
    assert_close("dv", got[2], dv, 2e-3)
    written = lambda out, dz: np.asarray(dz, np.float64) + np.asarray(out, np.float64) @ G.T
    # 4.1e-3 as well if numpy rounds v', dv, dA and dz; 3.8e-3 if only v' and dz
    assert_close("the gradient of v'^T z by z", written(*got[:2]), written(out, dz), 4.3e-3)
