"""What fast weights give a pretrained model before any training, if targets start as embeddings.

    python benchmarks/drop_in.py --data FOLDER --out FOLDER [--seconds 250]

FOLDER holds smollm2/ (examples/smollm2.py) and books_small.jsonl.xz, whose first books are read:
texts that training sees, so that the held-out ones stay unseen. Attention is cut as
benchmarks/smollm2_books.yaml says. Targets are v = s P rms(E[next token]): the convolution is its
tap at the next token, W_target is s P. Measured is the loss behind the first 2,048 tokens of a
passage, less that with s = 0. Layers are tried one at a time, then the best ones together, then
other projections P and other writes.

The best start is written to OUT/start, a Hugging Face folder for `--init_from`, with TTT in the
layers of OUT/layers.json; OUT/drop_in.jsonl has every row.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax import save_pretrained
from ttt_jax.config import Config, replace
from ttt_jax.data.tokenizer import load_tokenizer
from ttt_jax.model.stack import Runtime
from ttt_jax.model.transformer import Transformer, abstract_transformer
from ttt_jax.pretrained.calibration import NEXT
from ttt_jax.pretrained.load import initial_model, load_pretrained
from ttt_jax.pretrained.start_config import load_start_config

ROOT = Path(__file__).resolve().parents[1]
HEAD = 1024  # tokens whose logits exist at once
SCALES = (0.03, 0.1, 0.3, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--model", type=Path, help="in place of FOLDER/smollm2, such as a run without TTT"
    )
    parser.add_argument("--seconds", type=float, default=250)
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--skip", type=int, default=2048, help="tokens that do not count")
    parser.add_argument("--override", type=str.split, default=[], help="fields of the config")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    Study(args).run()


class Study:
    """One sweep: the model, its passages, and the rows found so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.started = args, time.monotonic()
        self.rows = (args.out / "drop_in.jsonl").open("a")
        smollm2 = args.data / "smollm2"
        words = [
            f"--init_from={args.model or smollm2}",
            f"--data.tokenizer={smollm2}",
            *args.override,
        ]
        config = load_start_config(ROOT / "benchmarks/smollm2_books.yaml", words)
        every = list(range(config.model.num_layers))
        self.config = replace(config, {"model.ttt.layers": every})
        self.ids_RT = passages(args, load_tokenizer(str(smollm2)))
        self.models: dict[str, Transformer] = {}
        model = self.model(self.config)
        D = model.config.d_model
        g_D = np.asarray(model.norm.scale[...], np.float32)
        E_VD = np.asarray(model.embed[...], np.float32)
        unit_VD = E_VD / np.sqrt(np.mean(E_VD**2, 1, keepdims=True) + 1e-12)
        mean_D = unit_VD[self.ids_RT.reshape(-1)].mean(0)
        out = np.eye(D, dtype=np.float32) - np.outer(mean_D, mean_D) / np.sum(mean_D**2)
        values, vectors = np.linalg.eigh(np.cov(unit_VD[self.ids_RT.reshape(-1)].T))
        white = vectors @ np.diag((values + 0.1 * values.mean()) ** -0.5) @ vectors.T
        white *= np.sqrt(values.mean())
        g_D = g_D / np.sqrt(np.mean(g_D**2))
        self.projections = {
            "identity": np.eye(D, dtype=np.float32),
            "norm": np.diag(g_D),
            "centred": out,
            "centred norm": out @ np.diag(g_D),
            "white": (out @ white).astype(np.float32),
            "white2": (out @ white @ white).astype(np.float32),
        }

    def model(self, config: Config) -> Transformer:
        key = json.dumps([config.model.sliding_window, config.model.num_layers])
        if key not in self.models:
            runtime = Runtime(dtype=config.compute_dtype)
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32),
                abstract_transformer(config.model, runtime),
            )
            found = initial_model(config, abstract)
            assert found is not None
            self.models[key] = found
        return self.models[key]

    def loss(self, config: Config) -> Callable[..., np.ndarray]:
        """Compile for `config`: (scales of layers, projection) -> loss of every passage."""
        model, length, skip = self.model(config), self.args.length, self.args.skip
        runtime = Runtime(dtype=config.compute_dtype)
        shape = abstract_transformer(config.model, runtime)
        treedef = jax.tree.structure(shape)

        @jax.jit
        def one(leaves: list[jax.Array], scale_L: jax.Array, proj_DD: jax.Array, ids_1T: jax.Array):
            here = with_target(jax.tree.unflatten(treedef, leaves), scale_L, proj_DD)
            h_BTD, _, _ = here.hidden(ids_1T[:, :length])
            h_MCD = h_BTD[0, skip:].reshape(-1, HEAD, h_BTD.shape[2])
            next_MC = ids_1T[0, skip + 1 : length + 1].reshape(-1, HEAD)

            def losses(_, part):
                h_CD, next_C = part
                logits_CV = here.logits(h_CD[None])[0]
                picked_C = jnp.take_along_axis(logits_CV, next_C[:, None], 1)[:, 0]
                return None, jax.nn.logsumexp(logits_CV, axis=1) - picked_C

            return jax.lax.scan(losses, None, (h_MCD, next_MC))[1].mean()

        leaves = jax.tree.leaves(model)

        def of(scale_L: np.ndarray, proj: str = "identity") -> np.ndarray:
            rows = [
                one(leaves, jnp.asarray(scale_L, jnp.float32), self.projections[proj], row[None])
                for row in self.ids_RT
            ]
            return np.asarray(jax.device_get(rows))

        return of

    @property
    def left(self) -> float:
        return self.args.seconds - (time.monotonic() - self.started)

    def note(self, base_R: np.ndarray, found_R: np.ndarray, **about: Any) -> float:
        """Print and keep one row; returns the gain over `base_R`."""
        gain_R = base_R - found_R
        gain, error = float(gain_R.mean()), float(gain_R.std(ddof=1) / np.sqrt(len(gain_R)))
        row = {**about, "loss": float(found_R.mean()), "gain": gain, "standard_error": error}
        self.rows.write(json.dumps(row) + "\n")
        self.rows.flush()
        text = " ".join(f"{name}={value}" for name, value in about.items())
        print(f"{row['loss']:.4f}  gain {gain:+.4f} +- {error:.4f}  {text}", flush=True)
        return gain

    def run(self) -> None:
        L = self.config.model.num_layers
        none = np.zeros(L)
        plain = replace(self.config, {"model.ttt.layers": [], "model.sliding_window": None})
        loss = self.loss(self.config)
        base_R = loss(none)
        self.note(base_R, base_R, what="window")
        if self.args.model is None:
            self.note(base_R, self.loss(plain)(none), what="full attention")
        best = dict.fromkeys(range(L), (0.0, 0.0))
        coarse = [*range(L - 1, -1, -3), *range(L - 2, -1, -3), *range(L - 3, -1, -3)]
        for layer in coarse:
            if self.left < 0.55 * self.args.seconds:
                break
            for scale in SCALES:
                scale_L = none.copy()
                scale_L[layer] = scale
                gain = self.note(base_R, loss(scale_L), what="layer", layer=layer, scale=scale)
                best[layer] = max(best[layer], (gain, scale))
                if gain < -0.02:
                    break
        order = sorted(best, key=lambda layer: -best[layer][0])
        chosen, factor_best = (0.0, none), 1.0
        for count in (1, 2, 4, 6, 10):
            for factor in (0.25, 0.5, 1.0):
                scale_L = none.copy()
                for layer in order[:count]:
                    scale_L[layer] = factor * best[layer][1]
                gain = self.note(
                    base_R, loss(scale_L), what="together", layers=order[:count], factor=factor
                )
                if gain > chosen[0]:
                    chosen, factor_best = (gain, scale_L), factor
        print(f"chosen {chosen[0]:+.4f} factor {factor_best}", flush=True)
        gain, scale_L = chosen
        proj_best = "identity"
        for proj in self.projections:
            for factor in (0.5, 1.0, 2.0):
                found = self.note(
                    base_R, loss(factor * scale_L, proj), what="proj", proj=proj, factor=factor
                )
                if found > gain:
                    gain, proj_best, chosen = found, proj, (found, factor * scale_L)
        scale_L = chosen[1]
        self.save(scale_L, proj_best, gain)
        for change in (
            {"model.ttt.write": "sum"},
            {"model.ttt.ridge": 0.1},
            {"model.ttt.ridge": 10.0},
            {"model.ttt.chunk_size": 128},
            {"model.ttt.chunk_size": 1024},
            {"model.ttt.decay": 0.9},
            {"model.ttt.ridge": 100.0},
            {"model.ttt.chunk_size": 256},
        ):
            if self.left < 15:
                break
            other = self.loss(replace(self.config, change))
            for factor in (0.5, 1.0, 2.0) if "model.ttt.write" not in change else (1e-3, 1e-2, 0.1):
                about = {name.removeprefix("model.ttt."): value for name, value in change.items()}
                self.note(
                    base_R, other(factor * scale_L, proj_best), what="write", factor=factor, **about
                )

    def save(self, scale_L: np.ndarray, proj: str, gain: float) -> None:
        """Write OUT/start: smollm2 with TTT in the layers that have a scale."""
        layers = [layer for layer, scale in enumerate(scale_L) if scale]
        if not layers:
            print("nothing gains; no start is written", flush=True)
            return
        source = str(self.args.data / "smollm2")
        config = replace(self.config, {"model.ttt.layers": layers, "init_from": source})
        runtime = Runtime(dtype="float32")
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32),
            abstract_transformer(config.model, runtime),
        )
        model = initial_model(config, abstract)
        assert model is not None
        model = with_target(model, jnp.asarray(scale_L, jnp.float32), self.projections[proj])
        save_pretrained(model, self.args.out / "start", carry_from=source)
        (self.args.out / "layers.json").write_text(json.dumps(layers))
        kept = load_pretrained(self.args.out / "start")
        assert kept.config.ttt.layers == tuple(layers) or list(kept.config.ttt.layers) == layers
        scales = [float(scale_L[layer]) for layer in layers]
        print(f"start: layers {layers} scales {scales} {proj}: gain {gain:+.4f}", flush=True)


