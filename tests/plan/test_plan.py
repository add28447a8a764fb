"""`ttt-jax plan`: what is read from a program's text, the arithmetic of the estimate, the command;
and real TPU compiles.
"""

import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.aot import TINY

from ttt_jax.command.cli import main
from ttt_jax.config import load_config
from ttt_jax.errors import UserError
from ttt_jax.flops import decode_flops, model_flops_per_token
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.plan.collectives import nbytes, read_collectives
from ttt_jax.plan.common import Topology, Work, advice, parse_topology
from ttt_jax.plan.gpu import estimate
from ttt_jax.plan.inference import model_flops, roofline
from ttt_jax.plan.make import describe
from ttt_jax.plan.tpu import out_of_memory
from ttt_jax.training.step_memory import activations

ROOT = Path(__file__).resolve().parents[2]
QWEN3_8B = str(ROOT / "configs/qwen3_8b_longct.yaml")

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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v7:2x2", "unknown"),
        ("v5p", "unknown"),
        ("v5p:4x0x4", "unknown"),
        ("v5p:4x4", "grid of 3 sizes"),
        ("v6e:2x2x2", "grid of 2 sizes"),
        ("h100:2x4", "number of GPUs"),
    ],
)
def test_bad_topologies(text, words, capsys):
    with pytest.raises(UserError, match=words):
        parse_topology(text)
    assert main(["plan", "--config", QWEN3_8B, "--topology", text]) == 2
    assert words in capsys.readouterr().err


def test_topologies():
    assert parse_topology("v5p:4x4x8") == Topology("v5p:4x4x8", "v5p", 128, (4, 4, 8))
    assert parse_topology("h200:64").memory == 141e9


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


def test_a_missing_libtpu_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main(["plan", "--config", QWEN3_8B, "--topology", "v5p:4x4x4"]) == 2
    error = capsys.readouterr().err
    assert "pip install" in error
    assert "libtpu" in error
    assert error.count("\n") == 1


SMALL = [
    "--model.vocab_size=100",
    "--model.d_model=64",
    "--model.num_layers=3",
    "--model.num_heads=4",
    "--model.num_kv_heads=2",
    "--model.head_dim=16",
    "--model.d_ff=128",
    "--model.ttt.layers=[1]",
    "--model.ttt.chunk_size=32",
    "--model.ttt.proj=false",
    "--data.seq_len=256",
    "--data.batch_size=8",
    "--compute_dtype=bfloat16",
    "--mesh.context=2",
    "--mesh.tensor=2",
]


def small(*words):
    return load_config(None, [*SMALL, *words])


def test_the_estimate_by_hand():
    """fsdp 2, context 2, tensor 2: 4 rows of 128 tokens on a device, half the heads and half of
    F.
    """
    plan = estimate(
        small("--remat_save=[attention]", "--optimizer.accumulate=1"), parse_topology("h100:8")
    )
    kinds = plan.bytes_by_kind
    b, t, D, F = 4, 128, 64, 64
    assert plan.mesh == {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}
    matrices = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 100 * 64
    vectors = 3 * 2 * 64 + 64  # norms, on every device
    # and the convolution
    assert kinds["parameters"] == pytest.approx(4 * (matrices / 8 + vectors + 64 * 5), rel=0.02)
    assert kinds["optimizer state"] == pytest.approx(2 * kinds["parameters"], rel=0.01)
    assert kinds["gradients"] == kinds["parameters"]
    assert kinds["batch"] == 5 * b * t * 4
    # layer inputs, outputs and float32 statistics
    assert kinds["kept activations"] == b * t * 2 * 3 * (D + 32 + 2 * 2)
    assert kinds["one layer, backward"] == b * t * 2 * (8 * D + 6 * F + 2 * (32 + 2 * 16))
    assert kinds["gathered keys and values"] == b * 256 * 2 * 16 * (2 + 4)
    assert kinds["fast weights"] == 4 * b * D * F * 4
    assert plan.total == pytest.approx(sum(kinds.values()))
    assert plan.fits
    assert not plan.compiled
    assert "ESTIMATE" in describe(plan)


