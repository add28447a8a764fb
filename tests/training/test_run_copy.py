"""A run with `checkpoint.copy_to`: killed, its disk lost, started again elsewhere; the curve and
the weights are those of a run that nothing happened to.
"""

import shutil
import signal
import threading
import time
from pathlib import Path

import fsspec
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from support.jobs import TINY, curve, one_device, start, wait_for_step, write_corpus
from support.stores import REMOTE, bucket, files_of, listed, serving

import train
from ttt_jax.checkpoint.checksums import CHECKSUMS
from ttt_jax.data import Loader
from ttt_jax.errors import TrainingError


def arrays_of(run_dir: Path, step: int):
    """The bits of the parameters and moments of a step."""

    def args(path):
        tree = reader.metadata(path).item_metadata.tree
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.args.PyTreeRestore(restore_args=jax.tree.map(lambda _: as_numpy, tree))

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        paths = [run_dir / "checkpoints" / str(step) / item for item in ("model", "opt_state")]
        trees = [reader.restore(path, args=args(path)) for path in paths]
    return [{name: x.tobytes() for name, x in sorted(tree.items())} for tree in trees]


@pytest.fixture(scope="module", autouse=True)
def few_to_compile_for():
    with one_device():
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(overrides, folder of the run) of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    words = [*TINY, f"--data.train={write_corpus(folder / 'corpus')}", "--name=a"]
    words += ["--checkpoint.keep=1"]
    assert train.main([*words, f"--runs_dir={folder}"]) == 0
    return words, folder / "a"


# The emulator of gs:// serves one request at a time, and a job would wait for minutes.
@pytest.fixture(params=["folder", REMOTE[0]])
def target(request, tmp_path):
    """Where the copy goes."""
    if request.param == "folder":
        yield str(tmp_path / "copies")
        return
    with serving(request.param):
        yield f"{bucket(request.param)}/runs"


def wait_for_a_step(target: str) -> None:
    store = fsspec.filesystem(target.partition("://")[0] if "://" in target else "file")
    for _ in range(1000):
        store.invalidate_cache()
        if any(store.exists(f"{target}/a/checkpoints/{step}/{CHECKSUMS}") for step in (4, 8)):
            return
        time.sleep(0.05)
    raise AssertionError("nothing is copied")


def copied_part(run_dir: Path) -> dict[str, bytes]:
    return {
        name: data
        for name, data in files_of(run_dir).items()
        if name.split("/")[0] not in ("compile_cache", "tensorboard", ".lock")
    }


def compare(run_dir: Path, expected: Path, target: str):
    assert curve(run_dir) == curve(expected)
    assert arrays_of(run_dir, 16) == arrays_of(expected, 16)
    there = listed(target)
    assert there == copied_part(run_dir), "the copy is the run folder, report included"
    assert {"report.json", "metrics.jsonl", f"checkpoints/16/{CHECKSUMS}"} < there.keys()
    assert {name.split("/")[1] for name in there if name.startswith("checkpoints")} == {"16"}


def test_a_run_whose_disk_is_lost_goes_on_elsewhere(
    undisturbed, target, tmp_path, monkeypatch, capsys
):
    words, expected = undisturbed
    words = [*words, f"--checkpoint.copy_to={target}"]
    following = Loader.__next__

    def until_the_machine_goes(loader):
        if loader.batches_done == 11:
            wait_for_a_step(target)
            raise TrainingError("the machine is gone")
        return following(loader)

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "__next__", until_the_machine_goes)
        assert train.main([*words, f"--runs_dir={tmp_path / 'first'}"]) == 1
    for thread in threading.enumerate():  # a machine that is gone copies nothing any more
        if thread.name.startswith("copy"):
            thread.join(60)
    shutil.rmtree(tmp_path / "first")
    assert capsys.readouterr().err == "error: the machine is gone\n"
    assert train.main([*words, f"--runs_dir={tmp_path / 'second'}"]) == 0
    said = f"config field checkpoint.copy_to = {target!r}: fetched step "
    assert said in capsys.readouterr().out
    compare(tmp_path / "second" / "a", expected, target)


@pytest.mark.slow
def test_killed_and_its_disk_lost(undisturbed, target, tmp_path):
    """With processes of their own, and kill -9."""
    words, expected = undisturbed[0], tmp_path / "a"
    job = start([*words, f"--runs_dir={tmp_path}"])
    output = job.communicate(timeout=300)[0]
    assert job.returncode == 0, output
    words = [*words, f"--checkpoint.copy_to={target}"]
    job = start([*words, f"--runs_dir={tmp_path / 'first'}"], sleep=0.3)
    wait_for_step(tmp_path / "first" / "a", 11, job)
    job.send_signal(signal.SIGKILL)
    job.communicate(timeout=60)
    shutil.rmtree(tmp_path / "first")
    job = start([*words, f"--runs_dir={tmp_path / 'second'}"])
    output = job.communicate(timeout=300)[0]
    assert job.returncode == 0, output
    assert f"config field checkpoint.copy_to = {target!r}: fetched step " in output
    compare(tmp_path / "second" / "a", expected, target)
