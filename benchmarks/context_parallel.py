"""Scaling over the sequence: prefill and training on 1 .. n GPUs, with the share of the TTT
collectives.

    # prefill, strong and weak scaling
    python benchmarks/context_parallel.py --devices 1,2,4
    python benchmarks/context_parallel.py --train --mesh 1x4x1 --mesh 2x2x1 \\
        --strong 131072 # fsdp x context x tensor
    XLA_FLAGS=--xla_force_host_platform_device_count=4 JAX_PLATFORMS=cpu \\
        python benchmarks/context_parallel.py --preset default --strong 1024 --weak 256 \\
        --devices 1,2 --chunk 64 --check-seq 256 --repeats 2 [--train]

Random tokens, one document per row, bf16. Parameters are bf16 for prefill and float32 master
weights with AdamW under --train; they are sharded over fsdp and context. Strong scaling: one row of
--strong tokens whatever the number of devices; weak scaling: --weak tokens per context shard.
Before anything is timed, attention and op on the largest mesh are compared with one device, on
--check-seq tokens; a wrong result ends the run. TTT collectives: the exclusive prefix compiled
alone on the shapes of a layer, times the number of TTT layers and of prefixes per step (1 in
prefill; 3 in training: forward, recomputation, backward). MFU counts the model's FLOPs against a
matmul timed in the same run. Needs neither grain nor the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from train_step import matmul_rate, timed

from ttt_jax import config as config_lib
from ttt_jax.flops import model_flops_per_token
from ttt_jax.model.transformer import Transformer
from ttt_jax.ops import in_place_ttt
from ttt_jax.ops.attention.api import self_attention
from ttt_jax.ops.ttt.sharded import exclusive_prefix
from ttt_jax.parallel.mesh import batch_sharding, make_mesh, spec
from ttt_jax.parallel.one_device import Devices
from ttt_jax.parallel.shard_mapped import Parallel, make_parallel
from ttt_jax.pretrained.start_config import load_start_config
from ttt_jax.training.step import abstract_state, init_state, make_train_step
from ttt_jax.training.step_memory import settled_remat

ROOT = Path(__file__).resolve().parents[1]


def rms_error(x, oracle) -> float:
    x, oracle = (np.asarray(a, np.float32).astype(np.float64) for a in (x, oracle))
    return float(np.sqrt(np.mean((x - oracle) ** 2) / np.mean(oracle**2)))


def check(parallel: Parallel, model: config_lib.ModelConfig, T: int, dtype) -> dict[str, float]:
    """Relative RMS of attention and op on the mesh against float32 on one device, values and
    gradients.

    Raises: SystemExit if one exceeds 5e-3 (values) or 1e-2 (gradients).
    """
    C, rng = min(model.ttt.chunk_size, T // parallel.shards), np.random.default_rng(0)
    N, K, H, D, F = (
        model.num_heads,
        model.num_kv_heads,
        model.head_dim,
        min(model.d_model, 512),
        min(model.d_ff, 1024),
    )
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    heads = (draw(1, T, N, H), draw(1, T, K, H), draw(1, T, K, H)), draw(1, T, N, H)
    op = lambda run: lambda z, v, w: run(z, v, w, lr=0.5 / T**0.5, chunk_size=C)[0]
    fast = (draw(1, T, F), draw(1, T, D), draw(D, F)), draw(1, T, D)
    cases = {"op": (op(parallel.in_place_ttt), op(in_place_ttt), fast)}
    for window in {None, model.sliding_window}:
        one = functools.partial(self_attention, window=window, implementation="xla")
        cases[f"attention, window {window}"] = (
            functools.partial(parallel.attention, window=window),
            one,
            heads,
        )

    def both(run, x, dy):
        def value_and_gradients(x, dy):
            y, pull = jax.vjp(run, *x)
            return y, pull(dy)

        return jax.device_get(jax.jit(value_and_gradients)(x, dy))

    errors = {}
    for name, (split, one, (x, dy)) in cases.items():
        got, want = (
            both(split, x, dy),
            both(one, *jax.tree.map(lambda a: a.astype(jnp.float32), (x, dy))),
        )
        errors[name] = rms_error(got[0], want[0])
        errors[f"{name}, gradients"] = max(
            rms_error(a, b) for a, b in zip(got[1], want[1], strict=True)
        )
        if not (errors[name] <= 5e-3 and errors[f"{name}, gradients"] <= 1e-2):
            raise SystemExit(f"refusing to time a wrong result: {name}: {errors}")
    return errors


def prefix_seconds(
    parallel: Devices, model: config_lib.ModelConfig, rows: int, repeats: int
) -> float:
    """The exclusive prefix of one layer's S, alone; 0 on one shard."""
    if not isinstance(parallel, Parallel) or parallel.axis is None:
        return 0.0
    p, axis, shards = parallel, parallel.axis, parallel.shards
    batch_spec, wide = spec(("batch", "mlp"), (rows, model.d_ff), p.mesh)

    def local(delta):
        return exclusive_prefix(delta[0], None, None, axis=axis, shards=shards)[0][None]

    place = P(axis, batch_spec, None, wide)
    run = jax.jit(
        jax.shard_map(local, mesh=p.mesh, in_specs=place, out_specs=place, check_vma=False)
    )
    shape = (shards, rows, model.d_model, model.d_ff)
    delta = jax.jit(
        lambda: jnp.ones(shape, jnp.float32), out_shardings=NamedSharding(p.mesh, place)
    )()
    if abs(float(run(delta)[-1, 0, 0, 0]) - (shards - 1)) > 1e-6:
        raise SystemExit("refusing to time a wrong prefix")
    return timed(lambda: run(delta), repeats)


