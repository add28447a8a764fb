"""The presets that are shipped: what they train, and how many parameters."""

import math
import re
from pathlib import Path

import jax
import pytest
import yaml

from ttt_jax.config import (
    Config,
    ModelConfig,
    dump_yaml,
    from_dict,
    load_config,
)
from ttt_jax.model.param_path import param_path
from ttt_jax.model.transformer import Transformer
from ttt_jax.pretrained.start_config import load_start_config

CONFIGS = Path(__file__).parents[2] / "configs"
# `continual` names no checkpoint, and so no model.
PRESETS = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem != "continual")
CONTINUAL = {
    "qwen3_0p6b": (65536, 596_049_920),  # tokens a row, published parameters
    "qwen3_1p7b": (65536, 1_720_574_976),
    "qwen3_4b_longct_32k": (32768, 4_022_468_096),
    "qwen3_4b_longct_128k": (131072, 4_022_468_096),
    "qwen3_8b_longct": (65536, 8_190_735_360),
    "llama3p1_8b_longct": (65536, 8_030_261_248),
}
# 24 layers of 4 D^2 + 3 D F + 2 D, a last norm, tied embeddings
SCRATCH = {"500m": (1024, 3072, 2048, 2**21, 5e-4), "1p5b": (2048, 6144, 4096, 2**22, 3e-4)}


def parameter_count(cfg: ModelConfig) -> tuple[int, int]:
    """(without, of) the TTT parameters, from shapes alone."""
    abstract = jax.eval_shape(lambda: Transformer(cfg, key=jax.random.key(0)))
    plain = ttt = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]:
        if ".target." in param_path(path):
            ttt += math.prod(leaf.shape)
        else:
            plain += math.prod(leaf.shape)
    return plain, ttt


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_presets_load_and_name_their_run(path):
    config = load_start_config(path)
    assert config.name == path.stem
    assert path.read_text().startswith("# ")
    assert from_dict(Config, yaml.safe_load(dump_yaml(config))) == config
    assert config.model.ttt.layers, "a preset of this project adapts"


@pytest.mark.parametrize("name", CONTINUAL)
def test_continual_training_presets(name):
    seq_len, published = CONTINUAL[name]
    config = load_start_config(CONFIGS / f"{name}.yaml")
    model, data, opt = config.model, config.data, config.optimizer
    plain, ttt = parameter_count(model)
    assert plain == published
    assert ttt == len(model.ttt.layers) * (model.d_model**2 + 5 * model.d_model)
    assert model.ttt.layers == tuple(range(0, model.num_layers, 6))
    assert (model.ttt.lr, model.ttt.chunk_size, model.ttt.target) == (3.0, 4096, "hidden_states")
    assert (data.seq_len, data.batch_size) == (seq_len, 64)
    assert (opt.lr, opt.weight_decay, opt.warmup_ratio, opt.schedule) == (5e-6, 0.1, 0.02, "cosine")
    assert config.compute_dtype == "bfloat16"
    assert config.init_from is not None
    assert model.max_positions >= seq_len


@pytest.mark.parametrize("name", SCRATCH)
def test_from_scratch_presets(name):
    D, F, window, batch_tokens, lr = SCRATCH[name]
    config = load_config(CONFIGS / f"{name}.yaml")
    model, opt = config.model, config.optimizer
    plain, ttt = parameter_count(model)
    assert plain == 24 * (4 * D * D + 3 * D * F + 2 * D) + D + 32000 * D
    assert ttt == len(model.ttt.layers) * 5 * D  # the convolution; there is no W_target
    assert (model.sliding_window, model.ttt.target, model.rope.base) == (window, "input_embed", 1e6)
    assert config.data.seq_len * config.data.batch_size == batch_tokens
    assert (opt.lr, opt.warmup_steps, opt.clip_norm, opt.weight_decay) == (lr, 1024, 1.0, 0.1)


def test_presets_show_no_tabs_and_fit_the_line():
    for path in PRESETS:
        assert not re.search(r"\t|.{101,}", path.read_text()), path
