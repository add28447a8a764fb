"""Plans for TPUs: libtpu's words, meshes on a torus and over slices, and real compiles."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from support.aot import TINY

from ttt_jax.config import MeshConfig
from ttt_jax.errors import UserError
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.plan.tpu import out_of_memory

ROOT = Path(__file__).resolve().parents[2]
QWEN3_8B = str(ROOT / "configs/qwen3_8b_longct.yaml")


def test_both_ways_in_which_libtpu_says_that_memory_is_short():
    whole = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm. "
        "Exceeded by 4.75G."
    )
    assert out_of_memory(whole, 1e9) == (20.5 * 2**30, 15.75 * 2**30)
    far = (
        "E1000: the total memory required for HLO temporaries (130.69G) exceeds available HBM "
        "(15.75G). HLO module: step."
    )
    assert out_of_memory(far, 1e9) == (130.69 * 2**30 + 1e9, 15.75 * 2**30)
    assert out_of_memory("INVALID_ARGUMENT: Mosaic failed", 1e9) is None


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a TPU as laying out a mesh asks for."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"


def chips(shape, slices=1):
    grid = list(np.ndindex(*shape))
    return [Chip(s * len(grid) + i, c, s) for s in range(slices) for i, c in enumerate(grid)]


def test_a_mesh_may_split_an_axis_of_the_torus():
    """8 x 8 on 4 x 4 x 4: `jax.make_mesh` refuses this on v5p and v6e."""
    config = MeshConfig(fsdp=8, context=8)
    mesh = make_mesh(config, chips((4, 4, 4)))
    assert mesh.devices.shape == (1, 8, 8, 1)
    assert len({device.id for device in mesh.devices.flat}) == 64


def test_slices_lie_on_the_data_axis():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, context=2), chips((2, 2, 1), slices=2))
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(UserError, match="multiple of the 2 TPU slices"):
        make_mesh(MeshConfig(context=2), chips((2, 2, 1), slices=2))


# ---------------------------------------------------------------------------------------- real TPUs

tpu = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(
        find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[tpu]'"
    ),
]


def plan_json(config, topology, *words, timeout):
    """The command in a process of its own: libtpu reads its environment once."""
    command = [
        sys.executable,
        "-m",
        "ttt_jax",
        "plan",
        "--config",
        str(config),
        "--topology",
        topology,
        "--json",
        *words,
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    plan = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(plan))  # `pytest -rP` shows it: the figures are why one waits for these tests
    assert plan["fits"] == (done.returncode == 0)
    return plan


MESHED = [*TINY, "--model.sliding_window=null", "--mesh.context=2", "--mesh.tensor=2"]


@pytest.mark.parametrize(
    "program", [pytest.param("train", marks=tpu), pytest.param("prefill", marks=tpu)]
)
def test_a_tiny_model_on_every_axis(program):
    words = ["--prefill=2048"] if program == "prefill" else []
    plan = plan_json(ROOT / "configs/default.yaml", "v5e:2x4", *MESHED, *words, timeout=600)
    assert plan["compiled"]
    assert plan["mesh"] == {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}
    assert plan["fits"]
    assert plan["bytes_by_kind"]["temporaries"] > 0
    assert {"all-gather", "all-reduce"} <= set(plan["collectives"])
    assert plan["loops_of_unknown_length"] == 0


@pytest.mark.tpu_aot
@pytest.mark.skipif(
    find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[tpu]'"
)
def test_qwen3_8b_at_128k_fits_a_v5p_128():
    """Minutes. 64 chips of 95 GB; packed rows, float32 master weights. It took 55 GB while masks
    were kept.
    """
    words = [
        "--data.seq_len=131072",
        "--model.max_positions=131072",
        "--data.batch_size=8",
        "--optimizer.accumulate=1",
        "--remat_save=[attention,ttt_target]",
    ]
    plan = plan_json(QWEN3_8B, "v5p:4x4x4", *words, "--mesh.context=8", timeout=2400)
    assert plan["mesh"] == {"data": 1, "fsdp": 8, "context": 8, "tensor": 1}
    assert plan["fits"]
    assert plan["total"] < 40e9
    # Parameters and two moments, float32, over all 64 chips.
    stored = plan["bytes_by_kind"]["parameters"] + plan["bytes_by_kind"]["optimizer state"]
    assert stored == pytest.approx(3 * 4 * 8.29e9 / 64, rel=0.02)
    assert plan["loops_of_unknown_length"] == 0
    # All layers are counted: each gathers the keys and values of all tokens, in the forward and in
    # the backward pass.
    assert plan["collectives"]["all-gather"][1] >= 36 * 2 * 2 * 131072 * 8 * 128 * 2


@pytest.mark.tpu_aot
@pytest.mark.skipif(
    find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[tpu]'"
)
@pytest.mark.parametrize(
    ("words", "least"),
    [(["--decode=32768", "--rows=4"], 500), (["--prefill=8192"], 5_000)],
    ids=["decode", "prefill"],
)
def test_qwen3_8b_is_read_and_written_by_eight_v5e(words, least):
    """Minutes. 16 GB a chip, and the parameters alone have 16.4: heads, F and S over all eight."""
    mesh = ["--mesh.context=1", "--mesh.fsdp=1", "--mesh.tensor=8"]
    plan = plan_json(QWEN3_8B, "v5e:2x4", *words, *mesh, timeout=2400)
    assert plan["compiled"]
    assert plan["fits"]
    assert plan["total"] < 12e9
    # bfloat16, over eight chips; W_target of the six TTT layers is whole on each
    stored = 2 * (8.19e9 / 8 + 6 * 4096**2)
    assert plan["bytes_by_kind"]["parameters"] == pytest.approx(stored, rel=0.02)
    # Activations are summed over the chips; no parameter and no S is sent.
    assert plan["collectives"].get("all-gather", (0, 0))[1] < 50e6
    assert plan["loops_of_unknown_length"] == 0
    assert least < plan["roofline"]["tokens_per_second"] < 100 * least
