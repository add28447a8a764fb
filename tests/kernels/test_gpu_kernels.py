"""The GPU kernels without a GPU: table of tiles, lowering for CUDA, refusals, and (slow) the Mosaic
kernels in the interpreter.

On a device they are checked by tests/gpu.
"""

import contextlib
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.op_checks import BF16, DOCUMENTS, F32, check, make_inputs

from ttt_jax.errors import UserError
from ttt_jax.kernels_pallas import gpu, gpu_schedule, gpu_sweep, triton
from ttt_jax.kernels_pallas.gpu_launch import launch_p
from ttt_jax.ops import in_place_ttt
from ttt_jax.ops.ttt.chunk_blocks import in_blocks

SIZES = {"D": 256, "F": 512}  # one tile of 256 in a dimension, two in the other
HAS_INTERPRETER = hasattr(plgpu, "InterpretGPUParams")  # jax 0.11 and later


ONE = (gpu_schedule.ProductShape(1024, 2560, 9728),)
TWO = (*ONE, gpu_schedule.ProductShape(1024, 9728, 2560))
SMALL = (gpu_schedule.ProductShape(256, 512, 256),)


@pytest.mark.parametrize("shapes", [ONE, TWO, SMALL])
@pytest.mark.parametrize(("B", "clusters"), [(1, 66), (32, 66), (3, 400)])
def test_every_tile_is_computed_once_and_the_work_is_even(shapes, B, clusters):
    table = gpu_schedule.schedule(shapes, B, clusters)
    taken = []
    for row in table:
        assert not row[1 + row[0, 0] :].any()
        taken.append([gpu_schedule.Tile(*map(int, tile)) for tile in row[1 : 1 + row[0, 0]]])
    every = {
        (k, b, m, n)
        for k, shape in enumerate(shapes)
        for b in range(B)
        for m in range(0, shape.rows, 256)
        for n in range(0, shape.columns, 256)
    }
    assert sorted(tile for queue in taken for tile in queue) == sorted(every)
    costs = [sum(shapes[tile.product].cost for tile in queue) for queue in taken]
    assert max(costs) <= min(costs) + max(shape.cost for shape in shapes)


def lowered(implementation, backward):
    T, C = 2 * 256 + 7, 256
    D, F = SIZES["D"], SIZES["F"]
    shapes = [(1, T, F), (1, T, D), (D, F)]
    z, v, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    run = {"pallas_gpu": gpu.in_place_ttt_gpu, "triton": triton.in_place_ttt_triton}[implementation]

    def forward(z, v, w):
        state_BDF, keep_BM = jnp.zeros((1, D, F)), jnp.ones((1, 3))
        o, S = run(z, v, w, lr=jnp.float32(1), chunk_size=C, state_BDF=state_BDF, keep_BM=keep_BM)
        return o.astype(jnp.float32).sum() + S.sum()

    function = jax.grad(forward, (0, 1, 2)) if backward else forward
    return jax.jit(function).trace(z, v, w).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_mosaic_lowers_for_cuda_without_a_gpu(backward):
    text = lowered("pallas_gpu", backward)
    # A sweep, and products with its states. A gradient alone needs no forward launch; of both
    # sweeps of the backward, the products are one launch.
    assert text.count("custom_call @mosaic_gpu") == (3 if backward else 2)
    # The state and the output are updated in place.
    assert "output_operand_alias" in text


def test_mosaic_launches_stand_apart_from_slices_of_stacks():
    """XLA's slice fusion would take the launch in, and write the new state where nobody reads it
    (`test_gpu_aot.test_launches_update_their_arrays_in_place` looks at compiled programs).
    """
    lines = lowered("pallas_gpu", backward=False).splitlines()
    launches = [n for n, line in enumerate(lines) if "custom_call @mosaic_gpu" in line]
    assert launches
    for n in launches:
        before = max(k for k in range(n) if "optimization_barrier" in lines[k])
        held = lines[before].split(" = ")[0].strip().split(":")[0]  # the name of what it returns
        operands = lines[n].partition("@mosaic_gpu")[2].partition("(")[2].partition(")")[0]
        assert {name.strip().split("#")[0] for name in operands.split(",")} == {held}
        assert "optimization_barrier" in lines[n + 1]


