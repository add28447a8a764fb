"""Whole programs compile for an H100 that is not there, kernels included: needs the libraries of
jax[cuda13], no GPU.

What `benchmarks/gpu_traffic.py` says about them is checked against what it must say.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.launches import copied_bytes, launches

pytestmark = [
    pytest.mark.gpu_aot,
    pytest.mark.skipif(
        find_spec("jax_cuda13_plugin") is None,
        reason="jax[cuda13] is not installed: pip install -e '.[gpu]'",
    ),
]
SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_traffic.py"


def python(*words: str) -> str:
    """What it prints, in a process of its own: this one was started for CPUs (conftest.py)."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "JAX_PLATFORMS")
    }
    command = [sys.executable, *words]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def compiled(*words: str) -> dict[str, dict[str, float]]:
    """GiB of temporaries and arguments and GB of passes, TTT off and on."""
    printed = python(str(SCRIPT), "--chunk", "1024", *words)
    number = r"([\d.]+)"
    line = rf"TTT (\w+): temporaries {number} GiB, arguments {number} GiB; passes {number} GB"
    names = "temporaries", "arguments", "passes"
    return {
        ttt: dict(zip(names, map(float, rest), strict=True))
        for ttt, *rest in re.findall(line, printed)
    }


def test_a_training_step():
    """Qwen3-1.7B, 4 x 8192: the H100 itself had a peak of 36.2 GiB without TTT and 42.6 with it,
    before layers were scanned in place. The state of two moments and a parameter in float32 is 19.2
    GiB.
    """
    found = compiled(
        "--preset", "qwen3_1p7b", "--seq", "8192", "--batch", "4", "--model.ttt.implementation=xla"
    )
    off, on = found["off"], found["on"]
    assert off["arguments"] == pytest.approx(19.23, abs=0.02)
    assert off["temporaries"] < 17
    assert on["temporaries"] < off["temporaries"] + 2.5
    assert off["passes"] < 475
    assert on["passes"] < 1.25 * off["passes"]


def test_a_training_step_with_kernels():
    """The Mosaic kernels compile inside of it, and what XLA does around them is little. A sweep's
    states, 0.75 GiB, cost 2.0 GiB of it: with a quarter of them a stretch, temporaries are 3.0 GiB
    more than without TTT.
    """
    words = "--preset", "qwen3_1p7b", "--seq", "8192", "--batch", "4"
    found = compiled(*words)  # what None chooses
    assert found["on"]["passes"] < 1.08 * found["off"]["passes"]
    assert found["on"]["temporaries"] < found["off"]["temporaries"] + 5.25


@pytest.mark.parametrize("implementation", ["xla", "pallas_gpu"])
def test_a_prefill(implementation):
    words = (
        "--preset",
        "qwen3_4b_longct_128k",
        "--prefill",
        "8192",
        f"--model.ttt.implementation={implementation}",
    )
    found = compiled(*words)
    assert found["off"]["arguments"] == pytest.approx(7.49, abs=0.02)  # parameters in bfloat16
    assert (
        found["on"]["passes"] < (1.6 if implementation == "xla" else 1.2) * found["off"]["passes"]
    )


@pytest.mark.parametrize("implementation", [None, "pallas_gpu"])
def test_eight_gpus(implementation):
    """Qwen3-4B, 8 rows of 32k tokens, FSDP: what `ttt-jax plan` estimates is 36.1 GB a GPU.
    Kernels, by name, run in a `shard_map`.
    """
    words = (
        "--preset",
        "qwen3_4b_longct_32k",
        "--seq",
        "32768",
        "--batch",
        "8",
        "--devices",
        "8",
        "--only",
        "on",
    )
    found = compiled(
        *words, *([f"--model.ttt.implementation={implementation}"] if implementation else [])
    )["on"]
    total = (found["temporaries"] + found["arguments"]) * 2**30 / 1e9
    assert total == pytest.approx(36.1, rel=0.1)
    assert (found["passes"] < 850) == (implementation is not None)


OP = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/benchmarks"]
import gpu_traffic, jax, numpy as np, op
from jax.sharding import Mesh, NamedSharding, PartitionSpec
whole = NamedSharding(Mesh(np.array(gpu_traffic.devices(1)), ("x",)), PartitionSpec())
case = op.Case(1, {T}, 2560, 9728, {C}, False)
arrays = jax.eval_shape(lambda: op.inputs.__wrapped__(*case[:4]))
arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in arrays]
for function in op.functions("pallas_gpu", case):
    traced = jax.jit(function).trace(*arrays)
    compiled = traced.lower(lowering_platforms=("cuda",)).compile(gpu_traffic.OPTIONS)
    print("temporaries", compiled.memory_analysis().temp_size_in_bytes / 2**30)
