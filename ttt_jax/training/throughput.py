"""Tokens per second and MFU between the steps that are logged, and over the whole start."""

from __future__ import annotations

import time

import jax

from ttt_jax.config import Config
from ttt_jax.flops import model_flops_per_token, peak_flops


class Throughput:
    """Counts the tokens that a run trains, and the seconds that this takes.

    The interval up to the first logged step holds the compilation, and does not count.
    """

    def __init__(self, config: Config, step: int) -> None:
        """Begin after `step` finished steps, now."""
        self._tokens_per_step = config.data.batch_size * config.data.seq_len
        self._flops_per_step = self._tokens_per_step * model_flops_per_token(
            config.model, config.data.seq_len, training=True
        )
        self._peak = peak_flops(jax.devices()[0])
        self._start = step
        self._tokens, self._seconds = 0, 0.0
        self.restart(step)

    def restart(self, step: int) -> None:
        """Begin the next interval now: what went before, an evaluation for instance, is no step."""
        self._step, self._since = step, time.perf_counter()

    def scalars(self, step: int) -> dict[str, float]:
        """Measure the interval that ends with `step`: `tokens_per_second`, and `mfu` where the
        device's peak is known.
        """
        seconds, steps = time.perf_counter() - self._since, step - self._step
        if self._step == self._start:
            return {}
        self._tokens += steps * self._tokens_per_step
        self._seconds += seconds
        found = {"tokens_per_second": steps * self._tokens_per_step / seconds}
        if self._peak:
            peak = self._peak * jax.device_count()
            found["mfu"] = steps * self._flops_per_step / seconds / peak
        return found

    @property
    def mean(self) -> float | None:
        """Return tokens per second over all intervals; None before the second one."""
        return self._tokens / self._seconds if self._seconds else None
