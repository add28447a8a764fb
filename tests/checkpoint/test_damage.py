"""Checkpoints that are damaged, old, or cut short by a kill."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
from ttt_jax.checkpoint.parameters import load_model_params
from ttt_jax.config import CheckpointConfig

ROOT = Path(__file__).parents[2]


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
