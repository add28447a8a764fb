"""The small files beside a model: bounded, regular, inside the folder; refused in one line by
everything that reads them.
"""

import contextlib
import functools
import json
import os
import shutil
import threading
import tracemalloc

import pytest
from data.test_tokenizer import make_tokenizer
from support.fuzzing import SMALL
from support.hf_folders import make_folder

from ttt_jax.checkpoint.checkpointer import Checkpointer
from ttt_jax.config import CheckpointConfig, Config, ModelConfig, dump_yaml, from_dict
from ttt_jax.data.tokenizer import load_tokenizer
from ttt_jax.errors import CheckpointError, UserError
from ttt_jax.files.reading import (
    MAX_JSON_BYTES,
    excerpt,
    find_companion,
    read_bounded,
    read_json_object,
    read_text,
)
from ttt_jax.pretrained.convert import convert
from ttt_jax.pretrained.load import load_pretrained, read_eos_ids

SECRET = "root:x:0:0"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """The same model as a Hugging Face folder and as a converted one, each with a tokenizer."""
    root = tmp_path_factory.mktemp("companions")
    make_folder(root / "hf", SMALL | {"vocab_size": 300})
    make_tokenizer(root / "hf", tokenizer_config={"eos_token": "<|im_end|>"})
    (root / "hf/chat_template.jinja").write_text("{{ messages }}")
    convert(root / "hf", root / "orbax", to="orbax")
    return root


@pytest.fixture
def models(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "models")
    return tmp_path / "models"


def within(seconds, call):
    """What `call` raises; a hang is a failure, not a test that never ends."""
    found = []

    def run():
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "it hangs"
    return found[0]


def refused(call):
    error = within(30, call)
    assert isinstance(error, UserError), error
    message = str(error)
    assert message.isprintable()
    assert len(message) < 600
    assert SECRET not in message
    return message


@contextlib.contextmanager
def small_memory():
    """What Python holds at once, compilation and imports included; the files that must not be read
    have 3 GB.
    """
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 200_000_000
    finally:
        tracemalloc.stop()


def link(path):
    secret = path.parent.parent.parent / "secret"
    secret.write_text(
        json.dumps({"eos_token_id": SECRET, "eos_token": SECRET, "model_type": SECRET})
    )
    path.symlink_to(secret)


def huge(path):
    path.touch()
    os.truncate(path, 3 << 30)  # sparse


SPOILT = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link": link,
    "huge": huge,
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "folder": os.mkdir,
}
FILES = [
    "hf/config.json",
    "hf/generation_config.json",
    "hf/tokenizer_config.json",
    "hf/tokenizer.json",
    "orbax/ttt_jax.json",
    "orbax/generation_config.json",
    "orbax/tokenizer_config.json",
    "orbax/tokenizer.json",
]


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("file", FILES)
def test_every_companion_is_refused_by_name(models, file, how):
    path = models / file
    path.unlink(missing_ok=True)
    SPOILT[how](path)
    memory = small_memory if how == "huge" else contextlib.nullcontext
    with memory():
        message = refused(lambda: load_pretrained(path.parent))
    assert file.rpartition("/")[2] in message
    if path.name.startswith("tokenizer"):
        refused(lambda: load_tokenizer(str(path.parent)))
    if how == "folder" and path.name in ("tokenizer_config.json", "generation_config.json"):
        return  # folders are not carried along
    with memory():
        assert path.name in refused(lambda: convert(path.parent, models / "out", to="hf"))
    assert not (models / "out").exists()


@pytest.mark.parametrize("how", ["pipe", "device", "link", "huge"])
def test_what_is_only_copied(models, how):
    path = models / "hf/chat_template.jinja"
    path.unlink()
    SPOILT[how](path)
    assert "chat_template.jinja" in refused(
        lambda: convert(models / "hf", models / "out", to="orbax")
    )
    assert not (models / "out").exists()


EOS = {
    "beyond": 300,
    "negative": -1,
    "in a list": [1, 300],
    "boolean": True,
    "text": "a" * 10**6,
    "long list": list(range(65)),
    "very long list": [1] * 20_000,
    "nested": [[1]],
    "float": 1.0,
    "table": {"a": 1},
    "huge": 10**400,
    "escape": "\x1b[31m",
}


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("case", EOS)
def test_end_tokens_that_are_none(tmp_path, case, name):
    path = tmp_path / name
    path.write_text(json.dumps({"eos_token_id": EOS[case]}))
    message = refused(lambda: read_eos_ids(tmp_path, 300))
    assert message.startswith(f"{path}: eos_token_id")
    assert len(message) < len(str(path)) + 200


