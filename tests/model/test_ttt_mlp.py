"""The adaptive MLP and its target module against the official code's float64 arrays; streaming; its
statistics.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from support.tolerance import TOLERANCE, assert_close, relative_rms

from ttt_jax.config import ModelConfig, TTTConfig
from ttt_jax.errors import ConfigError
from ttt_jax.model.layers import Context
from ttt_jax.model.transformer import Transformer
from ttt_jax.model.ttt_mlp import KERNEL, MLP, Target
from ttt_jax.ops import in_place_ttt
from ttt_jax.pretrained.hf_weights import tensor_names

NAMES = {  # ours -> theirs
    "gate": "gate_proj.weight",
    "up": "up_proj.weight",
    "down": "down_proj.weight",
    "target.conv": "ttt_conv.weight",
    "target.proj": "ttt_proj.weight",
}


def parameter(mlp, name):
    *parents, last = name.split(".")
    for parent in parents:
        mlp = getattr(mlp, parent)
    return getattr(mlp, last)


def official_mlp(arrays, dtype):
    """An MLP of the file's sizes holding its parameters; the target's source comes from
    `Context.embed_BTD`.
    """
    F, D = arrays["param.gate_proj.weight"].shape
    ttt = TTTConfig(
        layers=(0,),
        chunk_size=int(arrays["chunk"]),
        lr=float(arrays["lr"]),
        target="input_embed",
        proj="param.ttt_proj.weight" in arrays,
    )
    cfg = ModelConfig(d_model=D, d_ff=F, ttt=ttt)
    mlp = jax.eval_shape(lambda: MLP(cfg, cfg.ttt.target, key=jax.random.key(0)))
    for ours, theirs in NAMES.items():
        if f"param.{theirs}" in arrays:
            parameter(mlp, ours).set_value(jnp.asarray(arrays[f"param.{theirs}"], dtype))
    return mlp


def context(source, start=None, **options):
    nothing = jnp.zeros((1, 1, 1), jnp.float32)
    return Context(
        rope=(nothing, nothing),
        start_B=start,
        lengths_B=None,
        embed_BTD=source,
        **{"segment_ids_BT": None} | options,
    )


@jit
def apply(mlp, x, source, start, state):
    return mlp(x, context(source, start, keep_state=True), state)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_output_and_gradients_of_the_official_mlp(golden_mlp, dtype):
    with jax.enable_x64(dtype == "float64"):
        mlp = official_mlp(golden_mlp, dtype)
        x, t, dy = (jnp.asarray(golden_mlp[name], dtype) for name in ("x", "t", "dy"))
        run = lambda mlp, x, t: mlp(x, context(t), None)[0]
        y, grads = jit(lambda *a: (run(*a), jax.vjp(run, *a)[1](dy)))(mlp, x, t)
        assert y.dtype == dtype
        assert_close("y", y, golden_mlp["y"], TOLERANCE[dtype])
        assert_close("dx", grads[1], golden_mlp["dx"], TOLERANCE[dtype])
        assert_close("dt", grads[2], golden_mlp["dt"], TOLERANCE[dtype])
        compared = 0
        for ours, theirs in NAMES.items():
            if f"grad.{theirs}" in golden_mlp:
                gradient = parameter(grads[0], ours)[...]
                assert_close(theirs, gradient, golden_mlp[f"grad.{theirs}"], TOLERANCE[dtype])
                compared += 1
        assert compared == sum(name.startswith("grad.") for name in golden_mlp)


@pytest.mark.parametrize(
    ("dtype", "pieces"), [("float64", "tokens"), ("float64", "odd"), ("float32", "tokens")]
)
def test_streaming_gives_the_official_inference_form(golden_mlp, dtype, pieces):
    """Pieces of any size from an empty state: `y_infer`, and W + S afterwards `w_after`."""
    with jax.enable_x64(dtype == "float64"):
        mlp = official_mlp(golden_mlp, dtype)
        x, t = (jnp.asarray(golden_mlp[name], dtype) for name in ("x", "t"))
        B, T, _ = x.shape
        size = {"tokens": 1, "odd": 13}[pieces]
        state, outputs = mlp.init_state(B, jnp.dtype(dtype)), []
        for start in range(0, T, size):
            cut = slice(start, min(start + size, T))
            y, state, _ = apply(mlp, x[:, cut], t[:, cut], jnp.full((B,), start, jnp.int32), state)
            outputs.append(y)
        assert_close("y", jnp.concatenate(outputs, 1), golden_mlp["y"], TOLERANCE[dtype])
        if B == 1:
            assert_close(
                "y_infer", jnp.concatenate(outputs, 1), golden_mlp["y_infer"], TOLERANCE[dtype]
            )
            weight = mlp.down[...] + state.S_BDF[0]
            assert_close("w_after", weight, golden_mlp["w_after"], TOLERANCE[dtype])


def test_a_fresh_pass_leaves_the_official_fast_weight(golden_mlp, x64):
    mlp = official_mlp(golden_mlp, "float64")
    x, t = jnp.asarray(golden_mlp["x"]), jnp.asarray(golden_mlp["t"])
    _, state, _ = apply(mlp, x, t, None, None)
    C = mlp.cfg.ttt.chunk_size
    pending = x.shape[1] % C
    np.testing.assert_array_equal(state.source_BCX[:, :pending], t[:, x.shape[1] - pending :])
    assert not np.asarray(state.source_BCX[:, pending:]).any()
    if x.shape[0] == 1:
        assert_close(
            "w_after", mlp.down[...] + state.S_BDF[0], golden_mlp["w_after"], TOLERANCE["float64"]
        )
    with jax.numpy_rank_promotion("allow"):  # the rule in one line of numpy per chunk
        v = np.asarray(mlp.target(t[:, : x.shape[1] // C * C], C))
        z = np.asarray(jax.nn.silu(x @ mlp.gate[...].T) * (x @ mlp.up[...].T))
    S = sum(
        (
            mlp.cfg.ttt.lr * np.einsum("bcd,bcf->bdf", v[:, i : i + C], z[:, i : i + C])
            for i in range(0, v.shape[1], C)
        ),
        np.zeros(state.S_BDF.shape),
    )
    np.testing.assert_allclose(state.S_BDF, S, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------- target


@pytest.mark.parametrize("write", ["sum", "ridge"])
def test_chunks_whose_write_nothing_reads_have_no_targets(x64, write):
    """Those with padding and a document's last. Targets are zero there, and in the others what they
    are without documents; so is the gradient, and S is what the op makes of any targets.
    """
    B, C, D = 2, 4, 6
    ttt = TTTConfig(layers=(0,), chunk_size=C, target="input_embed", write=write)
    cfg = ModelConfig(d_model=D, d_ff=8, ttt=ttt)
    mlp = MLP(cfg, cfg.ttt.target, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    mlp.target.conv.set_value(jnp.asarray(rng.standard_normal(mlp.target.conv.shape)))
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    ids = jnp.asarray([[1] * 10 + [0] * 2 + [2] * 8, [1] * 8 + [2] * 4 + [3] * 5 + [0] * 3])
    written = jnp.asarray([[1.0, 1, 0, 1, 1], [1, 0, 0, 1, 0]])
    z, source, dv = draw(B, 20, 8), draw(B, 20, D), draw(B, 20, D)

    def targets(ids, source, z):
        return mlp.targets(z, source, context(source, segment_ids_BT=ids))

    def both(ids, dv):
        v, pull = jax.vjp(lambda *arrays: targets(ids, *arrays), source, z)
        return v, *pull(dv)

    mask = jnp.broadcast_to(jnp.repeat(written, C, axis=1)[:, :, None], source.shape)
    got, (raw, *gradients) = both(ids, dv), both(None, mask * dv)
    for x, y in zip(got, (mask * raw, *gradients), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-13)
    assert not np.asarray(got[0])[np.asarray(mask) == 0].any()
    _, S = mlp.op(z, got[0], 0.5, None, segment_ids_BT=ids)
    options = {"lr": 0.5, "chunk_size": C, "segment_ids": ids, "implementation": "reference"}
    np.testing.assert_allclose(S, in_place_ttt(z, raw, mlp.down[...], **options)[1], atol=1e-13)


def target_of(proj, D=6, **options):
    cfg = ModelConfig(d_model=D, d_ff=8, ttt=TTTConfig(layers=(0,), proj=proj, **options))
    return Target(cfg, cfg.ttt.target, key=jax.random.key(1))


@pytest.mark.parametrize("proj", [True, False])
@pytest.mark.parametrize("C", [1, 2, 4, 12])
def test_target_is_a_centred_convolution_inside_each_chunk(C, proj, x64):
    target = target_of(proj)
    source = np.random.default_rng(0).standard_normal((2, 12, 6))
    conv = np.asarray(target.conv[...], np.float64)[:, 0]
    expected = np.zeros_like(source)
    for i in range(12):
        for k in range(KERNEL):
            j = i + k - 2
            if j >= 0 and j // C == i // C and j < 12:
                expected[:, i] += conv[:, k] * source[:, j]
    if proj:
        expected = expected @ np.asarray(target.proj[...], np.float64)  # not its transpose
    got = jit(lambda target, source: target(source, C))(target, jnp.asarray(source))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13)


# ----------------------------------------------------------------------------------- what stats say


def small_mlp(**ttt):
    cfg = ModelConfig(d_model=6, d_ff=10, ttt=TTTConfig(layers=(0,), chunk_size=4, lr=0.5, **ttt))
    return MLP(cfg, cfg.ttt.target, key=jax.random.key(2))


@pytest.mark.parametrize("T", [3, 4, 10])
def test_statistics(T, x64):
    mlp = small_mlp()
    x = jax.random.normal(jax.random.key(3), (2, T, 6), jnp.float64)
    _, state, stats = apply(mlp, x, x, None, None)
    norm = np.linalg.norm(state.S_BDF, axis=(1, 2))
    slow = np.linalg.norm(np.asarray(mlp.down[...], np.float64))
    np.testing.assert_allclose(stats["state_ratio_B"], norm / slow, rtol=1e-12)
    before = (
        apply(mlp, x[:, :4], x[:, :4], None, None)[1].S_BDF
        if T == 10
        else np.zeros(state.S_BDF.shape)
    )
    first_row = np.linalg.norm((state.S_BDF - before)[0])  # stands for the batch
    np.testing.assert_allclose(stats["update_norm_B"], [first_row] * 2, rtol=1e-12)
    assert (norm > 0).all() == (T >= 4)


@pytest.mark.parametrize("end", [1, 0], ids=["whole", "padded"])
def test_the_norm_of_an_update_is_that_of_what_was_written(end, x64):
    """Clipped, and nothing where the first row's last chunk holds padding."""
    mlp, clip = small_mlp(clip_norm=1e-6), 1e-6
    x = jax.random.normal(jax.random.key(3), (2, 8, 6), jnp.float64)
    segments = jnp.asarray([[1] * 7 + [end], [1] * 8], jnp.int32)
    run = lambda x: mlp(x, dataclasses.replace(context(x), segment_ids_BT=segments), None)[2]
    np.testing.assert_allclose(jit(run)(x)["update_norm_B"], [clip * end] * 2, rtol=1e-12)


