"""Memory files: what comes back, and damaged, forged and foreign ones."""

import json
import zlib

import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.damage import TREES, fuzz, fuzz_bytes, one_line, replaced

from ttt_jax.errors import CheckpointError
from ttt_jax.memory.memory import Memory
from ttt_jax.memory.sources import Source
from ttt_jax.memory.terms import Term

D, F = 3, 5


def memory_of(seed, name="a", rank=None):
    rng = np.random.default_rng(seed)
    deltas = {layer: rng.standard_normal((D, F)).astype(np.float32) for layer in (1, 12)}
    source = Source(name, 100, 96, ids=f"{seed:064x}", file="b" * 64, context=32)
    memory = Memory("a" * 64, D, F, {1: 2.5, 12: 0.0}, (Term(deltas, (source,)),))
    return memory if rank is None else memory.truncate(rank)


@pytest.fixture
def saved(tmp_path):
    memory = 0.1 * memory_of(0) - memory_of(1, "é\n", rank=2)
    memory.save(tmp_path / "m")
    return memory, tmp_path / "m"


def test_a_file_is_the_memory_again(saved):
    memory, path = saved
    again = Memory.load(path)
    assert again == memory
    assert again.sources == memory.sources
    assert (again.D, again.F, again.slow_norms) == (D, F, memory.slow_norms)
    assert [term.rank for term in again.terms] == [term.rank for term in memory.terms]
    for layer in memory.layers:
        np.testing.assert_array_equal(again.dW(layer), memory.dW(layer))
    (memory - memory).save(path)
    assert Memory.load(path) == memory - memory
    assert sorted(path.parent.iterdir()) == [path]


def manifest_of(path):
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["manifest"])


def forge(path, tensors, manifest):
    """A file whose checksums are right, whatever else it says."""
    text = json.dumps(manifest)
    seal = {"manifest": text, "manifest_crc32": str(zlib.crc32(text.encode()))}
    save_file(tensors, path, metadata=seal)


def crc32(tensors):
    bits = lambda x: np.ascontiguousarray(x).reshape(-1).view(np.uint8).tobytes()
    return {name: zlib.crc32(bits(x)) for name, x in tensors.items()}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "ttt_jax memory 2"}, "its format is 'ttt_jax memory 2', this version reads"),
        ({"model": "x"}, "model is no fingerprint"),
        ({"d_model": 4}, r"not float32 \[4, 5\]|not float32 \[4, 2\]"),
        ({"d_ff": True}, "d_model and d_ff are no widths"),
        ({"d_ff": 10**30}, "d_model and d_ff are no widths"),
        ({"d_model": 2**16, "d_ff": 2**16}, "a dW of 65536 x 65536 is larger than any model's"),
        ({"slow_norms": {"1": 1.0}}, "is unknown"),
        ({"slow_norms": {"1": 1.0, "12": float("nan")}}, "no norms"),
        ({"slow_norms": {"1": 1.0, "012": 1.0}}, "no norms"),
        ({"terms": []}, "is unknown"),
        ({"terms": [{}] * 10**6}, "terms are not those of its tensors"),
    ],
)
def test_a_forged_manifest_is_refused(saved, change, match):
    _, path = saved
    forge(path, load_file(path), manifest_of(path) | change)
    with pytest.raises(CheckpointError, match=match) as refusal:
        Memory.load(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weight": "0"}, "a term has the weight 0"),
        ({"weight": "1e999999999"}, "a weight is no fraction"),
        ({"weight": "1/0"}, "a weight is no fraction"),
        ({"weight": 1.0}, "a weight is no fraction"),
        ({"weight": "9" * 30}, "of a size from 1e-9 to 1e9"),
        ({"rank": 1}, "is missing|is unknown|not float32"),
        ({"rank": 4}, "a term's rank is not from 1 to 3"),
        ({"sources": [{"name": "x"}]}, "a source has other fields"),
        ({"sources": None}, "a term has no sources"),
    ],
)
def test_a_forged_term_is_refused(saved, change, match):
    """Of another rank than its tensors, too."""
    _, path = saved
    manifest = manifest_of(path)
    manifest["terms"][0] |= change
    forge(path, load_file(path), manifest)
    with pytest.raises(CheckpointError, match=match):
        Memory.load(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "x" * 1001),
        ("tokens", -1),
        ("tokens", 1.5),
        ("written", 101),
        ("ids", "0" * 63),
        ("file", 3),
        ("context", 0),
        ("weight", None),
    ],
)
def test_a_forged_source_is_refused(saved, field, value):
    _, path = saved
    manifest = manifest_of(path)
    manifest["terms"][1]["sources"][0][field] = value
    forge(path, load_file(path), manifest)
    with pytest.raises(CheckpointError, match="damaged"):
        Memory.load(path)