@pytest.mark.parametrize(("check_vma", "n"), [(False, 1), (True, 1), (True, 2)])
def test_mosaic_lowers_inside_a_shard_map(check_vma, n):
    """jax lets no ref vary over mesh axes; the launch is lowered as what it is, the program of one
    device.
    """
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(z, v, w):
        def run(z, v, w):
            state_BDF = jnp.zeros((1, 256, 512), jnp.float32)
            return in_blocks(
                gpu.in_place_ttt_gpu,
                n,
                z,
                v,
                w,
                lr=jnp.float32(1),
                chunk_size=256,
                state_BDF=state_BDF,
            )[0]

        specs = {
            "in_specs": (P("data"), P("data"), P()),
            "out_specs": P("data"),
            "check_vma": check_vma,
        }
        return jax.shard_map(run, mesh=mesh, **specs)(z, v, w).astype(jnp.float32).sum()

    place = lambda shape, spec: jax.ShapeDtypeStruct(
        shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)
    )
    arguments = (
        place((2, 600, 512), P("data")),
        place((2, 600, 256), P("data")),
        place((256, 512), P()),
    )
    text = (
        jax.jit(jax.grad(loss, (0, 1, 2)))
        .trace(*arguments)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    # XLA removes what is not read
    assert text.count("custom_call @mosaic_gpu") == (3 if n == 1 else 4)


def test_mosaic_lowers_in_a_scan_over_rematerialised_layers():
    """As training calls it. jax cannot take a kernel apart that holds refs; it must find a
    primitive.
    """
    z, v, w = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((1, 512, 512), (1, 512, 256), (256, 512))
    )

    def loss(z, v, w):
        def layer(v, _):
            run = functools.partial(
                gpu.in_place_ttt_gpu,
                lr=jnp.float32(1),
                chunk_size=256,
                state_BDF=jnp.zeros((1, 256, 512)),
            )
            return run(z, v, w)[0], None

        policy = jax.checkpoint_policies.save_only_these_names("none")
        return (
            jax.lax.scan(jax.checkpoint(layer, policy=policy), v, length=3)[0]
            .astype(jnp.float32)
            .sum()
        )

    text = (
        jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        .trace(z, v, w)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    assert text.count("custom_call @mosaic_gpu") >= 3


def test_a_vmapped_launch_runs_for_each():
    """Kernels under `jax.vmap`: a loop over launches. What it computes is tested with a launch that
    runs anywhere.
    """
    z, v, w = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((3, 1, 512, 512), (3, 1, 512, 256), (256, 512))
    )
    run = functools.partial(
        gpu.in_place_ttt_gpu, lr=jnp.float32(1), chunk_size=256, state_BDF=jnp.zeros((1, 256, 512))
    )
    function = jax.jit(jax.vmap(run, in_axes=(0, 0, None)))
    assert (
        function.trace(z, v, w)
        .lower(lowering_platforms=("cuda",))
        .as_text()
        .count("custom_call @mosaic_gpu")
        == 2  # a sweep and its products
    )
    program = lambda x, y: (x + 2 * y, y)
    launch = lambda x, y: launch_p.bind(x, y, launch=program, results=2)
    x_34, y_43 = jnp.arange(12.0).reshape(3, 4), jnp.arange(12.0).reshape(4, 3) ** 2
    with jax.disable_jit():  # the primitive itself is lowered for CUDA only
        both = jax.vmap(launch, in_axes=(0, 1))(x_34, y_43)
        one = jax.vmap(launch, in_axes=(None, 1))(x_34[0], y_43)
    np.testing.assert_array_equal(both[0], x_34 + 2 * y_43.T)
    np.testing.assert_array_equal(both[1], y_43.T)
    np.testing.assert_array_equal(one[0], x_34[:1] + 2 * y_43.T)


def test_triton_lowers_for_cuda_without_a_gpu(monkeypatch):
    try:
        import jax_triton.triton_lib as lib
    except ImportError as error:  # not installed, or a jax without GPU support
        pytest.skip(f"jax-triton cannot be imported: {error}")
    monkeypatch.setattr(lib.triton_kernel_call_lib, "get_compute_capability", lambda device: 90)
    assert lowered("triton", backward=True).count("triton_kernel_call") == 2


