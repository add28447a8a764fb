"""Hugging Face folders: the official code's models reproduced, the name map, config.json's
dialects, refusals.
"""

import dataclasses
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from safetensors import safe_open
from safetensors.numpy import save_file
from support.hf_folders import QWEN3
from support.tolerance import assert_close

from ttt_jax.errors import CheckpointError, ConfigError, UserError
from ttt_jax.model.loss import cross_entropy
from ttt_jax.model.param_path import param_path
from ttt_jax.model.transformer import Transformer
from ttt_jax.pretrained.hf_config import config_from_hf, read_config
from ttt_jax.pretrained.hf_weights import load_hf, load_hf_into, tensor_names
from ttt_jax.pretrained.load import load_pretrained


def tensors(folder):
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def by_tensor(model, tree):
    """(checkpoint name, array) of everything in a model-shaped tree, with the stacks of scanned
    layers taken apart.
    """
    names = tensor_names(model)
    for path, value in leaves(tree).items():
        rank = 3 if path.endswith("conv") else 1 if path.endswith(("scale", "bias")) else 2
        assert len(names[path]) == math.prod(value.shape[:-rank])
        yield from zip(
            names[path], np.asarray(value).reshape(-1, *value.shape[-rank:]), strict=True
        )


def leaves(model):
    return {param_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}


@pytest.fixture
def folder(golden_model, tmp_path):
    """A copy of a golden folder that a test may change."""
    source, _ = golden_model
    copy = tmp_path / "model"
    shutil.copytree(source, copy)
    return copy


# ------------------------------------------------------------------------------ the official models


def test_logits_loss_and_gradients_of_the_official_models(golden_model):
    folder, io = golden_model
    model, ids = load_hf(folder), jnp.asarray(io["input_ids"], jnp.int32)

    def loss(model):
        h, _, _ = model.hidden(ids)
        targets = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))
        weights = jnp.ones(ids.shape, jnp.float32).at[:, -1].set(0)
        return cross_entropy(
            h, model.output_weight, targets, weights / weights.sum()
        ), model.logits(h)

    (value, logits), grads = jit(jax.value_and_grad(loss, has_aux=True))(model)
    assert_close("logits", logits, io["logits"], 1e-4)
    assert abs(float(value) / float(io["loss"]) - 1) <= 1e-5
    seen = set()
    for name, grad in by_tensor(model, grads):
        norm = float(np.linalg.norm(grad.astype(np.float64)))
        assert abs(norm / float(io[f"gradnorm.{name}"]) - 1) <= 1e-3, name
        seen.add(f"gradnorm.{name}")
    assert seen == {name for name in io if name.startswith("gradnorm.")}, (
        "every official gradient was compared"
    )


def test_decoding_step_by_step_follows_the_official_one(golden_model):
    folder, io = golden_model
    model, ids = load_hf(folder), jnp.asarray(io["decode_ids"], jnp.int32)
    prompt = io["decode_prompt"].shape[1]
    np.testing.assert_array_equal(ids[:, :prompt], io["decode_prompt"])
    step = jit(lambda model, ids, state: model(ids, state))
    logits, state = jit(lambda model, ids: model(ids, capacity=ids.shape[1] + 39))(
        model, ids[:, :prompt]
    )
    steps, greedy = [logits[:, -1]], [int(logits[0, -1].argmax())]
    for _ in range(prompt, ids.shape[1] - 1):  # feeds its own choices
        logits, state = step(model, jnp.asarray([[greedy[-1]]], jnp.int32), state)
        steps.append(logits[:, -1])
        greedy.append(int(logits[0, -1].argmax()))
    np.testing.assert_array_equal(greedy, ids[0, prompt:])
    assert_close("decode logits", jnp.stack(steps, 1), io["decode_logits"], 1e-4)


def test_every_tensor_is_named_once_and_lands_unchanged(golden_model):
    folder, _ = golden_model
    model, stored = load_hf(folder), tensors(folder)
    names = tensor_names(model)
    assert sorted(name for group in names.values() for name in group) == sorted(stored)
    for name, x in by_tensor(model, model):
        np.testing.assert_array_equal(x, stored[name], err_msg=name)


