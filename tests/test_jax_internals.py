"""Private parts of jax are used in one file only."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRIVATE = re.compile(r"\bjax\._src\b|\bfrom jax import _src\b|\b_splash_attention\w*_bwd\b")


# These two say what must not be written elsewhere.
NAMES_IT = (Path(__file__).resolve(), ROOT / "tests" / "test_imports.py")


def test_no_other_file_mentions_what_is_private_in_jax():
    folders = ("ttt_jax", "kernels_pallas", "benchmarks", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = {
        str(path.relative_to(ROOT))
        for path in (*files, ROOT / "train.py")
        if path not in NAMES_IT and PRIVATE.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"ttt_jax/jax_internals.py"}
