"""What a call of the op may ask for, and which implementation takes it."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support.op_checks import BF16, F32, check, make_inputs
from support.tolerance import TOLERANCE, assert_close

from ttt_jax.errors import UserError
from ttt_jax.kernels_pallas import tpu
from ttt_jax.ops import in_place_ttt


def test_lr_may_be_traced_and_zero():
    arguments, cotangents = make_inputs()
    z, v, w, _, state = arguments
    check((z, v, w, 0.0, state), cotangents, jnp.float32, None, chunk_size=8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"implementation": "triton2"}, "implementation 'triton2'"),
        ({"chunk_size": 0}, "chunk_size = 0"),
        ({"state": jnp.zeros((2, 3, 4))}, "state has shape"),
        ({"segment_ids": jnp.zeros((1, 40), jnp.int32)}, "segment_ids has shape"),
        ({"written": jnp.ones((2, 40), bool)}, "written has shape .* beside segment_ids"),
    ],
)
def test_wrong_arguments(change, words):
    (z, v, w, lr, _), _ = make_inputs()
    options = {"lr": lr, "chunk_size": 8} | change
    with pytest.raises(UserError, match=words) as error:
        in_place_ttt(*(jnp.asarray(x, jnp.float32) for x in (z, v, w)), **options)
    assert "\n" not in str(error.value)


def test_wrong_shapes():
    (z, v, w, lr, _), _ = make_inputs()
    with pytest.raises(UserError, match="do not fit"):
        in_place_ttt(*(jnp.asarray(x, jnp.float32) for x in (z, v, w.T)), lr=lr, chunk_size=8)


def test_a_kernel_says_why_it_cannot_run():
    (z, v, w, lr, _), _ = make_inputs()
    run = functools.partial(in_place_ttt, lr=lr, chunk_size=8, implementation="pallas_tpu")
    z, v, w = (jnp.asarray(x, F32) for x in (z, v, w))
    with pytest.raises(
        UserError, match="'pallas_tpu' cannot run: it needs a TPU, and the platform is cpu"
    ):
        run(z, v, w)
    with tpu.interpreted(), pytest.raises(UserError, match="float32 and bfloat16, not in float16"):
        run(z.astype(jnp.float16), v, w)
    with tpu.interpreted(), pytest.raises(UserError, match="there are no tokens"):
        run(z[:, :0], v[:, :0], w)
    large = [
        jax.ShapeDtypeStruct(s, BF16) for s in ((1, 65536, 9728), (1, 65536, 2560), (2560, 9728))
    ]
    with (
        tpu.interpreted(tiles=None),
        pytest.raises(UserError, match="D = 2560, F = 9728 needs more than the 64 MiB"),
    ):
        jax.eval_shape(functools.partial(run, chunk_size=65536), *large)


def test_a_kernel_is_never_partitioned_by_the_compiler():
    """Over a mesh, a kernel runs inside a `shard_map`, each shard with its own sequences."""
    arguments, cotangents = make_inputs(T=21)
    arguments, cotangents = jax.tree.map(lambda x: jnp.asarray(x, F32), (arguments, cotangents))
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def results(run):
        out, vjp = jax.vjp(run, *arguments)
        return out, vjp(cotangents)

    run = lambda name: (
        lambda z, v, w, lr, S: in_place_ttt(
            z, v, w, lr=lr, state=S, chunk_size=8, implementation=name
        )
    )
    with tpu.interpreted():
        with jax.set_mesh(mesh), pytest.raises(UserError, match="not partitioned over a mesh"):
            run("pallas_tpu")(*arguments)
        # The interpreter itself does not pass the check of varying axes; compiled kernels do
        # (tests/kernels/test_tpu_aot.py).
        specs = (P("x"), P("x"), P(), P(), P("x"))
        sharded = jax.shard_map(
            run("pallas_tpu"), mesh=mesh, in_specs=specs, out_specs=P("x"), check_vma=False
        )
        got = jax.jit(functools.partial(results, sharded))()
    want = jax.jit(functools.partial(results, run("xla")))()
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close("a result", x, y, TOLERANCE["float32"])
