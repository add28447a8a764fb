"""The JSON lines are exact and continue seamlessly; sinks that are missing; counts of
operations.
"""

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ttt_jax.config import Config, LogConfig, ModelConfig, TTTConfig
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.flops import device_memory_bytes, model_flops_per_token, peak_flops
from ttt_jax.run.metrics import MetricsLogger, read_metrics

QUIET = Config(log=LogConfig(tensorboard=False))


def curve(step):
    return {"loss": float(np.float32(1 / (step + 1))), "ttt/layer_03/state_ratio": 0.1 * step}


def write(run_dir, steps, start_step=0, config=QUIET, **options):
    with MetricsLogger(
        config, run_dir, total_steps=100, start_step=start_step, **options
    ) as logger:
        for step in steps:
            logger.log(step, curve(step))


# --------------------------------------------------------------------------------------- JSON lines


def test_floats_survive_bit_for_bit(tmp_path):
    values = {"a": 0.1 + 0.2, "b": float(np.float32(1 / 3)), "c": 1e-320, "d": -0.0, "e/f": 2.0**70}
    with MetricsLogger(QUIET, tmp_path, total_steps=10, start_step=0) as logger:
        logger.log(3, values)
        logger.log(4, {"a": math.nan, "b": -math.inf})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    assert row.pop("step") == 3
    assert {key: value.hex() for key, value in row.items()} == {
        key: value.hex() for key, value in values.items()
    }
    assert lines[1] == '{"step": 4, "a": null, "b": null}'  # JSON has no NaN


def test_resuming_gives_the_file_of_an_uninterrupted_run(tmp_path):
    write(tmp_path / "whole", range(10, 101, 10))
    # killed after step 80, its checkpoint is of step 50,
    write(tmp_path / "parts", range(10, 81, 10))
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 90, "lo')  # in the middle of a line
    write(tmp_path / "parts", range(60, 101, 10), start_step=50)
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_bytes()
    assert read_metrics(tmp_path / "parts" / "metrics.jsonl")[4] == {"step": 50, **curve(50)}
    write(tmp_path / "each", range(1, 8))
    write(tmp_path / "each", [], start_step=4)  # the step after the checkpoint's is taken again
    assert [row["step"] for row in read_metrics(tmp_path / "each" / "metrics.jsonl")] == [
        1,
        2,
        3,
        4,
    ]
    write(tmp_path / "parts", [10], start_step=0)  # killed before the first checkpoint: all anew
    assert [row["step"] for row in read_metrics(tmp_path / "parts" / "metrics.jsonl")] == [10]


