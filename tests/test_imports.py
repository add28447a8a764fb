"""The rooms of the house from low to high: a file imports from its own room and from lower ones."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A folder ends with a slash and holds whatever is in it.
ROOMS = (
    ("kernels_pallas/",),
    ("ttt_jax/terminal.py", "ttt_jax/errors.py", "ttt_jax/jax_internals.py"),
    ("ttt_jax/ops/",),
    ("ttt_jax/display/",),
    ("ttt_jax/config/",),
    ("ttt_jax/flops.py",),
    ("ttt_jax/files/",),
    ("ttt_jax/process/",),
    ("ttt_jax/data/",),
    ("ttt_jax/parallel/",),
    ("ttt_jax/model/",),
    ("ttt_jax/run/",),
    ("ttt_jax/checkpoint/",),
    ("ttt_jax/pretrained/",),
    ("ttt_jax/training/",),
    ("ttt_jax/memory/",),
    ("ttt_jax/inference/",),
    ("ttt_jax/plan/",),
    ("ttt_jax/eval/",),
    ("ttt_jax/__init__.py",),  # the public names
    ("train.py",),
    ("ttt_jax/command/",),
    ("ttt_jax/__main__.py",),
)

# At the top of the tree, and links in ttt_jax: imported as `ttt_jax.train`, so that an installed
# copy has no names that other packages may have.
LINKED = ("train.py", "kernels_pallas/")

# All that these may import of the project, besides files of the same folder if they are a folder.
NARROW = {
    "ttt_jax/terminal.py": (),
    "ttt_jax/config/": ("ttt_jax/errors.py",),
    "ttt_jax/files/": ("ttt_jax/errors.py", "ttt_jax/terminal.py"),
    "ttt_jax/data/": ("ttt_jax/config/", "ttt_jax/errors.py", "ttt_jax/files/"),
    "ttt_jax/data/compressed.py": (),
    "ttt_jax/data/digests.py": (),
    "ttt_jax/data/parquet_pages.py": ("ttt_jax/data/compressed.py",),
    "ttt_jax/process/": ("ttt_jax/errors.py", "ttt_jax/jax_internals.py"),
    "ttt_jax/process/signals.py": (),
    "ttt_jax/process/lost_terminal.py": (),
    "ttt_jax/process/interrupts.py": (),
    "ttt_jax/run/folder.py": (
        "ttt_jax/config/",
        "ttt_jax/errors.py",
        "ttt_jax/files/",
        "ttt_jax/process/",
    ),
    "ttt_jax/inference/writing.py": ("ttt_jax/errors.py",),
    "ttt_jax/eval/unfinished.py": ("ttt_jax/errors.py", "ttt_jax/files/"),
    "ttt_jax/display/html_page.py": (),
}

# None of these waits for jax or arrays when it is imported: signals find their handler first,
# --help and a refused second job answer at once.
LIGHT = (
    "train.py",
    "ttt_jax/__init__.py",
    "ttt_jax/__main__.py",
    "ttt_jax/terminal.py",
    "ttt_jax/errors.py",
    "ttt_jax/config/",
    "ttt_jax/command/cli.py",
    "ttt_jax/command/train.py",
    "ttt_jax/process/failure.py",
    "ttt_jax/process/interrupts.py",
    "ttt_jax/process/lock.py",
    "ttt_jax/process/lost_terminal.py",
    "ttt_jax/process/output_lock.py",
    "ttt_jax/process/signals.py",
    "ttt_jax/inference/writing.py",
    "ttt_jax/eval/unfinished.py",
)
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "numpy", "grain", "tensorstore", "matplotlib"}

Sources = dict[str, str]  # the text of every file by its path from the root


@functools.cache
def real_sources() -> Sources:
    found = [*ROOT.glob("ttt_jax/**/*.py"), *ROOT.glob("kernels_pallas/**/*.py")]
    paths = sorted({path.resolve().relative_to(ROOT.resolve()) for path in found})  # links once
    return {str(path): (ROOT / path).read_text(encoding="utf-8") for path in paths}


@functools.cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def module_of(path: str) -> str:
    path = f"ttt_jax/{path}" if path.startswith(LINKED) else path
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def is_in(path: str, place: str) -> bool:
    return path.startswith(place) if place.endswith("/") else path == place


def runs_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs when a module is imported: none in functions or under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from runs_at_import(child)


@functools.cache
def imported(path: str, text: str, walk=ast.walk) -> list[tuple[str, str | None]]:
    """(module, name taken from it or None) of every import of a file."""
    here = module_of(path).split(".")
    package = here if path.endswith("__init__.py") else here[:-1]
    found = []
    for node in walk(parsed(text)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found += [(base, alias.name) for alias in node.names]
    return found


def file_imports(sources: Sources, path: str, walk=ast.walk) -> set[str]:
    """Paths of the project's files that a file imports."""
    found = set()
    for module, name in imported(path, sources[path], walk):
        places = [m.replace(".", "/") for m in (f"{module}.{name}", module)]
        files = [f"{place}{end}" for place in places for end in (".py", "/__init__.py")]
        inside = [file.removeprefix("ttt_jax/") for file in files]
        files = [i if i.startswith(LINKED) else f for f, i in zip(files, inside, strict=True)]
        found.update([file for file in files if file in sources][:1])
    return found - {path}


