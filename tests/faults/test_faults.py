"""A small version of each fault of the harness (`python tests/faults/run.py` is the full one)."""

import os
import shutil
import subprocess

import pytest
from faults import corrupted, scenarios
from faults.job import Job


def can_mount(folder):
    mounted = shutil.which("mount") and os.geteuid() == 0
    return (
        mounted
        and subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=False).returncode
        == 0
    )


def test_a_flipped_byte_in_any_file_of_a_checkpoint(tmp_path, monkeypatch):
    """Named, and the step before is restored. (The full harness also cuts and deletes each, and
    trains on.)
    """
    monkeypatch.setattr(corrupted, "DAMAGES", corrupted.DAMAGES[:1])
    job = Job(tmp_path, steps=9)
    job.finish("run")
    assert "damages" in corrupted.every_file(job, job.runs / "run", tmp_path / "scratch")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "kill_9",
        "sigterm",
        "corrupt",
        "truncated_data",
        "not_finite",
        "one_of_two",
        "sigterm_of_two",
        "shared_cache",
        "two_jobs",
        "interrupted_twice",
        "lost_terminal",
        "signals_anywhere",
    ],
)
def test_fault(name, tmp_path):
    trials = {
        "kill_9": 6,
        "sigterm": 3,
        "corrupt": 1,
        "truncated_data": 1,
        "not_finite": 1,
        "one_of_two": 1,
        "sigterm_of_two": 2,
        "shared_cache": 1,
        "two_jobs": 2,
        "interrupted_twice": 2,
        "lost_terminal": 1,
        "signals_anywhere": 12,
    }[name]
    getattr(scenarios, name)(tmp_path, trials)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["disk_full", "disk_full_of_two"])
def test_disk_full(name, tmp_path):
    (tmp_path / "probe").mkdir()
    if not can_mount(tmp_path / "probe"):
        pytest.skip("needs the right to mount a tmpfs")
    subprocess.run(["umount", str(tmp_path / "probe")], check=True)
    getattr(scenarios, name)(tmp_path)
