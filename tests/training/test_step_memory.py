"""What `remat_save: auto` keeps, by the estimate of a step's memory."""

import jax
import pytest

from ttt_jax.config import REMAT_NAMES, Config, from_dict, replace
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.plan.gpu import estimate
from ttt_jax.plan.topology import parse_topology
from ttt_jax.training import step_memory
from ttt_jax.training.step import abstract_state, runtime_of

MODEL = {
    "d_model": 32,
    "num_layers": 4,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "d_ff": 96,
    "ttt": {"layers": [1], "chunk_size": 16},
}
OPEN = from_dict(
    Config, {"model": MODEL, "data": {"seq_len": 64, "batch_size": 8}, "remat_save": "auto"}
)
LEAST, SOME, MOST = (
    ("attention", "ttt_target"),
    ("attention", "mlp_gate", "mlp_up", "ttt_target"),
    ("attention", "qkv", "attention_out", "mlp_gate", "mlp_up", "ttt_target"),
)


def needs(names):
    """Bytes of the step, by the plan's estimate."""
    config = replace(OPEN, {"remat_save": names})
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state, _ = abstract_state(config, mesh)
    sizes = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
    return sum(step_memory.step_bytes(config, sizes, state).values())


def kept(memory, config=OPEN):
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    config, lines = step_memory.keep_what_fits(config, mesh, memory)
    return config.remat_save, lines


@pytest.mark.parametrize("names", [LEAST, SOME, MOST], ids=["least", "some", "most"])
def test_the_largest_list_that_fits(names):
    enough = needs(names) / step_memory._USABLE
    found, (line,) = kept(1.001 * enough)
    assert found == names
    assert ", ".join(names) in line
    assert "on each device" in line
    if names != LEAST:
        assert kept(0.999 * enough)[0] != names


def test_where_nothing_fits_or_the_memory_is_not_known_the_least_is_kept():
    assert kept(1.0)[0] == LEAST
    found, (line,) = kept(None)
    assert found == LEAST
    assert "does not say how much memory" in line


def test_what_is_written_stays():
    for names in ((), ("qkv",), REMAT_NAMES, None):
        config = replace(OPEN, {"remat_save": names})
        assert kept(1e15, config) == (names, [])
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        assert step_memory.settled_remat(config, mesh) is config


def test_the_devices_at_hand_are_asked_and_it_is_said(monkeypatch, capsys):
    mesh = make_mesh(OPEN.mesh, jax.devices()[:1])
    monkeypatch.setattr(step_memory, "device_memory_limit", lambda: 1e15)
    assert step_memory.settled_remat(OPEN, mesh).remat_save == MOST
    assert "remat_save: auto keeps attention, qkv" in capsys.readouterr().out


def test_nothing_is_computed_before_it_is_settled():
    with pytest.raises(ValueError, match="remat_save is open"):
        runtime_of(OPEN)


def test_a_plan_says_what_is_kept():
    plan = estimate(replace(OPEN, {"compute_dtype": "bfloat16"}), parse_topology("h100:8"))
    (note,) = (line for line in plan.notes if "remat_save" in line)
    assert f"auto keeps {', '.join(MOST)}" in note
    least = estimate(replace(OPEN, {"remat_save": LEAST}), parse_topology("h100:8"))
    assert plan.bytes_by_kind["kept activations"] > least.bytes_by_kind["kept activations"]


@pytest.mark.parametrize("apply", ["split", "fused"])
def test_without_loops_more_is_kept(apply):
    config = replace(OPEN, {"unroll_layers": True, "model.ttt.apply": apply})
    found, (line,) = kept(1e15, config)
    states = ["ttt_states"] if apply == "fused" else []
    assert found == ("attention", "mlp_gate", "mlp_up", "mlp_hidden", "ttt_target", *states)
    assert ", ".join(found) in line
    assert kept(1.0, config)[0] == LEAST
