"""Where the time of a packed training step goes: with and without TTT, and TTT's pieces by
themselves, all interleaved.

    python benchmarks/step_parts.py                                  # books, on one GPU
    python benchmarks/step_parts.py --steps none,6,6+fused,4+sum,6+xla:1 --skip op --seconds 100
    python benchmarks/step_parts.py --ops 2560x9728:512:1:16384=pallas_gpu:1+pallas_gpu:2

A step is a list of words that change the preset: how many TTT layers (evenly spaced; "none", or
"on" for the preset's), the write, `model.ttt.apply`, decay=X, "unroll" for layers without loops and
more that the backward keeps, a variant. A variant is an
implementation, the chunks of a block and, where it is not "split", what `model.ttt.apply` is
(pallas_gpu:1:fused). Every variant's op is timed at the step's shape and decay, and those named at
the shapes of --ops (DxF:C:B:T[:DECAY]=variants), in rows of one document and in packed rows, where
a document starts every fifth chunk, at another chunk in each row. Packed rows of the steps hold two
documents; with --documents 1 they are not packed. The op's results are compared with those of the
shape's first variant, so put `xla:1` first; one that is off by more than 1e-2 relative RMS is not
timed, and the exit code is 1.

Programs are traced one after the other, in the order of their importance. Ops are compiled side by
side, and so are steps behind the first: XLA tunes matmuls on the GPU, and what it has tuned for one
step the others have too. What is not ready after 75 % of --seconds is left out, and named. Each
round runs every program once, or several times where it is short, a matmul of 8192^3 among them;
the table gives medians over the rounds: ops also as multiples of 4TDF (forward) and 14TDF FLOPs
(both) at the matmul's rate; steps also over "none" ("none+unroll"), and as MFU (model FLOPs, with
no recomputation counted, over that rate). With --json FILE one object a line is appended.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import config as config_lib
from ttt_jax.config.inner_rate import inner_rate
from ttt_jax.errors import UserError
from ttt_jax.flops import model_flops_per_token
from ttt_jax.model.ttt_mlp import MLP
from ttt_jax.ops import in_place_ttt
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.parallel.one_device import ONE_DEVICE
from ttt_jax.pretrained.start_config import load_start_config
from ttt_jax.training.step import abstract_state, init_state, make_train_step
from ttt_jax.training.step_memory import settled_remat

ROOT = Path(__file__).resolve().parents[1]
registry: Any = importlib.import_module("ttt_jax.ops.ttt.api")  # not the function
TOLERANCE = 1e-2  # of two results in bfloat16


@contextlib.contextmanager
def taken(variant: str | None):
    """Make `implementation=None` mean this variant, if any, while programs are traced."""
    if variant is None:
        yield
        return
    name, n, *_ = variant.split(":")
    before = registry._FAST
    one = before[name]._replace(block=lambda call: int(n), pays=lambda call: True)
    registry._FAST = {name: one, **{key: x for key, x in before.items() if key != name}}
    try:
        yield
    finally:
        registry._FAST = before


def apply_of(variant: str) -> str:
    return [*variant.split(":"), "split"][2]


def random(shape, dtype=jnp.bfloat16, scale=1.0, seed=0):
    make = lambda: (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)
    return jax.jit(make)()


def segment_ids(B: int, T: int, C: int, every: int):
    """A document starts every `every` chunks, in each row at other ones."""
    number_BT = (np.arange(T)[None] // C + 1 + np.arange(B)[:, None]) // every + 1
    return jnp.asarray(number_BT, jnp.int32)


class Op:
    """The op's programs at one shape: forward, and forward + backward."""

    def __init__(self, D: int, F: int, C: int, B: int, T: int, decay: float = 1.0):
        self.name, self.C = f"op {D}x{F} C={C} {B}x{T}", C
        self.name += "" if decay == 1 else f" decay={decay:g}"
        self.decay, self.work = decay, B * T * D * F
        self.arrays = (
            random((B, T, F), seed=1),
            random((B, T, D), seed=2),
            random((D, F), scale=F**-0.5, seed=3),
        )
        self.do = random((B, T, D), seed=4)
        self.ids = segment_ids(B, T, C, 5)
        self.lr = 0.3 * F**-0.5 / C**0.5  # an update has a third of W's norm

    def forward(self, apply, ids, *arrays):
        options = {"lr": self.lr, "chunk_size": self.C, "segment_ids": ids, "apply": apply}
        options["decay"] = self.decay
        return in_place_ttt(*arrays, **options)[0]

    def both(self, apply, ids, do, *arrays):
        o, pull = jax.vjp(functools.partial(self.forward, apply, ids), *arrays)
        return o, *pull(do)

    def programs(self, variants, kinds=("packed", "one document")):
        for variant in variants:
            for rows in kinds:
                ids = self.ids if rows == "packed" else None
                words = f"{self.name} {variant} {rows}"
                both, forward = (
                    functools.partial(x, apply_of(variant)) for x in (self.both, self.forward)
                )
                yield f"{words}: both", variant, both, (ids, self.do, *self.arrays)
                yield f"{words}: forward", variant, forward, (ids, *self.arrays)


