"""Models from disk: for inference (`load_pretrained`) and as the start of a training run
(`initial_model`).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import jax
from jax.sharding import Mesh

from ttt_jax.checkpoint.checksums import CHECKPOINT_FOLDER
from ttt_jax.checkpoint.parameters import find_checkpoint, load_model_params
from ttt_jax.config import Config, MeshConfig, ModelConfig, validate_model
from ttt_jax.data.tokenizer import load_tokenizer
from ttt_jax.errors import CheckpointError, UserError
from ttt_jax.files.reading import companion_fields, excerpt, find_companion
from ttt_jax.model.param_path import param_path
from ttt_jax.model.stack import Runtime
from ttt_jax.model.transformer import Transformer, abstract_transformer
from ttt_jax.parallel.inference_mesh import check_model, inference_mesh, mesh_of
from ttt_jax.parallel.mesh import abstract_parameters
from ttt_jax.parallel.shard_mapped import make_parallel
from ttt_jax.pretrained.companions import TOKENIZER, tokenizer_of_run
from ttt_jax.pretrained.hf_config import read_config
from ttt_jax.pretrained.hf_weights import load_hf, load_hf_into, load_into, tensor_names
from ttt_jax.pretrained.hub import is_hub_id, model_folder
from ttt_jax.pretrained.model_changes import compare_models
from ttt_jax.pretrained.orbax_folder import OrbaxTensors
from ttt_jax.pretrained.orbax_layout import check_layout, is_model_folder, read_description
from ttt_jax.run.folder import CONFIG_FILE, read_run_config

DTYPES = ("float32", "bfloat16", "float16", "float64")
MAX_EOS_IDS = 64  # models in use have three at most; each one is compared at every token


def load_pretrained(
    path: str | Path,
    *,
    dtype: str = "float32",
    runtime: Runtime | None = None,
    mesh: Mesh | None = None,
) -> Transformer:
    """Load a model for inference.

    Args:
      path: a Hugging Face folder (config.json, safetensors), a folder that `ttt-jax convert --to
        orbax` wrote, or a run folder of `train.py` (its newest checkpoint) or one of its
        `checkpoints/STEP`.
      dtype: dtype of the parameters.
      runtime: how to compute; None computes in `dtype`.
      mesh: devices to split the model over (`inference_mesh`); None: one device. Every device gets
        its share of each parameter and no more.

    Returns: a `Transformer` with `.config` and `.tokenizer` (None when the folder has no
    tokenizer.json). Raises: CheckpointError or ConfigError, one line, when the folder is missing,
    incomplete or not supported, or the mesh does not suit the model; UserError for another dtype.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r:.80}: must be one of {', '.join(DTYPES)}")
    path, runtime = Path(path), runtime or Runtime(dtype=dtype)
    if mesh is not None:
        runtime = dataclasses.replace(runtime, parallel=make_parallel(mesh))
    if not path.is_dir():
        raise CheckpointError(
            f"model {path}: {'a file, no' if path.is_file() else 'no such'} folder; give a Hugging "
            "Face, converted or run folder"
        )
    has_tokenizer = find_companion(path, "tokenizer.json") is not None
    if is_model_folder(path):
        about = read_description(path)
        cfg, beside = about.model, path
        _check_mesh(cfg, mesh)
        tokenizer = about.tokenizer or (str(path) if has_tokenizer else None)
        check_layout(path, abstract_transformer(cfg))
    elif find_companion(path, "config.json") is not None:
        # What is small is refused before what is large is read.
        cfg = read_config(path)
        _check_mesh(cfg, mesh)
        eos_ids = read_eos_ids(path, cfg.vocab_size)
        tokenizer = load_tokenizer(str(path)) if has_tokenizer else None
        model = load_hf(path, runtime, dtype=dtype)
        model.tokenizer, model.eos_ids = tokenizer, eos_ids
        return model
    else:
        beside = run_folder(path)
        if beside is None:
            raise CheckpointError(
                f"model {path}: no config.json, and no {CONFIG_FILE} of a run; give a Hugging "
                "Face, converted or run folder"
            )
        config = read_run_config(beside)
        cfg, tokenizer = config.model, tokenizer_of_run(beside, config)
        _check_mesh(cfg, mesh)
    eos_ids = read_eos_ids(beside, cfg.vocab_size)
    loaded_tokenizer = load_tokenizer(tokenizer) if tokenizer is not None else None
    stacked = dataclasses.replace(runtime, scan_layers=True)  # as train.py and convert write them
    abstract = abstract_transformer(cfg, stacked)
    abstract = abstract_parameters(abstract, dtype, mesh_of(runtime.parallel))
    model = load_model_params(path, abstract)
    model = model if runtime.scan_layers else unstacked(model)
    model.tokenizer, model.eos_ids = loaded_tokenizer, eos_ids
    return model


def _check_mesh(cfg: ModelConfig, mesh: Mesh | None) -> None:
    if mesh is not None:
        check_model(cfg, mesh.shape)


def load_model(
    folder: str | Path,
    dtype: str | None = None,
    *,
    decodes: bool = False,
    mesh: MeshConfig | None = None,
) -> Transformer:
    """Load a model as the commands compute it.

    Args:
      dtype: of the parameters and the computation; None: float32 on CPUs, bfloat16 elsewhere.
      decodes: it will write token by token. On an accelerator that wants layers with arrays of
        their own; on a CPU the scan's shorter compile time wins.
      mesh: sizes of the mesh to split it over; None: one device. Raises ConfigError where they do
        not fit.
    """
    devices = None if mesh is None else inference_mesh(mesh)
    on_cpu = jax.default_backend() == "cpu"
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    runtime = Runtime(dtype=dtype, scan_layers=on_cpu or not decodes)
    return load_pretrained(folder, dtype=dtype, runtime=runtime, mesh=devices)


