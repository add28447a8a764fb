"""The collectives that a plan counts are read from a program's text."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ttt_jax.plan.collectives import nbytes, read_collectives

# As libtpu writes it: a loop without a trip count, one gather in three pieces, a start with
# (operand, result), a kernel whose attributes go over several lines.
PROGRAM = """HloModule jit_step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[]{:T(128)} add(%a, %b)
}

%cond (p: (s32[], f32[8,16])) -> pred[] {
  %c.1 = s32[]{:T(128)} constant(3), backend_config={"x":[]}
  %i.1 = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %c.1), direction=LT
}

%piece (p: f32[8,2]) -> f32[8,16] {
  ROOT %ag.2 = f32[8,16]{1,0:T(8,128)} all-gather(%p), \
channel_id=5, frontend_attributes={chain_id="7"}
}

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %f.1 = f32[8,16]{1,0} fusion(%x), kind=kOutput, calls=%piece
  %ag.1 = f32[8,16]{1,0} all-gather(%x), channel_id=5, frontend_attributes={chain_id="7"}
  %ar.1 = (f32[4]{0}, /*index=1*/bf16[6]{0}) all-reduce(%y, %z), \
channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%sum
  ROOT %t = (s32[], f32[8,16]) tuple(%i, %f.1)
}

ENTRY %main (x: f32[8,2]) -> f32[8,16] {
  %k = f32[8,2]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="splash"}
  %w = (s32[], f32[8,16]) while(%init), condition=%cond, body=%body, metadata={op_name="while"}
  %cp = (bf16[4,4]{1,0}, bf16[4,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%q), \
source_target_pairs={{0,1}}
  %done = bf16[4,4]{1,0} collective-permute-done(%cp)
  %alone = f32[1000]{0} all-reduce(%r), replica_groups={{0},{1}}, to_apply=%sum
  ROOT %out = f32[8,16]{1,0} get-tuple-element(%w), index=1
}
"""


def test_collectives_of_a_text():
    found = read_collectives(PROGRAM)
    assert found.kinds == {
        "all-gather": (3, 3 * 8 * 16 * 4),
        "all-reduce": (3, 3 * (4 * 4 + 6 * 2)),
        "collective-permute": (1, 32),
    }
    assert found.loops_of_unknown_length == 0
    unknown = read_collectives(PROGRAM.replace("constant(3)", "parameter(1)"))
    assert unknown.kinds["all-gather"] == (1, 512)
    assert unknown.loops_of_unknown_length == 1
    with pytest.raises(ValueError, match="ENTRY"):
        read_collectives("nothing")


def test_collectives_of_a_compiled_loop():
    """Five rounds of one psum of 4 KB, in a program that XLA compiled here."""
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))

    def function(x):
        step = lambda carry, _: (jax.lax.psum(jnp.sin(carry), "a") / 8, None)
        return jax.lax.scan(step, x, None, length=5)[0]

    mapped = jax.shard_map(function, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=False)
    x = jax.ShapeDtypeStruct((8192,), jnp.float32, sharding=NamedSharding(mesh, P("a")))
    assert read_collectives(jax.jit(mapped).lower(x).compile().as_text()).kinds == {
        "all-reduce": (5, 5 * 4096)
    }


def test_bytes_of_types():
    assert nbytes("(f32[2,3]{1,0:T(8,128)}, bf16[5], pred[7], u8[], s4[3])") == 24 + 10 + 7 + 1 + 2
    assert nbytes("f8e4m3fn[10]") == 10
    assert nbytes("token[]") == 0
