"""The op's GPU kernels on a GPU, against float64. Run: JAX_PLATFORMS=cuda,cpu python -m pytest
tests/gpu -m gpu
"""

import jax
import numpy as np
import pytest
from support.op_checks import BF16, DOCUMENTS, F32, check, make_inputs

from ttt_jax.kernels_pallas import gpu
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
    options = {"chunk_size": C, "segment_ids": ids}
    check(*make_inputs(T=T, D=D, F=F), dtype, implementation, **options)
    check(*make_inputs(T=T, D=D, F=F), dtype, implementation, **options, decay=0.6)


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


@pytest.mark.parametrize("documents", ["none", "boundaries"])
@pytest.mark.parametrize(("B", "D", "F"), [(1, 1024, 3072), (3, 256, 512)])
def test_a_launch_of_many_chunks_gives_what_launches_of_one_give(monkeypatch, B, D, F, documents):
    """Bit for bit, again and again: its tiles read what other multiprocessors have just written."""
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
        return results, vjp((do, dS))

    compiled = {}
    for most in (1, 5, 64):
        monkeypatch.setattr(gpu, "MOST_CHUNKS", most)
        compiled[most] = jax.jit(lambda *arrays: both(*arrays)).lower(z, v, w, state).compile()
    expected = jax.tree.leaves(compiled[1](z, v, w, state))
    for most in (5, 64):
        for _ in range(10):
            for got, x in zip(
                jax.tree.leaves(compiled[most](z, v, w, state)), expected, strict=True
            ):
                np.testing.assert_array_equal(np.asarray(got), np.asarray(x))
