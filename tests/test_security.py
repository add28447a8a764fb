"""What SECURITY.md says of the source: nothing unpickles, evaluates text, runs a shell or trusts
remote code.
"""

import ast
from pathlib import Path

import numpy as np
import pytest

from ttt_jax.config import load_config
from ttt_jax.data import load_tokenizer
from ttt_jax.data.source_files import find_files
from ttt_jax.errors import UserError
from ttt_jax.files.npy import map_npy, parse_npy

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for pattern in (
        "ttt_jax/**/*.py",
        "kernels_pallas/**/*.py",
        "benchmarks/**/*.py",
        "examples/**/*.py",
        "train.py",
    )
    for path in ROOT.glob(pattern)
)
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "pty",
    "tarfile",
}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "yaml.unsafe_load",
    "yaml.full_load",
}
FORBIDDEN_CALLS |= {"torch.load", "pickle.loads", "pickle.load", "builtins.eval", "builtins.exec"}


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def constant(node):
    return node.value if isinstance(node, ast.Constant) else None


def findings(source):
    """(line, what) of everything that is forbidden."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [module or ""] if module else [alias.name for alias in node.names]
            found += [
                (node.lineno, name) for name in names if name.split(".")[0] in FORBIDDEN_MODULES
            ]
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        keywords = {k.arg: k.value for k in node.keywords}
        if name in FORBIDDEN_CALLS or name.startswith(("os.exec", "os.spawn")):
            found.append((node.lineno, name))
        if (
            name.endswith((".Popen", "subprocess.run", ".check_output", ".check_call"))
            and "shell" in keywords
        ):
            found.append((node.lineno, "shell"))
        for unsafe in ("trust_remote_code", "allow_pickle"):
            if unsafe in keywords and constant(keywords[unsafe]) is not False:
                found.append((node.lineno, unsafe))
        if (
            name in ("np.load", "numpy.load", "np.lib.format.read_array")
            and "allow_pickle" not in keywords
        ):
            found.append((node.lineno, f"{name} without allow_pickle=False"))
        if name == "yaml.load" and dotted(keywords.get("Loader", ast.Name(""))) != "_Loader":
            found.append((node.lineno, name))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import dill.source",
        "eval('1')",
        "exec(x)",
        "__import__('os')",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "np.load(p)",
        "np.load(p, allow_pickle=True)",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=x)",
        "yaml.load(x)",
        "yaml.load(x, Loader=yaml.Loader)",
        "yaml.unsafe_load(x)",
        "torch.load(p)",
        "os.execvp('a', b)",
        "np.lib.format.read_array(f)",
    ],
)
def test_the_search_finds(source):
    assert findings(source)


def test_the_search_lets_pass():
    assert not findings(
        "import json\nmodel.eval\nre.compile('x')\njitted.compile()\nnp.load(p, allow_pickle=False)"
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_dangerous_in(path):
    assert not findings(path.read_text(encoding="utf-8"))


def test_subprocesses_are_listed_with_fixed_commands():
    """The report asks git, chat templates run in a Python of their own: lists of constants and
    these files' own paths.
    """
    users = [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if "subprocess" in path.read_text(encoding="utf-8")
    ]
    assert [user for user in users if not user.startswith(("benchmarks/", "examples/"))] == [
        "ttt_jax/inference/chat_template.py",
        "ttt_jax/run/provenance.py",
    ]


def test_npy_of_objects_is_refused(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    for read in (lambda: map_npy(path), lambda: parse_npy(path.read_bytes())):
        with pytest.raises(ValueError, match=r"[Oo]bject|allow_pickle|claims"):
            read()


def test_npy_header_may_not_claim_more_than_there_is():
    stream = b"\x93NUMPY\x01\x00"
    header = (
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(117) + b"\n"
    )
    with pytest.raises(ValueError, match="its header claims the shape"):
        parse_npy(stream + len(header).to_bytes(2, "little") + header)


@pytest.mark.parametrize("spec", ["../nowhere", "/etc/passwd", "a\0b", "x" * 5000])
def test_paths_that_are_no_files(spec):
    calls = [lambda: load_tokenizer(spec), lambda: load_config(spec)]
    if spec != "/etc/passwd":  # which is text
        calls.append(lambda: find_files((spec,), field="data.train", format="auto"))
    for call in calls:
        with pytest.raises(UserError) as error:
            call()
        assert "\n" not in str(error.value)
