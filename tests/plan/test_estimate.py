"""What a plan computes by formula: memory on GPUs, rooflines, advice."""

import numpy as np
import pytest

from ttt_jax.config import load_config
from ttt_jax.flops import decode_flops, model_flops_per_token
from ttt_jax.plan.gpu import estimate
from ttt_jax.plan.inference import model_flops, roofline
from ttt_jax.plan.make import describe
from ttt_jax.plan.result import advice
from ttt_jax.plan.topology import parse_topology
from ttt_jax.plan.work import Work
from ttt_jax.training.step_memory import activations

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
