"""Shared fixtures: eight fake CPU devices, strict dtype promotion, and the official code's
arrays.
"""

import gc
import os
import signal

from support.compilation import CHEAP, EIGHT_DEVICES, forget_programs, keep_programs

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of linear algebra wait for work by spinning, which slows the other worker down.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {EIGHT_DEVICES} {CHEAP}"

from pathlib import Path

import jax
import numpy as np
import pytest
from support import awake  # noqa: F401  models of tests have fast weights that write

# Under `nohup`, which tests of signals would inherit.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
if os.environ["JAX_PLATFORMS"] == "cpu":
    keep_programs()

MANY_BYTES = 2 << 30  # of a worker
GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_finish(session):
    """What has been imported stays until the end: the collector need not look through it. And it
    comes less often: tracing makes many objects and few cycles.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """pytest collects five times when all tests are done. What one collection leaves is in use."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """Give a large heap back between two files, which share few programs."""
    result = yield
    if nextitem is not None and nextitem.path != item.path:
        forget_programs(MANY_BYTES)
    return result


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give each worker a part of the list in one piece: a module's fixtures and compiled programs
    are made once. A worker that is done takes over from the other.
    """
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getvalue("dist") == "load" else None


@pytest.fixture
def x64():
    """Run one test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=sorted(p.stem for p in GOLDEN.glob("mlp_*.npz")))
def golden_mlp(request):
    with np.load(GOLDEN / f"{request.param}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(params=sorted(p.name for p in GOLDEN.glob("model_*")))
def golden_model(request):
    """Folder of a tiny random model of the official code, with the arrays of io.npz."""
    folder = GOLDEN / request.param
    with np.load(folder / "io.npz", allow_pickle=False) as arrays:
        return folder, dict(arrays)


@pytest.fixture
def interruptible():
    """Let Ctrl-C through: jobs in the background of a shell ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def usual_promotion():
    """Promote as jax does for users, not as strictly as in the other tests."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
