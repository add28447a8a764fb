"""`ttt-jax plan`: topologies, what it refuses, and its answer."""

import json
import os
from pathlib import Path

import pytest

from ttt_jax.command.cli import main
from ttt_jax.errors import UserError
from ttt_jax.plan.topology import Topology, parse_topology

ROOT = Path(__file__).resolve().parents[2]
QWEN3_8B = str(ROOT / "configs/qwen3_8b_longct.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v7:2x2", "unknown"),
        ("v5p", "unknown"),
        ("v5p:4x0x4", "unknown"),
        ("v5p:4x4", "grid of 3 sizes"),
        ("v6e:2x2x2", "grid of 2 sizes"),
        ("h100:2x4", "number of GPUs"),
    ],
)
def test_bad_topologies(text, words, capsys):
    with pytest.raises(UserError, match=words):
        parse_topology(text)
    assert main(["plan", "--config", QWEN3_8B, "--topology", text]) == 2
    assert words in capsys.readouterr().err


def test_topologies():
    assert parse_topology("v5p:4x4x8") == Topology("v5p:4x4x8", "v5p", 128, (4, 4, 8))
    assert parse_topology("h200:64").memory == 141e9


def test_a_missing_libtpu_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main(["plan", "--config", QWEN3_8B, "--topology", "v5p:4x4x4"]) == 2
    error = capsys.readouterr().err
    assert "pip install" in error
    assert "libtpu" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--decode", 64, "--mesh.tensor", 8), "mesh.tensor 8: does not divide model.num_kv_h"),
        (("--decode", 64, "--prefill", 64), "--prefill and --decode are two programs"),
        (("--rows", 2), "--rows is of --prefill or --decode"),
        (("--decode", 64, "--rows", 3, "--mesh.data", 2), "mesh.data = 2: does not divide the 3"),
    ],
)
def test_bad_work(words, line, capsys):
    mesh = ("--mesh.fsdp", -1)
    words = ("plan", "--config", "default", "--topology", "h100:8", *mesh, *words)
    assert main([str(word) for word in words]) == 2
    assert line in capsys.readouterr().err


def test_the_command_estimates_and_says_whether_it_fits(capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    words = ["plan", "--config", QWEN3_8B, "--topology", "h100:64", "--json", "--mesh.context", "8"]
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["mesh"]["fsdp"] == 8
    assert plan["total"] == pytest.approx(sum(plan["bytes_by_kind"].values()))
    assert main(["plan", "--config", QWEN3_8B, "--topology", "h100:2"]) == 1
    text = capsys.readouterr().out
    assert "does not fit" in text
    assert "more devices" in text
    assert main(["plan", "--config", QWEN3_8B, "--topology", "h100:7"]) == 2
    assert "does not divide 7 devices" in capsys.readouterr().err
    assert main(["plan", "--config", QWEN3_8B, "--topology", "h100:8", "--model.nothing=1"]) == 2
    assert "model.nothing" in capsys.readouterr().err
