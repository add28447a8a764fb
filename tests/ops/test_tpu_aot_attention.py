"""Splash attention compiles for real TPUs at real sizes, alone and in a whole training step.
Nothing runs.
"""

import json
from importlib.util import find_spec

import pytest
from support.aot import TINY, compile_in_a_process

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(
        find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[tpu]'"
    ),
]

ATTENTION = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from ttt_jax.ops.attention.api import self_attention

topology, B, T, N, K, H, window, packed = json.loads(sys.argv[1])
device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:1]
mesh = Mesh(np.array(device), ("x",), axis_types=(AxisType.Auto,))

def both(q, k, v, ids, do):
    # No implementation is named: the mesh says that this is for TPU.
    segments = ids if packed else None
    attend = lambda q, k, v: self_attention(q, k, v, window=window, segment_ids_BT=segments)
    o, vjp = jax.vjp(attend, q, k, v)
    return o, vjp(do)

def struct(shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

args = [struct((B, T, heads, H)) for heads in (N, K, K)]
args += [struct((B, T), jnp.int32), struct((B, T, N, H))]
mapped = jax.shard_map(both, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
compiled = jax.jit(mapped).lower(*args).compile()
calls = compiled.as_text().count('custom_call_target="tpu_custom_call"')
print("REPORT", json.dumps({"calls": calls}))
"""

STEP = """
import json, re, sys
from ttt_jax.plan.topology import parse_topology
from ttt_jax.plan.tpu import prepare_environment
prepare_environment()
from ttt_jax.config import load_config
from ttt_jax.plan.work import abstract_batch
from ttt_jax.plan.tpu import tpu_devices
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.training.step import abstract_state, make_train_step

config = load_config("configs/default.yaml", sys.argv[2:])
mesh = make_mesh(config.mesh, tpu_devices(parse_topology(sys.argv[1])))
state, tx = abstract_state(config, mesh)
lowered = make_train_step(config, tx).lower(state, abstract_batch(config, mesh))
kernels = sorted(set(re.findall(r"splash_mha_(fwd|dq|dkv)", lowered.as_text())))
memory = lowered.compile().memory_analysis()
print("REPORT", json.dumps({"kernels": kernels, "temp": memory.temp_size_in_bytes}))
"""


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize(
    ("B", "T", "N", "K", "H", "window", "packed"),
    [
        (2, 8192, 16, 8, 128, None, True),
        (2, 8192, 16, 8, 64, 2048, True),
        (1, 5000, 9, 3, 64, None, False),  # ragged
        (1, 131072, 32, 8, 128, None, True),
        (1, 262144, 8, 2, 128, None, True),  # LONGEST
    ],
)
def test_attention_compiles(topology, B, T, N, K, H, window, packed):
    report = compile_in_a_process(ATTENTION, json.dumps([topology, B, T, N, K, H, window, packed]))
    assert report["calls"] == 3  # forward, dq, dkv


@pytest.mark.parametrize(
    "mesh", [[], ["--mesh.context=2", "--mesh.tensor=2"]], ids=["fsdp", "every axis"]
)
@pytest.mark.parametrize("window", ["null", "256"])
def test_a_training_step_compiles(mesh, window):
    report = compile_in_a_process(
        STEP,
        "v5e:2x4",
        *TINY,
        "--remat_save=[attention]",
        f"--model.sliding_window={window}",
        "--mesh.fsdp=-1",
        *mesh,
    )
    assert report["kernels"] == ["dkv", "dq", "fwd"]
    assert report["temp"] > 0
