"""Small models that fuzzed readers are given: as they are written, and a copy to damage."""

import shutil

import pytest
from support.fuzzing import SMALL
from support.hf_folders import make_folder

from ttt_jax.pretrained.convert import convert


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
