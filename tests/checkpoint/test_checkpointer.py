"""Save and restore bit for bit, onto other meshes; one-line refusals; a kill during a save."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
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
    newest_of,
    older,
    refusal,
    save,
    save_parameters,
    state_of,
)

from ttt_jax.checkpoint.checkpointer import Checkpointer
from ttt_jax.checkpoint.checksums import find_damage
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


@pytest.mark.filterwarnings("ignore:.*has no checksums")
def test_damaged_checkpoint(tmp_path):
    # one leaf: Orbax reads the leaves at once, and drops the others when one fails
    model = {"w": jnp.ones((64,))}
    save_parameters(tmp_path, model)
    (tmp_path / "checksums.json").unlink()  # as an older version wrote it
    for path in (tmp_path / "model").glob("**/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "incomplete or damaged" in refusal(load_model_params, tmp_path, model)
    (tmp_path / "model" / "_METADATA").unlink()
    assert "incomplete or damaged" in refusal(load_model_params, tmp_path, model)


@pytest.fixture
def three(tmp_path):
    """Steps 1, 2, 3, whose models have the seeds 1, 2, 3."""
    with Checkpointer(tmp_path / "checkpoints", CheckpointConfig(keep=3)) as checkpointer:
        for step in (1, 2, 3):
            save(checkpointer, step, Model(seed=step))
    return tmp_path / "checkpoints"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(three):
    model, warned = Model(), []
    flip(three / "3/opt_state/_METADATA")
    (three / "2/data_state/metadata").unlink()
    assert newest_of(three, model, warned, before=1) is None
    assert not warned
    step, restored = newest_of(three, model, warned)
    assert step == 1
    assert_same_bits(restored.model, Model(seed=1))
    assert restored.data_state == {"step": 1}
    assert [text.replace(str(three), "") for text in warned] == [
        "checkpoint /3: damaged (opt_state/_METADATA: its content changed since it was written); "
        "step 1 is used instead "
        "(kept as 3.damaged)",
        "checkpoint /2: damaged (data_state/metadata: missing); step 1 is used instead (kept as "
        "2.damaged)",
    ]
    assert sorted(path.name for path in three.iterdir()) == ["1", "2.damaged", "3.damaged"]
    with Checkpointer(three, CheckpointConfig(keep=3)) as checkpointer:  # its number is free again
        save(checkpointer, 3, model)
    assert sorted(path.name for path in three.iterdir()) == ["1", "2.damaged", "3", "3.damaged"]


def test_when_all_are_damaged_nothing_is_touched(three):
    for step in (1, 2, 3):
        flip(three / f"{step}/extra/metadata")
    message = refusal(newest_of, three, Model(), [])
    assert (
        "3: damaged (extra/metadata: its content changed since it was written), and no older one "
        "is intact" in message
    )
    assert sorted(path.name for path in three.iterdir()) == ["1", "2", "3"]


def test_a_named_step_is_verified_too(three):
    flip(three / "3/model/manifest.ocdbt")
    with Checkpointer(three, CheckpointConfig(keep=3)) as checkpointer:
        state = abstract(state_of(Model()))
        assert "damaged (model/manifest.ocdbt: " in refusal(
            checkpointer.restore, 3, model=Model(), opt_state=state
        )
    assert "damaged (model/manifest.ocdbt: " in refusal(load_model_params, three, Model())
    flip(three / "2/opt_state/manifest.ocdbt")  # not read for the parameters
    assert_same_bits(load_model_params(three / "2", abstract(Model())), Model(seed=2))


def test_checksums_cannot_be_forged_into_other_folders(three):
    path = three / "3/checksums.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"files": {}}))
    assert find_damage(three / "3") == "checksums.json: does not match itself"
    for text in ("", "[]", "{", '{"version": 1, "files": 3, "files_sha256": ""}', "null", "\0"):
        path.write_text(text)
        assert find_damage(three / "3").startswith("checksums.json: ")
    files = {"../2/extra/metadata": {"bytes": 1, "sha256": ""}}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"version": 1, "files": files, "files_sha256": digest}))
    assert find_damage(three / "3") == "checksums.json: names files outside of the checkpoint"


def test_checkpoints_of_older_versions_have_no_checksums(three):
    older(three / "3")
    warned = []
    step, _ = newest_of(three, Model(), warned)
    assert step == 3
    assert "no checksums" in warned[0]
    (three / "3/model/manifest.ocdbt").unlink()  # noticed all the same when it cannot be read
    warned.clear()
    assert newest_of(three, Model(), warned)[0] == 2
    assert "3: damaged (" in warned[0]


def test_a_removal_that_was_killed_is_finished(three):
    (three / "1").rename(three / "1.deleting")
    (three / "7.orbax-checkpoint-tmp").mkdir()
    (three / "notes.deleting").mkdir()
    Checkpointer(three, CheckpointConfig()).close()
    assert sorted(path.name for path in three.iterdir()) == ["2", "3", "notes.deleting"]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert "choose another runs_dir" in refusal(
        Checkpointer, tmp_path / "file" / "checkpoints", CheckpointConfig()
    )


# --------------------------------------------------------------------------------------------- kill

_KILLED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import jax.numpy as jnp
from ttt_jax.checkpoint.checkpointer import Checkpointer
from ttt_jax.config import CheckpointConfig
from flax import nnx
def tree(value):
    return dict(a=jnp.full((8 << 20,), value), b=jnp.full((8 << 20,), value, jnp.bfloat16))
checkpointer = Checkpointer({path!r}, CheckpointConfig())
checkpointer.save(1, model=tree(1.0), opt_state=tree(1.5), data_state=dict(step=1))
checkpointer.wait()
checkpointer.save(2, model=tree(2.0), opt_state=tree(2.5), data_state=dict(step=2))
print("saving", flush=True)
checkpointer.wait()
print("saved", flush=True)
"""


def test_kill_during_an_asynchronous_save(tmp_path):
    path = tmp_path / "checkpoints"
    script = _KILLED.format(root=str(ROOT), tests=str(Path(__file__).parents[1]), path=str(path))
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "saving\n", child.stderr.read()
    deadline = time.monotonic() + 20
    while (
        not [entry for entry in path.iterdir() if entry.name.startswith("2")]
        and time.monotonic() < deadline
    ):
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert "saved" not in child.communicate()[0]
    left = sorted(entry.name for entry in path.iterdir())
    assert left[0] == "1"
    assert len(left) == 2, "the kill came too early or too late to test anything"
    assert left[1] != "2"

    wanted = {
        "a": jax.ShapeDtypeStruct((8 << 20,), jnp.float32),
        "b": jax.ShapeDtypeStruct((8 << 20,), jnp.bfloat16),
    }
    assert np.all(np.asarray(load_model_params(tmp_path, wanted)["a"]) == 1.0)
    with Checkpointer(path, CheckpointConfig()) as checkpointer:
        assert checkpointer.latest_step() == 1
        restored = checkpointer.restore(1, model=wanted, opt_state=wanted)
        assert restored.data_state == {"step": 1}
        assert np.all(np.asarray(restored.opt_state["b"]) == 1.5)
        # and on it goes
        checkpointer.save(
            2, model=restored.model, opt_state=restored.opt_state, data_state={"step": 2}
        )
        checkpointer.wait()
        assert checkpointer.latest_step() == 2
    # what the kill left is gone
    assert sorted(entry.name for entry in path.iterdir()) == ["1", "2"]


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