def test_tensors_that_do_not_fit_are_refused(saved, tmp_path):
    _, path = saved
    tensors, manifest = load_file(path), manifest_of(path)
    some = sorted(tensors)[0]
    twice = {name.replace("terms.0", "terms.1"): x for name, x in tensors.items() if "s.0" in name}
    for changed, match in [
        (tensors | {some: tensors[some] * np.float32("nan")}, "not finite"),
        (tensors | {some: tensors[some] + np.float32(2e18)}, "not finite, or too large"),
        (tensors | {some: tensors[some][:1]}, "not float32"),
        (tensors | {some: tensors[some].astype(np.float16)}, "float16"),
        (tensors | {"more": np.zeros(1, np.float32)}, "more is unknown"),
        ({name: x for name, x in tensors.items() if name != some}, "is missing"),
    ]:
        forge(tmp_path / "f", changed, manifest | {"crc32": crc32(changed)})
        with pytest.raises(CheckpointError, match=match):
            Memory.load(tmp_path / "f")
    zero = {name: x for name, x in tensors.items() if "terms.0" in name}
    terms = [manifest["terms"][0]] * 2
    forge(tmp_path / "f", zero | twice, manifest | {"terms": terms, "crc32": crc32(zero | twice)})
    with pytest.raises(CheckpointError, match="two of its terms are the same"):
        Memory.load(tmp_path / "f")


def test_what_is_no_memory_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"memory .*none: no such file; give a file that"):
        Memory.load(tmp_path / "none")
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="not a memory of ttt_jax"):
        Memory.load(tmp_path / "weights")
    (tmp_path / "text").write_text("no safetensors at all")
    with pytest.raises(CheckpointError, match="damaged"):
        Memory.load(tmp_path / "text")


def damaged_files(folder, examples):
    """Bytes, the manifest and tensors, with right checksums or not: a refusal is one line."""
    path = folder / "m"
    (0.5 * memory_of(0) + memory_of(1, "b", rank=1)).save(path)
    original, tensors, manifest = path.read_bytes(), load_file(path), manifest_of(path)
    third = max(examples // 3, 1)
    load = lambda: Memory.load(path).dW(1)
    fuzz_bytes(third, path, original, load)

    def forged(change):
        forge(path, tensors, replaced(manifest, *change))
        one_line(load)

    def other_tensors(change):
        name, shape, dtype = change
        changed = tensors | {name: np.ones(shape, dtype)}
        forge(path, changed, manifest | {"crc32": crc32(changed)})
        one_line(load)

    fuzz(third, TREES, forged)
    names = st.sampled_from(sorted(tensors)) | st.just("new")
    shapes = st.lists(st.integers(0, 6), max_size=3)
    dtypes = st.sampled_from(["int32", "float32", "float64", "int8"])
    fuzz(third, st.tuples(names, shapes, dtypes), other_tensors)


def test_damaged_files(tmp_path):
    damaged_files(tmp_path, 300)


@pytest.mark.slow
def test_damaged_files_10000(tmp_path):
    damaged_files(tmp_path, 10_000)


def test_any_flipped_bit_and_any_missing_end_is_found(saved):
    _, path = saved
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for place in (0, 7, 8, len(data) - 1, *rng.integers(0, len(data), 100).tolist()):
        bad = bytearray(data)
        bad[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            Memory.load(path)
    for size in (0, 7, 8, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            Memory.load(path)


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    memory, path = saved

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ttt_jax.files.sealed.save_file", full)
    with pytest.raises(CheckpointError, match=r"memory .*could not be written.*free space"):
        (2 * memory).save(path)
    assert Memory.load(path) == memory
    assert list(path.parent.iterdir()) == [path]
