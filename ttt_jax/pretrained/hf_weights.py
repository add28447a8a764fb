"""Tensors of Hugging Face folders into our model, and back.

The name map is one table, `tensor_names`; a checkpoint must hold exactly the tensors that it lists.
Tensors are read and written one at a time through safetensors, never unpickled.

Letters: R repeats of a scanned pattern, N layers of a run in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.config import ModelConfig, TTTConfig
from ttt_jax.errors import CheckpointError
from ttt_jax.files.reading import list_names
from ttt_jax.model.param_path import param_path
from ttt_jax.model.stack import Runtime
from ttt_jax.model.transformer import Transformer, abstract_transformer
from ttt_jax.model.ttt_mlp import KERNEL
from ttt_jax.parallel.inference_mesh import mesh_of
from ttt_jax.parallel.mesh import abstract_parameters
from ttt_jax.pretrained.hf_config import read_config
from ttt_jax.pretrained.safetensors_io import TensorFiles, TensorSource, TensorSpec, write_tensors

# -------------------------------------------------------------------------------------------- names

_BLOCK_NAMES = {
    "attention_norm.scale": "input_layernorm.weight",
    "attention.q": "self_attn.q_proj.weight",
    "attention.k": "self_attn.k_proj.weight",
    "attention.v": "self_attn.v_proj.weight",
    "attention.o": "self_attn.o_proj.weight",
    "attention.q_bias": "self_attn.q_proj.bias",
    "attention.k_bias": "self_attn.k_proj.bias",
    "attention.v_bias": "self_attn.v_proj.bias",
    "attention.o_bias": "self_attn.o_proj.bias",
    "attention.q_norm.scale": "self_attn.q_norm.weight",
    "attention.k_norm.scale": "self_attn.k_norm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "mlp.gate": "mlp.gate_proj.weight",
    "mlp.up": "mlp.up_proj.weight",
    "mlp.down": "mlp.down_proj.weight",
    "mlp.gate_bias": "mlp.gate_proj.bias",
    "mlp.up_bias": "mlp.up_proj.bias",
    "mlp.down_bias": "mlp.down_proj.bias",
    "mlp.target.conv": "mlp.ttt_conv.weight",
    "mlp.target.proj": "mlp.ttt_proj.weight",
}
_TOP_NAMES = {
    "embed": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "head": "lm_head.weight",
}


def tensor_names(model: Transformer) -> dict[str, list[str]]:
    """Name, for each parameter path of the model, the checkpoint's tensors: one, or one per layer
    of a stack.
    """
    names = {}
    for path, _ in jax.tree_util.tree_flatten_with_path(model)[0]:
        ours = param_path(path)
        stacked = re.fullmatch(r"groups\.(\d+)\.blocks\.(\d+)\.(.+)", ours)
        if stacked is None:
            names[ours] = [_TOP_NAMES[ours]]
        else:
            layers = model.groups[int(stacked[1])].layer_indices(int(stacked[2]))
            names[ours] = [f"model.layers.{layer}.{_BLOCK_NAMES[stacked[3]]}" for layer in layers]
    return names


def parameters(model: Transformer) -> dict[str, Any]:
    """Return parameter path -> array (or structure) of a model."""
    return {param_path(path): x for path, x in jax.tree_util.tree_flatten_with_path(model)[0]}


def tensor_places(model: Transformer) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return tensor name -> (parameter path, index in its stack [R, N, ...]; () where there is
    none).
    """
    leaves, places = parameters(model), {}
    for ours, theirs in tensor_names(model).items():
        stack = leaves[ours].shape[:2] if ours.startswith("groups.") else ()
        for i, name in enumerate(theirs):
            places[name] = (ours, tuple(map(int, np.unravel_index(i, stack))) if stack else ())
    return places


def tensor_shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that the model needs, under the checkpoint's names."""
    leaves = parameters(model)
    return {
        name: tuple(leaves[ours].shape[len(index) :])
        for name, (ours, index) in tensor_places(model).items()
    }


# ------------------------------------------------------------------------------------------ reading


def load_hf(
    folder: str | Path, runtime: Runtime | None = None, *, dtype: str = "float32"
) -> Transformer:
    """Read a Hugging Face folder into a `Transformer`.

    Args:
      folder: holds config.json and model.safetensors (or shards with an index).
      runtime: how to compute; None computes in float32.
      dtype: dtype of the parameters; training wants float32.

    Raises: ConfigError for an unsupported architecture; CheckpointError listing the tensors that
      are missing, that the model has no place for, or whose shape differs, or naming one that holds
      NaN.
    """
    cfg = read_config(folder)
    files = TensorFiles(folder)
    abstract = abstract_model(cfg, files, str(folder), runtime)
    check_tensors(abstract, files, str(folder))
    mesh = mesh_of(abstract.runtime.parallel)
    return fill(abstract_parameters(abstract, dtype, mesh), files.read)


