"""Write the lowered programs as text that moving and renaming Python code does not change.

    python benchmarks/lowered.py /tmp/before                            # at the commit before
    python benchmarks/lowered.py /tmp/after --compare /tmp/before

Lowers the train step, the held-out loss by position and a decode step, for the default preset and
`books`, on one fake CPU device and on eight: twelve texts in StableHLO, before any compilation, in
half a minute. Writes NAME.txt.xz and sha256.txt into the folder. With --compare it prints the first
lines that differ, and exits with 1 when a text differs or is missing.

The text keeps what decides the result: operations, shapes, dtypes, constants, shardings, donation.
It leaves out locations, the module's name and the names of results. Functions are named by their
order of first use, and functions with equal bodies are one. The code under test is found by the
names of its definitions, wherever the files are.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import hashlib
import importlib
import itertools
import lzma
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ("default", "books")
# Eight devices: once each axis that splits tokens or rows, and rows for all of them.
LAYOUTS: dict[int, list[str]] = {
    1: [],
    8: ["--mesh.data=2", "--mesh.fsdp=2", "--mesh.context=2", "--data.batch_size=8"],
}
_SYMBOL = re.compile(r'@("[^"]*"|[\w.$-]+)')
_FUNCTION = re.compile(r'^  func\.func (?:public |private )?@("[^"]*"|[\w.$-]+)')
_RESULT_NAME = re.compile(r'jax\.result_info = "(?:[^"\\]|\\.)*"')


def main() -> int:
    parser = argparse.ArgumentParser(description="Write lowered programs.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--compare", type=Path, metavar="OTHER_DIR")
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)  # inside one process
    words = parser.parse_args()
    words.out.mkdir(parents=True, exist_ok=True)
    if words.devices:
        write_texts(words.out, words.devices)
        return 0
    for devices in LAYOUTS:
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        command = [sys.executable, __file__, str(words.out), f"--devices={devices}"]
        subprocess.run(command, env=environment, check=True)
    hashes = {path.name: read(path) for path in sorted(words.out.glob("*.txt.xz"))}
    lines = [f"{hashlib.sha256(t.encode()).hexdigest()}  {name}" for name, t in hashes.items()]
    (words.out / "sha256.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return compare(words.out, words.compare) if words.compare else 0


def compare(ours: Path, theirs: Path) -> int:
    """Print which texts differ, and where first; the exit code."""
    names = sorted({path.name for folder in (ours, theirs) for path in folder.glob("*.txt.xz")})
    wrong = 0
    for name in names:
        lost = [folder for folder in (theirs, ours) if not (folder / name).is_file()]
        if lost:
            print(f"{name}: missing in {lost[0]}")
        elif (old := read(theirs / name)) != (new := read(ours / name)):
            print(f"{name}: differs")
            lines = old.splitlines(), new.splitlines()
            diff = difflib.unified_diff(*lines, fromfile="before", tofile="after", lineterm="", n=1)
            print("".join(f"    {line[:160]}\n" for line in itertools.islice(diff, 14)), end="")
        else:
            continue
        wrong += 1
    print(f"{len(names) - wrong} of {len(names)} texts are equal")
    return 1 if wrong or not names else 0


def read(path: Path) -> str:
    return lzma.decompress(path.read_bytes()).decode()


def write_texts(out: Path, devices: int) -> None:
    """Write the texts of both presets, with the devices of this process."""
    sys.path.insert(0, str(ROOT))
    import jax

    assert jax.device_count() == devices, f"{jax.device_count()} devices, not {devices}"
    for preset in PRESETS:
        path = ROOT / "configs" / f"{preset}.yaml"
        config = home("load_config")(path, LAYOUTS[devices])
        mesh = home("make_mesh")(config.mesh)
        for program in (train_step, heldout_loss, decode_step):
            text = canonical(program(config, mesh).as_text())
            assert "dot_general" in text, f"{preset}: {program.__name__} is not a model's program"
            name = f"{preset}.{program.__name__}.{devices}.txt.xz"
            (out / name).write_bytes(lzma.compress(text.encode()))


def home(name: str) -> Any:
    """The one definition of this name in the package, as an object."""
    defined = re.compile(rf"^(?:def|class) {name}\b", re.MULTILINE)
    files = sorted((ROOT / "ttt_jax").rglob("*.py"))
    found = [path for path in files if defined.search(path.read_text(encoding="utf-8"))]
    if len(found) != 1:
        raise SystemExit(f"{name}: defined in {found}, not in one file; correct its name here")
    module = ".".join(found[0].relative_to(ROOT).with_suffix("").parts)
    return getattr(importlib.import_module(module.removesuffix(".__init__")), name)


def train_step(config: Any, mesh: Any) -> Any:
    state, optimizer = home("abstract_state")(config, mesh)
    step = home("make_train_step")(config, optimizer)
    return step.lower(state, home("abstract_batch")(config, mesh))


def heldout_loss(config: Any, mesh: Any) -> Any:
    import jax

    model = home("abstract_state")(config, mesh)[0].model
    scale = jax.ShapeDtypeStruct((), "float32")
    batch = home("abstract_batch")(config, mesh)
    return home("make_position_nll")(mesh).lower(model, batch, scale)


def decode_step(config: Any, mesh: Any) -> Any:
    """One token of four streams, sampled, at the end of a chunk: the program that also writes."""
    import jax

    B = 4
    runtime = dataclasses.replace(home("runtime_of")(config, mesh), scan_layers=False)
    make = home("Transformer")
    model = jax.eval_shape(lambda: make(config.model, runtime, key=jax.random.key(0)))
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, runtime.dtype, sharding=sharding)
    model = jax.tree.map(place, model, home("model_shardings")(model, mesh))
    ids = jax.ShapeDtypeStruct((B, config.model.ttt.chunk_size), "int32")
    after = lambda model, ids: model.hidden(ids, keep_state=True, at_chunk_start=True)[1]
    state = jax.eval_shape(after, model, ids)
    alive, ids_B = jax.ShapeDtypeStruct((B,), "bool"), jax.ShapeDtypeStruct((B,), "int32")
    sampling = home("Sampling")(temperature=0.8, top_k=40, top_p=0.95)
    frozen = home("Frozen")(model)
    with_clock = {"sampling": sampling, "eos": (0,), "ends_chunk": True, "ttt": True}
    return first_program("decode_step", (frozen, state, ids_B, alive, ids_B), with_clock)


class Reached(BaseException):
    """Carries what the first jitted function that is called lowers to."""


def first_program(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Lower the jitted function that a plain function makes and calls, donation included."""
    import jax

    function, real = home(name), jax.jit  # imported first: modules call jax.jit, too

    def jit(wrapped: Any, **settings: Any) -> Any:
        def call(*args: Any, **options: Any) -> None:
            jax.jit = real
            raise Reached(real(wrapped, **settings).lower(*args, **options))

        return call

    jax.jit = jit
    try:
        function(*args, **options)
    except Reached as reached:
        return reached.args[0]
    finally:
        jax.jit = real
    raise SystemExit(f"{name}: calls no jitted function")