def with_target(model: Transformer, scale_L, proj_DD) -> Transformer:
    """The model with targets v = scale P rms(E[next]) in its TTT layers."""
    layers = {(g, r): layers for g, r, layers in model.ttt_runs()}

    def leaf(path: Any, x: jax.Array) -> jax.Array:
        names = [
            str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path
        ]
        if "target" not in names:
            return x
        numbers = [int(name) for name in names if name.isdigit()]
        scale_N = scale_L[jnp.asarray(layers[numbers[0], numbers[1]])]
        if "conv" in names:
            return jnp.zeros_like(x).at[..., NEXT].set(1)
        scale = scale_N.reshape(*x.shape[:2], 1, 1)
        return (scale * jnp.asarray(proj_DD)).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, model)


def passages(
    args: argparse.Namespace, tokenizer: Any, file: str = "books_small.jsonl.xz"
) -> np.ndarray:
    """[R, length + 1] ids from behind the first page of each of the first long books of a file."""
    rows = []
    with lzma.open(args.data / file, "rt") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            ids = tokenizer.encode(text[5000 : 5000 + 8 * args.length])
            if len(ids) > args.length:
                rows.append(ids[: args.length + 1])
            if len(rows) == args.passages:
                break
    return np.asarray(rows, np.int32)


if __name__ == "__main__":
    main()
