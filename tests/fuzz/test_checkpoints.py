"""Damaged and hostile checkpoints: a one-line `UserError` or exactly what is in the file; no crash,
no large allocation.

A few examples of each run with the fast tests, `-m slow` runs 10,000.
"""

import contextlib
import functools
import json
import os
import shutil
import tracemalloc

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from support.fuzzing import FLIPS, JSON, SMALL, flip, fuzz
from support.hf_folders import make_folder, read_folder, write_shards

import ttt_jax.pretrained.hf_weights
import ttt_jax.pretrained.load
import ttt_jax.pretrained.source
from ttt_jax.errors import CheckpointError, ConfigError, UserError
from ttt_jax.files.reading import MAX_JSON_BYTES, inside
from ttt_jax.model.transformer import abstract_transformer
from ttt_jax.pretrained.convert import convert
from ttt_jax.pretrained.hf_config import config_from_hf
from ttt_jax.pretrained.hf_weights import check_tensors, load_hf
from ttt_jax.pretrained.load import load_pretrained
from ttt_jax.pretrained.safetensors_io import MAX_HEADER_BYTES, TensorFiles
from ttt_jax.pretrained.source import open_source

MEMORY = 20_000_000  # bytes that Python and numpy may hold at once


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A Hugging Face folder in one file, one in shards, and the converted one."""
    root = tmp_path_factory.mktemp("pristine")
    stored = make_folder(root / "one", SMALL)
    make_folder(root / "shards", SMALL, shards=3)
    convert(root / "one", root / "orbax", to="orbax")
    return root, stored


@pytest.fixture(scope="module")
def work(pristine, tmp_path_factory):
    """A copy of all that an example may change; the next one finds it as it was (`changed`)."""
    root = tmp_path_factory.mktemp("work") / "models"
    shutil.copytree(pristine[0], root)
    return root


@pytest.fixture(autouse=True)
def traced_once(monkeypatch):
    """What a model's structure costs to trace, twenty times what reading these files costs, is paid
    once per config.
    """
    cached = functools.cache(abstract_transformer)
    for module in (
        ttt_jax.pretrained.hf_weights,
        ttt_jax.pretrained.load,
        ttt_jax.pretrained.source,
    ):
        monkeypatch.setattr(module, "abstract_transformer", cached)


@contextlib.contextmanager
def changed(path, data):
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


@contextlib.contextmanager
def small_memory():
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def read_all(folder):
    """name -> array of every tensor of the model, or None after a refusal in one line."""
    with small_memory():
        try:
            source = open_source(folder)
            check_tensors(source.abstract, source.tensors, str(folder))
            return {name: source.tensors.read(name) for name in source.tensors}
        except UserError as error:
            message = str(error)
            assert "\n" not in message
            assert len(message) < 20_000
            return None


def check_file(work, data, header_bytes):
    """A file is refused, or what is read is what lies at the places of the tensors."""
    path = work / "one" / "model.safetensors"
    original = path.read_bytes()
    header = json.loads(original[8:header_bytes])
    with changed(path, data):
        found = read_all(work / "one")
    if found is None:
        return False
    for name, fields in header.items():
        if name != "__metadata__":
            begin, end = fields["data_offsets"]
            assert found[name].tobytes() == data[header_bytes + begin : header_bytes + end], name
    return True


def header_size(path):
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def run_flips(work, examples, inside_header):
    path = work / "one" / "model.safetensors"
    original, size = path.read_bytes(), header_size(path)

    @fuzz(examples)
    @given(FLIPS)
    def example(places):
        places = [(place % size, bit) for place, bit in places] if inside_header else places
        check_file(work, flip(original, places), size)

    example()


def run_truncations(work, examples):
    path = work / "one" / "model.safetensors"
    original, size = path.read_bytes(), header_size(path)

    @fuzz(examples)
    @given(st.integers(0, len(original) - 1), st.binary(max_size=3))
    def example(length, tail):
        data = original[:length] + tail
        assert not check_file(work, data, size) or len(data) == len(original)

    example()


FIELDS = [
    *SMALL,
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "rms_norm_eps",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "attention_bias",
    "max_position_embeddings",
    "hidden_act",
    "initializer_range",
    "quantization_config",
    "torch_dtype",
]


def run_configs(work, stored, examples):
    path = work / "one" / "config.json"
    raw = json.loads(path.read_text())

    @fuzz(examples)
    @given(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
    def example(change):
        with changed(path, json.dumps(raw | change).encode()):
            found = read_all(work / "one")
        if found is not None:  # then the sizes were those of the tensors
            assert found.keys() >= {name for name in stored if name != "lm_head.weight"}

    example()


def run_texts(work, name, examples):
    """Flipped bits and cuts in one of the JSON files."""
    path = work / name
    original = path.read_bytes()

    @fuzz(examples)
    @given(FLIPS | st.integers(0, len(original)))
    def example(change):
        with changed(
            path, flip(original, change) if isinstance(change, list) else original[:change]
        ):
            read_all(path.parent)

    example()


def run_index(work, stored, examples):
    path = work / "shards" / "model.safetensors.index.json"
    names = list(json.loads(path.read_text())["weight_map"])
    good = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    bad = [
        "../one/model.safetensors",
        "/etc/passwd",
        "..",
        "",
        "a\0b",
        "config.json",
        "x" * 5000,
        f"{good[0]}/",
    ]
    files = st.sampled_from(good + bad) | JSON

    @fuzz(examples)
    @given(
        st.dictionaries(st.sampled_from(names) | st.text(max_size=5), files, max_size=4),
        st.booleans(),
    )
    def example(change, keep):
        weight_map = json.loads(path.read_text())["weight_map"] if keep else {}
        with changed(path, json.dumps({"weight_map": weight_map | change}).encode()):
            found = read_all(work / "shards")
        if found is not None:
            assert all(found[name].tobytes() == x.tobytes() for name, x in stored.items())

    example()


def load(folder):
    with contextlib.suppress(UserError):
        load_pretrained(folder)


def run_orbax(work, examples, reader):
    """Any file of the Orbax folder, flipped or cut."""
    files = sorted(p for p in (work / "orbax").rglob("*") if p.is_file())

    @fuzz(examples)
    @given(st.integers(0, len(files) - 1), FLIPS, st.integers(0, 1 << 20), st.booleans())
    def example(which, places, length, cut):
        original = files[which].read_bytes()
        data = (
            original[: length % (len(original) + 1)]
            if cut or not original
            else flip(original, places)
        )
        with changed(files[which], data):
            reader(work / "orbax")

    example()


# After a read that failed, Orbax drops the others without awaiting them.
DROPPED_READS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_flipped_header(work):
    run_flips(work, 80, inside_header=True)


def test_flipped_anywhere(work):
    run_flips(work, 15, inside_header=False)


def test_truncated(work):
    run_truncations(work, 60)


def test_configs(work, pristine):
    run_configs(work, pristine[1], 60)


@pytest.mark.parametrize(
    "name", ["one/config.json", "shards/model.safetensors.index.json", "orbax/ttt_jax.json"]
)
def test_json_files(work, name):
    run_texts(work, name, 25)


def test_index(work, pristine):
    run_index(work, pristine[1], 40)


@DROPPED_READS
@pytest.mark.parametrize("reader", [read_all, load])
def test_orbax_files(work, reader):
    run_orbax(work, 12, reader)


N = 10_000
MANY = {
    "header": lambda work, stored: run_flips(work, N, inside_header=True),
    "anywhere": lambda work, stored: run_flips(work, N, inside_header=False),
    "truncated": lambda work, stored: run_truncations(work, N),
    "configs": lambda work, stored: run_configs(work, stored, N),
    "config.json": lambda work, stored: run_texts(work, "one/config.json", N),
    "index.json": lambda work, stored: run_texts(work, "shards/model.safetensors.index.json", N),
    "ttt_jax.json": lambda work, stored: run_texts(work, "orbax/ttt_jax.json", N),
    "index": lambda work, stored: run_index(work, stored, N),
    "orbax, converter": lambda work, stored: run_orbax(work, N, read_all),
    "orbax, load": lambda work, stored: run_orbax(work, N, load),
}


@DROPPED_READS
@pytest.mark.slow
@pytest.mark.parametrize("what", MANY)
def test_many_more(work, pristine, what):
    MANY[what](work, pristine[1])


# ------------------------------------------------------------------------------- hostile on purpose


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty file": (b"", "its header claims 0 bytes, the file has 0"),
    "absurd header": (file_of({}, length=2**63), "its header claims 9223372036854775808 bytes"),
    "header beyond the end": (file_of({}, length=3), "its header claims 3 bytes"),
    "nested": (file_of(b"[" * 100_000), "is not JSON"),
    "absurd integer": (file_of(b'{"a":' + b"9" * 10_000 + b"}"), "is not JSON"),
    "a list": (file_of([]), "its header is not an object"),
    "listed twice": (
        file_of(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],'
            b'"data_offsets":[0,4]}}',
            b"1234",
        ),
        "a is listed twice",
    ),
    "out of range": (file_of({"a": tensor([1000], 0, 4000)}, b"1234"), "its tensors end at byte"),
    "overlap": (
        file_of({"a": tensor([1], 0, 4), "b": tensor([1], 0, 4)}, b"1234"),
        "tensor b begins at byte",
    ),
    "hole": (file_of({"a": tensor([1], 4, 8)}, b"12345678"), "tensor a begins at byte"),
    "rest": (file_of({"a": tensor([1], 0, 4)}, b"12345678"), "its tensors end at byte"),
    "negative": (file_of({"a": tensor([-1], 0, 4)}, b"1234"), "no valid shape and data_offsets"),
    "fraction": (file_of({"a": tensor([1.5], 0, 6)}, b"123456"), "no valid shape and data_offsets"),
    "boolean": (file_of({"a": tensor([True], 0, 4)}, b"1234"), "no valid shape and data_offsets"),
    "huge shape": (
        file_of({"a": tensor([2**40, 2**40], 0, 4)}, b"1234"),
        "has 4 bytes, which is not its shape in F32",
    ),
    "dtype": (file_of({"a": tensor([1], 0, 4, "pickle")}, b"1234"), "unknown dtype 'pickle'"),
    "line break": (
        file_of({"a\nerror: b": tensor([1], 0, 8)}, b"12345678"),
        r"'a\\nerror: b' has "
        r"8 bytes",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(case, tmp_path):
    data, words = HOSTILE[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    with small_memory(), pytest.raises(CheckpointError, match=words) as error:
        TensorFiles(tmp_path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "model.safetensors"))


def test_large_headers_and_json_are_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse
    with small_memory(), pytest.raises(CheckpointError, match="its header claims"):
        TensorFiles(tmp_path)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with (
        small_memory(),
        pytest.raises(ConfigError, match=f"{MAX_JSON_BYTES + 1} bytes; such a file has at most"),
    ):
        load_hf(tmp_path)


@pytest.mark.parametrize(
    "field",
    [
        "hidden_size",
        "intermediate_size",
        "vocab_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
    ],
)
@pytest.mark.parametrize("value", [10**12, 2**24, 4096])
def test_absurd_sizes_allocate_nothing(work, field, value):
    path = work / "one" / "config.json"
    with (
        changed(path, json.dumps(json.loads(path.read_text()) | {field: value}).encode()),
        small_memory(),
    ):
        with pytest.raises(UserError) as error:
            load_hf(work / "one")
        with pytest.raises(UserError):
            convert(work / "one", work / "out", to="orbax")
    assert len(str(error.value)) < 20_000
    assert not (work / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 0, "x", None, [], 10**400])
@pytest.mark.parametrize("field", ["ttt_lr", "ttt_chunk", "rms_norm_eps", "rope_theta"])
def test_numbers_that_are_none(field, value):
    with contextlib.suppress(ConfigError):
        cfg = config_from_hf(SMALL | {field: value})
        assert np.isfinite([cfg.ttt.lr, cfg.norm_eps, cfg.rope.base]).all()
        assert min(cfg.ttt.chunk_size, cfg.norm_eps, cfg.rope.base) > 0


def test_links_may_not_leave_the_folder(pristine, tmp_path):
    root, stored = pristine
    (tmp_path / "secret").write_text('{"a": 1}')
    folder = tmp_path / "model"
    shutil.copytree(root / "one", folder)
    (folder / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(
        CheckpointError,
        match=r"tokenizer\.json: a link to .*secret, outside the checkpoint's folder",
    ):
        convert(folder, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()
    (folder / "tokenizer.json").unlink()
    for name in ("model.safetensors", "config.json"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(f"../{name}")
        with pytest.raises(CheckpointError, match="outside the checkpoint's folder"):
            load_hf(folder)
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)
    (folder / "loop").symlink_to("loop")
    with contextlib.suppress(CheckpointError):
        inside(folder, "loop")
    # A Hugging Face cache keeps its files beside the folder; they are part of it. So are links
    # within the folder.
    snapshot, blobs = tmp_path / "hub/models--x/snapshots/abc", tmp_path / "hub/models--x/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in (root / "one").iterdir():
        shutil.copy(path, blobs / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    convert(snapshot, tmp_path / "from_hub", to="hf")
    assert all(
        read_folder(tmp_path / "from_hub")[name].tobytes() == x.tobytes()
        for name, x in stored.items()
    )
    os.symlink(folder, tmp_path / "alias")
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "alias"), load_hf(folder))


def test_a_pipe_is_no_file(pristine, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(pristine[0] / "one", folder)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    # and does not wait for a writer
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        load_hf(folder)


def test_one_tensor_in_two_files(pristine, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(pristine[0] / "one", folder)
    stored = read_folder(folder)
    (folder / "model.safetensors").unlink()
    write_shards(folder, stored, 2)
    save_file(stored, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="is in two files"):
        load_hf(folder)