def canonical(text: str) -> str:
    """The module without names of ours; see the top of this file."""
    head, *lines = _RESULT_NAME.sub('jax.result_info = ""', text).splitlines()
    bodies: dict[str, list[str]] = {}
    body = top = [re.sub(r"@[\w.$-]+", "@module", head, count=1)]
    for line in lines:
        if found := _FUNCTION.match(line):
            body = bodies[found[1]] = []
        body.append(line)
        if line == "  }":
            body = top

    def renamed(name: str, new: Callable[[str], str]) -> str:
        change = lambda match: f"@{new(match[1])}" if match[1] in bodies else match[0]
        return _SYMBOL.sub(change, "\n".join(bodies[name]))

    @functools.cache
    def digest(name: str) -> str:
        """Of the body, with each function that it calls replaced by that one's digest."""
        body = renamed(name, lambda other: "self" if other == name else digest(other))
        return hashlib.sha256(body.encode()).hexdigest()

    numbers: dict[str, str] = {}
    number = lambda name: numbers.setdefault(digest(name), f"f{len(numbers)}")
    written: dict[str, str] = {}

    def write(name: str) -> None:
        """Write the function, then those that it calls, each body once."""
        if digest(name) not in written:
            written[digest(name)] = renamed(name, number)
            for other in _SYMBOL.findall("\n".join(bodies[name])):
                if other in bodies:
                    write(other)

    write("main")
    return "\n".join([*top[:-1], *written.values(), top[-1]]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
