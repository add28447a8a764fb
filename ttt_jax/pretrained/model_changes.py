"""What `init_from` may change about the model whose weights it takes, field by field.

| field of `model` | rule |
|---|---|
| `init_std`, `ttt.implementation` | free: neither changes what the weights compute |
| `ttt.*` | free where the checkpoint has no TTT layers; printed where it has |
| `ttt.layers`, `ttt.proj` | refused where parameters of the checkpoint would be left out |
| `ttt.target`, `ttt.last_target` | printed where a layer of the checkpoint gets another target |
| `max_positions` | raised: printed; lowered: refused |
| `rope.kind` | from `default` to a scaled kind: printed, with its factors; else refused |
| `rope.factor` of the same kind | raised: printed; lowered: refused |
| `sliding_window`, `full_attention_layers` | a layer sees more: refused; less: printed |
| all others, `rope.base` among them | refused |

Printed means a line each before anything starts: continual training changes these on purpose, for
longer rows or for a smaller cache, and a wrong preset changes them by mistake. Refused is what no
recipe changes: the weights would compute something else. Settings without effect (the factor of
`default`) are not compared.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ttt_jax.config import ModelConfig, RopeConfig
from ttt_jax.config.fields import ROPE_FIELDS
from ttt_jax.errors import ConfigError

_FREE = ("init_std",)
_BY_RULE = ("ttt", "rope", "max_positions", "sliding_window", "full_attention_layers")


def compare_models(wanted: ModelConfig, found: ModelConfig, where: str) -> list[str]:
    """Compare the model of a run with that of the checkpoint it starts from, by the rules above.

    Returns: one line for each difference that continual training may make; none when both compute
    the same. Raises: ConfigError naming the field, both values and the fix.
    """
    for field in dataclasses.fields(ModelConfig):
        if field.name not in (*_FREE, *_BY_RULE):
            _same(field.name, getattr(wanted, field.name), getattr(found, field.name), where)
    lines = _compare_positions(wanted, found, where)
    lines += _compare_rope(wanted.rope, found.rope, where)
    lines += _compare_windows(wanted, found, where)
    return lines + _compare_ttt(wanted, found, where)


def computes_the_same(wanted: ModelConfig, found: ModelConfig) -> bool:
    """Say whether both models compute the same of the same weights, new TTT layers at their start.

    Raises: as `compare_models`.
    """
    # How many positions a model is made for enters no computation.
    wanted = dataclasses.replace(wanted, max_positions=found.max_positions)
    return not compare_models(wanted, found, "the checkpoint")


def _refuse(name: str, ours: Any, theirs: Any, where: str, reason: str = "") -> None:
    raise ConfigError(
        f"config field model.{name} = {_show(ours)}: {where} has {_show(theirs)}{reason}; set "
        f"model.{name} to {_show(theirs)}, or leave it out"
    )


def _same(name: str, ours: Any, theirs: Any, where: str) -> None:
    if ours != theirs:
        _refuse(name, ours, theirs, where)


def _line(name: str, ours: Any, theirs: Any) -> str:
    return f"model.{name} is {_show(ours)} here, {_show(theirs)} in the checkpoint"


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _compare_positions(wanted: ModelConfig, found: ModelConfig, where: str) -> list[str]:
    ours, theirs = wanted.max_positions, found.max_positions
    if ours < theirs:
        _refuse("max_positions", ours, theirs, where, ", and an export would forget that")
    return [_line("max_positions", ours, theirs)] if ours > theirs else []


def _compare_rope(wanted: RopeConfig, found: RopeConfig, where: str) -> list[str]:
    _same("rope.base", wanted.base, found.base, where)
    if wanted.kind != found.kind:
        if found.kind != "default":
            _refuse(
                "rope.kind", wanted.kind, found.kind, where, ", which its weights were trained with"
            )
        lines = [_line("rope.kind", wanted.kind, found.kind)]
        return lines + [
            f"model.rope.{name} is {_show(getattr(wanted, name))} here"
            for name in ROPE_FIELDS[wanted.kind]
        ]
    lines = []
    for name in ROPE_FIELDS[found.kind]:
        ours, theirs = getattr(wanted, name), getattr(found, name)
        if name == "factor" and ours > theirs:
            lines.append(_line("rope.factor", ours, theirs))
        else:
            _same(f"rope.{name}", ours, theirs, where)
    return lines


def _reach(model: ModelConfig, layer: int) -> float:
    """Count the tokens that a query of the layer sees."""
    full = model.sliding_window is None or layer in model.full_attention_layers
    return float("inf") if full or model.sliding_window is None else model.sliding_window


def _compare_windows(wanted: ModelConfig, found: ModelConfig, where: str) -> list[str]:
    names = [
        name
        for name in ("sliding_window", "full_attention_layers")
        if getattr(wanted, name) != getattr(found, name)
    ]
    wider = [i for i in range(found.num_layers) if _reach(wanted, i) > _reach(found, i)]
    if wider:
        # With the checkpoint's window the other field decides, and the other way round.
        name = "full_attention_layers" if names == ["full_attention_layers"] else "sliding_window"
        reason = f", and layer {wider[0]} would see more than it was trained with"
        _refuse(name, getattr(wanted, name), getattr(found, name), where, reason)
    return [_line(name, getattr(wanted, name), getattr(found, name)) for name in names]


def _compare_ttt(wanted: ModelConfig, found: ModelConfig, where: str) -> list[str]:
    """Layers that are new start at zero and change nothing; everything else about layers that adapt
    does. Parameters of the checkpoint are not left out: its tensors have to have a place.
    """
    if not found.ttt.layers:
        return []
    if not set(wanted.ttt.layers) >= set(found.ttt.layers):
        reason = ", whose parameters would be lost"
        _refuse("ttt.layers", wanted.ttt.layers, found.ttt.layers, where, reason)
    if found.ttt.proj and not wanted.ttt.proj:
        _refuse("ttt.proj", False, True, where, ", and its W_target would be lost")
    names = [
        field.name
        for field in dataclasses.fields(type(found.ttt))
        if field.name not in ("implementation", "layers", "target", "last_target")
    ]
    pairs = [(name, getattr(wanted.ttt, name), getattr(found.ttt, name)) for name in names]
    lines = [_line(f"ttt.{name}", ours, theirs) for name, ours, theirs in pairs if ours != theirs]
    return _compare_targets(wanted, found) + lines


def _compare_targets(wanted: ModelConfig, found: ModelConfig) -> list[str]:
    """Compare what each layer of the checkpoint writes: which layer is the last one, and so has
    `ttt.last_target`, depends on the new layers, too.
    """
    changed: dict[tuple[Any, Any], list[int]] = {}
    for layer in sorted(found.ttt.layers):
        pair = wanted.ttt.target_of(layer), found.ttt.target_of(layer)
        if pair[0] != pair[1]:
            changed.setdefault(pair, []).append(layer)
    return [
        _line(f"ttt.target of layers {layers}", ours, theirs)
        for (ours, theirs), layers in changed.items()
    ]
