"""What is installed: every import is declared, what only some need is an extra, private parts have
upper bounds, and CI installs what constraints/ pins with hashes.
"""

import ast
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
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
    "pytest-xdist": "xdist",
}
# The only files that need an extra as soon as they are imported; others ask in a function.
NEED_AN_EXTRA = {
    "ttt_jax/eval/harness.py": "eval",
    "kernels_pallas/triton_kernels.py": "gpu",
}
# A program that test_sglang.py starts in an environment that has SGLang.
IN_ANOTHER_ENVIRONMENT = {"tests/memory/sglang_engine.py"}
PINNED = {"constraints/ci-py311.txt": ["dev"], "constraints/ci-py312.txt": ["dev"]}
PINNED["constraints/docs-py312.txt"] = ["docs"]


def requirements(*extras, main=True):
    """Name -> requirement of the main dependencies and of extras, with those that they name."""
    optional = PROJECT["optional-dependencies"]
    lines = [*(PROJECT["dependencies"] if main else ())]
    lines += [line for extra in extras for line in optional[extra]]
    found = {}
    for wanted in map(Requirement, lines):
        if wanted.name == PROJECT["name"]:
            found |= requirements(*wanted.extras, main=False)
        else:
            found[wanted.name.lower()] = wanted
    return found


def modules(declared):
    return {MODULES.get(name, name) for name in declared}


def imports(node, when="first"):
    """(module, "first" or "late") of every import: late ones stand in functions or under
    TYPE_CHECKING.
    """
    for child in ast.iter_child_nodes(node):
        late = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        )
        if isinstance(child, ast.Import):
            yield from ((alias.name.split(".")[0], when) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and not child.level:
            yield (child.module or "").split(".")[0], when
        elif (
            isinstance(child, ast.Call)
            and ast.unparse(child.func).endswith("import_module")
            and isinstance(child.args[0], ast.Constant)
        ):
            yield child.args[0].value.split(".")[0], when
        yield from imports(child, "late" if late else when)


def foreign(text):
    """Module -> "first" or "late", of packages that are not Python's own nor the project's."""
    found = {}
    for module, when in imports(ast.parse(text)):
        if module not in sys.stdlib_module_names | {"ttt_jax"} and found.get(module) != "first":
            found[module] = when
    return found


def sources():
    found = [*ROOT.glob("ttt_jax/**/*.py"), *ROOT.glob("kernels_pallas/**/*.py")]
    paths = {path.resolve().relative_to(ROOT.resolve()).as_posix() for path in found}  # links once
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in sorted(paths)}


def undeclared(files):
    """Complaints "path: module" about imports that an installation may not have."""
    main = modules(requirements())
    every = modules(requirements(*PROJECT["optional-dependencies"]))
    found = []
    for path, text in files.items():
        extra = NEED_AN_EXTRA.get(path)
        at_once = modules(requirements(extra)) if extra else main
        for module, when in foreign(text).items():
            if module not in (at_once if when == "first" else every):
                found.append(f"{path}: {module}")
    return found


def test_every_import_is_declared():
    files = sources()
    assert "train.py" in files
    assert set(files) >= NEED_AN_EXTRA.keys()
    assert undeclared(files) == []


@pytest.mark.parametrize(
    "text",
    [
        "import requests",
        "def f():\n    import requests",
        "import importlib\nimportlib.import_module('requests.api')",
        "import pyarrow",  # an extra's, before anybody asked for it
        "try:\n    import wandb\nexcept ImportError: ...",
    ],
)
def test_an_import_that_is_not_declared_is_seen(text):
    assert len(undeclared({"ttt_jax/new.py": text})) == 1
    harmless = "import os\nimport jax.numpy\nfrom . import x\ndef f():\n    import pyarrow, lm_eval"
    assert undeclared({"ttt_jax/new.py": harmless}) == []


def test_every_dependency_is_imported():
    """What is declared and not imported is a burden."""
    imported = {module for text in sources().values() for module in foreign(text)}
    assert modules(requirements("parquet", "wandb", "eval", "gpu", "tpu")) - imported == set()