def reached(start: set[str], step: Callable[[str], set[str]]) -> set[str]:
    """`start`, and all that one gets to from there step by step."""
    found, new = set(start), set(start)
    while new:
        new = set().union(*map(step, new)) - found
        found |= new
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def room_of(path: str) -> int | None:
    rooms = [i for i, places in enumerate(ROOMS) for place in places if is_in(path, place)]
    return rooms[0] if len(rooms) == 1 else None


# Every rule returns what breaks it, "path: why".


def every_file_has_one_room(sources: Sources) -> list[str]:
    """A file without a room, and a name of a room or of a list above that no file has any more."""
    named = {place for places in ROOMS for place in places} | {*NARROW, *LIGHT}
    named |= {place for places in NARROW.values() for place in places}
    stale = [f"{n}: no such file" for n in sorted(named) if not any(is_in(p, n) for p in sources)]
    return stale + [f"{path}: not in one room" for path in sources if room_of(path) is None]


def imports_go_down(sources: Sources) -> list[str]:
    return [
        f"{path}: imports {other} of a higher room"
        for path in sources
        for other in sorted(file_imports(sources, path))
        if None not in (room_of(path), room_of(other)) and room_of(other) > room_of(path)
    ]


def no_two_files_import_each_other(sources: Sources) -> list[str]:
    """Also by way of others."""
    graph = {path: file_imports(sources, path) for path in sources}
    return [
        f"{path}: imports itself by way of {other}"
        for path in sources
        for other in sorted(graph[path])
        if path in reached({other}, graph.__getitem__)
    ]


def private_names_stay_at_home(sources: Sources) -> list[str]:
    """`from module import _name`, and `module._name`."""
    modules, found = {module_of(path) for path in sources}, []
    for path, text in sources.items():
        bound = set()
        for module, name in imported(path, text):
            if module in modules and name and is_private(name):
                found.append(f"{path}: {module}.{name} is private")
        for node in ast.walk(parsed(text)):
            if isinstance(node, ast.ImportFrom | ast.Import):
                base = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                bound |= {a.asname or a.name for a in node.names if base + a.name in modules}
        for node in ast.walk(parsed(text)):
            private = isinstance(node, ast.Attribute) and is_private(node.attr)
            if private and ast.unparse(node.value) in bound:
                found.append(f"{path}: {ast.unparse(node)} is private")
    return found


def internals_of_jax_are_in_one_file(sources: Sources) -> list[str]:
    return [
        f"{path}: imports {module}"
        for path, text in sources.items()
        for module, name in imported(path, text)
        if f"{module}.{name}.".startswith("jax._src.") and path != "ttt_jax/jax_internals.py"
    ]


def kernels_are_reached_through_ops(sources: Sources) -> list[str]:
    return [
        f"{path}: imports {other}"
        for path in sources
        if not path.startswith(("ttt_jax/ops/", "kernels_pallas/"))
        for other in sorted(file_imports(sources, path))
        if other.startswith("kernels_pallas/")
    ]


