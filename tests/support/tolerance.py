"""How results are compared: relative root mean square against a float64 oracle or the official
arrays.
"""

import numpy as np

# docs/numerics.md; never relaxed to pass a test
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 5e-3}


def relative_rms(value, oracle) -> float:
    value, oracle = np.asarray(value, np.float64), np.asarray(oracle, np.float64)
    assert value.shape == oracle.shape, f"shape {value.shape} != {oracle.shape}"
    scale = np.sqrt(np.mean(oracle**2))
    error = np.sqrt(np.mean((value - oracle) ** 2))
    return float(error / scale) if scale else float(error)


def assert_close(name, value, oracle, tolerance) -> None:
    error = relative_rms(value, oracle)
    assert error <= tolerance, f"{name}: relative RMS {error:.3e} > {tolerance:.0e}"
