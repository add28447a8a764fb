"""The op's GPU kernels on a GPU, against float64. Run: JAX_PLATFORMS=cuda,cpu python -m pytest
tests/gpu -m gpu
"""

import importlib

import jax
import numpy as np
import pytest
from support import op_checks
from support.op_checks import BF16, DOCUMENTS, F32, check, make_inputs
from support.tolerance import TOLERANCE, assert_close

from ttt_jax.kernels_pallas import gpu_sweep, inverse_root, target_convolution
from ttt_jax.ops import in_place_ttt
from ttt_jax.ops.ttt import targets, writes

registry = importlib.import_module("ttt_jax.ops.ttt.api")  # the package has a function of this name
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]
CASES = [
    pytest.param("pallas_gpu", BF16, 512, 1024, 256, id="pallas_gpu"),
    pytest.param("triton", BF16, 512, 1024, 256, id="triton"),
    pytest.param("triton", BF16, 200, 328, 40, id="triton-odd"),
    pytest.param("triton", F32, 200, 328, 40, id="triton-float32"),
]


@pytest.mark.parametrize(("implementation", "dtype", "D", "F", "C"), CASES)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("tail", [0, 17])
def test_kernels_match_the_float64_reference(implementation, dtype, D, F, C, documents, tail):
    T = 4 * C + tail
    segment_ids = DOCUMENTS[documents]
    ids = None if segment_ids is None else np.broadcast_to(segment_ids(T, C), (2, T))
    options = {"chunk_size": C, "segment_ids": ids}
    check(*make_inputs(T=T, D=D, F=F), dtype, implementation, **options)
    check(*make_inputs(T=T, D=D, F=F), dtype, implementation, **options, decay=0.6)


