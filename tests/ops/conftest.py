"""What tests of the op run in."""

import contextlib

import jax
import pytest
from support.op_checks import DTYPES, F32, F64

from ttt_jax.kernels_pallas import tpu


@pytest.fixture(autouse=True)
def interpreter(request):
    """Tests with implementation="pallas_tpu" run it in the interpreter."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    with (
        tpu.interpreted()
        if parameters.get("implementation") == "pallas_tpu"
        else contextlib.nullcontext()
    ):
        yield


@pytest.fixture
def best(implementation):
    """The most precise dtype of an implementation, and what results in it may differ by after
    another order of sums.
    """
    dtype = DTYPES[implementation][0]
    with jax.enable_x64(dtype == F64):
        yield dtype, {F64: 1e-14, F32: 1e-5}[dtype]