def narrow_files_import_little(sources: Sources) -> list[str]:
    found = []
    for place, allowed in NARROW.items():
        allowed = (*allowed, place) if place.endswith("/") else allowed
        found += [
            f"{path}: imports {other}"
            for path in sources
            if is_in(path, place)
            for other in sorted(file_imports(sources, path))
            if not any(is_in(other, a) for a in allowed)
        ]
    return found


def light_files_do_not_wait(sources: Sources) -> list[str]:
    """For what they import at once, what that imports at once, and the packages of both."""

    def at_once(path: str) -> set[str]:
        below = file_imports(sources, path, runs_at_import)
        folders = {str(folder) for file in (path, *below) for folder in Path(file).parents}
        return below | {f"{folder}/__init__.py" for folder in folders} & set(sources)

    found = []
    for path in sources:
        if any(is_in(path, place) for place in LIGHT):
            for file in sorted(reached({path}, at_once)):
                modules = {m for m, _ in imported(file, sources[file], runs_at_import)}
                heavy = {module.split(".")[0] for module in modules} & HEAVY
                found += [f"{path}: waits for {name} by way of {file}" for name in sorted(heavy)]
    return found


def the_first_import_of_the_script_is_its_signals(sources: Sources) -> list[str]:
    """Its other imports of the project stand below the handler, in functions."""
    nodes = runs_at_import(parsed(sources["train.py"]))
    found = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    found = [node for node in found if getattr(node, "module", "") != "__future__"]
    ours = [node for node in found if "ttt_jax" in ast.unparse(node)]
    if [getattr(node, "module", "") for node in found[:1]] != ["ttt_jax.process.signals"]:
        return [f"train.py: line {found[0].lineno} comes before the signals"]
    return [f"train.py: line {node.lineno} is not in a function" for node in ours[1:]]


def the_command_is_light_until_it_trains(sources: Sources) -> list[str]:
    """`ttt-jax train` handles signals before it imports the job, and does not wait for click."""
    path = "ttt_jax/__main__.py"
    body = {n.name: n for n in parsed(sources[path]).body if isinstance(n, ast.FunctionDef)}
    ours = [n.module for n in body["_train"].body if isinstance(n, ast.ImportFrom)]
    found = (
        [] if ours == ["ttt_jax.process.signals", "ttt_jax.train"] else [f"{path}: _train: {ours}"]
    )
    at_once = imported(path, sources[path], runs_at_import)
    return found + [f"{path}: imports {m} at once" for m, _ in at_once if m.startswith("ttt_jax")]


def the_script_is_run_only(sources: Sources) -> list[str]:
    """Nothing but the command of its name imports the job."""
    return [
        f"{path}: imports train"
        for path in sources
        if path not in ("ttt_jax/__main__.py", "ttt_jax/command/train.py")
        and "train.py" in file_imports(sources, path)
    ]


def all_is_imported_from_the_package(sources: Sources) -> list[str]:
    """Outside of the tree there is no `train` and no `kernels_pallas`, or somebody else's."""
    tops = {place.removesuffix(".py").removesuffix("/") for place in LINKED}
    return [
        f"{path}: imports {module}"
        for path, text in sources.items()
        for module, _ in imported(path, text)
        if module.split(".")[0] in tops
    ]


def only_the_mesh_names_axes(sources: Sources) -> list[str]:
    """No mesh axis is written out inside a PartitionSpec anywhere else."""
    axes, home, found = None, "ttt_jax/parallel/mesh.py", []
    for node in parsed(sources[home]).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "AXES":
            axes = set(ast.literal_eval(node.value))
    assert axes == {"data", "fsdp", "context", "tensor"}
    for path in set(sources) - {home}:
        for node in ast.walk(parsed(sources[path])):
            if not isinstance(node, ast.Call):
                continue
            if ast.unparse(node.func).split(".")[-1] in ("P", "PartitionSpec"):
                named = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)} & axes
                found += [f"{path}: names the axis {axis}" for axis in named]
    return found


