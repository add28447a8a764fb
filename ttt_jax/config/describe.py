"""What `--help` says about the fields of a config, and which field a wrong name may have meant.

A field's sentence is its comment in fields.py, its range comes from its type, and its value from
the preset that was asked for. So there is one place to write each of them.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import io
import json
import re
import textwrap
import tokenize
import types
import typing
from typing import Any, Literal, NamedTuple

from pydantic.fields import FieldInfo

from ttt_jax.config import fields
from ttt_jax.config.fields import Config

_WIDTH = 100
_NEAR = 3  # names in a suggestion, at most


class FieldHelp(NamedTuple):
    """One field, as `--help` shows it.

    Fields:
      name: dotted.
      value: the default, or the preset's value, as it is written on a command line.
      values: which values it takes, in words.
      sentence: what it is.
    """

    name: str
    value: str
    values: str
    sentence: str


# --------------------------------------------------------------------------------------------- help


def fields_help(config: Any = None) -> list[FieldHelp]:
    """Describe every field below a config (None: that of a run), with the values that it holds."""
    config = Config() if config is None else config
    return [
        FieldHelp(name, written(value), _values(hint), _sentence(owner, field))
        for name, owner, field, hint, value in _walk(config, "")
    ]


def help_text(config: Config) -> str:
    """Lay out `fields_help` for a terminal, with a line about each group of fields."""
    lines, group = [], None
    groups = dict(_groups(Config, ""))
    for row in fields_help(config):
        if (above := row.name.rpartition(".")[0]) != group:
            group = above
            about = " ".join((groups[group].__doc__ or "").split("\n\n")[0].split())
            lines += ["", *textwrap.wrap(f"{group or 'run'}: {about}", _WIDTH)]
        lines.append(f"  --{row.name} {row.value}")
        text = f"{row.sentence} [{row.values}]"
        lines += textwrap.wrap(text, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines[1:])


def written(value: Any) -> str:
    """Write a value as the command line takes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        return json.dumps([dataclasses.asdict(item) for item in value])
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "[]"
    return str(value) if value != "" else "''"


def _walk(config: Any, prefix: str) -> typing.Iterator[tuple[str, type, str, Any, Any]]:
    """Yield (dotted name, class, field, type, value) of every field below `config`, those of a
    group before the groups in it.
    """
    owner = type(config)
    hints = _annotations(owner)
    for field, hint in hints.items():
        if not dataclasses.is_dataclass(hint):
            yield f"{prefix}{field}", owner, field, hint, getattr(config, field)
    for field, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            yield from _walk(getattr(config, field), f"{prefix}{field}.")


@functools.cache
def _annotations(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner, include_extras=True)


def _sentence(owner: type, field: str) -> str:
    return _sentences().get(owner.__name__, {}).get(field, "")


@functools.cache
def _sentences() -> dict[str, dict[str, str]]:
    """Read fields.py: class -> field -> its comment, beside it or in the lines above it; nothing
    where Python has no source.
    """
    try:
        source = inspect.getsource(fields)
    except OSError:
        return {}
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ").strip()
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    found: dict[str, dict[str, str]] = {}
    for owner in ast.parse(source).body:
        if not isinstance(owner, ast.ClassDef):
            continue
        found[owner.name] = {}
        for node in owner.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                first = node.lineno
                while first - 1 in alone:
                    first -= 1
                lines = range(first, (node.end_lineno or node.lineno) + 1)
                text = " ".join(comments[line] for line in lines if line in comments)
                # as it is written in YAML
                text = text.replace("None", "null").replace("()", "[]").replace("False", "false")
                found[owner.name][node.target.id] = text
    return found


# --------------------------------------------------------------------------------- ranges, in words


