"""||S||/||W|| in the first steps of training: the rule for the inner rate over shapes, and no
preset explodes.

A new model has S = 0, since its targets are zero. So the ratio rises from 0, and is looked at from
below at the end only.
"""

import pytest
from support.awake import new_target
from support.narrow import narrow, ratios

from ttt_jax.config import load_config, preset_names, read_written
from ttt_jax.model import ttt_mlp

LOW, HIGH = 0.05, 2.0
FROM_SCRATCH = [name for name in preset_names() if not read_written(name).get("init_from")]


@pytest.fixture(autouse=True)
def real_start(monkeypatch):
    """The start of real models: a zero convolution and a diagonal W_target."""
    monkeypatch.setattr(ttt_mlp, "initial_target", new_target)


def of_shape(D, T, C, *words):
    """Two layers of the default run's MLP, one of them with TTT, at other sizes. `init_std` keeps
    the scale of projections.
    """
    sizes = {
        "model.d_model": D,
        "model.d_ff": 2 * D,
        "model.head_dim": D // 2,
        "model.num_layers": 2,
        "model.ttt.layers": [1],
        "model.init_std": 0.06 * (96 / D) ** 0.5,
        "model.sliding_window": 16,
        "model.ttt.chunk_size": C,
        "model.ttt.lr": "auto",
        "data.seq_len": T,
        "data.batch_size": 1,
        "optimizer.warmup_steps": 10,
        "optimizer.schedule": "constant",
    }
    return load_config("default", [f"--{name}={value}" for name, value in sizes.items()] + [*words])


SUM = ["--model.ttt.write", "sum", "--model.ttt.decay", "1", "--model.ttt.target", "input_embed"]
RIDGE = ["--model.ttt.write", "ridge", "--model.ttt.decay", "0.9"]


@pytest.mark.parametrize(
    ("words", "T", "steps", "apart"),
    [
        pytest.param(SUM, 256, 12, 2, id="sum"),
        pytest.param(
            [*SUM, "--model.ttt.proj", "true"], 256, 12, 2, id="W_target", marks=pytest.mark.slow
        ),
        pytest.param(RIDGE, 512, 30, 4, id="ridge", marks=pytest.mark.slow),
    ],
)
def test_one_setting_serves_every_row_chunk_and_width(words, T, steps, apart):
    """Rows, widths and chunks of half and twice the size. `apart`: by what factor rows and chunks
    may differ (without the row in the rule it would be 4 with `sum`). Over widths the rule is
    half right: they differ by 4.4 (docs/writes.md).
    """
    found, base, widths = {}, (64, T, 16), [(32, T, 16), (128, T, 16)]
    rows_and_chunks = [base, (64, T // 2, 16), (64, 2 * T, 16), (64, T, 8)]
    for shape in (*rows_and_chunks, *widths):
        found[shape] = ratios(of_shape(*shape, *words), steps)[-4:].mean()
        assert LOW / 2 < found[shape] < HIGH, shape
    assert max(found.values()) < 6 * min(found.values()), found
    same_width = [found[shape] for shape in rows_and_chunks]
    assert max(same_width) < apart * min(same_width), found


@pytest.mark.parametrize("preset", FROM_SCRATCH)
def test_no_preset_explodes_or_stays_away(preset):
    ratio = ratios(narrow(preset, 32, 8), 40)
    assert ratio.shape[1] == len(load_config(preset).model.ttt.layers)
    assert ratio.max() < HIGH
    assert ratio[-6:].mean() > LOW


@pytest.mark.slow
@pytest.mark.parametrize("preset", FROM_SCRATCH)
def test_no_preset_explodes_in_a_longer_run(preset):
    ratio = ratios(narrow(preset, 48, 16), 120)
    assert ratio.max() < HIGH
    assert ratio[40:].mean(axis=1).min() > LOW
