"""The inner learning rate of new TTT layers, measured on the checkpoint by the docs' rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.hf_folders import make_folder

import ttt_jax.training.measured_rate
from ttt_jax.config import TTTConfig, replace
from ttt_jax.config.inner_rate import SUM
from ttt_jax.errors import ConfigError
from ttt_jax.model.layers import rope_tables
from ttt_jax.model.stack import Context, Runtime
from ttt_jax.pretrained.hf_weights import load_hf
from ttt_jax.pretrained.start_config import load_start
from ttt_jax.training.measured_rate import rate_of, settled

RAW = {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True, "num_hidden_layers": 7}
T = 48


def key_squares(folder, ids_RT):
    """||z||^2 [layers, R, T], block by block, from the parts of the plain model."""
    model = load_hf(folder, Runtime(scan_layers=False))
    h = model.embed[...][ids_RT]
    positions = jnp.arange(ids_RT.shape[1], dtype=jnp.int32)[None]
    rope = rope_tables(model.config.rope, model.config.head_dim, positions)
    found = []
    for group in model.groups:
        h, squares_RT = through(group.blocks[0], h, rope)
        found.append(np.asarray(squares_RT))
    return np.stack(found)


@jax.jit
def through(stack, h, rope):
    """A stack of one block: the hidden state behind it, and ||z||^2 of its MLP."""
    block = jax.tree.map(lambda x: x[0, 0], stack)
    y, _ = block.attention(block.attention_norm(h), Context(rope, None, None, None, h), None, None)
    h = h + y
    x = block.mlp_norm(h)
    z = jax.nn.silu(x @ block.mlp.gate[...].T) * (x @ block.mlp.up[...].T)
    return h + z @ block.mlp.down[...].T, jnp.square(z).sum(-1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "plain"
    make_folder(path, RAW)
    return path


def rows():
    ids = np.random.default_rng(0).integers(0, 97, (3, T)).astype(np.int32)
    real = np.ones((3, T), np.int32)
    real[1, 29:] = 0
    return {"ids": ids, "segment_ids": real}


def test_the_rate_is_the_rule_s_for_the_layer_with_the_largest_keys(folder, capsys):
    words = [f"--init_from={folder}", "--data.train=x", "--compute_dtype=float32"]
    start = load_start(None, [*words, f"--data.seq_len={T}"])
    assert start.open_rate
    batch = rows()
    squares_LRT = key_squares(folder, batch["ids"][:2])[list(start.config.model.ttt.layers)]
    medians = [np.median(x_RT[batch["segment_ids"][:2] > 0]) for x_RT in squares_LRT]
    config = settled(start, batch)
    assert config.model.ttt.lr == pytest.approx(SUM / (max(medians) * T), rel=0.05)  # two digits
    assert config == replace(start.config, {"model.ttt.lr": config.model.ttt.lr})
    line = capsys.readouterr().out
    layer = start.config.model.ttt.layers[int(np.argmax(medians))]
    assert f"model.ttt.lr is {config.model.ttt.lr:g}, {SUM:,.0f} / (m T) with m = " in line
    assert (
        f"{float(max(medians)):.3g}, the median ||z||^2 of held-out tokens in layer {layer}" in line
    )
    assert line.count("\n") == 1


def test_a_rate_that_is_written_is_kept(folder, monkeypatch):
    monkeypatch.setattr(ttt_jax.training.measured_rate, "initial_model", None)
    start = load_start(None, [f"--init_from={folder}", "--data.train=x", "--model.ttt.lr=0.3"])
    assert settled(start, rows()) is start.config


def test_a_model_that_is_too_large_to_measure_is_one_line(folder, monkeypatch):
    monkeypatch.setattr(ttt_jax.training.measured_rate, "too_large", lambda *_: "its 9 GiB")
    start = load_start(None, [f"--init_from={folder}", "--data.train=x"])
    with pytest.raises(
        ConfigError, match=r"^config field model\.ttt\.lr = auto: .*: its 9 GiB; set"
    ):
        settled(start, rows())


@pytest.mark.parametrize("square", [0.0, float("nan"), float("inf")])
def test_keys_without_a_scale_are_one_line(folder, square, monkeypatch):
    monkeypatch.setattr(ttt_jax.training.measured_rate, "_key_squares", lambda *_: {"0": square})
    start = load_start(None, [f"--init_from={folder}", "--data.train=x"])
    with pytest.raises(ConfigError, match=r"model\.ttt\.lr = auto: .* no scale for it"):
        settled(start, rows())


def test_the_rule():
    paper, bare = TTTConfig(), TTTConfig(proj=False)
    assert rate_of(paper, 100.0, 300) == 0.01
    assert rate_of(paper, 123.0, 4096) == pytest.approx(SUM / (123 * 4096), rel=0.02)
    assert rate_of(bare, 100.0, 50) == 0.01
    assert rate_of(paper, 200.0, 1000) < rate_of(paper, 100.0, 1000)
