"""Reads configs from YAML, command-line words and dictionaries, and writes them back.

Every mistake is a `ConfigError` of one line that names the field, the value and the fix.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from ttt_jax.config.describe import field_names, nearest_fields
from ttt_jax.config.fields import Config
from ttt_jax.config.inner_rate import inner_rate
from ttt_jax.config.presets import find_config, is_preset, place_of_run, same_preset
from ttt_jax.config.validate import validate
from ttt_jax.config.written import AUTO, RATE, Written, name_auto_layers, value_at, without
from ttt_jax.config.yaml_text import MAX_YAML_BYTES, NULLS, parse_yaml
from ttt_jax.errors import ConfigError

T = typing.TypeVar("T")


def load_config(path: str | Path | None = None, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a preset or a YAML file, apply dotted overrides, validate.

    With `init_from`, what is not written comes from a checkpoint, which pretrained/start_config.py
    reads; here every field of `model` must be written then.

    Args: see `read_written`.

    Returns: the config; where `model.ttt.lr` is `auto`, with the number that it stands for
    (inner_rate.py), so that nothing after this depends on the rule.

    Raises:
      ConfigError: one line naming the field, the value and the fix.
    """
    written = read_written(path, overrides)
    source = written.get("init_from")
    if source is not None and not written.has_model():
        raise ConfigError(
            f"config field init_from = {str(source)[:60]!r}: its model is not read here; "
            "use load_start_config of ttt_jax.pretrained.start_config"
        )
    return make_config(written)


def read_written(path: str | Path | None, overrides: typing.Sequence[str] = ()) -> Written:
    """Read a preset or a YAML file, and command-line words.

    Args:
      path: YAML file, the name of a preset, or the folder of a run, which then names `runs_dir` and
        `name`; None leaves every field at its default.
      overrides: command-line words, `--a.b value` or `--a.b=value`. A text field takes the word as
        it is written (`off`, `123`), without quotes around it; other values are YAML (`[0,6,12]`,
        `null`, `1e-4`). Of two for one field the last counts.

    Raises: ConfigError, one line.
    """
    preset: dict[str, Any] = {}
    user: dict[str, Any] = {}
    if path is not None:
        file = find_config(path)
        tree = _read_yaml(file)
        if is_preset(file):
            preset = tree
        else:
            user = tree if Path(path) == file else tree | place_of_run(file)
    for key, value in parse_overrides(overrides):
        _assign(user, key, value)
    return Written(preset, user)


def make_config(written: Written, base: dict[str, Any] | None = None) -> Config:
    """Make the config of what is written; what nobody wrote comes from `base`, then from the
    defaults.

    `model.ttt.lr: auto` is the rule's (inner_rate.py). With `init_from` and `sum` it is measured on
    the checkpoint (training/measured_rate.py), and has its default here.

    Raises ConfigError, one line.
    """
    tree = name_auto_layers(written.over(base or {}))
    auto = value_at(tree, RATE) == AUTO
    config = from_dict(Config, without(tree, RATE) if auto else tree)
    validate(config)
    if not auto or (config.init_from is not None and config.model.ttt.write != "ridge"):
        return config
    return replace(config, {RATE: inner_rate(config)})


def from_dict(cls: type[T], tree: dict[str, Any]) -> T:
    """Build a config dataclass from nested dictionaries; a wrong field is a one-line
    `ConfigError`.
    """
    _refuse_switches(cls, tree, "")
    try:
        return _adapter(cls).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(_explain(cls, error)) from None


def to_dict(config: Any) -> dict[str, Any]:
    """Invert `from_dict`: plain dictionaries, lists and scalars that YAML and JSON can hold."""
    return _adapter(type(config)).dump_python(config, mode="json")


def _as_written(cls: type, field: str, word: str) -> bool:
    """Say whether a word is a text field's value. `off` of a field that may be null is not: it
    could mean either.
    """
    hint = _hint(cls, field)
    switched = (
        _takes(hint, type(None))
        and not _takes(hint, tuple)
        and word.lower() in ("off", "no", "false")
    )
    return _takes(hint, str) and not switched


def _refuse_switches(kind: Any, value: Any, name: str) -> None:
    """Raise ConfigError for a boolean (`yes`, `on`) in the place of a number, which pydantic would
    take for 1 or 0.
    """
    if isinstance(value, bool) and not _takes(kind, bool):
        fix = (
            "write null for none, or the word in quotes"
            if _takes(kind, type(None))
            else "give a value of the field's own kind"
        )
        raise ConfigError(
            f"config field {name} = {str(value).lower()}: a switch (yes, no, on, off, true, "
            f"false); {fix}"
        )
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        for key, item in value.items():
            _refuse_switches(
                _hint(typing.cast(type, kind), str(key)),
                item,
                f"{name}.{key}" if name else str(key),
            )
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            group = next((k for k in _kinds(kind) if dataclasses.is_dataclass(k)), kind)
            _refuse_switches(group, item, f"{name}.{number}")


def _hint(cls: type, field: str) -> Any:
    """Find the type of a dotted field below `cls`, items of a list under the list's name; None when
    there is no such field.
    """
    kind: Any = cls
    for part in field.split("."):
        group = next((k for k in _kinds(kind) if dataclasses.is_dataclass(k)), None)
        kind = _hints(group).get(part) if group is not None else None
    return kind


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _takes(kind: Any, wanted: type) -> bool:
    """Say whether a field of this type holds a `wanted`, by itself or in a list."""
    return wanted in _kinds(kind)


