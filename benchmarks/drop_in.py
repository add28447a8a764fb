"""What fast weights give SmolLM2 with a window of 1,024 before any training, and where to start
training from.

    python benchmarks/drop_in.py --data FOLDER --texts FILE --out OUT [--model RUN] [--seconds 150]

FOLDER holds smollm2/ (examples/smollm2.py) and books_heldout.jsonl.xz. FILE has books that neither
SmolLM2's run (RUN) was trained on nor anybody evaluates: on books that RUN has seen, the best scale
is three times too small (docs/lab/2026-11-30-errors-h200.md). Attention is cut as
benchmarks/smollm2_books.yaml says. Targets are a step of Newton on the loss of the next token, as
ttt_jax/pretrained/calibration.py says, which users have as `ttt-jax convert --ttt.calibrate`. Here
its settings are varied, one after the other, and layers are added, each with a scale of its own.
Measured is the loss behind the first 2,048 tokens of a passage, less that without TTT.

The best is read on held-out novels and written to OUT/start, a Hugging Face folder, with
OUT/words.txt, the fields that go with it: W_target is scaled so that AdamW can move it, and the
inner learning rate takes the rest. OUT/drop_in.jsonl has every row.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.memory_books import records
from ttt_jax import save_pretrained
from ttt_jax.config import Config, replace
from ttt_jax.data.tokenizer import load_tokenizer
from ttt_jax.model.stack import Runtime
from ttt_jax.model.transformer import Transformer, abstract_transformer
from ttt_jax.pretrained.calibration import (
    FIXED,
    FREE,
    NEXT,
    as_target,
    newton_step,
    predicted_covariance,
)
from ttt_jax.pretrained.load import initial_model
from ttt_jax.pretrained.start_config import load_start_config

ROOT = Path(__file__).resolve().parents[1]
HEAD = 1024  # tokens whose logits exist at once
START = {**FIXED, "decay": FREE["decay"], "shrink": 0.3, "scales": {29: 0.2}}
CHANGES = (
    {"shrink": 0.1},
    {"shrink": 1.0},
    {"decay": 1.0},
    {"decay": 0.9},
    {"ridge": 0.1},
    {"ridge": 10.0},
    {"chunk_size": 256},
    {"chunk_size": 1024},
)
OTHERS = (28, 27, 26, 25, 22)  # layers that may be added, with a scale of their own


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="in place of FOLDER/smollm2")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--skip", type=int, default=2048, help="tokens that do not count")
    parser.add_argument("--setting", type=json.loads, help="JSON, in place of the sweep")
    parser.add_argument("--override", type=str.split, default=[], help="fields of the config")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    Study(args).run()


class Study:
    """One sweep: the model, its passages, and the best setting so far.

    A setting is fields of `model.ttt`, `shrink` of the Newton step, and `scales`: the layers with
    TTT and how much of the step each takes. Every such layer makes the logits once more.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.started = args, time.monotonic()
        self.rows = (args.out / "drop_in.jsonl").open("a")
        self.source = args.data / "smollm2"
        words = [f"--init_from={args.model or self.source}", f"--data.tokenizer={self.source}"]
        config = load_start_config(ROOT / "benchmarks/smollm2_books.yaml", [*words, *args.override])
        self.none = replace(config, {"model.ttt.layers": []})
        self.tokenizer = load_tokenizer(str(self.source))
        self.ids_RT = passages(args.texts, self.tokenizer, args.passages, args.length)
        self.models: dict[tuple[int, ...], Transformer] = {}
        self.compiled: dict[str, Callable[..., jax.Array]] = {}
        model = self.model(self.none)
        covariance_DD = predicted_covariance(model, [row[: args.skip] for row in self.ids_RT])
        scale_D = np.asarray(model.norm.scale[...])
        self.steps = {
            shrink: newton_step(covariance_DD, scale_D, shrink).astype(np.float32)
            for shrink in (0.1, 0.3, 1.0)
        }
        self.base_R = self.losses(self.none, {}, 0.3)
        self.best: tuple[float, dict[str, Any]] = (0.0, START)

    def model(self, config: Config) -> Transformer:
        layers = tuple(config.model.ttt.layers)
        if layers not in self.models:
            self.models[layers] = starting_model(config, config.compute_dtype)
        return self.models[layers]

    def losses(self, config: Config, scales: Mapping[int, float], shrink: float) -> np.ndarray:
        """Loss of every passage."""
        model = self.model(config)
        key = repr(config.model.ttt)
        if key not in self.compiled:
            self.compiled[key] = loss_of(config, self.args.length, self.args.skip)
        scale_L = scale_by_layer(config, scales)
        rows = [
            self.compiled[key](jax.tree.leaves(model), scale_L, self.steps[shrink], row[None])
            for row in self.ids_RT
        ]
        return np.asarray(jax.device_get(rows))

    @property
    def left(self) -> float:
        return self.args.seconds - (time.monotonic() - self.started)

    def tried(self, what: str, setting: dict[str, Any]) -> float:
        """The gain of a setting, which is printed and kept."""
        fields = {k: v for k, v in setting.items() if k not in ("shrink", "scales")}
        fields["layers"] = sorted(setting["scales"])
        config = replace(self.none, {f"model.ttt.{k}": v for k, v in fields.items()})
        found_R = self.losses(config, setting["scales"], setting["shrink"])
        gain_R = self.base_R - found_R
        gain, error = float(gain_R.mean()), float(gain_R.std(ddof=1) / np.sqrt(len(gain_R)))
        row = {"what": what, **setting, "gain": gain, "standard_error": error}
        row |= {"loss": float(found_R.mean()), "by_passage": gain_R.round(5).tolist()}
        self.rows.write(json.dumps(row) + "\n")
        self.rows.flush()
        text = " ".join(f"{name}={value}" for name, value in setting.items() if name not in FIXED)
        print(f"{row['loss']:.4f}  gain {gain:+.4f} +- {error:.4f}  {what} {text}", flush=True)
        if what != "heldout" and gain > self.best[0]:
            self.best = gain, setting
        return gain

    def climb(self, what: str, settings: Sequence[dict[str, Any]]) -> None:
        """Try settings of growing size until one gains less than the one before."""
        before = -np.inf
        for setting in settings:
            if self.left < 25:
                return
            gain = self.tried(what, setting)
            if gain < before:
                return
            before = gain

    def run(self) -> None:
        print(f"{self.base_R.mean():.4f}  without TTT", flush=True)
        if self.args.setting is None:
            self.sweep()
        else:
            scales = self.args.setting.get("scales", START["scales"])
            scales = {int(layer): scale for layer, scale in scales.items()}
            setting = {**START, **self.args.setting, "scales": scales}
            self.best = self.tried("given", setting), setting
        gain, setting = self.best
        print(f"best {gain:+.4f} {setting}", flush=True)
        if gain > 0:
            self.save(setting)
            held_out = self.args.data / "books_heldout.jsonl.xz"
            self.ids_RT = passages(held_out, self.tokenizer, self.args.passages, self.args.length)
            self.base_R = self.losses(self.none, {}, 0.3)
            self.tried("heldout", setting)

    def sweep(self) -> None:
        """Climb from `START`, one change after the other."""
        self.climb("scale", [scaled(START, factor) for factor in (0.25, 0.5, 1.0, 2.0, 4.0)])
        for change in CHANGES:
            here = self.best[1] | change
            self.climb("change", [scaled(here, factor) for factor in (0.5, 1.0, 2.0)])
        for layer in OTHERS:
            here = self.best[1]
            added = [
                here | {"scales": {**here["scales"], layer: scale}} for scale in (0.02, 0.05, 0.1)
            ]
            self.climb("layer", added)

    def save(self, setting: dict[str, Any]) -> None:
        """Write OUT/start and the fields that go with it."""
        scales = setting["scales"]
        largest = max(scales.values())
        target_DD, rate = as_target(self.steps[setting["shrink"]], largest)
        fields = {k: v for k, v in setting.items() if k not in ("shrink", "scales")}
        fields |= {"layers": sorted(scales), "lr": rate}
        changes = {f"model.ttt.{k}": v for k, v in fields.items()}
        config = replace(self.none, {**changes, "init_from": str(self.source)})
        relative = {layer: scale / largest for layer, scale in scales.items()}
        model = with_target(
            starting_model(config, "float32"), scale_by_layer(config, relative), target_DD
        )
        save_pretrained(model, self.args.out / "start", carry_from=str(self.source))
        words = [f"--model.ttt.{k}={json.dumps(v).strip(chr(34))}" for k, v in fields.items()]
        (self.args.out / "words.txt").write_text(" ".join(w.replace(" ", "") for w in words))
        print(f"start: {' '.join(words)}", flush=True)


