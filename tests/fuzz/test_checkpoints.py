"""Damaged and hostile checkpoints: a one-line `UserError` or exactly what is in the file; no crash,
no large allocation.

A few examples of each run with the fast tests, `-m slow` runs 10,000.
"""

import contextlib
import functools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import FLIPS, JSON, SMALL, changed, flip, fuzz, small_memory

import ttt_jax.pretrained.hf_weights
import ttt_jax.pretrained.load
import ttt_jax.pretrained.source
from ttt_jax.errors import UserError
from ttt_jax.model.transformer import abstract_transformer
from ttt_jax.pretrained.hf_weights import check_tensors
from ttt_jax.pretrained.load import load_pretrained
from ttt_jax.pretrained.source import open_source


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
