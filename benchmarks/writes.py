"""Check the ridge write's variants on this device against float64 on the CPU, then time them.

    python benchmarks/writes.py --seconds 140

(First run: variants to choose from. What is wrong, or not the same twice, is not timed.)
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import old_writes
from ttt_jax.kernels_pallas.inverse_root import inverse_root_gpu
from ttt_jax.ops.ttt import writes

KEYS = ("random", "shared", "tokens", "few")
SHAPES = {"books": (256, 512, 768, 2048), "4b": (32, 1024, 2560, 9728)}  # N, C, D, F
START = time.perf_counter()
X3 = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3
TF32X3 = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
F32, BF16 = jnp.float32, jnp.bfloat16


def keys_of(kind: str, C: int, F: int, rng):
    """Keys of text are far from random: `shared` have a direction in common, `tokens` repeat as
    often as words do, `few` lie in six dimensions and differ in size.
    """
    z_CF = rng.standard_normal((C, F))
    if kind == "shared":
        z_CF += 3
    elif kind == "tokens":
        z_CF = (rng.standard_normal((301, F)) + 1)[np.minimum(rng.zipf(1.3, C), 300)]
    elif kind == "few":
        z_CF = rng.standard_normal((C, 6)) @ rng.standard_normal((6, F))
        z_CF *= np.exp(rng.standard_normal((C, 1)))
    return z_CF


@functools.cache
def arrays(shape: str):
    """bf16 keys and targets, four chunks of four kinds, again and again: [1, N C, F], [1, N C, D];
    and what float64 makes of the four, targets, dz and dv of sum(v * v')."""
    N, C, D, F = SHAPES[shape]
    rng = np.random.default_rng(0)
    z = jnp.asarray(np.concatenate([keys_of(kind, C, F, rng) for kind in KEYS]), BF16)
    v = jnp.asarray(rng.standard_normal((4 * C, D)), BF16)
    oracles = [oracle(z[k * C : (k + 1) * C], v[k * C : (k + 1) * C], 1.0) for k in range(4)]
    again = jax.jit(lambda x: jnp.tile(x, (N // 4, 1))[None])
    return again(z), again(v), oracles


def oracle(z_CF, v_CD, ridge: float):
    z_CF, v_CD = np.asarray(z_CF, np.float64), np.asarray(v_CD, np.float64)
    gram_CC, C = z_CF @ z_CF.T, len(z_CF)
    exact_CD = np.linalg.solve(gram_CC + ridge * np.trace(gram_CC) / C * np.eye(C), v_CD)
    by_a_CC = -exact_CD @ exact_CD.T
    by_z = (by_a_CC + by_a_CC.T) @ z_CF + 2 * ridge / C * np.trace(by_a_CC) * z_CF
    return exact_CD, by_z, exact_CD


def right(shape: str, name: str, run) -> bool:
    N, C, *_ = SHAPES[shape]
    z, v, oracles = arrays(shape)
    first = run(z, v)
    same = lambda x, y: bool(jax.jit(lambda x, y: jnp.all(x == y))(x, y))
    repeated = lambda x: jnp.tile(x[:, : 4 * C], (1, N // 4, 1))
    again = all(same(x, y) for x, y in zip(first, run(z, v), strict=True))
    alike = all(same(x, jax.jit(repeated)(x)) for x in first)
    errors = []
    for k in range(4):
        for x, exact in zip(first, oracles[k], strict=True):
            got = np.asarray(x[0, k * C : (k + 1) * C], np.float64)
            errors.append(float(np.linalg.norm(got - exact) / np.linalg.norm(exact)))
    fine = again and alike and all(error < 1e-2 for error in errors)
    shown = " ".join(f"{error:.1e}" for error in errors)
    print(
        f"{shape} {name}: v' dz dv of {' '.join(KEYS)}: {shown}; twice the same {again}, "
        f"chunks alike {alike} -> {'right' if fine else 'WRONG'}",
        flush=True,
    )
    return fine


def milliseconds(programs: dict, repeats: int = 7, inner: int = 4) -> dict[str, float]:
    """Median over interleaved repeats."""
    times = {name: [] for name in programs}
    for name, (function, args) in programs.items():
        jax.block_until_ready(function(*args))
    for _ in range(repeats):
        for name, (function, args) in programs.items():
            start = time.perf_counter()
            for _ in range(inner):
                result = function(*args)
            jax.block_until_ready(result)
            times[name].append((time.perf_counter() - start) / inner)
    return {name: 1000 * statistics.median(x) for name, x in times.items()}


# ------------------------------------------------------------------------------------------ variants


def kernel(leaf=None, **options):
    def inverse_root(a_NCC, shift_N):
        if leaf is None or a_NCC.shape[1] <= leaf:
            return inverse_root_gpu(a_NCC, shift_N, **options)
        a_NCC = a_NCC + shift_N[:, None, None] * jnp.eye(a_NCC.shape[1], dtype=F32)[None]
        zero = jnp.zeros_like(shift_N)
        return writes.by_halves(a_NCC, leaf, lambda a: inverse_root_gpu(a, zero, **options))

    return inverse_root


def cusolver(leaf):
    def inverse_root(a_NCC, shift_N):
        a_NCC = a_NCC + shift_N[:, None, None] * jnp.eye(a_NCC.shape[1], dtype=F32)[None]

        def invert(a):
            eye = jnp.broadcast_to(jnp.eye(a.shape[1], dtype=F32)[None], a.shape)
            factor = jax.lax.linalg.cholesky(a, symmetrize_input=False)
            return jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)

        return writes.by_halves(a_NCC, leaf, invert)

    return inverse_root


def contraction(subscripts):
    inputs, out = subscripts.split("->")
    left, right = inputs.split(",")
    letter = next(x for x in left if x in right and x not in out)
    return left.index(letter), right.index(letter)


def stacked(subscripts, xs, ys):
    pairs = [(i, j) for i in range(len(xs)) for j in range(len(ys)) if i + j < 2]
    a, b = contraction(subscripts)
    x = jnp.concatenate([xs[i] for i, _ in reversed(pairs)], axis=a)
    y = jnp.concatenate([ys[j] for _, j in reversed(pairs)], axis=b)
    return writes.dot(subscripts, x, y, F32)


def algorithm(subscripts, xs, ys, precision=X3):
    x, y = (sum(t.astype(F32) for t in terms) for terms in (xs, ys))
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=F32)


DOTS, TERMS = writes._product, writes._terms
whole = lambda x, dtype: (x,)


def with_gradients(shape, root=None, product=DOTS, terms=TERMS, module=writes):
    C = SHAPES[shape][1]

    def all_three(z, v):
        saved = writes.inverse_root, writes._product, writes._terms
        writes.inverse_root, writes._product, writes._terms = root, product, terms
        try:
            out, vjp = jax.vjp(lambda z, v: module.transformed("ridge", z, v, C), z, v)
            return out, *vjp(v)
        finally:
            writes.inverse_root, writes._product, writes._terms = saved

    return jax.jit(all_three)


VARIANTS = {
    "books": {
        "kernel dots": {"root": kernel()},
        "kernel stacked": {"root": kernel(), "product": stacked},
        "kernel x3": {"root": kernel(), "product": algorithm, "terms": whole},
        "old": {"module": old_writes},
    },
    "4b": {
        "kernel 256 dots": {"root": kernel(256)},
        "kernel 256 stacked": {"root": kernel(256), "product": stacked},
        "old": {"module": old_writes},
    },
}
ROOTS = {
    "books": {
        "kernel b64 w4": kernel(),
        "kernel b64 w4 one stage": kernel(stages=1),
        "kernel b64 w8": kernel(warps=8),
        "kernel b32 w4": kernel(block=32),
        "kernel b32 w2": kernel(block=32, warps=2),
        "kernel b64 w4 float32": kernel(precision=jax.lax.Precision.HIGHEST),
        "halves, kernel 128": kernel(128),
        "halves, kernel 256": kernel(256),
        "halves, cusolver 64": cusolver(64),
        "halves, cusolver 128": cusolver(128),
    },
    "4b": {
        "kernel": kernel(),
        "kernel 512": kernel(512),
        "kernel 256": kernel(256),
        "kernel 128": kernel(128),
        "cusolver 128": cusolver(128),
    },
}


def out_of_time(args) -> bool:
    return time.perf_counter() - START > args.seconds


def attempt(what, function):
    try:
        return function()
    except Exception:
        print(what, "FAILED", traceback.format_exc(limit=-2)[-600:], flush=True)
        return None


def time_roots(args, shape):
    N, C, _, F = SHAPES[shape]
    z, _, _ = arrays(shape)
    chunks = z.reshape(N, C, F)
    gram = jax.jit(lambda z: writes.dot("ncf,nkf->nck", z, z, F32))(chunks)
    mean = jax.jit(lambda g: jnp.trace(g, axis1=1, axis2=2) / C)(gram)
    a = np.asarray(gram[2], np.float64) + float(mean[2]) * np.eye(C)
    exact = np.linalg.inv(np.linalg.cholesky(a))
    programs = {}
    for name, root in ROOTS[shape].items():
        if out_of_time(args):
            break
        run = jax.jit(root)
        start = time.perf_counter()
        got = attempt(name, lambda run=run: np.asarray(run(gram, mean)[2], np.float64))
        if got is None:
            continue
        error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
        took = time.perf_counter() - start
        print(f"{shape} root {name}: error {error:.1e}, first call {took:.1f} s", flush=True)
        if error < 1e-4:
            programs[name] = run, (gram, mean)
    for name, ms in milliseconds(programs, 5, 2).items():
        print(f"{shape} root {name}: {ms:.3f} ms", flush=True)


def time_products(args, shape):
    N, C, D, F = SHAPES[shape]
    z, v, _ = arrays(shape)
    z, v = z.reshape(N, C, F), v.reshape(N, C, D)
    p = jax.jit(lambda z: writes.dot("ncf,nkf->nck", z, z, F32) / F)(z)
    pair = jax.jit(lambda p: TERMS(p, BF16))(p)
    programs = {"gram": (jax.jit(lambda z: writes.dot("ncf,nkf->nck", z, z, F32)), (z,))}
    programs["terms"] = jax.jit(lambda p: TERMS(p, BF16)), (p,)
    for name, subscripts, xs, ys, in (
        ("M^T M", "nck,ncl->nkl", pair, pair),
        ("P v", "nck,nkd->ncd", pair, (v,)),
        ("H z", "nck,nkf->ncf", pair, (z,)),
    ):  # fmt: skip
        for how, product in (("dots", DOTS), ("stacked", stacked)):
            f = lambda *a, product=product, s=subscripts: product(s, *a)
            cast = (lambda x: x) if name == "M^T M" else (lambda x: x.astype(BF16))
            programs[f"{name} {how}"] = jax.jit(lambda *a, f=f, c=cast: c(f(*a))), (xs, ys)
        y = (p,) if name == "M^T M" else ys
        f = lambda *a, s=subscripts, c=cast: c(algorithm(s, *a))
        programs[f"{name} x3"] = jax.jit(f), ((p,), y)
    f = lambda p: jnp.einsum("nck,ncl->nkl", p, p, precision="highest")
    programs["M^T M float32"] = jax.jit(f), (p,)
    f = lambda p: jnp.einsum("nck,ncl->nkl", p, p, precision=TF32X3)
    programs["M^T M tf32x3"] = jax.jit(f), (p,)
    ready = {}
    for name, (function, inputs) in programs.items():
        if out_of_time(args):
            break
        if attempt(name, lambda f=function, x=inputs: jax.block_until_ready(f(*x))) is not None:
            ready[name] = function, inputs
    for name, ms in milliseconds(ready, 5, 2).items():
        print(f"{shape} {name}: {ms:.3f} ms", flush=True)


def time_variants(args, shape):
    z, v, _ = arrays(shape)
    programs = {}
    for name, options in VARIANTS[shape].items():
        if out_of_time(args):
            break
        start = time.perf_counter()
        run = with_gradients(shape, **options)
        if attempt(name, lambda run=run, name=name: right(shape, name, run)):
            programs[name] = run, (z, v)
        print(f"   {time.perf_counter() - start:.1f} s", flush=True)
    for name, ms in milliseconds(programs).items():
        print(f"{shape} {name}: with gradients {ms:.2f} ms", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=140)
    args = parser.parse_args()
    print(jax.devices()[0].device_kind, f"jax {jax.__version__}", flush=True)
    for part, shape in (
        (time_roots, "books"),
        (time_variants, "books"),
        (time_products, "books"),
        (time_roots, "4b"),
        (time_variants, "4b"),
    ):
        if not out_of_time(args):
            part(args, shape)
            print(f"at {time.perf_counter() - START:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