@pytest.mark.skipif(not HAS_INTERPRETER, reason="this jax does not offer the GPU interpreter")
@pytest.mark.slow
@pytest.mark.parametrize("documents", ["none", "boundaries", "padding"])
@pytest.mark.parametrize(
    ("T", "clip_norm", "states"),
    [(3 * 256 + 41, None, 2**29), (2 * 256, 0.3, 1)],
    ids=["ragged", "clipped"],
)
def test_mosaic_matches_the_float64_reference_in_the_interpreter(
    monkeypatch, T, clip_norm, states, documents, capfd
):
    """Copies of all states at once, and of one chunk's at a time."""
    monkeypatch.setattr(gpu_sweep, "STATES", states)
    segment_ids = DOCUMENTS[documents]
    ids = None if segment_ids is None else np.broadcast_to(segment_ids(T, 256), (2, T))
    arguments, cotangents = make_inputs(T=T, **SIZES)
    with gpu.interpreted(plgpu.InterpretGPUParams(detect_races=True)):
        check(
            arguments,
            cotangents,
            BF16,
            "pallas_gpu",
            chunk_size=256,
            segment_ids=ids,
            clip_norm=clip_norm,
        )
    assert "RACE DETECTED" not in capfd.readouterr().out  # jax 0.11 prints them, 0.12 raises


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (("cpu", BF16, 256, 256, 256), "needs an NVIDIA GPU"),
        (("gpu", F32, 256, 256, 256), "bfloat16"),
        (("gpu", BF16, 128, 256, 256), "chunk_size = 128"),
        (("gpu", BF16, 256, 260, 256), "D = 260"),
        (("gpu", BF16, 256, 256, 300), "F = 300"),
        (("gpu", BF16, 256, 256, 512), None),
    ],
)
def test_mosaic_says_what_it_cannot_do(call, reason):
    got = gpu.why_not(*call)
    assert got is None if reason is None else reason in got


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 8192, 2048, 6144, 1024), ("pallas_gpu", 1)),
        ((1, 32768, 2560, 9728, 512), ("pallas_gpu", 2)),
        ((4, 8192, 2048, 6144, 512), ("pallas_gpu", 2)),
        ((1, 32768, 2560, 9728, 256), ("pallas_gpu", 4)),
        ((1, 900, 2560, 9728, 256), ("pallas_gpu", 2)),  # blocks of 512 tokens
        ((1, 32768, 2560, 9728, 4096), ("pallas_gpu", 1)),
        ((8, 8192, 1024, 3072, 1024), ("pallas_gpu", 1)),
        ((4, 8192, 2048, 6144, 256), ("xla", 1)),  # not measured, as what follows
        ((8, 8192, 1024, 3072, 512), ("pallas_gpu", 1)),
        ((8, 16384, 768, 2048, 512), ("pallas_gpu", 1)),
        ((8, 16384, 512, 1536, 512), ("xla", 1)),  # not measured
        ((1, 512, 2560, 9728, 1024), ("xla", 1)),  # less than a chunk: nothing to update
        ((1, 600, 2560, 9728, 512), ("pallas_gpu", 1)),  # less than a block
        ((1, 32768, 2560, 9728, 512, True), ("pallas_gpu", 2)),
        ((4, 8192, 2048, 6144, 512, True), ("pallas_gpu", 1)),  # packed rows: not measured in pairs
        ((1, 32768, 2560, 9728, 256, True), ("pallas_gpu", 1)),
    ],
)
def test_none_takes_on_a_gpu_what_was_measured_to_be_fastest(monkeypatch, shape, expected):
    """The table of docs/performance.md."""
    module = importlib.import_module("ttt_jax.ops.ttt.api")
    monkeypatch.setattr(module.platform, "compiled_for", lambda: "gpu")
    monkeypatch.setattr(module.platform, "on_one_device", lambda: True)
    name = module._choose(None, call := module._Call("gpu", BF16, *shape))
    assert (name, module._FAST[name].block(call)) == expected
    monkeypatch.setattr(module.platform, "one_of_several", lambda: True)
    assert module._choose(None, call) == "xla"


@pytest.mark.parametrize("implementation", ["pallas_gpu", "triton"])
def test_a_named_kernel_does_not_fall_back(implementation):
    (z, v, w, lr, _), _ = make_inputs(B=1, T=8, D=4, F=8)
    with pytest.raises(UserError, match=f"{implementation}.*GPU"):
        in_place_ttt(
            jnp.asarray(z),
            jnp.asarray(v),
            jnp.asarray(w),
            lr=lr,
            chunk_size=4,
            implementation=implementation,
        )


def test_triton_is_optional(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'ttt-jax[gpu]'" in triton.why_not("gpu", BF16)
    with contextlib.suppress(ImportError):
        importlib.import_module("ttt_jax.kernels_pallas.triton")  # the module itself needs neither
