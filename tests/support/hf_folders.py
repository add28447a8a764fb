"""Random Hugging Face folders of every family, written and read by the safetensors package."""

import json

import jax
import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ttt_jax.model.transformer import Transformer
from ttt_jax.pretrained.hf_config import config_from_hf
from ttt_jax.pretrained.hf_weights import tensor_shapes

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
FAMILIES = {
    "qwen3": TIED | {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6, "dtype": "bfloat16"},
    "llama3_transformers_4": UNTIED
    | {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3, "torch_dtype": "bfloat16"},
    "llama3_transformers_5": UNTIED
    | {"model_type": "llama", "rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "dtype": "bfloat16"},
    "qwen2": TIED
    | {"model_type": "qwen2", "rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 8},
    "mistral": UNTIED
    | {"model_type": "mistral", "rope_theta": 1e4, "sliding_window": 8, "dtype": "float16"},
    "smollm2": TIED | {"model_type": "llama", "rope_theta": 1e5, "torch_dtype": "bfloat16"},
}


def make_folder(folder, raw, *, shards=1, change=None):
    """Write a random model of a config, in files of about equal size; `change` edits the tensors.
    Returns name -> array.
    """
    raw = BASE | raw
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    cfg = config_from_hf(raw)
    dtype = np.dtype(raw.get("torch_dtype") or raw.get("dtype") or "float32")
    rng = np.random.default_rng(0)
    stored = {}
    for name, shape in sorted(
        tensor_shapes(jax.eval_shape(lambda: Transformer(cfg, key=jax.random.key(0)))).items()
    ):
        near = 1.0 if name.endswith("norm.weight") else 0.0
        stored[name] = (near + 0.1 * rng.standard_normal(shape)).astype(dtype)
    if change is not None:
        change(stored)
    write_shards(folder, stored, shards)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    return stored


def write_shards(folder, stored, shards):
    if shards == 1:
        save_file(stored, folder / "model.safetensors")
        return
    sizes, files = [0] * shards, {}
    for name in sorted(stored, key=lambda name: -stored[name].nbytes):  # shards of about equal size
        lightest = sizes.index(min(sizes))
        sizes[lightest] += stored[name].nbytes
        files[name] = f"model-{lightest + 1:05}-of-{shards:05}.safetensors"
    for file in sorted(set(files.values())):
        save_file({name: stored[name] for name in stored if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": files})
    )


def read_folder(folder):
    """name -> array of every safetensors file of a folder, read by the safetensors package."""
    stored = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                assert name not in stored
                stored[name] = file.get_tensor(name)
    return stored


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert (x.dtype, x.shape) == (b[name].dtype, b[name].shape), name
        assert x.tobytes() == b[name].tobytes(), name


BF16 = np.dtype(ml_dtypes.bfloat16)
