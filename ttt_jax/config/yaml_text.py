"""YAML for configs: plain data only, and nothing that YAML 1.1 would read as another thing than
what stands there.

`no` and `123` are texts where the field is a text, `0100` is no octal number and `1:30` no 90, and
a key that is written twice is refused. This module imports only PyYAML, so that `--help` is
instant.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

MAX_YAML_BYTES = 1_000_000
MAX_YAML_NESTING = 50  # brackets within one another
_TAG = "tag:yaml.org,2002:"
NULLS = ("", "~", "null", "Null", "NULL")
# Without YAML 1.1's octal numbers (0100) and its base 60 (1:30): nobody means these.
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
    r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases (a few lines of them stand for gigabytes) and absurd nesting: no
    config needs either.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """Refuse absurd nesting: PyYAML's time grows with the square of the depth: 1200 brackets
        take a second.
        """
        if self.flow_level >= MAX_YAML_NESTING:
            raise yaml.YAMLError(
                f"more than {MAX_YAML_NESTING} brackets within one another; no field needs that"
            )
        super().fetch_flow_collection_start(TokenClass)


_OTHERS = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag not in (_TAG + "int", _TAG + "float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_implicit_resolvers = _OTHERS
_Loader.add_implicit_resolver(
    _TAG + "int", re.compile(f"(?:{_INT.pattern})$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    _TAG + "float", re.compile(f"(?:{_FLOAT.pattern})$"), list("-+0123456789.")
)


def parse_yaml(text: str, is_text: Callable[[str, str], bool] = lambda field, word: False) -> Any:
    """Read plain data from YAML.

    Args:
      is_text: whether the word of a dotted field is taken as it is written. A null stays one. Items
        of a list have the name of the list.

    Raises:
      yaml.YAMLError: for everything that is wrong with the text, a key that is written twice
      included.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _prepare(node, "", is_text)
        return loader.construct_document(node)
    except yaml.YAMLError:
        raise
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        IndexError,
        OverflowError,
        RecursionError,
    ) as error:
        # From values that only look like dates or numbers, from wrong tags and from absurd nesting.
        raise yaml.YAMLError(
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from None
    finally:
        loader.dispose()


def _prepare(node: yaml.Node, field: str, is_text: Callable[[str, str], bool]) -> None:
    """Refuse repeated keys below `node`, and mark the words of text fields as texts."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            name = ""
            if isinstance(key, yaml.ScalarNode):
                name, line = key.value, key.start_mark.line + 1
                if (first := seen.get((key.tag, name))) is not None:
                    raise yaml.YAMLError(
                        f"line {line}: {name[:60]!r} is given twice (first in line {first}); "
                        "keep one of them"
                    )
                seen[key.tag, name] = line
            _prepare(value, f"{field}.{name}" if field else name, is_text)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _prepare(item, field, is_text)
    elif (
        isinstance(node, yaml.ScalarNode)
        and node.tag != _TAG + "null"
        and is_text(field, node.value)
    ):
        node.tag = _TAG + "str"