def _values(hint: Any, plural: bool = False) -> str:
    """Say which values a type takes."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _values(parts[0], plural) + _bounds(parts[1:])
    if origin in (types.UnionType, typing.Union):
        return ", or ".join("null" if p is type(None) else _values(p) for p in parts)
    if origin is Literal:
        return f"one of {', '.join(map(written, parts))}"
    if origin is tuple and dataclasses.is_dataclass(parts[0]):
        inner = [f"{n}: {_values(h)}" for n, h in _annotations(typing.cast(type, parts[0])).items()]
        return f"a list of {{{'; '.join(inner)}}}"
    if origin is tuple:
        return f"{_values(parts[0], plural=True)}, with commas between them"
    name = {bool: "true or false", int: "whole number", float: "number", str: "text"}[hint]
    return f"{name}s" if plural and hint is not bool else name


def _bounds(metadata: tuple[Any, ...]) -> str:
    """Say the limits of a number."""
    limits = [m for info in metadata if isinstance(info, FieldInfo) for m in info.metadata]
    found = {type(m).__name__: getattr(m, type(m).__name__.lower()) for m in limits}
    match found:
        case {"Ge": least, "Le": most}:
            return f" from {least} to {most}"
        case {"Ge": least, "Lt": most}:
            return f" from {least} to below {most}"
        case {"Gt": least, "Lt": most}:
            return f" above {least} and below {most}"
        case {"Gt": least}:
            return f" above {least}"
        case {"Ge": least}:
            return f", {least} or more"
    return ""


# -------------------------------------------------------------------------------------- suggestions


def field_names(cls: type = Config, prefix: str = "") -> list[str]:
    """List the dotted names of all fields below `cls`."""
    names = []
    for field, hint in _annotations(cls).items():
        below = dataclasses.is_dataclass(hint)
        names += field_names(typing.cast(type, hint), f"{prefix}{field}.") if below else []
        names += [] if below else [f"{prefix}{field}"]
    return names


def group_names(cls: type = Config) -> list[str]:
    """List the dotted names of all groups of fields below `cls`."""
    return [name for name, _ in _groups(cls, "") if name]


def _groups(cls: type, prefix: str) -> typing.Iterator[tuple[str, type]]:
    yield prefix, cls
    for field, hint in _annotations(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _groups(typing.cast(type, hint), f"{prefix}.{field}" if prefix else field)


def nearest_fields(name: str, cls: type = Config) -> list[str]:
    """Guess which fields below `cls` a wrong dotted name meant: three at most, the best first.

    A field of that very last word counts first (`lr`, `ttt.lr`), then names that are spelt nearly
    so, then a field whose sentence has the words (`learning_rate`), then a part of the name.
    """
    for guess in (_same_word, _same_spelling, _same_sentence, _same_part):
        if near := guess(name, cls):
            return near[:_NEAR]
    return []


def _same_word(name: str, cls: type) -> list[str]:
    names = field_names(cls)
    near = [n for n in names if f".{n}".endswith(f".{name}")]
    near = near or [n for n in names if _last(n) == _last(name)]
    return sorted(near, key=lambda n: n.count("."))


def _same_spelling(name: str, cls: type) -> list[str]:
    names = field_names(cls)
    if "." in name:
        return difflib.get_close_matches(name, names + group_names(cls), n=1, cutoff=0.5)
    by_word = {_last(n): n for n in reversed(names)}
    words = difflib.get_close_matches(name, by_word, n=_NEAR, cutoff=0.75)
    return [by_word[word] for word in words]


def _same_sentence(name: str, cls: type) -> list[str]:
    """List the fields whose sentence has the parts of a name side by side, perhaps without the last
    of many; first a sentence that begins with them.
    """
    parts = _last(name).split("_")
    for phrase in [parts] + [parts[:-1]] * (len(parts) > 2):
        pattern = re.compile(rf"\b{re.escape(' '.join(phrase))}\b", re.IGNORECASE)
        found = [
            (match.start(), row.name.count("."), row.name)
            for row in fields_help(cls())
            if (match := pattern.search(row.sentence))
        ]
        if found:
            return [name for *_, name in sorted(found)]
    return []


def _same_part(name: str, cls: type) -> list[str]:
    """List the fields that share a part with a name, such as `max_steps` and `steps`, or the group
    that is spelt nearly so.
    """
    word = _last(name)
    near = [n for n in field_names(cls) if _is_part(_last(n), word) or _is_part(word, _last(n))]
    return near or difflib.get_close_matches(word, group_names(cls), n=1, cutoff=0.6)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _is_part(short: str, long: str) -> bool:
    """Say whether a word of two parts, such as `max_steps`, begins or ends with the other one."""
    return short in long.split("_") and long.count("_") == 1