def test_the_tests_need_what_the_test_extra_has():
    """Others are asked for by name, and skipped without."""
    declared = modules(requirements("test")) | {"array_record"}  # of grain
    ours = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    ours |= {path.stem for path in ROOT.glob("tests/**/*.py")} | {"benchmarks", "train"}
    ours |= {path.stem for path in ROOT.glob("benchmarks/*.py")}
    missing = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in ROOT.glob("tests/**/*.py")
        if path.relative_to(ROOT).as_posix() not in IN_ANOTHER_ENVIRONMENT
        for module, when in foreign(path.read_text(encoding="utf-8")).items()
        if when == "first" and module not in declared | ours
        if f'importorskip("{module}"' not in path.read_text(encoding="utf-8")
    }
    assert missing == set()


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    """In the one line that ends the command."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ttt_jax.data.source_files import find_files
    from ttt_jax.data.sources import read_documents
    from ttt_jax.errors import DataError

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"]}), path)
    (file,) = find_files((str(path),), field="data.train", format="auto").files
    assert len(list(read_documents(file, text_field="text", max_bytes=100))) == 1
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r"pip install 'ttt-jax\[parquet\]'"):
        list(read_documents(file, text_field="text", max_bytes=100))


def test_private_parts_have_upper_bounds():
    found = requirements()
    for name in ("jax", "flax", "orbax-checkpoint", "grain"):
        assert any(part.operator == "<" for part in found[name].specifier), name
    for extra in ("gpu", "tpu"):
        assert requirements(extra, main=False)["jax"].specifier == found["jax"].specifier
    assert Version("0.12.0") in found["jax"].specifier
    assert Version("0.13.0") not in found["jax"].specifier


# ----------------------------------------------------------------------------------- pinned for CI


def pinned(file):
    """Package -> version, and the number of its hashes."""
    text = (ROOT / file).read_text(encoding="utf-8")
    parts = re.split(r"\n(?=\S)", text.strip())
    found = [re.match(r"([A-Za-z0-9._-]+)==(\S+)", part) for part in parts]
    assert all(found), "one package in each part"
    return {
        match[1].lower(): (match[2], part.count("--hash=sha256:"))
        for match, part in zip(found, parts, strict=True)
    }


@pytest.mark.parametrize("file", PINNED)
def test_what_is_pinned_is_what_is_declared(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*-(?!-hash)", text, re.MULTILINE), "no options such as an index"
    versions = pinned(file)
    assert min(hashes for _, hashes in versions.values()) > 0
    for name, wanted in requirements(*PINNED[file], main="docs" not in file).items():
        assert Version(versions[name][0]) in wanted.specifier, name
    if "docs" not in file:  # builds the project, without a download of its own
        assert Version(versions["setuptools"][0]) >= Version("77")


def test_every_pinned_file_is_known():
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("constraints/*")}
    assert files == set(PINNED)


def test_ci_installs_pinned_versions_with_hashes():
    run = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "--require-hashes -r" in run
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    versions = ["3.11", "3.12"]
    for name in ("readme", "pinned"):
        assert jobs[name]["strategy"]["matrix"]["python"] == versions
    assert {f"constraints/ci-py{v.replace('.', '')}.txt" for v in versions} < set(PINNED)
    steps = [step for job in jobs.values() for step in job["steps"]]
    lines = [line for step in steps for line in step.get("run", "").splitlines()]
    for line in [*run.splitlines(), *lines]:
        if "pip install" in line:
            assert "--require-hashes" in line or "--no-deps" in line, line


def test_the_workflow_runs_the_commands_of_the_readme():
    path = ROOT / ".ci/readme_line.py"
    spec = importlib.util.spec_from_file_location("readme_line", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    job, tests = module.commands()
    assert job.endswith("pip install -q -e . && .venv/bin/python train.py")
    assert tests.endswith("pip install -q -e '.[dev]' && .venv/bin/python -m pytest -q -n 2")
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert all(f"run: python3 .ci/readme_line.py {n}" in text for n in (0, 1))


def test_the_workflow_can_be_run_here():
    """By .ci/workflow.py, which knows every step of it and refuses what it does not know."""
    spec = importlib.util.spec_from_file_location("workflow", ROOT / ".ci/workflow.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.WORKFLOW.read_text(encoding="utf-8")
    found = module.jobs(text)
    assert [(name, version) for name, version, _ in found] == [
        ("readme", "3.11"), ("readme", "3.12"), ("pinned", "3.11"), ("pinned", "3.12"),
        ("site", "3.12"),
    ]  # fmt: skip
    for _, version, steps in found:
        assert steps[:2] == [("checkout", ""), ("python", version)]
        assert "${{" not in str(steps)
    assert ("run", ".ci/run") in found[2][2]
    with pytest.raises(ValueError, match="actions/cache"):
        module.jobs(text.replace("actions/upload-artifact", "actions/cache"))
