"""Which steps of a checkpoint folder are kept."""

import pytest

from ttt_jax.checkpoint.checksums import finished_steps, prune


@pytest.mark.parametrize(
    ("keep", "left"), [(1, [10]), (2, [9, 10]), (3, [7, 9, 10]), (9, [1, 7, 9, 10])]
)
def test_the_newest_steps_are_kept(tmp_path, keep, left):
    """By number, not by name: 10 comes after 9. What is no finished step is left alone."""
    for name in ("1", "7", "9", "10", "11.orbax-checkpoint-tmp", "8.damaged"):
        (tmp_path / name / "model").mkdir(parents=True)
    prune(tmp_path, keep)
    assert finished_steps(tmp_path) == left
    others = {"11.orbax-checkpoint-tmp", "8.damaged"}
    assert {path.name for path in tmp_path.iterdir()} == {*map(str, left), *others}
