"""The direction of imports (docs/design.md): a module may import only what lies below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    (*ROOT.glob("ttt_jax/**/*.py"), *ROOT.glob("kernels_pallas/**/*.py"), *ROOT.glob("train.py"))
)
ABOVE_THE_MODEL = (
    *("data", "checkpoint", "run_dir", "report", "metrics", "optimizer", "initial", "training"),
    *("pretrained", "model_changes", "start_check", "convert"),
    *("generate", "eval", "cli"),
)


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """Absolute names of everything a file imports, wherever in the file; `from a import b` counts
    as a and a.b.
    """
    package = (
        module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    )
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def imports_any(path, *modules):
    return sorted(
        name
        for name in imports(path)
        if any(name == m or name.startswith(m + ".") for m in modules)
    )


def files(*patterns):
    found = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    assert found, patterns
    return found


def test_the_walk_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "ttt_jax" / "ops" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import a.b\nfrom c import d\ndef f():\n    from . import e\n    from ..model import g\n"
    )
    assert {
        "a.b",
        "c.d",
        "ttt_jax.ops.e",
        "ttt_jax.model.transformer",
        "ttt_jax.model.transformer.g",
    } <= imports(path)
    assert imports_any(path, "ttt_jax.model.transformer")
    assert not imports_any(path, "ttt_jax.mod", "b")


def test_config_is_light():
    allowed = (
        "__future__",
        "dataclasses",
        "difflib",
        "functools",
        "os",
        "re",
        "types",
        "typing",
        "pathlib",
        "yaml",
    )
    path = ROOT / "ttt_jax/config/fields.py"
    assert not imports(path) - set(
        imports_any(path, *allowed, "pydantic", "ttt_jax.errors", "ttt_jax.config.yaml_text")
    )
    below = ROOT / "ttt_jax/config/yaml_text.py"
    assert not imports(below) - set(
        imports_any(below, "__future__", "re", "collections", "typing", "yaml")
    )
    fields = ROOT / "ttt_jax/config/resume_fields.py"
    assert not imports(fields) - set(imports_any(fields, "__future__"))
    errors = ROOT / "ttt_jax/errors.py"
    assert not imports(errors) - set(
        imports_any(errors, "__future__", "typing", "ttt_jax.terminal")
    )
    terminal = ROOT / "ttt_jax/terminal.py"
    assert not imports(terminal) - set(imports_any(terminal, "__future__", "re", "typing"))


@pytest.mark.parametrize("path", files("ttt_jax/ops/*.py"), ids=module_name)
def test_ops_know_nothing_of_the_model(path):
    below = imports_any(path, "ttt_jax.ops", "ttt_jax.errors", "ttt_jax.parallel.mesh")
    assert not set(imports_any(path, "ttt_jax")) - {"ttt_jax", *below}


def test_kernels_know_nothing_of_ttt_jax():
    for path in ROOT.glob("kernels_pallas/**/*.py"):
        assert not imports_any(path, "ttt_jax", "train"), path
    for path in SOURCES:
        if path.parts[-2] not in ("ops", "kernels_pallas"):
            assert not imports_any(path, "kernels_pallas"), (
                f"{path}: kernels are reached through ops"
            )


@pytest.mark.parametrize("name", ["model", "ttt", "layers", "attention", "loss", "blocks"])
def test_the_model_knows_nothing_of_training(name):
    path = ROOT / f"ttt_jax/{name}.py"
    assert not imports_any(path, "train", *(f"ttt_jax.{module}" for module in ABOVE_THE_MODEL))


@pytest.mark.parametrize(
    ("name", "above"),
    [
        ("layers", ("model", "ttt", "hf", "loss")),
        ("attention", ("model", "ttt", "hf", "loss", "layers")),
        ("ttt", ("model", "hf", "loss")),
        ("loss", ("model", "ttt", "hf", "layers")),
        ("model", ("hf", "loss")),
    ],
)
def test_the_model_is_layered(name, above):
    assert not imports_any(ROOT / f"ttt_jax/{name}.py", *(f"ttt_jax.{module}" for module in above))


@pytest.mark.parametrize("path", files("ttt_jax/data/*.py"), ids=module_name)
def test_data_knows_nothing_of_the_model(path):
    assert not imports_any(
        path, *(f"ttt_jax.{m}" for m in ("model", "ttt", "layers", "ops", "checkpoint", "training"))
    )


def test_digests_know_nothing_of_files_and_configs():
    assert not imports_any(ROOT / "ttt_jax/data/digests.py", "ttt_jax")
    assert not imports_any(ROOT / "ttt_jax/data/compressed.py", "ttt_jax")
    pages = ROOT / "ttt_jax/data/parquet_pages.py"
    assert not set(imports_any(pages, "ttt_jax")) - set(
        imports_any(pages, "ttt_jax.data.compressed")
    )


def test_the_run_folder_knows_nothing_of_what_is_compared_on_resume():
    for name in ("run_dir", "checkpoint_files", "config", "resume_fields"):
        assert not imports_any(
            ROOT / f"ttt_jax/{name}.py", "ttt_jax.run.resume_changes", "ttt_jax.data"
        ), name


@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("signals", ()),
        ("lost_terminal", ()),
        ("failure", ("errors",)),
        ("lock", ("errors", "distributed")),
        ("output_lock", ("errors", "lock")),
        ("finished", ("config", "report", "run_dir")),
    ],
)
def test_what_watches_over_a_run_is_light(name, below):
    """Signals find their handler before anything heavy is imported, and a second job is refused
    without jax.
    """
    path = ROOT / f"ttt_jax/{name}.py"
    ours = set(imports_any(path, "ttt_jax")) - {"ttt_jax"}
    assert not ours - set(imports_any(path, *(f"ttt_jax.{module}" for module in below)))
    assert not imports_any(path, "jax", "numpy", "orbax")


def test_the_first_import_of_the_training_script_is_its_signals():
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    found = [n for n in tree.body if isinstance(n, ast.ImportFrom | ast.Import)]
    first = next(n for n in found if getattr(n, "module", "") != "__future__")
    assert isinstance(first, ast.ImportFrom)
    assert first.module == "ttt_jax.process.signals"
    assert [n for n in found if "ttt_jax" in ast.unparse(n)] == [first], (
        "the others are imported below the handler"
    )


def test_nothing_imports_the_training_script():
    for path in SOURCES:
        assert not imports_any(path, "train"), path


def mesh_axes():
    """AXES of sharding.py, read without importing it."""
    for node in ast.parse((ROOT / "ttt_jax/parallel/mesh.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            getattr(t, "id", "") == "AXES" for t in node.targets
        ):
            return set(ast.literal_eval(node.value))
    raise AssertionError("sharding.py defines no AXES")


def named_axes(source, axes):
    """Lines where a mesh axis is written out inside a PartitionSpec."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        called = isinstance(node, ast.Call) and (
            getattr(node.func, "id", None) or getattr(node.func, "attr", None)
        )
        if called in ("P", "PartitionSpec"):
            constants = (c.value for c in ast.walk(node) if isinstance(c, ast.Constant))
            lines += [
                node.lineno for value in constants if isinstance(value, str) and value in axes
            ]
    return lines


def test_only_sharding_names_mesh_axes():
    axes = mesh_axes()
    assert axes == {"data", "fsdp", "context", "tensor"}
    assert named_axes('x = P(None, ("data", "fsdp"))', axes) == [1, 1]
    assert named_axes('jax.sharding.PartitionSpec("tensor")', axes) == [1]
    for path in SOURCES:
        if path != ROOT / "ttt_jax/parallel/mesh.py":
            assert not named_axes(path.read_text(encoding="utf-8"), axes), path


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("terminal", ()),
        ("interrupts", ()),
        ("command", ("errors", "interrupts", "terminal")),  # and no jax: --help does not wait
        ("writing", ("errors",)),
        ("watch", ("config", "errors", "model")),
        ("decoding", ("model", "reading", "sampling", "watch")),
        ("eval.unfinished", ("errors",)),
    ],
)
def test_what_inference_is_made_of(name, allowed):
    path = ROOT / f"ttt_jax/{name.replace('.', '/')}.py"
    found = {module.split(".")[1] for module in imports_any(path, "ttt_jax") if "." in module}
    assert found <= set(allowed), path
    if name in ("terminal", "interrupts", "command", "writing", "eval.unfinished"):
        assert not imports_any(path, "jax", "numpy"), path