def test_damaged_file_is_not_overwritten(tmp_path):
    text = '{"step": 1}\nnonsense\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(
        CheckpointError, match=r"metrics\.jsonl, line 2: not a JSON object with a step"
    ) as error:
        write(tmp_path, [3], start_step=2)
    assert "\n" not in str(error.value)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_other_processes_write_nothing(tmp_path, capsys):
    with MetricsLogger(
        Config(), tmp_path / "run", total_steps=10, start_step=0, enabled=False
    ) as logger:
        logger.log(1, curve(1))
        logger.advance(2)
        logger.message("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


# -------------------------------------------------------------------------------------- other sinks


def test_plain_lines_when_not_a_terminal(tmp_path, capsys):
    with MetricsLogger(QUIET, tmp_path, total_steps=20, start_step=0) as logger:
        scalars = {
            "loss": 2.5,
            "grad_norm": 0.25,
            "tokens_per_second": 12345.6,
            "mfu": 0.314,
            "ttt/x": 1.0,
        }
        logger.log(10, scalars)
        logger.advance(11)
        logger.message("checkpoint [10] saved")
        logger.log(20, {"heldout/ttt_on": 1.0})
    expected = (
        "step 10/20  loss 2.5000  grad norm 0.250  12,346 tok/s  MFU 31.4%\ncheckpoint [10] saved\n"
    )
    assert capsys.readouterr().out == expected


def test_progress_display_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with MetricsLogger(QUIET, tmp_path, total_steps=20, start_step=0) as logger:
        logger.log(
            10,
            {
                "loss": 2.5,
                "grad_norm": 0.25,
                "learning_rate": 3e-4,
                "tokens_per_second": 1e6,
                "mfu": 0.5,
            },
        )
        logger.message("checkpoint [10] saved")
        logger.advance(20)
    out = capsys.readouterr().out
    assert "checkpoint [10] saved" in out
    assert "20/20" in out
    assert "loss 2.5000  grad norm 0.250  lr 3.00e-04  1,000,000 tok/s  MFU 50.0%" in out


def test_tensorboard(tmp_path):
    write(tmp_path, [10, 20], config=Config())
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"ttt/layer_03/state_ratio" in events


@pytest.mark.parametrize(
    ("package", "log", "message"),
    [
        (
            "tensorboardX",
            LogConfig(),
            "config field log.tensorboard = true: tensorboardX is missing; pip install",
        ),
        (
            "wandb",
            LogConfig(tensorboard=False, wandb="p"),
            "config field log.wandb = p: wandb is not installed; pip install 'ttt-jax[wandb]'",
        ),
    ],
)
def test_missing_sink(tmp_path, monkeypatch, package, log, message):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as error:
        write(tmp_path, [], config=Config(log=log))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    write(tmp_path, [1])  # neither is imported unless it is asked for


def test_wandb(tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(
        log=lambda *a, **k: calls.append((a, k)), finish=lambda **k: calls.append(k)
    )
    fake = SimpleNamespace(init=lambda **k: calls.append(k["id"]) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = Config(log=LogConfig(tensorboard=False, wandb="p"))
    write(tmp_path, [10], config=config)
    write(tmp_path, [], config=config, start_step=10)
    assert calls[1:3] == [((curve(10),), {"step": 10}), {"exit_code": 0}]
    assert calls[0] == calls[3]  # the same run is continued


# --------------------------------------------------------------------------------------- arithmetic


def test_flops_by_counting_products():
    """Each matrix once, by its shape, against the closed form; attention by summing over
    queries.
    """
    ttt = TTTConfig(layers=(1,), chunk_size=16)
    model = ModelConfig(
        vocab_size=100,
        d_model=24,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_ff=40,
        sliding_window=10,
        full_attention_layers=(2,),
        ttt=ttt,
    )
    T, D, F, heads, kv = 64, 24, 40, 32, 16
    matrices = 3 * (D * heads + 2 * D * kv + heads * D + 3 * D * F) + D * 100
    matrices += F * D + 5 * D + D * D  # the TTT layer's update, convolution and W_target
    keys = [sum(min(t + 1, window) for t in range(T)) / T for window in (10, 10, T)]
    expected = 2 * matrices + sum(2 * 2 * heads * count for count in keys)
    assert model_flops_per_token(model, T, training=False) == pytest.approx(expected, rel=1e-12)
    assert model_flops_per_token(model, T, training=True) == pytest.approx(3 * expected, rel=1e-12)
    # Prediction errors: the output with S = 0, logits, and their mean row; nothing comes back.
    errors = dataclasses.replace(model, ttt=dataclasses.replace(ttt, target="prediction_error"))
    more = 2 * (F * D + 2 * D * 100)
    for training, times in ((False, 1), (True, 3)):
        flops = model_flops_per_token(errors, T, training=training)
        assert flops == pytest.approx(times * expected + more, rel=1e-12)


def test_flops_of_a_large_model_are_about_6n():
    model = ModelConfig(
        vocab_size=151_936,
        d_model=2560,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        d_ff=9728,
    )
    assert model_flops_per_token(model, 1024, training=True) == pytest.approx(6 * 4.02e9, rel=0.05)


def test_peak_flops_and_memory():
    peak = lambda kind: peak_flops(SimpleNamespace(device_kind=kind))
    known = {
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5p": 459e12,
        "TPU v5": 459e12,
        "TPU v6 lite": 918e12,
        "NVIDIA H100 80GB HBM3": 989.4e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989.4e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA GB200": 2500e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40S": 362e12,
    }
    assert {kind: peak(kind) for kind in known} == known
    assert peak("cpu") is None
    assert device_memory_bytes() is None  # the CPU keeps no count