def random_batch(config: config_lib.Config, mesh) -> dict:
    B, T = config.data.batch_size, config.data.seq_len
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, (B, T + 1)).astype(np.int32)
    batch = {"ids": ids[:, :-1], "targets": ids[:, 1:], "weights": np.ones((B, T), np.float32)}
    return {name: jax.device_put(x, batch_sharding(mesh, (B, T))) for name, x in batch.items()}


def prefill(config: config_lib.Config, mesh, repeats: int) -> tuple[float, float]:
    """Seconds of a forward pass that returns the stream's state, and GiB per device."""
    config = settled_remat(config, mesh)
    abstract, _ = abstract_state(config, mesh)
    low = lambda model: jax.tree.map(lambda x: x.astype(config.compute_dtype), model)
    shardings = jax.tree.map(lambda x: x.sharding, abstract.model)
    runtime = abstract.model.runtime
    make = lambda: low(Transformer(config.model, runtime, key=jax.random.key(0)))
    model = jax.jit(make, out_shardings=shardings)()

    def forward(model, ids):
        h_BTD, state, _ = model.hidden(ids, keep_state=True)
        return model.logits(h_BTD[:, -1:]), state

    ids = random_batch(config, mesh)["ids"]
    compiled = jax.jit(forward).lower(model, ids).compile()
    logits = np.asarray(compiled(model, ids)[0], np.float32)
    if not np.all(np.isfinite(logits)):
        raise SystemExit("refusing to report: logits are not finite")
    return timed(lambda: compiled(model, ids), repeats), _gib(compiled)


def train(config: config_lib.Config, mesh, repeats: int) -> tuple[float, float]:
    """Seconds of a training step, and GiB per device."""
    config = settled_remat(config, mesh)
    abstract, tx = abstract_state(config, mesh)
    batch = random_batch(config, mesh)
    compiled = make_train_step(config, tx).lower(abstract, batch).compile()
    state, losses = init_state(config, abstract, tx), []

    def run():
        nonlocal state
        state, metrics = compiled(state, batch)
        losses.append(metrics["loss"])
        return metrics["loss"]

    seconds = timed(run, repeats)
    first = float(losses[0])
    # Random tokens: the first loss must be that of a uniform guess, and nothing may blow up.
    if (
        not np.all(np.isfinite([float(x) for x in losses]))
        or abs(first - np.log(config.model.vocab_size)) > 1.0
    ):
        raise SystemExit(
            f"refusing to report: losses {[float(x) for x in losses]} are not those of a working "
            "step"
        )
    return seconds, _gib(compiled)


def _gib(compiled) -> float:
    memory = compiled.memory_analysis()
    size = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return (size - memory.alias_size_in_bytes) / 2**30


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset", default="qwen3_4b_longct_128k", help="name of a file in configs/"
    )
    parser.add_argument(
        "--devices", default="1,2,4", help="context axis sizes to compare, comma-separated"
    )
    parser.add_argument(
        "--mesh",
        action="append",
        help="fsdp x context x tensor, e.g. 1x4x1; replaces --devices; repeatable",
    )
    parser.add_argument(
        "--strong",
        type=int,
        help="tokens of a row in strong scaling (default 131072; 0: leave it out)",
    )
    parser.add_argument(
        "--weak",
        type=int,
        help="tokens per context shard in weak scaling (default 32768; 0: leave it out)",
    )
    parser.add_argument("--rows", type=int, default=1, help="rows per fsdp shard")
    parser.add_argument("--train", action="store_true", help="time a training step, not a prefill")
    parser.add_argument("--chunk", type=int, help="TTT chunk size")
    parser.add_argument("--only", choices=["on", "off"], help="measure TTT on or off alone")
    parser.add_argument(
        "--remat-save",
        help="activations kept for the backward, comma-separated; 'none' recomputes all",
    )
    parser.add_argument(
        "--check-seq", type=int, default=4096, help="tokens of the check against one device"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed runs (the median is reported)"
    )
    parser.add_argument("--json", help="append results to this file, one JSON object a line")
    return parser.parse_known_args()  # the rest: config fields, e.g. --model.ttt.lr=1