RULES = (
    every_file_has_one_room,
    imports_go_down,
    no_two_files_import_each_other,
    private_names_stay_at_home,
    internals_of_jax_are_in_one_file,
    kernels_are_reached_through_ops,
    narrow_files_import_little,
    light_files_do_not_wait,
    the_first_import_of_the_script_is_its_signals,
    the_command_is_light_until_it_trains,
    the_script_is_run_only,
    all_is_imported_from_the_package,
    only_the_mesh_names_axes,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps(rule):
    complaints = rule(real_sources())
    assert not complaints


BROKEN = [
    (every_file_has_one_room, "ttt_jax/new.py", ""),
    (imports_go_down, "ttt_jax/model/layers.py", "import ttt_jax.training.step"),
    (imports_go_down, "ttt_jax/ops/numerics.py", "def f():\n    from ..config import Config"),
    (imports_go_down, "kernels_pallas/tpu.py", "from ttt_jax import errors"),
    (
        imports_go_down,
        "ttt_jax/errors.py",
        "if TYPE_CHECKING:\n    from ttt_jax.data.loader import Loader",
    ),
    (imports_go_down, "ttt_jax/data/loader.py", "from .. import load_pretrained"),
    (
        no_two_files_import_each_other,
        "ttt_jax/config/fields.py",
        "def f():\n    from ttt_jax.config.loading import load_config",
    ),
    (private_names_stay_at_home, "ttt_jax/eval/run.py", "from ttt_jax.errors import _hidden"),
    (
        private_names_stay_at_home,
        "ttt_jax/eval/run.py",
        "from ttt_jax.ops.ttt import xla as op\nop._loop",
    ),
    (
        private_names_stay_at_home,
        "ttt_jax/eval/run.py",
        "import ttt_jax.errors\nttt_jax.errors._x",
    ),
    (internals_of_jax_are_in_one_file, "ttt_jax/errors.py", "from jax._src import core"),
    (internals_of_jax_are_in_one_file, "ttt_jax/errors.py", "from jax import _src"),
    (
        kernels_are_reached_through_ops,
        "ttt_jax/model/layers.py",
        "import ttt_jax.kernels_pallas.tpu",
    ),
    (narrow_files_import_little, "ttt_jax/data/digests.py", "from ttt_jax import errors"),
    (narrow_files_import_little, "ttt_jax/data/cache.py", "from ttt_jax.ops import in_place_ttt"),
    (light_files_do_not_wait, "ttt_jax/process/signals.py", "import jax.numpy as jnp"),
    (light_files_do_not_wait, "ttt_jax/command/cli.py", "from ttt_jax.model import layers"),
    (light_files_do_not_wait, "ttt_jax/process/lock.py", "class A:\n    from flax import nnx"),
    (
        light_files_do_not_wait,
        "ttt_jax/process/__init__.py",
        "try:\n    import numpy\nfinally: ...",
    ),
    (the_first_import_of_the_script_is_its_signals, "train.py", "import ttt_jax.config"),
    (
        the_command_is_light_until_it_trains,
        "ttt_jax/__main__.py",
        "def _train():\n    from ttt_jax.train import main",
    ),
    (the_command_is_light_until_it_trains, "ttt_jax/__main__.py", "from ttt_jax import errors"),
    (
        the_script_is_run_only,
        "ttt_jax/plan/make.py",
        "def f():\n    from ttt_jax.train import main",
    ),
    (the_script_is_run_only, "ttt_jax/command/plan.py", "from ttt_jax import train"),
    (all_is_imported_from_the_package, "ttt_jax/plan/make.py", "def f():\n    import train"),
    (all_is_imported_from_the_package, "ttt_jax/ops/ttt/api.py", "from kernels_pallas import tpu"),
    (only_the_mesh_names_axes, "ttt_jax/model/layers.py", 'x = P(None, ("data", "none"))'),
    (only_the_mesh_names_axes, "train.py", 'jax.sharding.PartitionSpec("tensor")'),
]


@pytest.mark.parametrize(("rule", "path", "line"), BROKEN)
def test_a_rule_sees_what_breaks_it(rule, path, line):
    sources = real_sources()
    text = f"{sources.get(path, '')}\n{line}\n"
    complaints = set(rule({**sources, path: text})) - set(rule(sources))
    assert any(path in complaint for complaint in complaints)


def test_the_script_meets_nothing_before_its_signals():
    """An import above that of the signals, which a line at the end of the file is not."""
    text = "import numpy\n" + real_sources()["train.py"]
    assert the_first_import_of_the_script_is_its_signals({**real_sources(), "train.py": text})