def unstacked(model: Transformer) -> Transformer:
    """Give the same parameters arrays of their own for each layer (`Runtime.scan_layers` off)."""
    runtime = dataclasses.replace(model.runtime, scan_layers=False)
    target = abstract_transformer(model.config, runtime)
    arrays, names = {}, tensor_names(model)
    for path, x in jax.tree_util.tree_flatten_with_path(model)[0]:
        own = names[param_path(path)]
        if param_path(path).startswith("groups."):
            x = x.reshape(len(own), 1, 1, *x.shape[2:])
            arrays |= {name: x[n] for n, name in enumerate(own)}
        else:
            arrays[own[0]] = x
    names, mesh = tensor_names(target), mesh_of(runtime.parallel)
    target = abstract_parameters(target, model.embed[...].dtype, mesh)
    leaf = lambda path, struct: jax.device_put(arrays[names[param_path(path)][0]], struct.sharding)
    return jax.tree_util.tree_map_with_path(leaf, target)


def read_eos_ids(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """Read the end tokens of `generation_config.json`, else of `config.json`; none when neither
    names one.

    Raises: CheckpointError when the file is not a JSON object of bounded size, or the field is not
      a token id below `vocab_size` or a list of `MAX_EOS_IDS` of them at most.
    """
    for name in ("generation_config.json", "config.json"):
        found = companion_fields(folder, name).get("eos_token_id")
        if found is None:
            continue
        where, ids = f"{folder / name}: eos_token_id", found if isinstance(found, list) else [found]
        if len(ids) > MAX_EOS_IDS:
            raise CheckpointError(
                f"{where} lists {len(ids)} tokens; at most {MAX_EOS_IDS} may end a text"
            )
        for i in ids:
            if type(i) is not int or not 0 <= i < vocab_size:
                raise CheckpointError(
                    f"{where} = {excerpt(i)}: must be a token id from 0 to {vocab_size - 1}, or a "
                    "list of them; correct it"
                )
        return tuple(ids)
    return ()


def initial_model(config: Config, abstract: Transformer) -> Transformer | None:
    """Load the parameters that `config.init_from` names, placed like `abstract`; None for a random
    start.

    A source without TTT parameters gets those of continual training, which leave its function
    unchanged. What may differ from the source's config is said in model_changes.py; `checked_start`
    prints it.

    Raises: CheckpointError or ConfigError, one line, when the source is missing or does not fit
    `config.model`.
    """
    if config.init_from is None:
        return None
    source = model_folder(config.init_from, "config field init_from", weights=True)
    found = source_config(source)
    if found is not None:
        compare_models(config.model, found, config.init_from)
    if not is_model_folder(source) and find_companion(source, "config.json") is not None:
        return load_hf_into(abstract, source, key=jax.random.key(config.seed))
    if found is None:
        return load_model_params(source, abstract)
    stored = abstract_transformer(found)
    if is_model_folder(source):
        check_layout(source, stored)
    if tensor_names(stored) == tensor_names(abstract):
        return load_model_params(source, abstract)
    # Other TTT layers or windows group the layers otherwise: tensor by tensor.
    tensors = OrbaxTensors(find_checkpoint(source), stored)
    key = jax.random.key(config.seed)
    return load_into(abstract, tensors, config.init_from, found.ttt, key=key)


def source_config(source: Path) -> ModelConfig | None:
    """Read the model's config in a Hugging Face, converted or run folder (or one of its steps);
    None: it holds parameters alone.

    Raises: CheckpointError or ConfigError, one line, when the file that says it cannot be read.
    """
    if is_model_folder(source):
        return read_description(source).model
    if find_companion(source, "config.json") is not None:
        return read_config(source)
    run = run_folder(source)
    if run is None:
        return None
    model = read_run_config(run).model
    validate_model(model)
    return model


def source_tokenizer(source: Path, name: str) -> str:
    """Say where the tokenizer of a Hugging Face, converted or run folder is: "bytes", or a place.

    Args:
      name: what the user calls the folder; it is the tokenizer's place in most cases.
    """
    if is_model_folder(source):
        return read_description(source).tokenizer or name
    run = None if find_companion(source, "config.json") is not None else run_folder(source)
    if run is None:
        return name
    place = tokenizer_of_run(run, read_run_config(run))
    return name if place == str(source.absolute()) else place


def training_tokenizer(config: Config) -> str:
    """Find the tokenizer of a run that begins or goes on: what `data.tokenizer` names, or the
    run's own copy when that is gone, or a model of the Hugging Face Hub.

    Raises: CheckpointError, one line, when the Hub cannot help.
    """
    name = config.data.tokenizer
    if name == "bytes" or os.path.lexists(Path(name).expanduser()):
        return name
    if find_companion(config.run_dir, TOKENIZER) is not None:
        return str(config.run_dir)
    if is_hub_id(name):
        return str(model_folder(name, "config field data.tokenizer", weights=False))
    return name


def run_folder(path: Path) -> Path | None:
    """Find the run folder that `path` is, or is the `checkpoints` of, or one of their steps."""
    path = path.absolute()
    above = [path, *([path.parent] if path.name == CHECKPOINT_FOLDER else [])]
    above += [path.parent.parent] if path.parent.name == CHECKPOINT_FOLDER else []
    return next((folder for folder in above if os.path.lexists(folder / CONFIG_FILE)), None)
