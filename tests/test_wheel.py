"""What is installed without the repository: one package that holds the job, the presets and the
kernels, and commands that run in an empty folder.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version
from support.compilation import CHEAP
from support.hf_folders import make_folder
from support.tokenizers import TEMPLATE, write_tokenizer

from ttt_jax.config import preset_names

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("ttt_jax", "configs", "kernels_pallas", "tests/support")
FILES = ("train.py", "pyproject.toml", "README.md", "LICENSE")
SMALL = {
    "model_type": "llama",
    "vocab_size": 300,
    "num_hidden_layers": 7,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def python(*words, folder, check=True, typed=None, **env):
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **env}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        input=typed,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a source distribution, which is built from the tree."""
    if Version(importlib.metadata.version("setuptools")) < Version("77"):
        pytest.skip("needs setuptools 77, as in the extra `test`")
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns("__pycache__")
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / "tree" / part, symlinks=True, ignore=unwanted)
    for name in FILES:
        shutil.copy(ROOT / name, folder / "tree")
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    python("-c", build, folder=folder / "tree")
    (source,) = folder.glob("*.tar.gz")
    pip = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    python(*pip, source, "-w", folder, folder=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel):
    """The wheel, installed into a folder of its own."""
    target = wheel.parent / "target"
    pip = ("-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", target)
    python(*pip, wheel, folder=wheel.parent)
    return target


@pytest.fixture
def run(installed, tmp_path):
    """A command of the installed copy in an empty folder."""

    def run(*words, **options):
        env = {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        env |= {"XLA_FLAGS": CHEAP}  # one device, as a newcomer has
        return python("-m", "ttt_jax", *words, folder=tmp_path, **options, **env)

    return run


def test_it_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = {n for n in archive.namelist() if ".dist-info/" not in n}
        assert archive.read("ttt_jax/train.py") == (ROOT / "train.py").read_bytes()
    places = [("ttt_jax", "ttt_jax"), ("kernels_pallas", "ttt_jax/kernels_pallas")]
    wanted = {
        f"{inside}/{path.relative_to(ROOT / place).as_posix()}"
        for place, inside in places
        for path in (ROOT / place).rglob("*.py")
    }
    wanted |= {f"ttt_jax/presets/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert found == wanted | {"ttt_jax/py.typed"}
    assert {"ttt_jax/train.py", "ttt_jax/kernels_pallas/tpu.py"} < wanted


def test_its_commands_run_in_an_empty_folder(run, installed, tmp_path):
    versions = f"ttt-jax, version 0.1.0 (jax {importlib.metadata.version('jax')})\n"
    assert run("--version").stdout == versions
    text = run("train", "--help").stdout
    assert all(word in text for word in ("ttt-jax train", "--model.ttt.chunk_size", "qwen3_0p6b"))
    assert (installed / "bin" / "ttt-jax").is_file()
    for words, message in [
        (["nosuch"], "config nosuch: no such file, and no preset of this name"),
        (["qwen3_0p6b"], "checkpoints/Qwen3-0.6B"),  # a path that the preset leaves to the user
        (["default", "--steps=none"], "config field steps"),
    ]:
        done = run("train", *words, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_its_kernels_are_its_own(installed, tmp_path):
    """Another package's `train` and `kernels_pallas` do not get in the way."""
    for name in ("train", "kernels_pallas"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError\n")
    code = (
        "import ttt_jax.train, ttt_jax.ops, ttt_jax.kernels_pallas.tpu as tpu\n"
        "from ttt_jax.config import preset_names\n"
        "print(tpu.__file__, *preset_names())"
    )
    out = python("-c", code, folder=tmp_path, PYTHONPATH=str(installed), JAX_PLATFORMS="cpu")
    file = str(installed / "ttt_jax" / "kernels_pallas" / "tpu.py")
    assert out.stdout.split() == [file, *preset_names()]


def write_text(folder):
    """What a newcomer has: one file of text."""
    (folder / "my.txt").write_text(
        "".join(f"{n} to be, or not to be: {n**7}\n" for n in range(900))
    )


def test_the_first_commands_of_a_newcomer(run, tmp_path):
    """A checkpoint and a text: train, and talk to what was trained. Nothing else is said."""
    make_folder(tmp_path / "small", SMALL)
    settings = {"eos_token": "<end>", "chat_template": TEMPLATE}
    write_tokenizer(tmp_path / "small", tokenizer_config=settings)
    write_text(tmp_path)
    first = run("train", "--init_from", "small", "--data.train", "my.txt", "--steps", "2")
    for part in ("TTT layers", "loss of the first held-out rows", "step 2/2", "Held-out loss by"):
        assert part in first.stdout
    folder = tmp_path / "runs" / "continual"
    assert first.stdout.endswith("report: runs/continual/report.html\n")
    assert "Held-out loss by position" in (folder / "report.html").read_text()
    shutil.rmtree(tmp_path / "small")  # a run stands alone
    (tmp_path / "part.txt").write_text("to be, or not to be\n" * 20)
    said = run("chat", "--model", "runs/continual", typed="/read part.txt\nhello\n/stats\n")
    assert said.stdout.strip()
    assert "tokens/s" in said.stderr
    assert "||S||/||W||" in said.stderr


@pytest.mark.slow
def test_a_text_alone(run, tmp_path):
    """The default model, from scratch."""
    write_text(tmp_path)
    out = run("train", "--data.train", "my.txt").stdout
    assert "holds out the end of my.txt" in out
    assert "step 200/200" in out
    said = run("chat", "--model", "runs/default", "--max-new-tokens", "8", typed="12 to be\n")
    assert said.stdout.strip()


@pytest.mark.slow
def test_the_default_run_needs_no_repository(run, tmp_path):
    """It reads Python's own standard library; what it has trained is a model for the others."""
    run("train", "--steps", "2")
    report = json.loads((tmp_path / "runs" / "default" / "report.json").read_text())
    assert report["steps"] == 2
    assert {"positions", "ttt_off", "ttt_on"} <= set(report["heldout"])
    page = tmp_path / "runs" / "default" / "report.html"
    assert "Held-out loss by position" in page.read_text()
    page.unlink()
    run("report", "runs/default")
    words = ("--model", "runs/default", "--prompt", "def ", "--max-new-tokens", "4", "--json")
    assert json.loads(run("generate", *words).stdout)["text"]
    assert "fits" in run("plan", "--config", "qwen3_0p6b", "--topology", "h100:8").stdout
    assert page.is_file()
