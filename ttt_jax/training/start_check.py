"""The start of a run from a checkpoint: what differs is said, and both models' losses are compared
before anything starts.

A wrong base of RoPE or a wrong window trains without an error. So the source is read once more,
with its own config, and reads the first held-out rows beside the model that will be trained.

Letters: R rows, T tokens, C chunk.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ttt_jax.config import Config, MeshConfig, ModelConfig, TTTConfig, validate_context
from ttt_jax.errors import ConfigError, VerificationError
from ttt_jax.model.stack import Runtime
from ttt_jax.model.transformer import Transformer, abstract_transformer
from ttt_jax.parallel.mesh import Batch, batch_sharding, make_mesh, model_shardings
from ttt_jax.pretrained.hub import model_folder
from ttt_jax.pretrained.load import initial_model, load_pretrained, source_config
from ttt_jax.pretrained.model_changes import compare_models, computes_the_same
from ttt_jax.process.multihost import on_first_process
from ttt_jax.run.folder import check_run_dir
from ttt_jax.training.heldout import make_position_nll
from ttt_jax.training.source_size import too_large
from ttt_jax.training.step import TrainState, init_state, runtime_of

MAX_ROWS, MIN_TOKENS = 4, 1024  # of the comparison
# Relative difference of the two losses: groups of layers may be compiled otherwise, and weights be
# rounded before or after.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}


def checked_beginning(
    config: Config,
    abstract: TrainState,
    tx: optax.GradientTransformation,
    rows: Batch,
    mesh: Mesh,
) -> Callable[[], TrainState]:
    """Check what a run would begin with, see `checked_start`, and return what makes that state.

    The check is for new runs; the folder of a run that has begun is compared with `config`. The
    model that was read for the check becomes the first state, and is read again for a later one.

    Args: as of `checked_start`; `abstract`: of the whole state.

    Raises: as `checked_start`; CheckpointError: the folder holds another run or other files.
    """
    running = on_first_process(lambda: check_run_dir(config))
    read = [] if running else [checked_start(config, abstract.model, rows, mesh)]

    def fresh() -> TrainState:
        model = read.pop() if read else initial_model(config, abstract.model)
        return init_state(config, abstract, tx, model)

    return fresh


def checked_start(
    config: Config, abstract: Transformer, rows: Batch, mesh: Mesh
) -> Transformer | None:
    """Read `initial_model`, and print what differs from its source and the loss of both on the
    first held-out rows.

    The losses are not compared where the source's config is not known, or its chunks do not fit
    the mesh; that is printed, too. The source is freed before the model is read.

    Args:
      abstract: the model's structure, placed on `mesh`.
      rows: held-out rows [R, T], see `heldout_rows`.

    Raises:
      CheckpointError, ConfigError: as of `initial_model`.
      VerificationError: the losses differ by more than rounding, though nothing was changed that
        a model computes from its first token on.
    """
    if config.init_from is None:
        return None
    say = lambda text: (
        print(f"init_from {config.init_from}: {text}", flush=True)
        if jax.process_index() == 0
        else None
    )
    found = source_config(model_folder(config.init_from, "config field init_from", weights=True))
    changes = [] if found is None else compare_models(config.model, found, config.init_from)
    for line in changes:
        say(line)
    if found is not None and config.model.ttt.layers and not found.ttt.layers:
        say(_new_layers(config.model.ttt))
        say(
            f"`ttt-jax convert {config.init_from} DST --to hf --ttt.calibrate TEXT` makes a layer "
            "that gains before training (docs/continual.md)"
        )
    batch = _first_rows(config, rows, mesh)
    theirs, reason = _source_loss(config, found, batch, mesh)
    model = initial_model(config, abstract)
    assert model is not None
    if theirs is None:
        say(f"its loss on the first held-out rows was not compared with this run's: {reason}")
        return model
    ours = _loss(model, batch, mesh)
    R, T = batch["ids"].shape
    say(
        f"loss of the first held-out rows ({R} x {T} tokens): {theirs:.4f} as it is, {ours:.4f} "
        "at the start of this run"
    )
    same = found is not None and computes_the_same(config.model, found)
    if same and not abs(ours - theirs) <= TOLERANCE[config.compute_dtype] * abs(theirs):
        raise VerificationError(
            f"config field init_from = {config.init_from!r}: the first held-out rows have loss "
            f"{ours:.6g} at the start of "
            f"this run and {theirs:.6g} in the checkpoint, though nothing was changed; please "
            "report this"
        )
    return model


def _first_rows(config: Config, rows: Batch, mesh: Mesh) -> Batch:
    """Take a few rows, cut where two chunks have been read; a context axis needs whole chunks on
    each shard.
    """
    C = config.model.ttt.chunk_size if config.model.ttt.layers else 1
    shards = mesh.shape["context"]
    unit = shards * C if shards > 1 else 1
    T = min(config.data.seq_len, math.ceil(max(MIN_TOKENS, 2 * C) / unit) * unit)
    return {name: x[:MAX_ROWS, :T] for name, x in rows.items()}


def _new_layers(ttt: TTTConfig) -> str:
    """Describe TTT layers that the source does not have."""
    targets = "target", "last_target", "proj", "normalize_source"
    values = {
        name: getattr(ttt, name)
        for name in ("chunk_size", "lr", *targets, "write", "decay", "read_cap")
    }
    fields = ", ".join(f"{k} {str(v).lower()}" for k, v in values.items() if v is not None)
    return f"new TTT layers {list(ttt.layers)}, which start at zero: {fields}"


def _source_loss(
    config: Config, found: ModelConfig | None, batch: Batch, mesh: Mesh
) -> tuple[float | None, str]:
    """Compute the loss of the source as it is, or None and why not."""
    assert config.init_from is not None
    if found is None:
        return None, "its folder holds no config of a model, and nothing about it could be compared"
    if jax.process_count() > 1 or too_large(found, config.compute_dtype):
        return _loss_on_mesh(config, found, batch, mesh)
    # By the reader of all commands, which shares least with the run's own start.
    model = load_pretrained(
        model_folder(config.init_from, "config field init_from", weights=True),
        dtype=config.compute_dtype,
        runtime=Runtime(dtype=config.compute_dtype),
    )
    return _loss(model, batch, make_mesh(MeshConfig(), [jax.local_devices()[0]])), ""


def _loss_on_mesh(
    config: Config, found: ModelConfig, batch: Batch, mesh: Mesh
) -> tuple[float | None, str]:
    """Do as `_source_loss` with the source spread over the run's devices, all processes
    together.
    """
    own = dataclasses.replace(config, model=found)
    try:
        validate_context(own, mesh.shape["context"])
    except ConfigError:
        return None, f"its chunks of {found.ttt.chunk_size} tokens do not fit mesh.context"
    structure = abstract_transformer(found, runtime_of(own, mesh))
    placed = lambda x, sharding: jax.ShapeDtypeStruct(
        x.shape, config.compute_dtype, sharding=sharding
    )
    abstract = jax.tree.map(placed, structure, model_shardings(structure, mesh))
    model = initial_model(own, abstract)
    assert model is not None
    return _loss(model, batch, mesh), ""


_position_nll = functools.lru_cache(2)(make_position_nll)  # both models may be one program


def _loss(model: Transformer, batch: Batch, mesh: Mesh) -> float:
    """Average over the real tokens, TTT on."""
    placed = {name: jax.device_put(x, batch_sharding(mesh, x.shape)) for name, x in batch.items()}
    nll_RT = np.asarray(
        _position_nll(mesh)(model, placed, jnp.asarray(1.0, jnp.float32))[0], np.float64
    )
    weights_RT = np.asarray(batch["weights"], np.float64)
    return float((nll_RT * weights_RT).sum() / weights_RT.sum())