@pytest.mark.parametrize("documents", ["none", "boundaries"])
@pytest.mark.parametrize("n", [1, 2])
def test_one_product_and_pairs_of_chunks(monkeypatch, documents, n):
    """Documents that start inside a pair, too."""
    C, T = 256, 7 * 256 + 17
    kernel = registry._FAST["pallas_gpu"]._replace(block=lambda call: n)
    monkeypatch.setitem(registry._FAST, "pallas_gpu", kernel)
    op_checks.compiled.cache_clear()  # programs are kept by name, and n is not in it
    ids = None if documents == "none" else np.broadcast_to((np.arange(T) // C + 1) // 3, (2, T))
    for apply in ("split", "fused"):
        options = {"chunk_size": C, "segment_ids": ids, "apply": apply}
        check(*make_inputs(T=T, D=512, F=1024), BF16, "pallas_gpu", **options)


@pytest.mark.parametrize("implementation", ["pallas_gpu", "triton"])
def test_kernels_under_rematerialisation_and_a_scan_over_layers(implementation):
    """As a model calls them: the gradient through a scan of rematerialised layers equals that of
    XLA.
    """
    (z, v, w, lr, _), (do, _) = make_inputs(B=1, T=3 * 256, D=256, F=512)
    z, v, w, do = (jax.numpy.asarray(x, BF16) for x in (z, v, w, do))

    def loss(z, v, w, implementation):
        @jax.checkpoint
        def layer(v, _):
            return in_place_ttt(z, v, w, lr=lr, chunk_size=256, implementation=implementation)[
                0
            ], None

        return (jax.lax.scan(layer, v, length=3)[0] * do).astype(F32).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    for got, expected in zip(
        gradient(z, v, w, implementation), gradient(z, v, w, "xla"), strict=True
    ):
        got, expected = (np.asarray(x, np.float64) for x in (got, expected))
        assert np.linalg.norm(got - expected) <= 1e-2 * np.linalg.norm(expected)  # two bf16 results


NAMES = ("o", "state", "dz", "dv", "dw", "dstate")


@pytest.mark.parametrize("documents", ["none", "boundaries"])
@pytest.mark.parametrize(("B", "D", "F"), [(1, 1024, 3072), (3, 256, 512)])
def test_stretches_of_any_length_give_the_same(monkeypatch, B, D, F, documents):
    """Bit for bit, again and again. But all chunks at once make dz in one sum, and dW is summed by
    stretches: those two to a rounding.
    """
    C, M = 256, 24
    ids = (
        None if documents == "none" else np.broadcast_to(DOCUMENTS[documents](M * C, C), (B, M * C))
    )
    (z, v, w, lr, state), (do, dS) = make_inputs(B=B, T=M * C, D=D, F=F)
    z, v, w, do = (jax.numpy.asarray(x, BF16) for x in (z, v, w, do))
    state, dS = (jax.numpy.asarray(x, F32) for x in (state, dS))

    def both(z, v, w, state):
        run = lambda z, v, w, state: in_place_ttt(
            z, v, w, lr=lr, chunk_size=C, state=state, segment_ids=ids, implementation="pallas_gpu"
        )
        results, vjp = jax.vjp(run, z, v, w, state)
        return *results, *vjp((do, dS))

    compiled = {}
    for most in (1, 5, 64):
        monkeypatch.setattr(gpu_sweep, "STATES", most * 2 * D * F)
        compiled[most] = jax.jit(lambda *arrays: both(*arrays)).lower(z, v, w, state).compile()
    first = {most: program(z, v, w, state) for most, program in compiled.items()}
    for most in (5, 64):
        for name, got, expected in zip(NAMES, first[most], first[1], strict=True):
            if name == "dw" or (name, most) == ("dz", 64):
                assert_close(name, got, expected, TOLERANCE["bfloat16"])
            else:
                np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
        for _ in range(10):
            for got, expected in zip(compiled[most](z, v, w, state), first[most], strict=True):
                np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


@pytest.mark.parametrize("C", [64, 192, 512])
def test_the_inverse_root_matches_float64(C):
    """Of keys that repeat as words do and of keys in six dimensions: A^-1 to a tenth of a rounding
    to bfloat16, and the same bits for the same matrix, wherever it runs.
    """
    rng = np.random.default_rng(0)
    words = rng.standard_normal((301, 300))[np.minimum(rng.zipf(1.3, C), 300)]
    few = rng.standard_normal((C, 6)) @ rng.standard_normal((6, 300))
    z_2CF = np.stack([words, few * np.exp(rng.standard_normal((C, 1)))])
    a_2CC = np.asarray(z_2CF @ z_2CF.transpose(0, 2, 1), np.float32)
    mean_2 = np.trace(a_2CC, axis1=1, axis2=2) / C
    repeated = (np.tile(a_2CC, (150, 1, 1)), np.tile(mean_2, 150))
    terms = jax.jit(inverse_root.inverse_root_gpu)(*repeated)
    got = sum(np.asarray(x, np.float64) for x in terms).reshape(150, 2, C, C)
    np.testing.assert_array_equal(got, np.broadcast_to(got[:1], got.shape))
    shifted = np.asarray(a_2CC, np.float64) + mean_2[:, None, None] * np.eye(C)
    inverse = np.swapaxes(got[0], 1, 2) @ got[0]
    assert_close("inverse", inverse, np.linalg.inv(shifted), TOLERANCE["bfloat16"] / 10)


@pytest.mark.parametrize(("C", "D"), [(512, 256), (1024, 256), (512, 128)])
def test_ridge_writes_and_their_gradients_match_float64(C, D):
    """In bfloat16, rounded once; of z the gradient of v'^T z. In a layer that is computed again,
    and one that keeps targets. In kernels, and with D = 128, which is no multiple of their tile, in
    matmuls.
    """
    rng = np.random.default_rng(0)
    T, F = 2048, 256
    z = rng.standard_normal((301, F))[np.minimum(rng.zipf(1.3, (2, T)), 300)]
    v, G = rng.standard_normal((2, T, D)), rng.standard_normal((F, D))
    arrays = [jax.numpy.asarray(x, BF16) for x in (z, v, z @ G)]
    written = lambda out, dz: dz + out @ G.T

    def all_three(z, v, do, policy):
        write = lambda z, v: writes.transformed("ridge", z, v, C)
        out, vjp = jax.vjp(jax.checkpoint(write, policy=policy), z, v)
        return out, *vjp(do)

    keep = jax.checkpoint_policies.save_only_these_names(writes.TARGET)
    found = [jax.jit(all_three, static_argnums=3)(*arrays, policy) for policy in (None, keep)]
    z, v, do = (np.asarray(x, np.float64).reshape(2, T // C, C, -1) for x in arrays)
    gram = z @ np.swapaxes(z, 2, 3)
    mean = np.trace(gram, axis1=2, axis2=3)[..., None, None] / C
    inverse = np.linalg.inv(gram + mean * np.eye(C))
    out, dv = inverse @ v, inverse @ do
    by_a = -dv @ np.swapaxes(out, 2, 3)
    trace = np.trace(by_a, axis1=2, axis2=3)[..., None, None]
    dz = (by_a + np.swapaxes(by_a, 2, 3)) @ z + 2 / C * trace * z
    for got in found:
        got = [np.asarray(x, np.float64).reshape(*z.shape[:3], -1) for x in got]
        assert_close("targets", got[0], out, 2e-3)
        assert_close("dv", got[2], dv, 2e-3)
        # 2.2e-3 to 2.5e-3 if numpy rounds v', dv, dA and dz
        assert_close("the gradient of v'^T z by z", written(*got[:2]), written(out, dz), 2.8e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_convolution_of_targets_matches_float64(dtype, normalize):
    """With gradients, at the shape of books; the other form, in float64, is the oracle."""
    B, T, C, D = 2, 1024, 512, 768
    assert target_convolution.why_not(dtype, C, D) is None
    rng = np.random.default_rng(0)
    shapes = (B, T, D), (D, 1, 5), (B, T, D)
    source, conv, dt = (jax.numpy.asarray(rng.standard_normal(s), dtype) for s in shapes)

    def both(source, conv, dt):
        run = lambda source, conv: targets.convolved(source, conv, C, normalize)
        t, pull = jax.vjp(run, source, conv)
        return t, *pull(dt)

    got = jax.jit(both)(source, conv, dt)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        expected = both(*(jax.numpy.asarray(np.asarray(x), "float64") for x in (source, conv, dt)))
    for name, x, y in zip(("t", "dsource", "dconv"), got, expected, strict=True):
        assert_close(name, x, y, TOLERANCE[dtype])
