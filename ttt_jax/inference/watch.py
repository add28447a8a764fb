"""What inference looks at: numbers that are not finite, fast weights out of their range, fast
weights that can only be zero.

B rows, L TTT layers in ascending order. The norms come out of programs that run anyway, as one more
small output [L, B], and the host looks at them where it has the programs' other results in hand, so
that the device never waits.
"""

from __future__ import annotations

import collections
import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.config import GuardConfig
from ttt_jax.errors import NotFiniteError
from ttt_jax.model.transformer import Transformer

LOW, HIGH = GuardConfig().min_state_ratio, GuardConfig().max_state_ratio
_BEHIND = 3  # programs that may be dispatched before the host looks at the first one's norms


_said: set[str] | None = None  # inside of `one_warning`: what has been said


@contextlib.contextmanager
def one_warning() -> Iterator[None]:
    """Inside of the block each of this module's warnings comes once, however many sessions and
    scorings it has."""
    global _said
    before, _said = _said, set()
    try:
        yield
    finally:
        _said = before


def _say(kind: str, text: str) -> None:
    if _said is None or kind not in _said:
        warnings.warn(text, stacklevel=4)
    if _said is not None:
        _said.add(kind)


def state_ratios(stats: dict[int, dict[str, Any]]) -> jax.Array | None:
    """||S||/||W|| [L, B] of the stats of `Transformer.hidden`; None where TTT is off. For use in
    programs."""
    return jnp.stack([stats[layer]["state_ratio_B"] for layer in sorted(stats)]) if stats else None


class Watch:
    """Looks at the fast weights of one session, one scoring or one evaluation; warns once.

    Args:
      model: whose layers are named.

    Fields:
      lost: row -> what is not finite in it. Once lost, a row stays so: S is a sum.
    """

    def __init__(self, model: Transformer) -> None:
        self._layers = sorted(model.config.ttt.layers)
        self._waiting: collections.deque[Any] = collections.deque()
        self._warned = False
        self.lost: dict[int, str] = {}

    def note(self, ratio_LB: jax.Array | None) -> None:
        """Take the norms of a program that has been dispatched, and look at those of a few
        before."""
        if ratio_LB is not None:
            self._waiting.append(ratio_LB)
        while len(self._waiting) > _BEHIND:
            self.look(self._waiting.popleft())

    def settle(self) -> None:
        """Look at all norms, waiting for them."""
        while self._waiting:
            self.look(self._waiting.popleft())

    def look(self, ratio_LB: Any) -> None:
        """Look at norms: warn, once, of the first one out of range; note in `lost` the rows that
        are not finite."""
        ratio_LB = np.asarray(ratio_LB, np.float64)
        for at, row in np.argwhere(~np.isfinite(ratio_LB)):
            where = f"fast weights of layer {self._layers[at]}: ||S||/||W|| = {ratio_LB[at, row]:g}"
            self.lost.setdefault(int(row), where)
        outside_LB = np.isfinite(ratio_LB) & (ratio_LB > 0) & ((ratio_LB < LOW) | (ratio_LB > HIGH))
        if self._warned or not outside_LB.any():
            return
        self._warned = True
        at, row = np.argwhere(outside_LB)[0]
        ratio = ratio_LB[at, row]
        verdict = (
            f"above {HIGH:g}: they drown the weights"
            if ratio > HIGH
            else f"below {LOW:g}: TTT changes next to nothing"
        )
        fix = (
            "lower model.ttt.lr, read less, or train at this length"
            if ratio > HIGH
            else "raise model.ttt.lr or train it"
        )
        row = f" of row {row}" if ratio_LB.shape[1] > 1 else ""
        where = f"fast weights of layer {self._layers[at]}{row}"
        _say("range", f"{where}: ||S||/||W|| = {ratio:.3g}, {verdict}; {fix}")

    def check(self, what: str, names: list[Any] | None = None) -> None:
        """Look at all norms, and raise NotFiniteError when a row is lost. `names`: of the rows, for
        the message."""
        self.settle()
        if self.lost:
            row = min(self.lost)
            raise not_finite(f"{what} {row if names is None else names[row]}", self.lost[row])


def not_finite(where: str, why: str = "") -> NotFiniteError:
    """The error for numbers that are not finite, one line."""
    reason = f" ({why})" if why else ""
    fix = "lower model.ttt.lr, switch TTT off (--no-ttt, --ttt off), or use weights that are finite"
    return NotFiniteError(f"{where}: numbers that are not finite{reason}; {fix}")


# ------------------------------------------------------------------------------------ zero targets


def warn_of_zero_targets(model: Transformer) -> None:
    """Say, in one line, that TTT does nothing in layers whose targets are zero whatever is read.

    That is a model which was converted and never trained: a convolution or a projection of zeros,
    or an inner learning rate of 0.
    """
    ttt = model.config.ttt
    zero = sorted(ttt.layers) if ttt.lr == 0 else _zero_layers(model)
    if not zero:
        return
    why = (
        "model.ttt.lr is 0" if ttt.lr == 0 else "their targets are zero (converted, never trained?)"
    )
    some = (
        "every TTT layer"
        if len(zero) == len(ttt.layers)
        else "TTT layers " + ", ".join(map(str, zero))
    )
    more = "; TTT on will equal TTT off exactly" if len(zero) == len(ttt.layers) else ""
    _say(
        "zero", f"the fast weights of {some} stay zero: {why}{more}; train the model with TTT first"
    )


def _zero_layers(model: Transformer) -> list[int]:
    """Layers in which the convolution or W_target holds nothing but zeros."""
    zero = []
    for group in model.groups:
        for at, (run, block) in enumerate(zip(group.pattern, group.blocks, strict=True)):
            if not run.kind.ttt:
                continue
            target = block.mlp.target
            arrays = [x[...] for x in (target.conv, target.proj) if x is not None]
            used_N = np.logical_and.reduce([np.asarray(_any_per_layer(x)) for x in arrays])
            zero += [
                layer
                for layer, used in zip(group.layer_indices(at), used_N, strict=True)
                if not used
            ]
    return sorted(zero)


@jax.jit
def _any_per_layer(x_RNX):
    """bool [R * N]: whether a layer of a stack [R, N, ...] has a number other than zero."""
    return jnp.any(x_RNX != 0, axis=tuple(range(2, x_RNX.ndim))).reshape(-1)
