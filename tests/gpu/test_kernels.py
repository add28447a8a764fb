"""The op's GPU kernels on a GPU, against float64. Run: JAX_PLATFORMS=cuda,cpu python -m pytest tests/gpu -m gpu"""

import jax
import numpy as np
import pytest
from op_checks import BF16, DOCUMENTS, F32, check, make_inputs

from ttt_jax.ops import in_place_ttt

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
    check(*make_inputs(T=T, D=D, F=F), dtype, implementation, chunk_size=C, segment_ids=ids)


@pytest.mark.parametrize("implementation", ["pallas_gpu", "triton"])
def test_kernels_under_rematerialisation_and_a_scan_over_layers(implementation):
    """As a model calls them: the gradient through a scan of rematerialised layers equals that of XLA."""
    (z, v, w, lr, _), (do, _) = make_inputs(B=1, T=3 * 256, D=256, F=512)
    z, v, w, do = (jax.numpy.asarray(x, BF16) for x in (z, v, w, do))

    def loss(z, v, w, implementation):
        @jax.checkpoint
        def layer(v, _):
            return in_place_ttt(z, v, w, lr=lr, chunk_size=256, implementation=implementation)[0], None

        return (jax.lax.scan(layer, v, length=3)[0] * do).astype(F32).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    for got, expected in zip(gradient(z, v, w, implementation), gradient(z, v, w, "xla"), strict=True):
        got, expected = (np.asarray(x, np.float64) for x in (got, expected))
        assert np.linalg.norm(got - expected) <= 1e-2 * np.linalg.norm(expected)  # two bf16 results
