"""What a preset says and what a user wrote, kept apart until both become one `Config`.

A value of a preset is a proposal: it yields where it does not fit what a user asks for. A value
that a user wrote does not: it counts, or is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from ttt_jax.config.fields import Config, ModelConfig

AUTO = "auto"
RATE = "model.ttt.lr"
EVERY = 6  # layers from one TTT layer to the next

# A field, another one, and the values of that which leave the first without effect.
_IDLE: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("optimizer.decay_ratio", "optimizer.schedule", lambda kind: kind != "wsd"),
    ("optimizer.final_lr_ratio", "optimizer.schedule", lambda kind: kind == "constant"),
    ("data.heldout_fraction", "data.heldout", bool),
    ("sample.prompt", "sample.every", lambda steps: steps == 0),
    ("sample.tokens", "sample.every", lambda steps: steps == 0),
    ("sample.temperature", "sample.every", lambda steps: steps == 0),
)


@dataclasses.dataclass(frozen=True)
class Written:
    """Nested dictionaries, as in YAML; nothing in them is checked yet.

    Fields:
      preset: of a preset of this project.
      user: of the user's own file, and of the command line, which counts before it.
    """

    preset: dict[str, Any]
    user: dict[str, Any]

    def get(self, field: str) -> Any:
        """Return what stands at a dotted field; None when nobody wrote it."""
        return value_at(self.over({}), field)

    def of_user(self, field: str) -> Any:
        """Return what a user wrote at a dotted field, or None."""
        return value_at(self.user, field)

    def proposing(self, tree: dict[str, Any]) -> Written:
        """Return the same with other values of the preset; the user's still count before them."""
        return Written(merged(self.preset, tree), self.user)

    def has_model(self) -> bool:
        """Say whether every field of `model` is written."""
        model = self.get("model")
        names = {field.name for field in dataclasses.fields(ModelConfig)}
        return isinstance(model, dict) and model.keys() >= names

    def over(self, base: dict[str, Any]) -> dict[str, Any]:
        """Put both over `base`, the user's last."""
        return merged(merged(base, self._fitting_preset()), self.user)

    def without(self, field: str) -> Written:
        """Return the same as if nobody had written a dotted field."""
        return Written(without(self.preset, field), without(self.user, field))

    def remarks(self) -> tuple[str, ...]:
        """Return lines for the user about values of the preset that yield, and about values of
        their own that another field leaves without effect.
        """
        lines = [
            f"config field {field} = {value}: has no effect with {other} = {found}"
            for field, other, value, found in self._without_effect()
        ]
        if self._yields() and self.of_user("optimizer.warmup_steps") is None:
            steps = value_at(self.preset, "optimizer.warmup_steps")
            reason = "is not shorter than the run" if self._too_long() else "yields to your ratio"
            lines.append(
                f"the preset's optimizer.warmup_steps = {steps} {reason}; the warm-up is "
                "optimizer.warmup_ratio of the steps"
            )
        return tuple(lines)

    def _without_effect(self) -> Iterator[tuple[str, str, Any, Any]]:
        """Yield (field, the other field, its value, the other's value) of what a user wrote for
        nothing.
        """
        default = Config()
        for field, other, idle in _IDLE:
            value, found = self.of_user(field), self.get(other)
            group, _, name = other.partition(".")
            found = getattr(getattr(default, group), name) if found is None else found
            group, _, name = field.partition(".")
            usual = getattr(getattr(default, group), name)
            if value is not None and value != usual and idle(found):
                yield field, other, value, found

    def _yields(self) -> bool:
        """Say whether the preset's warm-up gives way: to the end of the run, or to a user's
        ratio.
        """
        asked = self.of_user("optimizer.warmup_ratio") is not None
        steps = value_at(self.preset, "optimizer.warmup_steps")
        return self._too_long() or (asked and steps is not None)

    def _too_long(self) -> bool:
        """Say whether the preset's warm-up does not end within the run."""
        steps = value_at(merged(self.preset, self.user), "steps")
        warmup = value_at(self.preset, "optimizer.warmup_steps")
        return type(steps) is int and type(warmup) is int and warmup >= steps

    def _fitting_preset(self) -> dict[str, Any]:
        if not self._yields():
            return self.preset
        return merged(self.preset, {"optimizer": {"warmup_steps": None}})


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge nested dictionaries; lists and single values of `above` replace those of `below`."""
    tree = dict(below)
    for key, value in above.items():
        before = tree.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            value = merged(before, value)
        tree[key] = value
    return tree


def without(tree: dict[str, Any], field: str) -> dict[str, Any]:
    """Return nested dictionaries without what stands at a dotted field."""
    first, _, rest = field.partition(".")
    if not rest:
        return {key: value for key, value in tree.items() if key != first}
    group = tree.get(first)
    return tree | {first: without(group, rest)} if isinstance(group, dict) else tree


def value_at(tree: Any, field: str) -> Any:
    """Return what stands at a dotted field of nested dictionaries, or None."""
    for part in field.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def name_auto_layers(tree: dict[str, Any]) -> dict[str, Any]:
    """Replace `model.ttt.layers: auto` by every sixth layer, from the first one on."""
    if value_at(tree, "model.ttt.layers") != AUTO:
        return tree
    layers = value_at(tree, "model.num_layers") or Config().model.num_layers
    if type(layers) is not int or layers > 1 << 16:
        return tree  # said with the field's own check
    return merged(tree, {"model": {"ttt": {"layers": list(range(0, layers, EVERY))}}})