def test_statistics_carry_no_gradient():
    mlp = small_mlp()
    x = jnp.ones((1, 8, 6), jnp.float32)

    def total(x):
        stats = mlp(x, context(x), None)[2]
        return stats["state_ratio_B"].sum() + stats["update_norm_B"].sum()

    assert not np.asarray(jit(jax.grad(total))(x)).any()


def test_the_state_accumulates_in_float32_under_bfloat16():
    mlp = small_mlp()
    x = jax.random.normal(jax.random.key(3), (1, 9, 6), jnp.bfloat16)
    y, state, _ = jax.eval_shape(apply, mlp, x, x, None, None)
    assert (y.dtype, state.S_BDF.dtype, state.z_BCF.dtype) == (
        jnp.bfloat16,
        jnp.float32,
        jnp.bfloat16,
    )


def test_one_product_or_two():
    """`apply: fused` leaves out z W^T of all tokens; the results are the same to rounding."""
    x = jax.random.normal(jax.random.key(3), (1, 12, 6), jnp.float32)
    run = lambda mlp: mlp(x, context(x, keep_state=True), None)[0]
    outputs, products = {}, {}
    for word in ("split", "fused"):
        mlp = small_mlp(apply=word)
        mlp.target.conv.set_value(jnp.ones_like(mlp.target.conv[...]))  # or nothing is written
        outputs[word] = jit(run)(mlp)
        products[word] = str(jax.make_jaxpr(run)(mlp)).count("f32[1,12,6] = dot_general")
    assert_close("y", outputs["fused"], outputs["split"], TOLERANCE["float32"])
    without = jit(lambda mlp: mlp(x, context(x, ttt_scale=0.0), None)[0])(mlp)
    assert relative_rms(outputs["split"], without) > 1e-2
    assert products["split"] == products["fused"] + 1  # the target's projection is another one