def step_programs(config, steps, pool, documents: int = 2):
    """Training steps on rows of random tokens."""
    T, B = config.data.seq_len, config.data.batch_size
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, (B, T + 1)).astype(np.int32)
    batch = {
        "ids": jnp.asarray(ids[:, :-1]),
        "targets": jnp.asarray(ids[:, 1:]),
        "weights": jnp.ones((B, T), jnp.float32),
    }
    C = config.model.ttt.chunk_size
    if documents > 1:
        batch["segment_ids"] = segment_ids(B, T, C, 2 * T // C // documents)
        starts = jnp.where(jnp.diff(batch["segment_ids"], axis=1, prepend=0) != 0, jnp.arange(T), 0)
        batch["positions"] = (jnp.arange(T) - jax.lax.cummax(starts, axis=1)).astype(jnp.int32)
    for step in steps:
        changes, variant = step_changes(config, step)
        changed = config_lib.replace(config, changes)
        if "model.ttt.write" in changes:  # the preset's rate is another write's
            changed = config_lib.replace(changed, {"model.ttt.lr": inner_rate(changed)})
        changed = settled_remat(changed, make_mesh(changed.mesh))
        abstract, tx = abstract_state(changed, make_mesh(changed.mesh))
        state = pool.submit(init_state, changed, abstract, tx)
        yield f"step {step}", variant, make_train_step(changed, tx), (state, batch, abstract)


def step_changes(config, step: str) -> tuple[dict[str, Any], str | None]:
    """Read the words of --steps: the config's changes, and a variant or None."""
    changes, variant = {}, None
    for word in step.split("+"):
        if word == "on":
            continue
        if word == "none":
            changes["model.ttt.layers"] = []
        elif word.isdigit():
            every = config.model.num_layers // int(word)
            layers = range(every - 1, config.model.num_layers, every)
            changes["model.ttt.layers"] = list(layers[: int(word)])
        elif word.startswith("decay="):
            changes["model.ttt.decay"] = float(word.removeprefix("decay="))
        elif word == "unroll":
            kept = {*config.remat_save, "mlp_hidden", "ttt_states"}
            changes |= {"unroll_layers": True, "remat_save": tuple(sorted(kept))}
        elif word in ("split", "fused"):
            changes["model.ttt.apply"] = word
        elif ":" in word:
            variant = word
        else:
            changes["model.ttt.write"] = word
    return changes, variant


def flops_of(config, step: str) -> float:
    """Model FLOPs of a training step."""
    model = config_lib.replace(config, step_changes(config, step)[0]).model
    T = config.data.seq_len
    return config.data.batch_size * T * model_flops_per_token(model, T, training=True)


def part_programs(config):
    """Targets and norms of one TTT layer."""
    model, B, T = config.model, config.data.batch_size, config.data.seq_len
    mlp = MLP(model, model.ttt.target, key=jax.random.key(0))
    assert mlp.target is not None
    target = mlp.target
    C, D, F = model.ttt.chunk_size, model.d_model, model.d_ff
    source, dv = random((B, T, D), seed=1), random((B, T, D), seed=2)
    z, S = random((B, T, F), seed=3), random((B, D, F), jnp.float32, seed=4)
    make = lambda target, source: target(source, C)

    def both(target, source, dv):
        v, pull = jax.vjp(make, target, source)
        return v, pull(dv)

    def norms(mlp, S, z, v):
        return mlp.stats(S, ONE_DEVICE.last_update_norm(z, v, jnp.float32(0.1), C))

    yield "targets: both", None, both, (target, source, dv)
    yield "targets: forward", None, make, (target, source)
    yield "norms", None, norms, (mlp, S, z, dv)


def relative(got, expected) -> float:
    """The largest relative RMS error of the results."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        x, y = (a.astype(jnp.float32).ravel() for a in (x, y))
        error = float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))
        worst = max(worst, error if error == error else float("inf"))
    return worst


class Timed:
    """A compiled program with its arguments."""

    def __init__(self, name: str, compiled, arguments):
        self.name, self.compiled, self.times, self.calls = name, compiled, [], 1
        self.step = name.startswith("step")
        if self.step:  # the state is donated
            arguments = [arguments[0].result(), arguments[1]]
        self.arguments = arguments

    def run(self):
        if not self.step:
            return self.compiled(*self.arguments)
        self.arguments[0], metrics = self.compiled(*self.arguments)
        return metrics["loss"]

    def warm_up(self):
        result = jax.block_until_ready(self.run())
        start = time.perf_counter()
        jax.block_until_ready(self.run())
        self.calls = max(1, min(20, int(0.05 / (time.perf_counter() - start))))
        return result

    @property
    def median(self) -> float:
        """Milliseconds."""
        return float(np.median(self.times))

    def round(self):
        start = time.perf_counter()
        for _ in range(self.calls):
            result = self.run()
        jax.block_until_ready(result)
        self.times.append((time.perf_counter() - start) / self.calls * 1e3)


def matmul() -> tuple[Timed, int]:
    """A large matmul, and its FLOPs."""
    n = 8192 if jax.default_backend() != "cpu" else 512
    x, y = random((n, n), seed=1), random((n, n), seed=2)
    timed = Timed("matmul", jax.jit(lambda x, y: x @ y), (x, y))
    timed.warm_up()
    return timed, 2 * n**3


def compiled(lowered, first=None, options=None):
    """A compiled program, and the seconds that it took; `first`: behind this future."""
    if first is not None:
        concurrent.futures.wait([first])
    start = time.perf_counter()
    return lowered.compile(options), time.perf_counter() - start


def jitted(name: str, function):
    """A function that jax has not traced yet, with another variant."""
    return function if name.startswith("step") else jax.jit(lambda *arrays: function(*arrays))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = lambda text: [word for word in text.split(",") if word]
    parser.add_argument("--preset", default="books", help="name of a file in configs/")
    parser.add_argument("--steps", type=words, default=["none", "6", "6+fused"])
    parser.add_argument("--variants", type=words, default=["pallas_gpu:1", "pallas_gpu:1:fused"])
    parser.add_argument("--ops", type=words, default=[], help="other shapes of the op")
    parser.add_argument("--rows", type=words, default=["packed", "one document"], help="of ops")
    parser.add_argument("--skip", type=words, default=[], help="of step, op, parts")
    parser.add_argument("--documents", type=int, default=2, help="of a row of the steps")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=190)
    parser.add_argument("--json", type=Path)
    args, overrides = parser.parse_known_args(argv)
    begun = time.perf_counter()
    config = load_start_config(
        ROOT / "configs" / f"{args.preset}.yaml", ["--optimizer.accumulate=1", *overrides]
    )
    shape = (config.model.d_model, config.model.d_ff, config.model.ttt.chunk_size)
    shape = (*shape, config.data.batch_size, config.data.seq_len)
    pool, sources, ops = concurrent.futures.ThreadPoolExecutor(12), [], []
    if "step" not in args.skip:
        sources.append(step_programs(config, args.steps, pool, args.documents))
    if "op" not in args.skip:
        ops.append(Op(*shape, config.model.ttt.decay))
        sources.append(ops[-1].programs(args.variants, args.rows))
    if "parts" not in args.skip:
        sources.append(part_programs(config))
    for text in args.ops:
        sizes, variants = text.split("=")
        sizes = sizes.replace("x", ":").split(":")
        ops.append(Op(*map(int, sizes[:5]), *map(float, sizes[5:])))
        sources.append(ops[-1].programs(variants.split("+"), args.rows))
    waiting, first = [], None
    limit = begun + 0.75 * args.seconds
    for name, variant, function, arguments in (x for source in sources for x in source):
        if time.perf_counter() > limit:
            print(f"not traced in time: {name}", flush=True)
            continue
        traced = (arguments[2], arguments[1]) if name.startswith("step") else arguments
        try:
            with taken(variant):
                lowered = jitted(name, function).lower(*traced)
        except UserError as error:
            print(f"{name}: {error}", flush=True)
            continue
        step = name.startswith("step")
        future = pool.submit(compiled, lowered, first if step else None)
        first = future if step and first is None else first
        waiting.append((name, arguments, future))
        print(f"traced after {time.perf_counter() - begun:.0f} s: {name}", flush=True)
    concurrent.futures.wait([x for *_, x in waiting], max(0, limit - time.perf_counter()))
    print(f"compiled after {time.perf_counter() - begun:.0f} s", flush=True)
    programs, expected, wrong = [], {}, 0
    work = {f"step {step}": flops_of(config, step) for step in args.steps}
    for name, arguments, future in waiting:
        if not future.done():
            print(f"not compiled in time: {name}", flush=True)
            future.cancel()
            continue
        program, seconds = future.result()
        print(f"compiled in {seconds:.0f} s: {name}", flush=True)
        timed = Timed(name, program, arguments)
        result = timed.warm_up()
        if name.startswith("op"):
            rows = " packed" if " packed" in name else " one document"
            shape_and_variant, rest = name.rsplit(rows, 1)
            key = shape_and_variant.rsplit(" ", 1)[0] + rows + rest
            if (error := relative(result, expected.setdefault(key, result))) > TOLERANCE:
                wrong += 1
                print(f"NOT TIMED, off by {error:.1e}: {name}", flush=True)
                continue
        programs.append(timed)
    del expected
    multiplied, flops = matmul()
    for _ in range(args.rounds):
        if time.perf_counter() - begun > 0.95 * args.seconds:
            break
        for timed in (multiplied, *programs):
            timed.round()
    rate = flops / multiplied.median * 1e3
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, matmul {rate / 1e12:.0f} TFLOP/s")
    off = {x.name.removeprefix("step none"): x.median for x in programs if "step none" in x.name}
    for timed in programs:
        over = " " * 7
        if timed.step:
            same = off.get("+unroll" if "+unroll" in timed.name else "")
            over = f"{timed.median / same - 1:+7.1%}" if same else over
            over += f"  MFU {work[timed.name] / timed.median * 1e3 / rate:5.1%}"
        for op in ops:
            if timed.name.startswith(f"{op.name} "):
                bound = (4 if timed.name.endswith("forward") else 14) * op.work / rate * 1e3
                over = f"{timed.median / bound:6.2f}x"
        print(f"{timed.median:9.3f} ms {over}  {timed.name}", flush=True)
        if args.json:
            row = {"name": timed.name, "ms": timed.median, "rounds": timed.times}
            row |= {"device": device, "matmul_tflops": rate / 1e12, "jax": jax.__version__}
            with args.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(f"done after {time.perf_counter() - begun:.0f} s", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
