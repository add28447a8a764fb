"""Speed and memory of prefill and decode on this machine's accelerator, beside the bounds measured
in the same run.

    python benchmarks/generate.py --preset qwen3_4b_longct_128k --chunk 1024 \\
        --prefill 8192,32768,65536,131072 \
        --decode-context 9216 --batches 1,16
    # also runs on a CPU
    python benchmarks/generate.py --preset default --prefill 1024 --decode-context 512 --batches 1,4

Random bf16 weights (float32 on CPUs), random tokens, TTT on and off in one run. Prefill reads
pieces as `Session` does; decode is `decode_step` on a state filled with random numbers, at a fixed
context. The bandwidth bound of a decode step is every weight, the KV cache and the fast weights
(float32) read once at the rate of a large copy. Refuses to time if the pieces and the steps of a
small model do not agree with one whole pass. Needs neither grain nor the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.train_step import matmul_rate, timed
from ttt_jax import config as config_lib
from ttt_jax.flops import model_flops_per_token
from ttt_jax.inference.decoding import decode_step
from ttt_jax.inference.generation import GREEDY, generate
from ttt_jax.inference.prefill import Frozen, needs_capacity, piece_size, pieces, read_piece
from ttt_jax.inference.scoring import score
from ttt_jax.model.stack import Runtime
from ttt_jax.model.transformer import State, Transformer
from ttt_jax.pretrained.start_config import load_start_config

ROOT = Path(__file__).resolve().parents[1]


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(number, *, shape, dtype):
    return (
        0.02 * jax.random.normal(jax.random.fold_in(jax.random.key(0), number), shape, jnp.float32)
    ).astype(dtype)


def randomised(abstract):
    """Small random numbers of these shapes, vectors of ones; one program per shape, because one for
    all compiles minutes.
    """
    leaves, tree = jax.tree.flatten(abstract)
    vector = lambda x: sum(size > 1 for size in x.shape) <= 1
    make = lambda i, x: (
        jnp.ones(x.shape, x.dtype) if vector(x) else _normal(i, shape=x.shape, dtype=x.dtype)
    )
    return jax.tree.unflatten(tree, [make(i, x) for i, x in enumerate(leaves)])


def random_model(cfg: config_lib.ModelConfig, dtype: str) -> Transformer:
    runtime = Runtime(dtype=dtype, remat_save=None, scan_layers=False)
    abstract = jax.eval_shape(lambda: Transformer(cfg, runtime, key=jax.random.key(0)))
    return randomised(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract))


def set_implementation(model: Transformer, name: str | None) -> Transformer:
    """The same arrays in a model whose TTT op is computed by another implementation."""
    cfg = config_lib.replace(model.config, {"ttt.implementation": name})
    abstract = jax.eval_shape(lambda: Transformer(cfg, model.runtime, key=jax.random.key(0)))
    return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(model))


def check(cfg: config_lib.ModelConfig, dtype: str) -> None:
    """Pieces, steps and one whole pass of a small model of the same family agree, or nothing is
    timed.
    """
    small = dataclasses.replace(
        cfg,
        d_model=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        d_ff=512,
        vocab_size=512,
    )
    small = config_lib.replace(
        small, {"ttt.layers": [0, 2], "ttt.chunk_size": 128, "full_attention_layers": []}
    )
    model = random_model(small, dtype)
    ids = np.random.default_rng(0).integers(0, 512, 700)
    whole, cut = (score(model, [ids], piece=size).logprobs_BT for size in (1024, 256))
    out = generate(model, [ids], max_new_tokens=80, eos_ids=())[0]
    again = score(model, [np.concatenate([ids, out.token_ids])], piece=1024).logprobs_BT[
        0, len(ids) - 1 :
    ]
    for name, a, b in (("pieces", cut, whole), ("steps", np.array(out.logprobs), again)):
        error = float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))
        print(f"check: {name} against one whole pass: relative RMS {error:.1e}", flush=True)
        if not error < (5e-3 if dtype == "bfloat16" else 1e-4):
            raise SystemExit("refusing to time a wrong result")


def copy_rate() -> float:
    """Bytes/s of a large copy, read and written bytes counted."""
    n = (2**30 if jax.default_backend() != "cpu" else 2**26) // 4
    x = jax.random.normal(jax.random.key(0), (n,), jnp.float32)
    copy = jax.jit(lambda x: -x)
    return 2 * 4 * n / timed(lambda: copy(x), 10)


def prefill_seconds(
    model: Transformer, tokens: int, capacity: int, ttt: bool, repeats: int
) -> float:
    cfg = model.config
    rows = [np.random.default_rng(1).integers(0, cfg.vocab_size, tokens).astype(np.int32)]
    size, frozen = piece_size(model, None), Frozen(model)

    def run():
        state, logits = None, jnp.zeros((1, cfg.vocab_size), jnp.float32)
        for part in pieces(rows, np.zeros(1, np.int64), size, cfg.ttt.chunk_size):
            state, logits, _ = read_piece(
                frozen,
                state,
                logits,
                part.ids_BP,
                part.lengths_B,
                capacity=capacity if needs_capacity(model) else None,
                at_chunk_start=part.at_chunk_start,
                ttt=ttt,
            )
        del state
        return logits

    return timed(run, repeats)


def random_state(model: Transformer, batch: int, context: int, room: int, ttt: bool) -> State:
    """As if `context` tokens had been read; the pending chunk is far from complete."""

    state = jax.eval_shape(lambda: model.init_state(batch, context + room))
    layers = state.layers
    if not ttt:
        layers = tuple(tuple(run._replace(ttt=None) for run in runs) for runs in layers)
    return State(jnp.full((batch,), context, jnp.int32), randomised(layers), state.capacity)


def decode_seconds(
    model: Transformer, batch: int, context: int, steps: int, ttt: bool
) -> tuple[float, float, int]:
    """Seconds of a step that completes no chunk, of one that does (every row), and the bytes of the
    state.
    """
    state = random_state(model, batch, context, 256, ttt)
    size = sum(
        x.nbytes
        for x in jax.tree.leaves(
            [[run._replace(ttt=None) for run in runs] for runs in state.layers]
        )
    )
    size += sum(
        run.ttt.S_BDF.nbytes for runs in state.layers for run in runs if run.ttt is not None
    )
    token_B, seed_B, alive_B = (
        jnp.zeros((batch,), jnp.int32),
        jnp.zeros((batch,), jnp.int32),
        jnp.ones((batch,), bool),
    )
    frozen = Frozen(model)
    take = lambda state, token_B, ends: decode_step(
        frozen, state, token_B, alive_B, seed_B, sampling=GREEDY, eos=(), ends_chunk=ends, ttt=ttt
    )
    seconds = []
    for ends in (False, True) if ttt and model.config.ttt.layers else (False,):
        if ends:  # one token before the end of a chunk
            C = model.config.ttt.chunk_size
            state = dataclasses.replace(
                state, position_B=jnp.full((batch,), context // C * C - 1, jnp.int32)
            )
        state, out = take(state, token_B, ends)
        repeats, times = (1, []) if ends else (steps, [])
        for _ in range(3):
            if ends:
                state = dataclasses.replace(
                    state, position_B=jnp.full((batch,), context // C * C - 1, jnp.int32)
                )
            jax.block_until_ready(out)
            start = time.perf_counter()
            for _ in range(repeats):  # dispatched ahead, as `Session.generate` does
                state, out = take(state, out[0], ends)
            jax.block_until_ready(out)
            times.append((time.perf_counter() - start) / repeats)
        seconds.append(float(np.median(times)))
    return seconds[0], seconds[-1], size


def peak_gib() -> float:
    return ((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use") or 0) / 2**30


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="default", help="name of a file in configs/")
    parser.add_argument("--chunk", type=int, help="TTT chunk size")
    parser.add_argument("--prefill", default="1024", help="prompt lengths, comma-separated")
    parser.add_argument(
        "--implementations",
        help="of the TTT op, to compare in prefill; default: what the op chooses",
    )
    parser.add_argument(
        "--decode-context", type=int, default=512, help="tokens already read when decoding is timed"
    )
    parser.add_argument("--batches", default="1", help="batch sizes of decoding, comma-separated")
    parser.add_argument("--steps", type=int, default=32, help="decode steps per timing")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed prefills (the median is reported)"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="print the device time of each kernel of a decode step",
    )
    parser.add_argument("--json", help="append results to this file, one JSON object a line")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    cfg = load_start_config(ROOT / "configs" / f"{args.preset}.yaml").model
    if args.chunk:
        cfg = config_lib.replace(cfg, {"ttt.chunk_size": args.chunk})
    device = jax.devices()[0].device_kind
    flops, bandwidth = matmul_rate(dtype), copy_rate()
    print(
        f"{device}, jax {jax.__version__}, {dtype} matmul {flops / 1e12:.0f} TFLOP/s, copy "
        f"{bandwidth / 1e9:.0f} GB/s"
    )
    check(cfg, dtype)
    start = time.perf_counter()
    model = random_model(cfg, dtype)
    jax.block_until_ready(model)
    weights = sum(x.nbytes for x in jax.tree.leaves(model))
    if cfg.tie_embeddings is False:
        weights -= model.embed[...].nbytes  # only a few of its rows are read
    print(
        f"{args.preset}: {weights / 2**30:.2f} GiB of weights read per token, made in "
        f"{time.perf_counter() - start:.0f} s"
    )

    rows = [
        *time_prefill(model, cfg, args, flops),
        *time_decoding(model, cfg, args, weights, bandwidth),
    ]
    if args.json:
        with open(args.json, "a", encoding="utf-8") as file:
            for row in rows:
                extra = {
                    "preset": args.preset,
                    "device": device,
                    "jax": jax.__version__,
                    "chunk": cfg.ttt.chunk_size,
                }
                file.write(json.dumps(row | extra | {"matmul": flops, "copy": bandwidth}) + "\n")


def time_prefill(model: Transformer, cfg: config_lib.ModelConfig, args, flops: float) -> list[dict]:
    """Time every length with TTT off and with each implementation, print and return the rows."""
    rows: list[dict] = []
    lengths = [int(x) for x in args.prefill.split(",") if x]
    for tokens in lengths:
        capacity = max(lengths)  # one capacity, so that one program serves all lengths
        seconds_off = None
        for name in ("off", *(f"on {x}".strip() for x in (args.implementations or "").split(","))):
            start, ttt = time.perf_counter(), name != "off"
            chosen = set_implementation(model, name.partition(" ")[2] or None)
            seconds = prefill_seconds(chosen, tokens, capacity, ttt, args.repeats)
            seconds_off = seconds_off or seconds
            work = tokens * model_flops_per_token(
                cfg if ttt else config_lib.replace(cfg, {"ttt.layers": []}), tokens, training=False
            )
            rows.append({"work": "prefill", "tokens": tokens, "ttt": name, "seconds": seconds})
            rows[-1] |= {"tokens_per_second": tokens / seconds, "peak_gib": peak_gib()}
            print(
                f"prefill {tokens:7} TTT {name:3}: {seconds:7.3f} s to the first token "
                f"{tokens / seconds:9.0f} tok/s  "
                f"{work / seconds / flops:5.1%} of the matmul rate  overhead "
                f"{seconds / seconds_off - 1:+.1%}  "
                f"peak so far {peak_gib():5.1f} GiB  (measured in "
                f"{time.perf_counter() - start:.0f} s)",
                flush=True,
            )
    return rows


def time_decoding(
    model: Transformer, cfg: config_lib.ModelConfig, args, weights: int, bandwidth: float
) -> list[dict]:
    """Time a step of every batch with TTT off and on, print and return the rows."""
    rows: list[dict] = []
    for batch in [int(x) for x in args.batches.split(",") if x]:
        for name, ttt in (("off", False), ("on", True)):
            start = time.perf_counter()
            seconds, update_seconds, state_bytes = decode_seconds(
                model, batch, args.decode_context, args.steps, ttt
            )
            bound = (weights + state_bytes) / bandwidth
            C = cfg.ttt.chunk_size
            mean = seconds + (update_seconds - seconds) / C if ttt else seconds
            rows.append(
                {
                    "work": "decode",
                    "batch": batch,
                    "ttt": name,
                    "seconds": mean,
                    "update_seconds": update_seconds,
                }
            )
            rows[-1] |= {
                "tokens_per_second": batch / mean,
                "bound_seconds": bound,
                "peak_gib": peak_gib(),
            }
            print(
                f"decode B={batch:2} at {args.decode_context} TTT {name:3}: {mean * 1e3:7.2f} ms "
                "a step "
                f"{batch / mean:8.1f} tok/s  {bound / mean:5.1%} of the bandwidth bound "
                f"({bound * 1e3:.2f} ms)  "
                f"step with update {update_seconds * 1e3:.2f} ms  "
                f"peak so far {peak_gib():5.1f} GiB  (measured in "
                f"{time.perf_counter() - start:.0f} s)",
                flush=True,
            )
            if args.profile:
                for ends in (False, True) if ttt and cfg.ttt.layers else (False,):
                    profile(model, batch, args.decode_context, ttt, ends)
    return rows


def profile(model: Transformer, batch: int, context: int, ttt: bool, ends: bool) -> None:
    import collections
    import glob
    import tempfile

    state = random_state(model, batch, context, 256, ttt)
    zero_B, alive_B = jnp.zeros((batch,), jnp.int32), jnp.ones((batch,), bool)
    frozen = Frozen(model)
    step = lambda state: decode_step(
        frozen, state, zero_B, alive_B, zero_B, sampling=GREEDY, eos=(), ends_chunk=ends, ttt=ttt
    )
    state, _ = step(state)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            state, out = step(state)
            jax.block_until_ready(out)
        data = jax.profiler.ProfileData.from_file(
            glob.glob(folder + "/**/*.xplane.pb", recursive=True)[0]
        )
    time_ms, count = collections.Counter(), collections.Counter()
    for plane in data.planes:
        for line in plane.lines:
            if "GPU" in plane.name and line.name.startswith("Stream"):
                for event in line.events:
                    time_ms[event.name[:100]] += event.duration_ns / 1e6
                    count[event.name[:100]] += 1
    words = "a step that completes chunks" if ends else "one step"
    print(f"  kernels of {words}: {sum(time_ms.values()):.2f} ms in {sum(count.values())} launches")
    for name, ms in time_ms.most_common(16):
        print(f"  {ms:8.3f} ms x{count[name]:<4} {name}")


if __name__ == "__main__":
    main()
