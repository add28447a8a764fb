"""Files that commands read: taken as they are, and never replaced by what is made of them."""

import io
from pathlib import Path

import numpy as np
import pytest

from ttt_jax.command.cli import main
from ttt_jax.command.io import read_text


def test_line_ends_stay_as_they_are(tmp_path):
    """As in training, `eval` and `memory read`: other line ends are other tokens."""
    path, text = tmp_path / "text.txt", "a\r\nb\rc\n\ufeffd"
    path.write_bytes(text.encode())
    assert read_text(path, "--text") == text


def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch):
    """Once, at the beginning of the file; further ones are characters."""
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeff\ufeffa\ufeff".encode())
    assert read_text(path, "--text") == "\ufeffa\ufeff"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfb")))
    assert read_text(Path("-"), "--prompt-file", stdin=True) == "b"


@pytest.mark.parametrize(
    "words",
    [
        ["score", "--model", "model", "--text", "in/text", "--out", "in/text"],
        ["score", "--model", "model", "--ids", "in/../in/text", "--out", "link/text"],
        ["memory", "read", "model", "other", "in/text", "--out", "in/text"],
        ["convert", "model", "in", "--to", "hf", "--ttt.calibrate", "in/text"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_no_output_replaces_an_input(words, tmp_path, monkeypatch, capsys):
    """Said before anything is read: there is no model here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to("in")
    np.save(tmp_path / "in" / "text.npy", np.arange(3))
    (tmp_path / "in" / "text.npy").rename(tmp_path / "in" / "text")
    before = (tmp_path / "in" / "text").read_bytes()
    assert main([*words, "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert "/text, which is read; choose another one" in error
    assert len(error.splitlines()) == 1
    assert (tmp_path / "in" / "text").read_bytes() == before
