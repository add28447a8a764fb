"""Save and restore bit for bit, onto other meshes; one-line refusals; a kill during a save."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support.checkpoints import (
    Model,
    abstract,
    assert_same_bits,
    refusal,
    save,
    save_parameters,
    state_of,
)

from ttt_jax.checkpoint.checkpointer import Checkpointer
from ttt_jax.checkpoint.parameters import find_checkpoint, load_model_params
from ttt_jax.config import CheckpointConfig, ParamGroup

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkpointer(tmp_path):
    with Checkpointer(tmp_path / "checkpoints", CheckpointConfig(keep=2)) as checkpointer:
        yield checkpointer


# --------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("async_save", [True, False])
def test_round_trip(tmp_path, async_save):
    model = Model()
    state = state_of(model)
    # as grain's: nested JSON
    data_state = {"position": 2**70, "files": ["ä", None], "loss": 0.1 + 0.2}
    with Checkpointer(tmp_path, CheckpointConfig(async_save=async_save)) as checkpointer:
        assert checkpointer.latest_step() is None
        checkpointer.save(7, model=model, opt_state=state, data_state=data_state)
        # saved already: no second time
        checkpointer.save(7, model=model, opt_state=state, data_state={"position": 0})
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        assert checkpointer.latest_step() == 7
        restored = checkpointer.restore(7, model=abstract(model), opt_state=abstract(state))
    assert_same_bits(restored.model, model)
    assert_same_bits(restored.opt_state, state)
    assert restored.data_state == data_state
    assert restored.extra == {}
    assert restored.model.embed.get_metadata()["axes"] == ("vocab", "embed")


def test_what_is_saved_may_be_donated_at_once(checkpointer):
    model = nnx.Dict(w=nnx.Param(jnp.zeros((1 << 20,)), axes=("embed",)))
    opt_state = {"count": jnp.int32(0)}
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    for step in range(4):
        checkpointer.save(step, model=model, opt_state=opt_state, data_state={})
        model = bump(model)
        jax.block_until_ready(model)
    for step in (2, 3):
        restored = checkpointer.restore(step, model=abstract(model), opt_state=abstract(opt_state))
        assert np.all(np.asarray(restored.model["w"][...]) == step)
    assert sorted(int(path.name) for path in checkpointer.directory.iterdir()) == [2, 3]  # keep = 2


def test_names_are_readable_and_nothing_is_pickled(checkpointer):
    save(checkpointer, 1, Model())
    checkpointer.wait()
    folder = checkpointer.directory / "1"
    metadata = (folder / "model" / "_METADATA").read_text() + (
        folder / "opt_state" / "_METADATA"
    ).read_text()
    assert "groups.0.down" in metadata
    assert "adamw.inner_state.adam.mu.groups.0.down" in metadata
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [
        path
        for path in files
        if path.suffix in (".pkl", ".pickle") or path.read_bytes()[:2] == b"\x80\x04"
    ]


# ------------------------------------------------------------------------------------------- meshes


def mesh_of(*shape):
    return Mesh(
        np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), ("x", "y")[: len(shape)]
    )


def sharded(tree, mesh):
    """Specs by rank: the last axis over x, the one before it over y."""
    names = mesh.axis_names
    spec = lambda leaf: (
        PartitionSpec(*[None, *reversed(names)][-leaf.ndim :]) if leaf.ndim > 1 else PartitionSpec()
    )
    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf)), tree)


def test_restore_onto_another_mesh(checkpointer):
    model = Model()
    state = state_of(model)
    before = sharded(model, mesh_of(4, 2))
    placed_state = jax.device_put(state, sharded(state, mesh_of(4, 2)))
    checkpointer.save(1, model=jax.device_put(model, before), opt_state=placed_state, data_state={})
    for mesh in (mesh_of(2, 4), mesh_of(8), mesh_of(1)):
        wanted = [
            jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                tree,
                sharded(tree, mesh),
            )
            for tree in (model, state)
        ]
        restored = checkpointer.restore(1, model=wanted[0], opt_state=wanted[1])
        assert_same_bits(restored.model, model)
        assert_same_bits(restored.opt_state, state)
        for leaf, target in zip(
            jax.tree.leaves(restored[:2]), jax.tree.leaves(wanted), strict=True
        ):
            assert leaf.sharding == target.sharding
    like_concrete = load_model_params(checkpointer.directory, jax.device_put(model, before))
    assert like_concrete.embed[...].sharding.spec == PartitionSpec("y", "x")


_OTHER_MACHINE = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import jax, numpy as np
from support.checkpoints import Model
from support.checkpoints import abstract
from ttt_jax.checkpoint.parameters import load_model_params
assert jax.device_count() == 2
model = load_model_params({path!r}, abstract(Model()))
print(sorted(np.asarray(leaf).tobytes().hex()[:16] for leaf in jax.tree.leaves(model)))
"""