@functools.cache
def _kinds(kind: Any) -> frozenset[Any]:
    """List the classes that a type is made of: `tuple[str, ...] | None` is tuple, str and NoneType;
    a Literal, its values' types.
    """
    if typing.get_origin(kind) is Literal:
        return frozenset(type(value) for value in typing.get_args(kind))
    found = {typing.get_origin(kind) or kind}
    for part in typing.get_args(kind):
        found |= _kinds(part)
    return frozenset(found - {types.UnionType, typing.Union, Ellipsis})


@functools.cache
def _adapter(cls: type) -> TypeAdapter:
    return TypeAdapter(cls)


def dump_yaml(config: Any) -> str:
    """Write a config as YAML, its fields in order."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def replace(config: Any, changes: dict[str, Any]) -> Any:
    """Copy a config with dotted fields replaced, e.g. `replace(cfg, {"model.ttt.lr": 1.0})`."""
    tree = to_dict(config)
    for key, value in changes.items():
        _assign(tree, key, value)
    return from_dict(type(config), tree)


def parse_overrides(words: typing.Sequence[str]) -> list[tuple[str, Any]]:
    """Parse `["--a.b", "1", "--c=x"]` -> `[("a.b", 1), ("c", "x")]`. The fields of Config say
    what is a text.
    """
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(
                f"argument {word!r}: overrides are written --field.name VALUE (see --help)"
            )
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                name = key.replace("-", "_")
                if _hint(Config, name) is None:  # a value would not help
                    raise ConfigError(f"config field {key}: unknown; {_meant(Config, name, name)}")
                also = f", or {word}=VALUE for one that begins with --" if rest else ""
                raise ConfigError(f"argument {word!r} has no value: write {word} VALUE{also}")
            value = rest.pop(0)
        key = key.replace("-", "_")
        pairs.append((key, _scalar(key, value)))
    return pairs


def _scalar(key: str, word: str) -> Any:
    """Read a word of the command line: of a text field the word itself, else YAML."""
    hint = _hint(Config, key)
    if _takes(hint, str):
        quoted = len(word) > 1 and word[0] == word[-1] and word[0] in "'\""
        optional = _takes(hint, type(None)) and word in NULLS
        listed = _takes(hint, tuple) and word.startswith("[")
        if not quoted and not optional and not listed and _as_written(Config, key, word):
            return word
    try:
        return parse_yaml(
            word, lambda field, word: _as_written(Config, f"{key}.{field}" if field else key, word)
        )
    except yaml.YAMLError as error:
        twice = str(error).partition(": ")[2] if "given twice" in str(error) else ""
        raise ConfigError(
            f"--{key} {word[:60]!r}: {twice or 'not a YAML value; quote it or check its brackets'}"
        ) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if not os.path.isfile(path):  # False, not an error, for names that no file system takes
        presets = (
            ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml")))
            or f"no YAML file in {path.parent}"
        )
        raise ConfigError(f"config {path}: no such file (there: {presets}){same_preset(path)}")
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"config {path}: more than {MAX_YAML_BYTES} bytes; give a config")
        tree = parse_yaml(
            path.read_text(encoding="utf-8"), lambda *place: _as_written(Config, *place)
        )
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"config {path}: not valid YAML: {' '.join(str(error).split())}{_text_to_read(path)}"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"config {path}: cannot be read ({error.strerror}); give a YAML file"
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"config {path}: the top level must be a mapping of fields, not {type(tree).__name__}"
            f"{_text_to_read(path)}"
        )
    return tree


def _text_to_read(path: Path) -> str:
    """Make the end of the error line about a file that was hardly meant as a config."""
    if path.suffix in (".yaml", ".yml"):
        return ""
    return f"; to train on this file write --data.train {path}"


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(
                f"--{key}: {'.'.join(parents[: depth + 1])} is a single value, it has no fields"
            )
    tree[last] = value


def _meant(cls: type, name: str, key: str) -> str:
    """Say what to write instead of an unknown field."""
    if ":" in key:
        return f"in {key!r} a space is missing behind the colon"
    if near := nearest_fields(name, cls):
        return f"did you mean {' or '.join(near)}?"
    return "see --help for the known fields"


def _below(cls: type, group: str) -> list[str]:
    return [name for name in field_names(cls) if name.startswith(f"{group}.")]


def _explain(cls: type, error: ValidationError) -> str:
    """Tell the first pydantic error in one line; unknown fields get the nearest known name."""
    errors = error.errors(include_url=False, include_context=False)
    unknown = ("unexpected_keyword_argument", "extra_forbidden")
    # a misspelt name also misses its field
    first = min(errors, key=lambda item: item["type"] not in unknown)
    # pydantic puts the alternatives of a union into the location; only names and indices help a
    # reader.
    where = [
        str(part)
        for part in first["loc"]
        if isinstance(part, int) or re.fullmatch(r"[a-z_][a-z_0-9]*", str(part))
    ]
    name = ".".join(where) or cls.__name__
    if first["type"] in unknown:
        value = first["input"]
        while isinstance(value, dict) and len(value) == 1:  # a path into a group that is not there
            ((key, value),) = value.items()
            name = f"{name}.{key}"
        return f"config field {name}: unknown; {_meant(cls, name, str(first['loc'][-1]))}"
    if first["type"] == "dataclass_type" and (inner := _below(cls, name)):
        return (
            f"config field {name} = {str(first['input'])[:60]}: is a group of fields; set one of "
            f"them, such as {inner[0]}"
        )
    value = str(first["input"])
    value = value if len(value) <= 60 else value[:57] + "..."
    if name.endswith("ttt.write") and value == "spectral":  # runs of before may name it
        return (
            f"config field {name} = spectral: was taken out, because new layers could never start "
            "to write with it (docs/writes.md); use sum or ridge for a new model, and commit "
            "e9469e6 to read an old one"
        )
    return f"config field {name} = {value}: {first['msg'].lower()}"
