"""In-Place Test-Time Training (arXiv 2604.06169) in JAX/Flax: language models that adapt while they
read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttt_jax.inference.generation import Session, generate
    from ttt_jax.inference.scoring import score
    from ttt_jax.memory.memory import Memory
    from ttt_jax.ops import in_place_ttt
    from ttt_jax.pretrained.export import save_pretrained
    from ttt_jax.pretrained.load import load_pretrained

__version__ = "0.1.0"
__all__ = [
    "Memory",
    "Session",
    "__version__",
    "generate",
    "in_place_ttt",
    "load_pretrained",
    "save_pretrained",
    "score",
]

_HOMES = {
    "Memory": "ttt_jax.memory.memory",
    "Session": "ttt_jax.inference.generation",
    "generate": "ttt_jax.inference.generation",
    "in_place_ttt": "ttt_jax.ops",
    "load_pretrained": "ttt_jax.pretrained.load",
    "save_pretrained": "ttt_jax.pretrained.export",
    "score": "ttt_jax.inference.scoring",
}


def __dir__() -> list[str]:
    """The public names, also those that have not been imported yet."""
    shown = {name for name in globals() if name.startswith("__") or not name.startswith("_")}
    return sorted((shown | {*__all__}) - {"Any", "TYPE_CHECKING", "annotations"})


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import ttt_jax.config.fields` (and every --help) does not wait
    for jax.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'ttt_jax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