def test_the_estimate_follows_the_knobs():
    def kinds(*words):
        plan = estimate(small(*words), parse_topology("h100:8"))
        return plan.bytes_by_kind

    assert kinds("--optimizer.accumulate=4")["kept activations"] * 4 == kinds()["kept activations"]
    assert kinds("--optimizer.accumulate=4")["gradients"] == 2 * kinds()["gradients"]
    assert (
        kinds("--remat_save=null")["kept activations"]
        > 3 * kinds("--remat_save=[]")["kept activations"]
    )
    assert (
        kinds("--mesh.context=4", "--mesh.tensor=1")["kept activations"]
        == kinds("--mesh.tensor=1")["kept activations"]
    )
    assert kinds("--model.sliding_window=16")["gathered keys and values"] == 0
    assert kinds("--model.ttt.layers=[]")["fast weights"] == 0


def test_the_estimate_counts_rows_that_do_not_split():
    """3 rows over 2 devices are on both."""
    config = small("--data.batch_size=3")
    plan = estimate(config, parse_topology("h100:8"))
    assert "computed more than once" in plan.notes[0]
    sizes = {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}
    kept = lambda config: activations(config, sizes)["kept activations"]
    assert kept(config) * 2 == kept(small("--data.batch_size=12"))


def test_a_prefill_estimate():
    plan = estimate(small(), parse_topology("h100:8"), work=Work(prefill=512))
    # a row on each pair of devices of one context
    assert plan.bytes_by_kind["KV cache"] == 3 * 256 * 2 * 16 * 2
    assert plan.bytes_by_kind["fast weights"] == 64 * 64 * 4
    assert plan.rows == 2
    assert plan.program == "prefill of 512 tokens"
    assert plan.notes == ()
    (note,) = estimate(
        small("--model.max_positions=256"), parse_topology("h100:8"), work=Work(prefill=512)
    ).notes
    assert "--prefill 512: the config knows 256 positions" in note


def test_a_decode_estimate():
    """Four rows over fsdp 4, heads and F over tensor 2; a step reads parameters, caches and S."""
    words = ("--mesh.context=1", "--mesh.fsdp=4", "--mesh.tensor=2")
    config = small(*words, "--model.tie_embeddings=false")
    plan = estimate(config, parse_topology("h100:8"), Work(decode=512, rows=4))
    model = config.model
    D, F, V, C = model.d_model, model.d_ff, model.vocab_size, model.ttt.chunk_size
    caches = model.num_layers * 512 * 2 * model.num_kv_heads * model.head_dim * 2 / 2  # one row
    fast = 4 * D * F * 4 / 8
    pending = 4 * C * (F / 8 + D / 4) * 2
    positions = 4 * 4
    assert plan.bytes_by_kind["streams"] == caches + fast + pending + positions
    embedding = V * D * 2 / 8
    read = plan.bytes_by_kind["parameters"] - embedding + caches + fast
    assert (roof := plan.roofline) is not None
    assert roof.memory == pytest.approx(read / 3350e9)
    assert roof.compute == pytest.approx(4 * decode_flops(model, 512) / 8 / 989.4e12)
    assert roof.seconds == max(roof.memory, roof.compute)
    assert roof.tokens_per_second == pytest.approx(4 / roof.seconds)
    assert plan.program == "decode step at 512 tokens"
    assert "links not known" in describe(plan)
    assert estimate(small(), parse_topology("h100:8")).roofline is None


