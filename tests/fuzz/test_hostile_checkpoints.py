"""Checkpoints made to hurt: headers that lie, absurd sizes, links, pipes."""

import contextlib
import json
import os
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.fuzzing import SMALL, changed, small_memory
from support.hf_folders import read_folder, write_shards

from ttt_jax.errors import CheckpointError, ConfigError, UserError
from ttt_jax.files.reading import MAX_JSON_BYTES, inside
from ttt_jax.pretrained.convert import convert
from ttt_jax.pretrained.hf_config import config_from_hf
from ttt_jax.pretrained.hf_weights import load_hf
from ttt_jax.pretrained.safetensors_io import MAX_HEADER_BYTES, TensorFiles


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


def test_two_models_in_one_folder(pristine, tmp_path):
    """An export over a sharded one, whose index and shards stay behind: other readers choose."""
    folder = tmp_path / "model"
    shutil.copytree(pristine[0] / "shards", folder)
    stored = read_folder(folder)
    load_hf(folder)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"that lists other files: two models; delete what"):
        load_hf(folder)
    index = {"weight_map": dict.fromkeys(stored, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load_hf(folder)