def abstract_model(
    cfg: ModelConfig, source: TensorSource, where: str, runtime: Runtime | None = None
) -> Transformer:
    """Make the model's structure without arrays. Raises CheckpointError when the source has too few
    tensors for its layers.
    """
    count = sum(1 for _ in source)
    if cfg.num_layers > count:  # before anything is built for each layer
        raise CheckpointError(
            f"checkpoint {where}: its config has {cfg.num_layers} layers, but it holds {count} "
            "tensors"
        )
    return abstract_transformer(cfg, runtime or Runtime())


def load_hf_into(abstract: Transformer, folder: str | Path, *, key: jax.Array) -> Transformer:
    """Call `load_into` with a Hugging Face folder."""
    found = read_config(folder).ttt
    return load_into(abstract, TensorFiles(folder), str(folder), found, key=key)


def load_into(
    abstract: Transformer, source: TensorSource, where: str, found: TTTConfig, *, key: jax.Array
) -> Transformer:
    """Read tensors into the places (dtype and sharding) of an abstract model, which may have more
    TTT layers.

    TTT parameters that are new get the initialisation of continual training, see `fresh_ttt_rows`.

    Args:
      found: what the source's config says. Parameters that it promises are not new: without them
        the source is damaged.
    """
    parts = ("conv", "proj") if found.proj else ("conv",)
    promised = {f"model.layers.{i}.mlp.ttt_{part}.weight" for i in found.layers for part in parts}
    wanted = {name for names in tensor_names(abstract).values() for name in names}
    fresh = {name for name in wanted if ".mlp.ttt_" in name} - set(source) - promised
    check_tensors(abstract, source, where, optional=fresh)
    D, std = abstract.config.d_model, abstract.config.init_std
    return fill(
        abstract,
        lambda name: fresh_ttt_rows(name, D, std, key) if name in fresh else source.read(name),
    )


def fresh_ttt_rows(
    name: str, D: int, std: float, key: jax.Array, start: int = 0, stop: int | None = None
) -> np.ndarray:
    """Make rows of a TTT tensor as continual training initialises it, float32; they depend on the
    key and the name alone.

    The convolution is zero and W_target diagonal with entries N(0, std^2), so the model starts
    exactly at its pretrained function (docs/design.md).
    """
    start, stop, _ = slice(start, stop).indices(D)
    if name.endswith("ttt_conv.weight"):
        return np.zeros((stop - start, 1, KERNEL), np.float32)
    seed = np.frombuffer(np.asarray(jax.random.key_data(key)).tobytes() + name.encode(), np.uint8)
    diagonal_D = np.random.default_rng(seed).normal(0, std, D).astype(np.float32)
    rows = np.zeros((stop - start, D), np.float32)
    rows[np.arange(stop - start), np.arange(start, stop)] = diagonal_D[start:stop]
    return rows


def check_tensors(
    abstract: Transformer, source: TensorSource, where: str, optional: Set[str] = frozenset()
) -> None:
    """Check that every tensor of the model is there with its shape (but for the optional ones), and
    nothing else is.

    Raises: CheckpointError listing what is missing, unknown, of the wrong shape or not made of
    floats.
    """
    shapes = tensor_shapes(abstract)
    # A tied head is sometimes written out.
    ignored = {"lm_head.weight"} if abstract.head is None else set()
    # Old exports carry this constant.
    ignored |= {name for name in source if name.endswith("rotary_emb.inv_freq")}
    missing = sorted(set(shapes) - set(source) - optional)
    extra = sorted(set(source) - set(shapes) - ignored)
    both = sorted(set(shapes) & set(source))
    shared = [(name, source.shape(name), shapes[name]) for name in both]
    wrong = [
        f"{name} {found} (expected {wanted})" for name, found, wanted in shared if found != wanted
    ]
    integers = [name for name in both if source.dtype(name) is None]
    kinds = {
        "missing": missing,
        "unknown": extra,
        "wrong shape": wrong,
        "not of floats (quantised?)": integers,
    }
    problems = [f"{kind} {list_names(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError(
            f"checkpoint {where}: its tensors do not fit its config.json: {'; '.join(problems)}"
        )


def fill(abstract: Transformer, read: Callable[[str], np.ndarray]) -> Transformer:
    """Put tensors in the places of an abstract model, stacking the repeats of scanned layers."""
    names = tensor_names(abstract)

    def leaf(path, struct):
        ours = param_path(path)
        arrays = [read(name).astype(struct.dtype) for name in names[ours]]
        return jax.device_put(np.stack(arrays).reshape(struct.shape), struct.sharding)

    return jax.tree_util.tree_map_with_path(leaf, abstract)


# ------------------------------------------------------------------------------------------ writing


def write_model(model: Transformer, folder: Path, dtype: str, max_shard_bytes: int) -> None:
    """Write the safetensors of a model, one layer of a stack at a time."""
    leaves, places = parameters(model), tensor_places(model)
    target = np.dtype(jnp.dtype(dtype))
    specs = [TensorSpec(name, shape, target) for name, shape in tensor_shapes(model).items()]

    def rows(spec: TensorSpec) -> Iterator[np.ndarray]:
        ours, index = places[spec.name]
        yield np.asarray(leaves[ours][index].astype(dtype))

    write_tensors(folder, specs, rows, max_shard_bytes)