def scaled(setting: dict[str, Any], factor: float) -> dict[str, Any]:
    return setting | {"scales": {layer: factor * s for layer, s in setting["scales"].items()}}


def scale_by_layer(config: Config, scales: Mapping[int, float]) -> jax.Array:
    return jnp.asarray([scales.get(n, 0.0) for n in range(config.model.num_layers)], jnp.float32)


def starting_model(config: Config, dtype: str) -> Transformer:
    """What training by `config` would start from, in float32, to compute in `dtype`."""
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32),
        abstract_transformer(config.model, Runtime(dtype=dtype)),
    )
    model = initial_model(config, abstract)
    assert model is not None
    return model


def loss_of(config: Config, length: int, skip: int) -> Callable[..., jax.Array]:
    """Compile: (leaves of the model, scales of layers, Newton step, ids [1, length + 1]) -> loss
    behind the first `skip` tokens.
    """
    treedef = jax.tree.structure(
        abstract_transformer(config.model, Runtime(dtype=config.compute_dtype))
    )

    @jax.jit
    def one(leaves: list[jax.Array], scale_L: jax.Array, step_DD: jax.Array, ids_1T: jax.Array):
        here = with_target(jax.tree.unflatten(treedef, leaves), scale_L, step_DD)
        h_BTD, _, _ = here.hidden(ids_1T[:, :length])
        h_MCD = h_BTD[0, skip:].reshape(-1, HEAD, h_BTD.shape[2])
        next_MC = ids_1T[0, skip + 1 : length + 1].reshape(-1, HEAD)

        def losses(_, part):
            h_CD, next_C = part
            logits_CV = here.logits(h_CD[None])[0]
            picked_C = jnp.take_along_axis(logits_CV, next_C[:, None], 1)[:, 0]
            return None, jax.nn.logsumexp(logits_CV, axis=1) - picked_C

        return jax.lax.scan(losses, None, (h_MCD, next_MC))[1].mean()

    return one


def with_target(model: Transformer, scale_L: jax.Array, proj_DD: Any) -> Transformer:
    """The model with W_target = scale P in its TTT layers, behind a convolution whose only tap is
    the next token's.
    """
    layers = {(g, r): layers for g, r, layers in model.ttt_runs()}

    def leaf(path: Any, x: jax.Array) -> jax.Array:
        names = [
            str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path
        ]
        if "target" not in names:
            return x
        if "conv" in names:
            return jnp.zeros_like(x).at[..., NEXT].set(1)
        group, run, *_ = (int(name) for name in names if name.isdigit())
        scale_N = scale_L[jnp.asarray(layers[group, run])]
        return (scale_N.reshape(*x.shape[:2], 1, 1) * jnp.asarray(proj_DD)).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, model)


def passages(file: Path, tokenizer: Any, count: int, length: int) -> np.ndarray:
    """[R, length + 1] ids from behind the first page of each of the first long books of a file."""
    rows = []
    for record in records(file):
        ids = tokenizer.encode(record["text"][5000 : 5000 + 8 * length])
        if len(ids) > length:
            rows.append(ids[: length + 1])
        if len(rows) == count:
            break
    return np.asarray(rows, np.int32)


if __name__ == "__main__":
    main()
