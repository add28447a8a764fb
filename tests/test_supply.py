"""What is installed: declared in pyproject.toml, bounded where private parts are used, pinned with
hashes for CI.
"""

import ast
import re
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = {
    "orbax-checkpoint": "orbax",
    "pyyaml": "yaml",
    "lm-eval": "lm_eval",
    "ml-dtypes": "ml_dtypes",
    "huggingface-hub": "huggingface_hub",
    "tensorboardx": "tensorboardX",
    "jax-triton": "jax_triton",
    "absl-py": "absl",
}
# asked for by name in a config; of jax-triton; of grain
OPTIONAL = {"wandb", "triton", "array_record"}


def requirements(*groups):
    lines = [
        *PROJECT["dependencies"],
        *(line for group in groups for line in PROJECT["optional-dependencies"][group]),
    ]
    return {found.name.lower(): found for found in map(Requirement, lines)}


def pinned():
    """Package -> version, and the number of its hashes."""
    text = (ROOT / "constraints/ci-py311.txt").read_text(encoding="utf-8")
    parts = re.split(r"\n(?=\S)", text.strip())
    found = [re.match(r"([A-Za-z0-9._-]+)==(\S+)", part) for part in parts]
    assert all(found), "one package in each part"
    return {
        match[1].lower(): (match[2], part.count("--hash=sha256:"))
        for match, part in zip(found, parts, strict=True)
    }


def test_every_import_is_declared():
    declared = requirements("gpu", "eval", "test")
    known = (
        {MODULES.get(name, name) for name in declared}
        | OPTIONAL
        | {"ttt_jax", "kernels_pallas", "train", "jaxlib"}
    )
    imported = set()
    for path in (
        *ROOT.glob("ttt_jax/**/*.py"),
        *ROOT.glob("kernels_pallas/**/*.py"),
        ROOT / "train.py",
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add((node.module or "").split(".")[0])
    assert not imported - known - set(sys.stdlib_module_names)


def test_private_parts_have_upper_bounds():
    found = requirements()
    for name in ("jax", "flax", "orbax-checkpoint", "grain"):
        assert any(part.operator == "<" for part in found[name].specifier), name
    assert Version("0.12.0") in found["jax"].specifier
    assert Version("0.13.0") not in found["jax"].specifier


def test_ci_installs_pinned_versions_with_hashes():
    text = (ROOT / "constraints/ci-py311.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*-(?!-hash)", text, re.MULTILINE), "no options such as an index"
    versions = pinned()
    assert min(hashes for _, hashes in versions.values()) > 0
    for name, wanted in requirements("test", "dev").items():
        if name != "ttt-jax":
            assert Version(versions[name][0]) in wanted.specifier, name
    # builds the project, without a download of its own
    assert Version(versions["setuptools"][0]) >= Version("77")
    run = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "--require-hashes -r constraints/ci-py311.txt" in run
    assert all(
        "--require-hashes" in line or "--no-deps" in line
        for line in run.splitlines()
        if "pip install" in line
    )
