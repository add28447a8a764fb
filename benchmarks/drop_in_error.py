"""What fast weights give a pretrained model before any training, if targets are prediction errors.

    python benchmarks/drop_in_error.py --data FOLDER --out FOLDER [--model RUN] [--seconds 250]

FOLDER as for benchmarks/drop_in.py, and books_heldout.jsonl.xz. Targets are a step of
Newton on the loss of the next token, as ttt_jax/pretrained/calibration.py says, which users have as
`ttt-jax convert --ttt.calibrate`. Here every setting of it is varied.

Settings are chosen on training books, one after the other, and the best is read on held-out novels.
It is written to OUT/start_error with OUT/words.txt, the fields that go with it: W_target is
scaled so that AdamW can move it, and the inner learning rate takes the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import jax
import jax.numpy as jnp
import numpy as np
from drop_in import Study, passages, with_target

from ttt_jax import save_pretrained
from ttt_jax.config import Config, replace
from ttt_jax.data.tokenizer import load_tokenizer
from ttt_jax.model.stack import Runtime
from ttt_jax.model.transformer import Transformer, abstract_transformer
from ttt_jax.pretrained.calibration import (
    FIXED,
    FREE,
    as_target,
    newton_step,
    predicted_covariance,
)
from ttt_jax.pretrained.load import initial_model

START = {**FIXED, "decay": FREE["decay"], "layers": [29]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="in place of FOLDER/smollm2")
    parser.add_argument("--seconds", type=float, default=250)
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--skip", type=int, default=2048, help="tokens that do not count")
    parser.add_argument("--override", type=str.split, default=[], help="fields of the config")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    ErrorStudy(args).run()


class ErrorStudy(Study):
    """As `Study`, one setting after the other; each has the TTT layers that it names and no more,
    since every such layer makes the logits once more.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.models, self.projections = {}, {}
        self.none = replace(self.config, {"model.ttt.layers": []})
        model = self.model(self.none)
        covariance_DD = predicted_covariance(model, [row[: args.skip] for row in self.ids_RT])
        for shrink in (0.1, 0.3, 1.0):
            step_DD = newton_step(covariance_DD, np.asarray(model.norm.scale[...]), shrink)
            self.projections[str(shrink)] = step_DD.astype(np.float32)

    def model(self, config: Config) -> Transformer:
        key = json.dumps(list(config.model.ttt.layers))
        if key not in self.models:
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32),
                abstract_transformer(config.model, Runtime(dtype=config.compute_dtype)),
            )
            found = initial_model(config, abstract)
            assert found is not None
            self.models[key] = found
        return self.models[key]

    def run(self) -> None:
        base_R = self.loss(self.none)(np.zeros(30), "0.3")
        self.note(base_R, base_R, what="window")
        best: tuple[float, dict[str, Any]] = (0.0, {})

        def tried(scales=(0.5, 1.0, 2.0), **change: Any) -> float:
            """The best gain of a setting over the scales, which are factors on the best so far."""
            nonlocal best
            setting = {**START, "scale": 0.2, "shrink": "0.3", **best[1], **change}
            if self.left < 25:
                return 0.0
            fields = {k: v for k, v in setting.items() if k not in ("scale", "shrink")}
            loss = self.loss(replace(self.config, {f"model.ttt.{k}": v for k, v in fields.items()}))
            found = []
            for factor in scales:
                here = setting | {"scale": factor * setting["scale"]}
                scale_L = np.zeros(30)
                scale_L[list(setting["layers"])] = here["scale"]
                gain = self.note(base_R, loss(scale_L, setting["shrink"]), what="error", **here)
                found.append(gain)
                if gain > best[0]:
                    best = gain, here
                elif len(found) > 1 and gain < found[-2]:
                    break
            return max(found)

        tried(scales=(0.25, 0.5, 1.0, 2.0, 4.0))
        for change in (
            {"shrink": "0.1"},
            {"shrink": "1.0"},
            {"decay": 1.0},
            {"decay": 0.85},
            {"ridge": 0.1},
            {"ridge": 10.0},
            {"chunk_size": 256},
            {"chunk_size": 1024},
        ):
            tried(**change)
        layers = best[1]["layers"]
        gains = {n: tried(scales=(0.25, 1.0), layers=[n]) for n in (28, 27, 25, 22)}
        others = sorted(gains, key=lambda n: -gains[n])
        tried(scales=(0.5, 0.75, 1.0), layers=sorted([*layers, others[0]]))
        tried(scales=(0.35, 0.5, 0.75), layers=sorted([*layers, *others[:2]]))
        print(f"best {best}", flush=True)
        if best[1]:
            self.save_start(*best)
            self.heldout(best[1])

    def heldout(self, setting: dict[str, Any]) -> None:
        """Read the held-out novels with the best setting, and with the embedding in its place."""
        self.ids_RT = passages(
            self.args, load_tokenizer(str(self.args.data / "smollm2")), "books_heldout.jsonl.xz"
        )
        base_R = self.loss(self.none)(np.zeros(30), "0.3")
        fields = {f"model.ttt.{k}": v for k, v in setting.items() if k not in ("scale", "shrink")}
        scale_L = np.zeros(30)
        scale_L[list(setting["layers"])] = setting["scale"]
        loss = self.loss(replace(self.config, fields))
        found_R = loss(scale_L, setting["shrink"])
        self.note(base_R, found_R, what="heldout", **setting)
        print("by novel", np.round(base_R - found_R, 4).tolist(), flush=True)

    def save_start(self, gain: float, setting: dict[str, Any]) -> None:
        """Write OUT/start_error and the fields that go with it."""
        source = str(self.args.data / "smollm2")
        target_DD, rate = as_target(self.projections[setting["shrink"]], setting["scale"])
        fields = {k: v for k, v in setting.items() if k not in ("scale", "shrink")} | {"lr": rate}
        changes = {f"model.ttt.{k}": v for k, v in fields.items()} | {"init_from": source}
        config = replace(self.config, changes)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32),
            abstract_transformer(config.model, Runtime(dtype="float32")),
        )
        model = initial_model(config, abstract)
        assert model is not None
        model = with_target(model, jnp.ones(30, jnp.float32), target_DD)
        save_pretrained(model, self.args.out / "start_error", carry_from=source)
        words = [f"--model.ttt.{k}={json.dumps(v).strip(chr(34))}" for k, v in fields.items()]
        (self.args.out / "words.txt").write_text(" ".join(w.replace(" ", "") for w in words))
        print(f"start: gain {gain:+.4f}: {' '.join(words)}", flush=True)


if __name__ == "__main__":
    main()