def main() -> None:
    args, overrides = arguments()

    meshes = [tuple(int(n) for n in text.split("x")) for text in args.mesh or ()]
    meshes = meshes or [(1, int(n), 1) for n in args.devices.split(",")]
    words = [
        "--data.pack=false",
        "--optimizer.accumulate=1",
        "--compute_dtype=bfloat16",
        *overrides,
    ]
    if args.chunk:
        words.append(f"--model.ttt.chunk_size={args.chunk}")
    if args.remat_save is not None:
        words.append(
            f"--remat_save={[] if args.remat_save == 'none' else args.remat_save.split(',')}"
        )
    base = load_start_config(ROOT / "configs" / f"{args.preset}.yaml", words)
    rate = matmul_rate(base.compute_dtype)
    device = jax.devices()[0].device_kind
    print(
        f"{device}, jax {jax.__version__}, {base.compute_dtype} matmul {rate / 1e12:.3g} TFLOP/s",
        flush=True,
    )

    largest = max(meshes, key=np.prod)
    split = make_parallel(mesh_of(largest))
    if isinstance(split, Parallel):
        for name, error in check(split, base.model, args.check_seq, base.compute_dtype).items():
            print(f"check on {label(largest)}: {name}: relative RMS {error:.1e}", flush=True)

    scalings = {
        "strong": 131072 if args.strong is None else args.strong,
        "weak": 32768 if args.weak is None else args.weak,
    }
    for scaling, tokens in scalings.items():
        reference: dict[str, tuple[float, int]] = {}
        for shape in meshes if tokens else ():
            for ttt in ("off", "on"):
                if args.only in (None, ttt):
                    row = measure(
                        base,
                        shape,
                        tokens if scaling == "strong" else tokens * shape[1],
                        ttt,
                        args,
                        rate,
                    )
                    per_device = row["tokens_per_second"] / row["devices"] * row["flops_per_token"]
                    first = reference.setdefault(ttt, (per_device, row["devices"]))
                    row |= {
                        "scaling": scaling,
                        "device": device,
                        "jax": jax.__version__,
                        "efficiency": per_device / first[0],
                    }
                    report(row, first[1])
                    if args.json:
                        with open(args.json, "a", encoding="utf-8") as file:
                            file.write(json.dumps(row) + "\n")


def mesh_of(shape: tuple[int, ...]):
    fsdp, context, tensor = shape
    sizes = config_lib.MeshConfig(data=1, fsdp=fsdp, context=context, tensor=tensor)
    return make_mesh(sizes, jax.devices()[: fsdp * context * tensor])


def label(shape: tuple[int, ...]) -> str:
    return "fsdp {} x context {} x tensor {}".format(*shape)


def measure(base: config_lib.Config, shape, T: int, ttt: str, args, rate: float) -> dict:
    mesh, rows, devices = mesh_of(shape), args.rows * shape[0], int(np.prod(shape))
    names = dict(zip(("fsdp", "context", "tensor"), shape, strict=True))
    changes: dict = {
        "data.seq_len": T,
        "data.batch_size": rows,
        "model.max_positions": T,
        "mesh.data": 1,
    }
    changes |= {f"mesh.{name}": size for name, size in names.items()}
    if ttt == "off":
        changes["model.ttt.layers"] = []
    config = config_lib.replace(base, changes)
    config_lib.validate(config)
    seconds, gib = (train if args.train else prefill)(config, mesh, args.repeats)
    layers = len(config.model.ttt.layers)
    one = prefix_seconds(make_parallel(mesh), config.model, rows, args.repeats) if layers else 0.0
    flops = model_flops_per_token(config.model, T, training=args.train)
    if not args.train:  # the logits of the last token only
        flops -= 2 * config.model.d_model * config.model.vocab_size
    return {
        "preset": args.preset,
        "work": "train" if args.train else "prefill",
        "mesh": names,
        "devices": devices,
        "ttt": ttt,
        "rows": rows,
        "seq": T,
        "chunk": config.model.ttt.chunk_size,
        "seconds": seconds,
        "peak_gib": gib,
        "tokens_per_second": rows * T / seconds,
        "flops_per_token": flops,
        "matmul_tflops": rate / 1e12,
        "mfu": rows * T * flops / seconds / (rate * devices),
        "prefix_seconds": one,
        "prefix_share": one * layers * (3 if args.train else 1) / seconds,
        "remat_save": config.remat_save,
        "model": dataclasses.asdict(config.model.ttt),
    }


def report(row: dict, first: int) -> None:
    """Efficiency: model FLOP/s per device beside the first mesh's; under strong scaling that is the
    speed-up per device.
    """
    print(
        f"{row['scaling']:6} {row['work']} {label(tuple(row['mesh'].values()))} rows "
        f"{row['rows']} T={row['seq']} "
        f"TTT {row['ttt']:3}: {row['seconds'] * 1e3:9.1f} ms  {row['tokens_per_second']:9.0f} "
        f"tok/s  MFU {row['mfu']:6.1%}  "
        f"efficiency {row['efficiency']:6.1%} (of {first} device{'s' * (first > 1)})  "
        f"prefix {row['prefix_seconds'] * 1e3:.2f} ms, {row['prefix_share']:.2%} of the time  "
        f"{row['peak_gib']:.1f} GiB",
        flush=True,
    )


if __name__ == "__main__":
    main()