def test_the_step_that_completes_a_chunk_does_not_apply_it_again():
    """Its tokens were applied one by one. Of a kernel the compiler cannot leave out an apply that
    nobody reads, so none may be asked for.
    """
    mlp, B, C, D = small_mlp(), 2, 4, 6
    x = jax.random.normal(jax.random.key(3), (B, 1, D), jnp.float32)
    state = mlp.init_state(B, jnp.float32)

    def step(mlp, state, **options):
        ctx = context(x, start=jnp.full((B,), C - 1, jnp.int32), **options)
        return mlp(x, ctx, state)[1].S_BDF

    text = str(jax.make_jaxpr(functools.partial(step, ends_chunk=True))(mlp, state))
    for rows in (B, 1):  # one row, taken out of the others
        assert text.count(f"f32[{rows},{C},{D}] = dot_general") == 1, "the target's projection"
    assert text.count(f"f32[{B},{D},{mlp.cfg.d_ff}] = dot_general") == 1, "the write"


@pytest.mark.parametrize("complete", [(1,), (0,), (0, 2), (0, 1, 2)], ids=str)
def test_rows_that_complete_a_chunk_write_it_alone(complete, x64):
    """One of three rows is taken out of the others; what it writes is what all rows computed
    together write, and the norm is the first row's.
    """
    mlp, B, C = small_mlp(write="ridge", decay=0.5), 3, 4
    mlp.target.conv.set_value(jnp.ones_like(mlp.target.conv[...]))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((B, 1, 6)))
    empty = mlp.init_state(B, jnp.float64)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), empty)
    start_B = jnp.asarray([C - 1 if b in complete else 1 for b in range(B)], jnp.int32)
    step = jit(lambda mlp, x, start, state: mlp(x, context(x, start, ends_chunk=True), state))
    y, after, stats = step(mlp, x, start_B, state)
    for b in range(B):
        row = lambda leaf, b=b: leaf[b : b + 1]
        alone = step(mlp, row(x), row(start_B), jax.tree.map(row, state))
        np.testing.assert_allclose(row(y), alone[0], rtol=0, atol=1e-12)
        jax.tree.map(
            lambda got, expected, row=row: np.testing.assert_allclose(
                row(got), expected, rtol=0, atol=1e-12
            ),
            after,
            alone[1],
        )
        assert (after.S_BDF[b] == state.S_BDF[b]).all() == (b not in complete)
        if b == 0:
            np.testing.assert_allclose(
                stats["update_norm_B"], [float(alone[2]["update_norm_B"][0])] * B, rtol=1e-12
            )
            assert (stats["update_norm_B"] > 0).all() == (0 in complete)


# ------------------------------------------------------------------------------------ layer indices


def test_only_the_listed_layers_adapt():
    cfg = ModelConfig(
        num_layers=5, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24, vocab_size=11
    )
    cfg = dataclasses.replace(cfg, ttt=TTTConfig(layers=(1, 4), chunk_size=4))
    model = jax.eval_shape(lambda: Transformer(cfg, key=jax.random.key(0)))
    names = {name for group in tensor_names(model).values() for name in group}
    assert {name for name in names if "ttt_conv" in name} == {
        f"model.layers.{i}.mlp.ttt_conv.weight" for i in (1, 4)
    }
    stats = jax.eval_shape(
        lambda model, ids: model.hidden(ids)[2], model, jnp.zeros((1, 8), jnp.int32)
    )
    assert set(stats) == {1, 4}, "statistics by layer index"


@pytest.mark.parametrize(
    ("layers", "words"), [((5,), "layer 5 does not exist"), ((1, 1), "listed twice")]
)
def test_a_layer_that_does_not_exist_is_an_error(layers, words):
    with pytest.raises(ConfigError, match=words):
        Transformer(ModelConfig(num_layers=5, ttt=TTTConfig(layers=layers)), key=jax.random.key(0))