# ---------------------------------------------------------------------------------------- the files


def test_shards_with_an_index_equal_one_file(folder):
    whole, stored = load_hf(folder), tensors(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(stored)
    weight_map = {
        name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(names)
    }
    for shard in set(weight_map.values()):
        save_file(
            {name: stored[name] for name in names if weight_map[name] == shard}, folder / shard
        )
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    jax.tree.map(np.testing.assert_array_equal, load_hf(folder), whole)

    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.* is missing"):
        load_hf(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../other.safetensors")}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        load_hf(folder)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        load_hf(folder)


def test_tensors_that_do_not_fit_are_listed_in_one_line(folder):
    stored = tensors(folder)
    del stored["model.norm.weight"], stored["model.layers.2.mlp.ttt_conv.weight"]
    stored["model.layers.1.mlp.ttt_conv.weight"] = np.zeros((48, 1, 5), np.float32)
    stored["model.layers.3.mlp.down_proj.weight"] = np.zeros((80, 48), np.float32)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_hf(folder)
    message = str(error.value)
    assert "\n" not in message
    assert "missing model.layers.2.mlp.ttt_conv.weight, model.norm.weight;" in message
    assert "unknown model.layers.1.mlp.ttt_conv.weight;" in message
    assert "wrong shape model.layers.3.mlp.down_proj.weight (80, 48) (expected (48, 80))" in message


def test_constants_that_old_exports_carry_are_ignored(folder):
    stored = tensors(folder)
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    if read_config(folder).tie_embeddings:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    save_file(stored, folder / "model.safetensors")
    load_hf(folder)


def test_a_broken_or_missing_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_hf(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing .*never pickles"):
        load_hf(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected an object"):
        load_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_hf(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_hf(folder)


def test_bfloat16_parameters(golden_model):
    folder, _ = golden_model
    single, half = load_hf(folder), load_hf(folder, dtype="bfloat16")
    for x, y in zip(jax.tree.leaves(single), jax.tree.leaves(half), strict=True):
        np.testing.assert_array_equal(x.astype(jnp.bfloat16), y)


# -------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("dtype", [None, "fp16", jnp.float32])
def test_a_dtype_that_is_none_is_refused(dtype):
    with pytest.raises(UserError, match=r"^dtype = .*: must be one of float32, bfloat16, float16,"):
        load_pretrained("nowhere", dtype=dtype)


def test_qwen2_biases_are_read_and_count(tmp_path):
    """A Qwen2.5 folder: q, k, v with bias; the loaded biases change the logits."""
    raw = QWEN3 | {"model_type": "qwen2", "initializer_range": 0.2}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model = Transformer(config_from_hf(raw), key=jax.random.key(0))
    rng = np.random.default_rng(0)
    stored = {
        name: 0.2 * rng.standard_normal(x.shape).astype(np.float32)
        for name, x in by_tensor(model, model)
    }
    assert "model.layers.3.self_attn.k_proj.bias" in stored
    assert "model.layers.3.self_attn.o_proj.bias" not in stored
    save_file(stored, tmp_path / "model.safetensors")
    run = jit(lambda model: model.logits(model.hidden(jnp.arange(20, dtype=jnp.int32)[None])[0]))
    whole = run(load_hf(tmp_path))
    for bias in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.3.self_attn.{bias}.bias"
        save_file(stored | {name: 0 * stored[name]}, tmp_path / "model.safetensors")
        changed = float(jnp.abs(run(load_hf(tmp_path)) - whole).max())
        # The softmax does not see what is common to all keys; after rotation a key's bias is not.
        assert changed > 1e-5, bias


def test_a_ttt_layer_outside_the_model_is_refused(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ttt_layers": [0, 4]}))
    with pytest.raises(ConfigError, match="layer 4 does not exist"):
        load_hf(folder)


# ------------------------------------------------------------------------------- continual training


def abstract_model(cfg):
    return jax.eval_shape(lambda: Transformer(cfg, key=jax.random.key(0)))


def strip_ttt(folder):
    """Make a plain checkpoint of a golden folder. Returns the TTT model's config."""
    cfg = read_config(folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in raw.items() if not k.startswith("ttt_")})
    )
    save_file(
        {k: v for k, v in tensors(folder).items() if ".ttt_" not in k}, folder / "model.safetensors"
    )
    return cfg


def test_continual_training_starts_at_the_plain_model(folder):
    cfg = strip_ttt(folder)
    proj = cfg.ttt.target == "hidden_states"  # the third model goes without W_target
    cfg = dataclasses.replace(cfg, ttt=dataclasses.replace(cfg.ttt, proj=proj, layers=(0, 1, 3)))
    plain, model = load_hf(folder), load_hf_into(abstract_model(cfg), folder, key=jax.random.key(4))
    stored, diagonals = tensors(folder), []
    assert plain.config.ttt.layers == ()
    for name, x in by_tensor(model, model):
        if name.endswith("ttt_conv.weight"):
            assert x.shape == (48, 1, 5)
            assert not x.any()
        elif name.endswith("ttt_proj.weight"):
            diagonals.append(np.diagonal(x))
            np.testing.assert_array_equal(x, np.diag(diagonals[-1]))
        else:  # square q and o (LLaMA's) included
            np.testing.assert_array_equal(x, stored[name], err_msg=name)
    assert len(diagonals) == 3 * proj
    if proj:
        assert abs(np.std(diagonals) / cfg.init_std - 1) < 0.2
        assert len(np.unique(diagonals)) == 3 * 48, "every layer draws its own"
    run = jit(lambda model, ids: model.logits(model.hidden(ids)[0]))
    ids = jax.random.randint(jax.random.key(0), (2, 53), 0, 97, jnp.int32)
    np.testing.assert_array_equal(run(model, ids), run(plain, ids))


def test_continual_init_depends_on_the_key_alone(folder):
    cfg = strip_ttt(folder)
    load = lambda seed: load_hf_into(abstract_model(cfg), folder, key=jax.random.key(seed))
    jax.tree.map(np.testing.assert_array_equal, load(0), load(0))
    first, second = leaves(load(0)), leaves(load(1))
    for path, value in first.items():
        same = (np.asarray(value) == np.asarray(second[path])).all()
        assert same == (not path.endswith("target.proj")), path


def test_ttt_parameters_of_a_checkpoint_win(golden_model):
    """Reading a TTT checkpoint into a training model takes its TTT parameters; a layer more gets
    fresh ones.
    """
    folder, _ = golden_model
    cfg, stored = read_config(folder), tensors(folder)
    jax.tree.map(
        np.testing.assert_array_equal,
        load_hf_into(abstract_model(cfg), folder, key=jax.random.key(0)),
        load_hf(folder),
    )
    more = dataclasses.replace(cfg, ttt=dataclasses.replace(cfg.ttt, layers=(0, 2, 3)))
    model = load_hf_into(abstract_model(more), folder, key=jax.random.key(0))
    convs = {name: x for name, x in by_tensor(model, model) if name.endswith("mlp.ttt_conv.weight")}
    assert len(convs) == 3
    for name, x in convs.items():
        np.testing.assert_array_equal(
            x, stored.get(name, np.zeros((48, 1, 5), np.float32)), err_msg=name
        )
    fewer = dataclasses.replace(cfg, ttt=dataclasses.replace(cfg.ttt, layers=(0,)))
    with pytest.raises(CheckpointError, match=r"unknown model\.layers\.2\.mlp\.ttt_conv\.weight"):
        load_hf_into(abstract_model(fewer), folder, key=jax.random.key(0))


def test_ttt_parameters_that_a_checkpoint_promises_are_never_new_ones(folder):
    """A lost tensor would train from its initialisation without a word."""
    cfg, stored = read_config(folder), tensors(folder)
    layer = cfg.ttt.layers[-1]
    for part in ("conv", "proj")[: 1 + cfg.ttt.proj]:
        name = f"model.layers.{layer}.mlp.ttt_{part}.weight"
        save_file({k: v for k, v in stored.items() if k != name}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"config\.json: missing {re.escape(name)}$"):
            load_hf_into(abstract_model(cfg), folder, key=jax.random.key(0))
