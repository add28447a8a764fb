"""Writing Hugging Face folders: what comes back is what went in."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from support.streams import one_layer_model

from ttt_jax.config import ModelConfig, RopeConfig, TTTConfig
from ttt_jax.data.tokenizer import ByteTokenizer
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.model.transformer import Transformer
from ttt_jax.pretrained.export import save_pretrained
from ttt_jax.pretrained.hf_config import config_from_hf, config_to_hf, read_config
from ttt_jax.pretrained.hf_weights import load_hf
from ttt_jax.pretrained.load import load_pretrained
from ttt_jax.pretrained.safetensors_io import TensorFiles

SMALL = ModelConfig(
    vocab_size=31,
    d_model=16,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=24,
    rope=RopeConfig(base=5e5),
)


def tensors(folder):
    files = TensorFiles(folder)
    return {name: files.read(name) for name in files}


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
def test_official_checkpoints_come_back_byte_for_byte(golden_model, tmp_path, max_shard_bytes):
    folder, _ = golden_model
    out = tmp_path / "out"
    save_pretrained(
        load_hf(folder), out, dtype="float32", max_shard_bytes=max_shard_bytes, carry_from=folder
    )
    before, after = tensors(folder), tensors(out)
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert x.dtype == after[name].dtype
        assert x.tobytes() == after[name].tobytes(), name
    assert read_config(out) == read_config(folder)
    assert (out / "generation_config.json").read_bytes() == (
        folder / "generation_config.json"
    ).read_bytes()
    files = sorted(out.glob("*.safetensors"))
    if max_shard_bytes == 10**9:
        assert [f.name for f in files] == ["model.safetensors"]
    else:
        assert len(files) > 3
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in before.values())
        for file in files:  # a shard holds one tensor at least, and no more than fits
            with safe_open(file, "numpy") as shard:
                sizes = [before[name].nbytes for name in shard.keys()]  # noqa: SIM118
            assert len(sizes) == 1 or sum(sizes) <= max_shard_bytes


def test_own_ttt_fields_are_written_where_they_differ_from_the_official_code():
    plain = dataclasses.replace(SMALL, ttt=TTTConfig(layers=(1,)))
    own = dataclasses.replace(
        SMALL,
        ttt=TTTConfig(
            layers=(1,),
            last_target="prediction_error",
            normalize_source=True,
            write="ridge",
            ridge=0.5,
            decay=0.9,
            read_cap=0.1,
        ),
    )
    ours = "last_target", "normalize_source", "write", "ridge", "decay", "read_cap"
    names = {f"ttt_{name}" for name in ours}
    assert not names & config_to_hf(plain).keys()
    assert names <= config_to_hf(own).keys()
    for model in (plain, own):
        assert config_from_hf(config_to_hf(model)).ttt == model.ttt


def test_layers_of_repeated_stacks_keep_their_places(tmp_path):
    """Two plain layers and one with TTT, twice: each layer's parameters come back in that layer."""
    cfg = dataclasses.replace(SMALL, num_layers=6, ttt=TTTConfig(layers=(2, 5), chunk_size=4))
    model = Transformer(cfg, key=jax.random.key(0))
    (group,) = model.groups
    assert (group.repeats, [run.count for run in group.pattern]) == (2, [2, 1])
    save_pretrained(model, tmp_path / "out", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "out"), model)
    written = tensors(tmp_path / "out")
    second = np.stack([written[f"model.layers.{i}.mlp.gate_proj.weight"] for i in (1, 4)])
    np.testing.assert_array_equal(group.blocks[0].mlp.gate[...][:, 1], second)


def test_bfloat16_is_rounded_once(golden_model, tmp_path):
    folder, _ = golden_model
    save_pretrained(load_hf(folder), tmp_path / "out", dtype="bfloat16")
    for name, x in tensors(tmp_path / "out").items():
        np.testing.assert_array_equal(x, tensors(folder)[name].astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True, "sliding_window": 8, "full_attention_layers": (0, 3)},
        {"qkv_bias": True, "sliding_window": 8},
        {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "tie_embeddings": False},
        {"sliding_window": 8},
        {
            "rope": RopeConfig(
                kind="yarn",
                base=1e6,
                factor=4.0,
                original_max_positions=32768,
                attention_factor=1.2,
            )
        },
        {"rope": RopeConfig(kind="llama3", base=5e5, factor=8.0, original_max_positions=8192)},
        {"ttt": TTTConfig(layers=(1, 4), chunk_size=8, lr=0.25, target="input_embed", proj=False)},
        {"ttt": TTTConfig(layers=(4,), target="prediction_error", write="ridge")},
    ],
    ids=str,
)
def test_configs_come_back(changes):
    cfg = dataclasses.replace(SMALL, **changes)
    assert config_from_hf(json.loads(json.dumps(config_to_hf(cfg)))) == cfg


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qk_norm": True, "mlp_bias": True}, "no Hugging Face architecture"),
        ({"sliding_window": 8, "full_attention_layers": (1,)}, "no Hugging Face architecture"),
        ({"ttt": TTTConfig(layers=(0,), clip_norm=1.0)}, "model.ttt.clip_norm"),
    ],
)
def test_what_the_format_cannot_say_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words) as error:
        config_to_hf(dataclasses.replace(SMALL, **changes))
    assert "\n" not in str(error.value)


def test_an_existing_folder_is_left_alone(golden_model, tmp_path):
    folder, _ = golden_model
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"):
        save_pretrained(load_hf(folder), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_failure_leaves_no_folder(golden_model, tmp_path, monkeypatch):
    folder, _ = golden_model

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("ttt_jax.pretrained.hf_weights.write_tensors", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_pretrained(load_hf(folder), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_end_tokens_are_kept_without_a_tokenizer(golden_model, tmp_path):
    folder, _ = golden_model
    model = load_pretrained(folder)
    assert model.tokenizer is None
    assert model.eos_ids
    save_pretrained(model, tmp_path / "out")
    assert load_pretrained(tmp_path / "out").eos_ids == model.eos_ids


@pytest.mark.parametrize("vocab_size", [256, 257, 300])
def test_the_tokenizer_of_bytes_is_exported_as_a_file(tmp_path, vocab_size):
    """So that an export of the default run reads text; ids and end token are the same."""
    model = one_layer_model(vocab_size=vocab_size)
    model.tokenizer = built_in = ByteTokenizer()
    save_pretrained(model, tmp_path / "out")
    tokenizer = load_pretrained(tmp_path / "out").tokenizer
    every = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x3000 + 0xE000)))) + "  a\n\t b\r\n"
    for text in (every, "<end>", " x", "\u00e4\U0001f600"):
        ids = tokenizer.encode(text)
        assert list(ids) == built_in.encode(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id == (256 if vocab_size > 256 else None)
