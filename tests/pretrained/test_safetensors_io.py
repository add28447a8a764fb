"""Which numbers of a checkpoint are none."""

import ml_dtypes
import numpy as np
import pytest

from ttt_jax.pretrained.safetensors_io import all_finite


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_nan_and_infinity_are_found_anywhere(dtype):
    """In the first and the last place of an array that is looked at in blocks; the largest finite
    numbers are none of them."""
    size = (1 << 18) + 3
    largest = ml_dtypes.finfo(dtype).max if dtype is ml_dtypes.bfloat16 else np.finfo(dtype).max
    array = np.zeros(size, dtype)
    array[:2] = largest, -largest
    assert all_finite(array)
    for place in (0, size - 1):
        for bad in (np.inf, -np.inf, np.nan):
            broken = array.copy()
            broken[place] = bad
            assert not all_finite(broken), (place, bad)
