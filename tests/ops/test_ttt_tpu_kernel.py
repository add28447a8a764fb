"""The TPU kernel in interpreters: races, memory that nobody wrote, many tiles."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from support.op_checks import BF16, DOCUMENTS, F32, cases, check, compiled, make_inputs

from ttt_jax.kernels_pallas import tpu


@pytest.mark.parametrize(
    ("implementation", "dtype"), [*cases(BF16, F32, implementations=["pallas_tpu"])]
)
def test_tpu_kernel_has_no_races_and_reads_nothing_unwritten(implementation, dtype, capfd, caplog):
    """The TPU's own interpreter: two cores share the parallel dimensions, memory starts as NaN,
    DMAs land when waited for.
    """
    T, C = 22, 8
    ids = np.stack([DOCUMENTS["padding"](T, C), DOCUMENTS["boundaries"](T, C)]).astype(np.int32)
    arguments, cotangents = make_inputs(T=T, D=130, F=200)
    parameters = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2
    )
    compiled.cache_clear()  # the interpreter is not in the key
    # Tiles that end where the array does: with others this interpreter (jax 0.10.2) returns aliased
    # outputs with their padding.
    with tpu.interpreted(parameters, tiles=(128, 128)):
        check(
            arguments, cotangents, dtype, implementation, chunk_size=C, segment_ids=jnp.asarray(ids)
        )
    compiled.cache_clear()
    assert "RACE DETECTED" not in "".join(capfd.readouterr()) + caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["pallas_tpu"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_tpu_kernel_over_many_tiles(implementation, dtype):
    arguments, cotangents = make_inputs(T=300, D=600, F=700)
    ids = np.stack([DOCUMENTS[name](300, 64) for name in ("padding", "boundaries")]).astype(
        np.int32
    )
    check(arguments, cotangents, dtype, implementation, chunk_size=64)
    check(arguments, cotangents, dtype, implementation, chunk_size=64, segment_ids=jnp.asarray(ids))
