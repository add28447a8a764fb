"""The TPU kernel compiles for real TPUs at real sizes: libtpu compiles ahead of time, no TPU is
needed (and nothing runs).

A kernel that needs more VMEM than it asked for is refused by Mosaic, so this test also checks the
choice of tiles.
"""

import json
from importlib.util import find_spec

import pytest
from support.aot import compile_in_a_process

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(
        find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[tpu]'"
    ),
]

SWEEPS = ["ttt_forward", "ttt_replay", "ttt_reverse_dv", "ttt_reverse_dz"]
QWEN3 = {"0.6B": (1024, 3072), "4B": (2560, 9728), "8B": (4096, 12288)}

SCRIPT = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from ttt_jax.kernels_pallas import tpu
from ttt_jax.ops import in_place_ttt

topology, dtype, B, T, D, F, C, devices, vmem = json.loads(sys.argv[1])
names = sys.argv[2].split(",")
found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:devices]
mesh = Mesh(np.array(found), ("batch",), axis_types=(AxisType.Auto,))
rows, whole = P("batch"), P()
if vmem:  # what the kernels are told they may use; it is not what the core has
    tpu._core = lambda: tpu.Core(vmem_bytes=vmem)

def op(z, v, w, lr, state, segment_ids):
    # No implementation is named: the mesh says that this is for TPU, and shard_map that nothing
    # is left to partition.
    return in_place_ttt(z, v, w, lr=lr, chunk_size=C, state=state, segment_ids=segment_ids)

def struct(shape, dtype, spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

f32 = jnp.float32
args = [struct(s, dtype, p) for s, p in (((B, T, F), rows), ((B, T, D), rows), ((D, F), whole))]
args += [struct((), f32, whole), struct((B, D, F), f32, rows), struct((B, T), jnp.int32, rows)]
cotangents = struct((B, T, D), dtype, rows), struct((B, D, F), f32, rows)
op = jax.shard_map(op, mesh=mesh, in_specs=(rows, rows, whole, whole, rows, rows), out_specs=rows)

def both(args, cotangents):
    out, vjp = jax.vjp(lambda *a: op(*a, args[-1]), *args[:-1])
    return out, vjp(cotangents)

report = {}
for name, function, inputs in (("forward", op, args), ("both", both, (args, cotangents))):
    if name in names:
        compiled = jax.jit(function).lower(*inputs).compile()
        sweep = r"ttt_(?:forward|replay|reverse_dv|reverse_dz)"
        kernels = sorted(set(re.findall(sweep, compiled.as_text())))
        calls = compiled.as_text().count('custom_call_target="tpu_custom_call"')
        temp = compiled.memory_analysis().temp_size_in_bytes
        report[name] = {"kernels": kernels, "calls": calls, "temp": temp}
print("REPORT", json.dumps(report))
"""


def compile_op(
    topology,
    D,
    F,
    *,
    dtype="bfloat16",
    B=1,
    T=8192,
    C=1024,
    devices=1,
    vmem=None,
    names="forward,both",
):
    return compile_in_a_process(
        SCRIPT, json.dumps([topology, dtype, B, T, D, F, C, devices, vmem]), names
    )


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("size", QWEN3)
def test_forward_and_backward_compile(topology, size):
    report = compile_op(topology, *QWEN3[size])
    assert report["forward"] | {"temp": 0} == {"kernels": ["ttt_forward"], "calls": 1, "temp": 0}
    assert report["both"] | {"temp": 0} == {"kernels": SWEEPS, "calls": 4, "temp": 0}


@pytest.mark.parametrize(
    ("D", "F", "options"),
    [
        (2560, 9728, {"dtype": "float32"}),
        (2560, 9728, {"C": 4096, "T": 16384}),
        (2560, 9728, {"C": 2048, "T": 8192 + 100, "B": 2}),  # ragged
        (576, 1536, {"C": 500, "T": 1700, "B": 2}),  # nothing fills a tile
        (1024, 3072, {"C": 16, "T": 64}),
        (1024, 3072, {"B": 4, "devices": 4}),
        (2560, 9728, {"vmem": 64 * 2**20}),  # as on v5p and v7x
    ],
    ids=str,
)
def test_other_sizes_compile(D, F, options):
    report = compile_op("v5e:2x2", D, F, names="both", **options)
    assert report["both"] | {"temp": 0} == {"kernels": SWEEPS, "calls": 4, "temp": 0}


def test_memory_does_not_grow_with_the_number_of_chunks():
    short, long = (
        compile_op("v6e:2x2", 1024, 3072, T=T, names="both")["both"]["temp"] for T in (8192, 65536)
    )
    # v without the tail, say: nothing that holds one state per chunk (12 MiB each)
    per_token = 2 * (1024 + 3072)
    assert long - short <= (65536 - 8192) * per_token, (short, long)


def test_too_little_vmem_is_an_error():
    """Told of more VMEM than a core has, the kernels take tiles that do not fit: the tests above
    can fail.
    """
    with pytest.raises(AssertionError, match="Exceeded vmem capacity"):
        compile_op("v5p:2x2x1", 2560, 9728, vmem=120 * 2**20, names="both")
