"""How a parameter is named: in checkpoints, in parameter groups, and in the Hugging Face name
map.
"""

from __future__ import annotations

from typing import Any


def param_path(keypath: tuple[Any, ...]) -> str:
    """`(GetAttrKey('mlp'), SequenceKey(0), GetAttrKey('value'))` -> `"mlp.0"`; names and indices
    joined by dots.
    """
    keys = keypath
    if keys and getattr(keys[-1], "name", None) == "value":
        keys = keys[:-1]  # the array inside an nnx.Param
    parts = []
    for key in keys:
        # GetAttrKey, DictKey or FlattenedIndexKey, SequenceKey
        for field in ("name", "key", "idx"):
            if hasattr(key, field):
                parts.append(str(getattr(key, field)))
                break
        else:
            raise TypeError(f"unknown pytree key {key!r}")
    return ".".join(parts)