def test_end_tokens(tmp_path):
    assert read_eos_ids(tmp_path, 300) == ()
    (tmp_path / "config.json").write_text('{"eos_token_id": 299}')
    assert read_eos_ids(tmp_path, 300) == (299,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert read_eos_ids(tmp_path, 300) == (299,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(64))}))
    assert read_eos_ids(tmp_path, 300) == tuple(range(64))


def test_a_model_with_a_bad_end_token_is_refused(models):
    (models / "hf/generation_config.json").write_text('{"eos_token_id": 300}')
    shutil.copy(models / "hf/generation_config.json", models / "orbax")
    for folder in ("hf", "orbax"):
        message = refused(functools.partial(load_pretrained, models / folder))
        assert "eos_token_id = 300: must be a token id from 0 to 299" in message


def test_the_cache_of_hugging_face_is_followed(models, tmp_path):
    snapshot, blobs = tmp_path / "hub/models--x/snapshots/abc", tmp_path / "hub/models--x/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in (models / "hf").iterdir():
        shutil.copy(path, blobs / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    model = load_pretrained(snapshot)
    assert (model.eos_ids, model.tokenizer.fingerprint) == (
        (2, 3),
        load_tokenizer(str(models / "hf")).fingerprint,
    )
    convert(snapshot, tmp_path / "out", to="orbax")
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"


def test_a_run_with_a_pipe_in_its_place(tmp_path):
    """config.yaml of a run folder, and the JSON of a checkpoint without checksums."""
    config = from_dict(
        Config, {"name": "run", "runs_dir": str(tmp_path), "model": {"num_layers": 1}}
    )
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run/config.yaml")
    assert "config.yaml: not a regular file" in refused(lambda: load_pretrained(tmp_path / "run"))
    (tmp_path / "run/config.yaml").unlink()
    (tmp_path / "run/config.yaml").write_text(dump_yaml(config))
    folder = tmp_path / "run/checkpoints/1/model"
    folder.mkdir(parents=True)
    for name in ("_METADATA", "manifest.ocdbt", "_sharding"):
        os.mkfifo(folder / name)
    assert "not a regular file" in refused(lambda: load_pretrained(tmp_path / "run"))
    with Checkpointer(tmp_path / "run/checkpoints", CheckpointConfig()) as checkpointer:
        assert "not a regular file" in refused(
            lambda: checkpointer.restore(1, model={}, opt_state={})
        )
    assert ModelConfig().num_layers != config.model.num_layers


def test_reading_is_bounded(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5, CheckpointError) == b"12345"
    with pytest.raises(CheckpointError, match="5 bytes; such a file has at most 4"):
        read_bounded(path, 4, CheckpointError)
    with pytest.raises(CheckpointError, match="more than 4 bytes"):  # its size is said to be 0
        read_bounded(tmp_path.__class__("/proc/self/status"), 4, CheckpointError)
    path.write_bytes(b"ab\xff")
    with pytest.raises(CheckpointError, match=r"not UTF-8 \(byte 2\)"):
        read_text(path, 10, CheckpointError)
    for text, words in (
        ("[1]", "expected an object"),
        ("{", "not valid JSON"),
        ("[" * 10**5, "not valid JSON"),
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=words):
            read_json_object(path, CheckpointError)
    os.truncate(path, MAX_JSON_BYTES + 1)
    with small_memory(), pytest.raises(CheckpointError, match="such a file has at most"):
        read_json_object(path, CheckpointError)
    assert find_companion(tmp_path, "nothing") is None
    assert find_companion(tmp_path, "a") == path


LONG = [
    "a" * 10**6,
    [1] * 10**5,
    {str(n): n for n in range(100)},
    10**4000,
    "\x1b[2J\n",
    [["x"] * 9] * 9,
]


@pytest.mark.parametrize("value", LONG)
def test_excerpts_are_short(value):
    text = excerpt(value)
    assert text.isprintable()
    assert 0 < len(text) <= 60
