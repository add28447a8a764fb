"""Measures the loss on held-out rows by position, with TTT on and off on the same slow weights.

B rows of a batch, R held-out rows, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ttt_jax.config import Config
from ttt_jax.data import Tokenizer, heldout_rows
from ttt_jax.display.tables import table_text
from ttt_jax.model.loss import token_nll
from ttt_jax.model.transformer import Transformer
from ttt_jax.parallel.mesh import Batch, batch_sharding, replicated
from ttt_jax.run.positions import TITLE, position_scalars, position_table
from ttt_jax.training.hooks import Hook, Seen

# (model, batch, ttt_scale) -> (nll_BT, stats)
PositionNll = Callable[[Transformer, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class Heldout:
    """The held-out rows of a run, and what is measured on them: one program serves all of it.

    Attributes:
      rows: arrays [R, T], the same on every process; see `heldout_rows`.
      remarks: lines for the user, when there are fewer rows than `eval.rows`.
    """

    def __init__(self, config: Config, mesh: Mesh, tokenizer: Tokenizer) -> None:
        """Read the rows. Raises DataError; no process waits for another here."""
        self.rows = heldout_rows(config, tokenizer=tokenizer, rows=config.eval.rows)
        found, T = self.rows["ids"].shape
        self.remarks = [
            f"eval.rows = {config.eval.rows}: the held-out documents make {found} of {T} tokens"
        ] * (found < config.eval.rows)
        self._mesh, self._buckets = mesh, config.eval.buckets
        self._batch_size = min(config.data.batch_size, len(self.rows["ids"]))
        self._position_nll = make_position_nll(mesh)
        self._probe: Callable[[Transformer], dict[str, float]] | None = None
        self._latest: tuple[int, dict[str, list]] | None = None  # step, and what was measured

    def place(self) -> None:
        """Put the probe's rows on the devices, on all processes together."""
        self._probe = make_probe(self._position_nll, self.rows, self._mesh, self._batch_size)

    def probe(self, model: Transformer) -> dict[str, float]:
        """Measure the first rows, see `make_probe`; after `place`."""
        assert self._probe is not None
        return self._probe(model)

    def hooks(self, config: Config) -> list[Hook]:
        """Return what `log.probe_every` and `eval.every` ask for."""
        ttt = bool(config.model.ttt.layers)

        def probe(step: int, model: Transformer) -> Seen:
            return Seen(self.probe(model))

        def evaluate(step: int, model: Transformer) -> Seen:
            losses = self.by_position(model)
            self._latest = step, losses
            table = position_table(losses, ttt, f"{TITLE}, step {step}")
            return Seen(position_scalars(losses), table_text(table, first="right"))

        return [Hook(config.log.probe_every, probe), Hook(config.eval.every, evaluate)]

    def measured(self, step: int) -> dict[str, list] | None:
        """Return what `eval.every` has measured after this step, if that was the last time."""
        return self._latest[1] if self._latest and self._latest[0] == step else None

    def by_position(
        self, model: Transformer, before_each: Callable[[], None] | None = None
    ) -> dict[str, list]:
        """Measure all rows: `positions` and the mean losses `ttt_on` and `ttt_off`, see
        `bucket_losses`.

        Args:
          before_each: is called before each batch, and may raise to end the evaluation.
        """

        def nll(*batch: Any) -> tuple[jax.Array, Any]:
            if before_each is not None:
                before_each()
            return self._position_nll(*batch)

        on, off = evaluate_by_position(nll, model, self.rows, self._mesh, self._batch_size)
        positions, losses_on = bucket_losses(on, self.rows["weights"], self._buckets)
        _, losses_off = bucket_losses(off, self.rows["weights"], self._buckets)
        return {"positions": positions, "ttt_on": losses_on, "ttt_off": losses_off}