def test_restore_with_other_devices(checkpointer):
    """Saved on eight devices, read by a process that has two: the stored placement must not be
    asked for.
    """
    model = jax.device_put(Model(), sharded(Model(), mesh_of(4, 2)))
    checkpointer.save(1, model=model, opt_state=state_of(Model()), data_state={})
    checkpointer.wait()
    script = _OTHER_MACHINE.format(
        root=str(ROOT), tests=str(Path(__file__).parents[1]), path=str(checkpointer.directory)
    )
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(
        sorted(np.asarray(x).tobytes().hex()[:16] for x in jax.tree.leaves(model))
    )


# --------------------------------------------------------------------------------- parameters alone


def test_load_model_params(tmp_path, checkpointer):
    for step in (5, 40):
        save(checkpointer, step, Model(seed=step))
    checkpointer.wait()
    model = abstract(Model())
    for path, step in (
        (tmp_path, 40),
        (tmp_path / "checkpoints", 40),
        (tmp_path / "checkpoints" / "5", 5),
    ):
        assert_same_bits(load_model_params(path, model), Model(seed=step))
    # For inference in bfloat16 the float32 parameters are rounded as they are read.
    assert_same_bits(
        load_model_params(tmp_path, abstract(Model(dtype=jnp.bfloat16))),
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), Model(seed=40)),
    )


def test_a_checkpoint_of_the_parameters_alone(tmp_path):
    save_parameters(tmp_path, Model())
    assert_same_bits(load_model_params(tmp_path, abstract(Model())), Model())


# ----------------------------------------------------------------------------------------- refusals


def test_other_models_are_refused(checkpointer):
    save(checkpointer, 3, Model())
    restore = lambda model: refusal(
        checkpointer.restore, 3, model=abstract(model), opt_state=abstract(state_of(model))
    ).removeprefix(f"checkpoint {checkpointer.directory / '3'}: ")
    fix = "use the model section of the config it was trained with, or start another run"
    assert restore(Model(width=12)) == (
        f"parameter groups.0.down has shape [2, 8, 8] there and [2, 8, 12] in this model; {fix}"
    )
    assert restore(Model(bias=True)) == f"has no parameter bias, which this model needs; {fix}"
    assert restore(Model(dtype=jnp.bfloat16)) == (
        f"parameter embed is float32 there and bfloat16 in this model; {fix}"
    )
    save(checkpointer, 4, Model(bias=True))
    checkpointer.wait()
    message = refusal(load_model_params, checkpointer.directory, abstract(Model()))
    assert "4: has a parameter bias, which this model lacks; " in message


def test_other_optimizer_state_is_refused(checkpointer):
    model = Model()
    save(checkpointer, 1, model, groups=(ParamGroup("embed", frozen=True),))
    message = refusal(checkpointer.restore, 1, model=model, opt_state=state_of(model))
    assert "has no optimizer state adamw.inner_state.adam.mu.embed" in message
    assert "optimizer.groups" in message


def test_nothing_to_restore(tmp_path, checkpointer):
    model = Model()
    assert "no such folder" in refusal(find_checkpoint, tmp_path / "nowhere")
    assert "holds no finished checkpoint" in refusal(find_checkpoint, tmp_path)
    save(checkpointer, 1, model)
    message = refusal(checkpointer.restore, 2, model=model, opt_state=state_of(model))
    assert message.endswith("2: no such step; the newest one is 1")


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert "choose another runs_dir" in refusal(
        Checkpointer, tmp_path / "file" / "checkpoints", CheckpointConfig()
    )


def test_what_a_checkpoint_needs_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Every file of it, not only the arrays, is synced under its temporary name; then the name
    itself.
    """
    synced, real = [], os.fsync

    def fsync(file):
        synced.append(os.readlink(f"/proc/self/fd/{file}"))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    tree = {"w": jnp.zeros((4,))}
    with Checkpointer(tmp_path / "checkpoints", CheckpointConfig()) as checkpointer:
        checkpointer.save(3, model=tree, opt_state=tree, data_state={"at": 1})
    folder = tmp_path / "checkpoints" / "3"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    early = {path.partition("3.orbax-checkpoint-tmp")[2].partition("/")[2] for path in synced}
    assert {"data_state/metadata", "extra/metadata", "checksums.json", "model/_METADATA"} <= files
    assert files - early <= {"_CHECKPOINT_METADATA", "commit_success.txt"}, (
        "Orbax writes these last; nothing reads them"
    )
    assert synced[-1] == str(folder.parent)
