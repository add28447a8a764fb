"""The kernel of the inverse root without a GPU: in the interpreter, lowered for CUDA, and where it
is taken. tests/gpu has it on a device.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from support.tolerance import TOLERANCE, assert_close

from ttt_jax.kernels_pallas import inverse_root as kernel
from ttt_jax.ops import platform
from ttt_jax.ops.ttt.chunk_products import Matmuls
from ttt_jax.ops.ttt.inverse_root import inverse_root


def grams(C, seed=0):
    """Of three chunks: random keys, keys about one direction, keys that repeat as words do; and
    the mean of the diagonals."""
    rng = np.random.default_rng(seed)
    z_NCF = rng.standard_normal((3, C, 24)) + np.array([0.0, 3.0, 0.0])[:, None, None]
    z_NCF[2] = rng.standard_normal((21, 24))[np.minimum(rng.zipf(1.3, C), 20)]
    a_NCC = z_NCF @ z_NCF.transpose(0, 2, 1)
    return a_NCC, np.trace(a_NCC, axis1=1, axis2=2) / C


def oracle(a_NCC, shift_N):
    eye_CC = np.eye(a_NCC.shape[1])
    return np.linalg.inv(np.linalg.cholesky(a_NCC + shift_N[:, None, None] * eye_CC))


def joined(root):
    """The sum of the terms, float64."""
    return sum(np.asarray(x, np.float64) for x in root)


@pytest.mark.parametrize(("C", "block"), [(64, 64), (80, 16), (128, 32)])
def test_kernel_matches_float64(C, block):
    """To the 16 bits of two terms with random keys. Keys that are alike cost more, and A^-1, which
    is what counts, is within a tenth of one rounding to bfloat16.
    """
    a, shift = grams(C)
    above = np.triu(np.full((C, C), np.nan), block)  # blocks above the diagonal are not read
    root = kernel.interpreted(
        jnp.asarray(a + above, "float32"), jnp.asarray(shift, "float32"), block
    )
    assert [x.dtype for x in root] == [jnp.bfloat16] * 2
    got, want = joined(root), oracle(a, shift)
    np.testing.assert_array_equal(got, np.tril(got))
    assert_close("root of random keys", got[0], want[0], 1e-5)
    inverse = lambda m: np.swapaxes(m, 1, 2) @ m
    assert_close("inverse", inverse(got), inverse(want), TOLERANCE["bfloat16"] / 10)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As on one GPU, with the kernel in the interpreter; counts its calls."""
    calls = []

    def run(a_NCC, shift_N):
        calls.append(a_NCC.shape)
        return kernel.interpreted(a_NCC, shift_N, 32)

    monkeypatch.setattr(platform, "compiled_for", lambda: "gpu")
    monkeypatch.setattr(platform, "on_one_device", lambda: True)
    monkeypatch.setattr(kernel, "inverse_root_gpu", run)
    return calls


def check_inverse(a, shift, dtype, within):
    root = inverse_root(jnp.asarray(a, dtype), jnp.asarray(shift, dtype), Matmuls("bfloat16"))
    got, want = joined(root), oracle(a, shift)
    inverse = lambda m: np.swapaxes(m, 1, 2) @ m
    assert_close("inverse", inverse(got), inverse(want), within)


def test_one_gpu_takes_the_kernel(on_a_gpu):
    check_inverse(*grams(64), "float32", TOLERANCE["bfloat16"] / 10)
    assert on_a_gpu == [(3, 64, 64)]


def test_large_matrices_are_halved_to_the_kernel(on_a_gpu, monkeypatch):
    """To multiples of its unit: 5 blocks to 2 and 3, and 3 to 1 and 2."""
    monkeypatch.setattr(kernel, "BLOCK", 32)
    monkeypatch.setattr(kernel, "UNIT", 32)
    monkeypatch.setattr(kernel, "LARGEST", 64)
    check_inverse(*grams(160), "float32", TOLERANCE["bfloat16"] / 10)
    assert on_a_gpu == [(3, 64, 64), (3, 32, 32), (3, 64, 64)]


@pytest.mark.parametrize(("C", "dtype"), [(72, "bfloat16"), (64, "float32"), (64, "float64")])
def test_what_the_kernel_cannot_run_are_matmuls(on_a_gpu, C, dtype, x64):
    a, shift = grams(C)
    acc = "float64" if dtype == "float64" else "float32"
    root = inverse_root(jnp.asarray(a, acc), jnp.asarray(shift, acc), Matmuls(dtype))
    assert not on_a_gpu
    within = 1e-5 if dtype == "bfloat16" else TOLERANCE[dtype]  # two terms have 16 bits
    assert_close("root", joined(root), oracle(a, shift), within)


def test_a_mesh_of_several_devices_takes_matmuls(monkeypatch):
    """The compiler cannot partition a kernel."""
    monkeypatch.setattr(platform, "compiled_for", lambda: "gpu")
    a, shift = (jnp.asarray(x, "float32") for x in grams(64))
    run = lambda a, shift: inverse_root(a, shift, Matmuls("bfloat16"))
    assert "pallas_call" not in str(jax.make_jaxpr(run)(a, shift))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_lowers_for_cuda():
    """The Triton program of the block size that GPUs run."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 128, 128), (2,))]
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(kernel.inverse_root_gpu).trace(*shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "ttt_inverse_root" in text
    assert "triton" in text