def test_rooflines_by_hand():
    """A v5e: 197 TFLOP/s, 819 GB/s, 200 GB/s."""
    config, topology = small(), parse_topology("v5e:2x4")
    work = Work(prefill=1000, rows=2)
    flops = model_flops(config, work, 2, 1000)
    whole = model_flops_per_token(config.model, 1000, training=False)
    logits = 2 * config.model.d_model * config.model.vocab_size  # of each row's last token alone
    assert flops == 2 * (1000 * (whole - logits) + logits)
    for read, sent, seconds in ((819e9, 0.0, 1.0), (1.0, 400e9, 2.0)):
        roof = roofline(config, topology, work, 2, 1000, read, sent)
        assert roof.compute == pytest.approx(flops / 8 / 197e12)
        assert (roof.seconds, roof.tokens_per_second) == (seconds, 2000 / seconds)


def test_one_token_sees_what_is_before_it():
    """The mean over a row's tokens is what all its tokens need."""
    for word in ("--model.sliding_window=null", "--model.sliding_window=16"):
        model = small(word).model
        each = [decode_flops(model, position) for position in range(64)]
        assert np.mean(each) == pytest.approx(model_flops_per_token(model, 64, training=False))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--decode", 64, "--mesh.tensor", 8), "mesh.tensor 8: does not divide model.num_kv_h"),
        (("--decode", 64, "--prefill", 64), "--prefill and --decode are two programs"),
        (("--rows", 2), "--rows is of --prefill or --decode"),
        (("--decode", 64, "--rows", 3, "--mesh.data", 2), "mesh.data = 2: does not divide the 3"),
    ],
)
def test_bad_work(words, line, capsys):
    mesh = ("--mesh.fsdp", -1)
    words = ("plan", "--config", "default", "--topology", "h100:8", *mesh, *words)
    assert main([str(word) for word in words]) == 2
    assert line in capsys.readouterr().err


def test_advice_names_the_knobs():
    config = small("--remat_save=null")
    kinds = {"parameters": 1e9, "optimizer state": 2e9}
    sizes = {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}
    tight = " ".join(advice(config, sizes, kinds, 4e9, Work()))
    for knob in (
        "more devices",
        "optimizer.accumulate",
        "remat_save",
        "mesh.context",
        "mesh.tensor",
    ):
        assert knob in tight
    roomy = " ".join(
        advice(small("--remat_save=[]", "--optimizer.accumulate=4"), sizes, kinds, 1e11, Work())
    )
    assert "more devices" not in roomy
    assert "remat_save" not in roomy
    assert "accumulate" not in roomy


def test_the_command_estimates_and_says_whether_it_fits(capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    words = ["plan", "--config", QWEN3_8B, "--topology", "h100:64", "--json", "--mesh.context", "8"]
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["mesh"]["fsdp"] == 8
    assert plan["total"] == pytest.approx(sum(plan["bytes_by_kind"].values()))
    assert main(["plan", "--config", QWEN3_8B, "--topology", "h100:2"]) == 1
    text = capsys.readouterr().out
    assert "does not fit" in text
    assert "more devices" in text
    assert main(["plan", "--config", QWEN3_8B, "--topology", "h100:7"]) == 2
    assert "does not divide 7 devices" in capsys.readouterr().err
    assert main(["plan", "--config", QWEN3_8B, "--topology", "h100:8", "--model.nothing=1"]) == 2
    assert "model.nothing" in capsys.readouterr().err


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
    config = small("--mesh.fsdp=8", "--mesh.context=8", "--mesh.tensor=1").mesh
    mesh = make_mesh(config, chips((4, 4, 4)))
    assert mesh.devices.shape == (1, 8, 8, 1)
    assert len({device.id for device in mesh.devices.flat}) == 64


def test_slices_lie_on_the_data_axis():
    mesh = make_mesh(
        small("--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=1").mesh, chips((2, 2, 1), slices=2)
    )
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(UserError, match="multiple of the 2 TPU slices"):
        make_mesh(small("--mesh.data=1", "--mesh.tensor=1").mesh, chips((2, 2, 1), slices=2))


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