def make_position_nll(mesh: Mesh) -> PositionNll:
    """Make a jitted `(model, batch, ttt_scale) -> (nll_BT, stats)`, float32 and replicated.

    Scale 1 is TTT on, 0 off: one program. `stats` holds for each TTT layer the mean over rows of
    ||S||/||W||, and the mean cosine of successive updates.
    """

    def nll(model: Transformer, batch: Batch, ttt_scale: jax.Array):
        h_BTD, _, stats = model.hidden(
            batch["ids"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
            ttt_scale=ttt_scale,
            probe=True,
        )
        tokens = (h_BTD, model.output_weight, batch["targets"])
        nll_BT = model.runtime.parallel.over_vocabulary(token_nll, *tokens)
        means = {
            f"layer_{layer:02d}/{name}": stat[f"{name}_B"].mean()
            for layer, stat in stats.items()
            for name in ("state_ratio", "update_cosine")
        }
        return nll_BT.astype(jnp.float32), means

    out: NamedSharding = replicated(mesh)
    return jax.jit(nll, out_shardings=out)


def evaluate_by_position(
    nll: PositionNll,
    model: Transformer,
    rows: dict[str, np.ndarray],
    mesh: Mesh,
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute each token's loss on held-out rows with TTT on and off, each float32 [R, T].

    Args:
      rows: all rows, the same on every process; the last batch is filled up by repeating rows, so
        one program serves.
    """
    R = rows["ids"].shape[0]
    results: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for start in range(0, R, batch_size):
        index = np.arange(start, start + batch_size) % R
        batch = {
            name: jax.device_put(x[index], batch_sharding(mesh, (batch_size, x.shape[1])))
            for name, x in rows.items()
        }
        for out, scale in zip(results, (1.0, 0.0), strict=True):
            out.append(np.asarray(nll(model, batch, jnp.asarray(scale, jnp.float32))[0]))
    on, off = (np.concatenate(parts)[:R] for parts in results)
    return on, off


def bucket_losses(
    nll_BT: np.ndarray, weights_BT: np.ndarray, buckets: int
) -> tuple[list[list[int]], list[float | None]]:
    """Average a loss by position.

    Args:
      nll_BT: negative log-likelihood (nats) of the token predicted at each position, any float
        dtype.
      weights_BT: 1 where that prediction counts, 0 where it does not.
      buckets: number of position ranges of (nearly) equal length; at most T are made.

    Returns:
      positions: `[a, b]` for each bucket, which holds the positions a <= t < b.
      losses: the weighted mean in each bucket, accumulated in float64; None where no position
        counts.
    """
    nll_BT, weights_BT = np.asarray(nll_BT, np.float64), np.asarray(weights_BT, np.float64)
    length = nll_BT.shape[1]
    edges = [round(length * i / min(buckets, length)) for i in range(min(buckets, length) + 1)]
    positions, losses = [], []
    for start, stop in itertools.pairwise(edges):
        weights = weights_BT[:, start:stop]
        counted = weights > 0  # the loss at a padded position may be anything, even not a number
        total = float(weights.sum())
        positions.append([start, stop])
        losses.append(
            float((nll_BT[:, start:stop][counted] * weights[counted]).sum()) / total
            if total > 0
            else None
        )
    return positions, losses


def make_probe(
    position_nll: PositionNll, rows: dict[str, np.ndarray], mesh: Mesh, batch_size: int
) -> Callable[[Transformer], dict[str, float]]:
    """Make a function of the model that measures the first `batch_size` held-out rows, always the
    same ones:

      probe/ttt_on, probe/ttt_off     loss in nats per token, on the same slow weights
      probe/gain                      off minus on
      probe/layer_XX/state_ratio      ||S||/||W|| at the end of a row
      probe/layer_XX/update_cosine    mean cosine between the updates of successive chunks

    Args:
      position_nll: of `make_position_nll`; with the evaluation's batch size it is compiled once
        for both.
    """
    index = np.arange(batch_size) % len(rows["ids"])
    rows = {name: x[index] for name, x in rows.items()}
    batch = {name: jax.device_put(x, batch_sharding(mesh, x.shape)) for name, x in rows.items()}
    weights_BT = rows["weights"].astype(np.float64)
    total = max(float(weights_BT.sum()), 1.0)

    def probe(model: Transformer) -> dict[str, float]:
        measured = {}
        for name, scale in (("ttt_off", 0.0), ("ttt_on", 1.0)):
            nll_BT, stats = position_nll(model, batch, jnp.asarray(scale, jnp.float32))
            # padding may hold anything
            nll_BT = np.where(weights_BT > 0, np.asarray(nll_BT, np.float64), 0)
            measured[f"probe/{name}"] = float((nll_BT * weights_BT).sum() / total)
        measured["probe/gain"] = measured["probe/ttt_off"] - measured["probe/ttt_on"]
        return measured | {f"probe/{name}": float(x) for name, x in jax.device_get(stats).items()}

    return probe