"""


@pytest.mark.parametrize(
    ("C", "T", "most"), [(1024, 32768, 0.5), (1024, 131072, 0.5), (512, 65536, 0.6)]
)
def test_what_the_op_needs_beside_its_results(C, T, most):
    """4B shapes: at most 0.5 GiB, forward and with the backward, at any length; a little more in
    blocks of chunks.
    """
    printed = python("-c", OP.format(root=str(SCRIPT.parent.parent), C=C, T=T))
    found = [
        float(line.split()[1]) for line in printed.splitlines() if line.startswith("temporaries")
    ]
    assert len(found) == 2
    assert 0.1 < max(found) < most


WRITE = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/benchmarks"]
import gpu_traffic, jax
from jax.sharding import NamedSharding, PartitionSpec as P
from ttt_jax.config import MeshConfig
from ttt_jax.ops.ttt.writes import transformed
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.parallel.shard_mapped import Parallel
mesh = make_mesh(MeshConfig(context=2, fsdp=2, data=1), gpu_traffic.devices(4))
split = NamedSharding(mesh, P("fsdp", "context"))
arrays = [jax.ShapeDtypeStruct((4, 6 * 256, x), "bfloat16", sharding=split) for x in (512, 256)]
devices = Parallel(mesh)
write = lambda z, v: transformed("ridge", z, v, 256, over_chunks=devices.over_chunks)
loss = lambda z, v: write(z, v).astype("float32").sum()
traced = jax.jit(jax.grad(loss, (0, 1))).trace(*arrays)
program = traced.lower(lowering_platforms=("cuda",)).compile(gpu_traffic.OPTIONS).as_text()
lines = [line.partition("backend_config")[0] for line in program.splitlines()]
print("roots", [line for line in lines if "gpu.triton" in line])
print("products", len([line for line in lines if "mosaic_gpu" in line]))
print("collectives", [line for line in lines if " all-" in line or " collective-" in line])
"""


def test_each_gpu_of_a_mesh_runs_the_kernels_of_ridge_writes():
    """On its own 2 x 3 chunks, without communication."""
    printed = python("-c", WRITE.format(root=str(SCRIPT.parent.parent)))
    assert "bf16[6,256,256]" in printed
    assert "products 6" in printed
    assert "collectives []" in printed


LAUNCHES = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/benchmarks"]
import gpu_traffic, jax, jax.numpy as jnp, numpy as np, op
from jax.sharding import Mesh, NamedSharding, PartitionSpec
name, dump, *words = {words!r}
devices = gpu_traffic.devices(1)
whole = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec())
struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
array = lambda shape, dtype: struct(jax.ShapeDtypeStruct(shape, dtype))

def books(*words):
    words = "--model.num_layers=4", "--model.ttt.layers=[1,3]", *words
    return gpu_traffic.load_start_config(gpu_traffic.ROOT / "configs/books.yaml", words)

def read(*words):
    config = books(*words).model
    runtime = gpu_traffic.Runtime(dtype="bfloat16")
    make = lambda: gpu_traffic.Transformer(config, runtime, key=jax.random.key(0))
    model = jax.tree.map(lambda x: array(x.shape, jnp.bfloat16), jax.eval_shape(make))
    leaves, tree = jax.tree.flatten(model)
    options = dict(capacity=None, at_chunk_start=True, ttt=True)
    read_piece = gpu_traffic.reading.read_piece.__wrapped__
    piece = lambda leaves, state, *arrays: read_piece(
        jax.tree.unflatten(tree, leaves), state, *arrays, **options
    )
    arrays = [((2, config.vocab_size), jnp.float32), ((2, 1024), jnp.int32), ((2,), jnp.int32)]
    arrays = [array(*x) for x in arrays]
    first = jax.tree.map(struct, jax.eval_shape(piece, leaves, None, *arrays)[0])
    return jax.jit(piece, donate_argnums=1).trace(leaves, first, *arrays)

def train(*words):
    return gpu_traffic.train_step(books(*words), devices, packed=True)

def both(*words):
    case = op.Case(1, 16384, 2560, 9728, 512, True)
    arrays = jax.tree.map(struct, jax.eval_shape(lambda: op.inputs.__wrapped__(*case[:4])))
    return jax.jit(op.functions("pallas_gpu", case)[1]).trace(*arrays)

lowered = globals()[name](*words).lower(lowering_platforms=("cuda",))
options = dict(xla_dump_to=dump, xla_dump_hlo_as_text=True)
lowered.compile(gpu_traffic.OPTIONS | options)
"""


@pytest.mark.parametrize(
    ("words", "in_place", "copies"),
    [
        (("read",), 2, 1),
        (("read", "--model.ttt.apply=fused"), 2, 1),
        (("train", "--data.batch_size=2"), 5, 1),
        (("both",), 12, 3),
    ],
    ids=["read", "read-fused", "train", "op"],
)
def test_launches_update_their_arrays_in_place(words, in_place, copies, tmp_path):
    """A launch inside of a fusion has lost that its results are its operands: with jax 0.11.2 the
    slice of a layer's state and the launch became one, and S stayed zero. States are copied once a
    layer where something keeps them, or for the stack of a scan, not once a chunk.
    """
    root = str(SCRIPT.parents[1])
    python("-c", LAUNCHES.format(root=root, words=[words[0], str(tmp_path), *words[1:]]))
    found = launches(tmp_path)
    assert found.lost == []
    assert found.in_place == in_place
    states = {"read": 2 * 2, "train": 2 * 2, "both": 1}[words[0]]  # layers, rows
    shape, size = ("2560,9728", 2560 * 9728) if words[0] == "both" else ("768,2048", 768 * 2048)
    assert copied_bytes(tmp_path, f"{shape}]") <= copies * states * 4 * size
