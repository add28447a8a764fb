"""The plain Hugging Face folder that conversions start from."""

import pytest
from support.conversions import PLAIN
from support.hf_folders import make_folder


@pytest.fixture
def plain(tmp_path):
    make_folder(tmp_path / "plain", PLAIN)
    return tmp_path / "plain"
