"""Commands on models whose numbers are not finite, or whose fast weights stay zero."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import V
from support.streams import ZERO, changed, one_layer_model, prompts, with_nan_at

from ttt_jax import save_pretrained
from ttt_jax.command.cli import main
from ttt_jax.data.tokenizer import ByteTokenizer

# ----------------------------------------------------------------------------------------- commands


@pytest.fixture
def lost_model(monkeypatch):
    """What the commands load: parameters on disk that are not finite are refused."""
    monkeypatch.setattr(
        "ttt_jax.pretrained.load.load_model", lambda *arguments, **options: with_nan_at(V - 1)
    )
    monkeypatch.setattr("ttt_jax.eval.run._load", lambda options: with_nan_at(V - 1))
    return "model"


@pytest.fixture(autouse=True)
def _usual_promotion():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def test_score_command(lost_model, tmp_path, capsys):
    ids = prompts([20], vocab=V - 1)[0]
    ids[10] = V - 1
    np.save(tmp_path / "ids.npy", ids)
    words = [
        "score",
        "--model",
        lost_model,
        "--ids",
        str(tmp_path / "ids.npy"),
        "--out",
        str(tmp_path / "o.npz"),
    ]
    assert main([*words, "--piece", "8"]) == 1
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert "row 0 from token 8 on" in error
    assert "o.npz holds what was computed" in error
    with np.load(tmp_path / "o.npz", allow_pickle=False) as kept:
        assert np.isfinite(kept["logprobs"][0, :8]).all()


def test_generate_command(lost_model, tmp_path, capsys):
    np.save(tmp_path / "ids.npy", np.array([[1, 2, 3], [1, V - 1, 3]]))
    session = tmp_path / "s.safetensors"
    words = [
        "generate",
        "--model",
        lost_model,
        "--ids",
        str(tmp_path / "ids.npy"),
        "--max-new-tokens",
        "3",
        "--json",
    ]
    assert main([*words, "--session", str(session), "--ignore-eos"]) == 1
    out, error = capsys.readouterr()
    rows = [
        json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()
    ]  # NaN is no JSON
    assert [row["finish_reason"] for row in rows] == ["length", "not_finite"]
    assert len(rows[0]["token_ids"]) == 3
    assert error.count("\n") == 1
    assert "s.safetensors is not written" in error
    assert not session.exists()


def test_eval_command(lost_model, tmp_path, capsys):
    """Stops at the document, keeps those before it, and writes no result."""
    rows = np.stack(prompts([40, 40, 40], vocab=V - 1))
    rows[2, 5] = V - 1
    np.save(tmp_path / "ids.npy", rows)
    words = [
        "eval",
        "--model",
        lost_model,
        "--perplexity",
        str(tmp_path / "ids.npy"),
        "--lengths",
        "16,32",
    ]
    words += ["--batch-size", "1", "--no-shuffled", "--out", str(tmp_path / "out")]
    assert main(words) == 1
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert "document 2 with TTT" in error
    assert "2 finished pieces of work are kept" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unfinished.jsonl"]


def test_eval_of_fast_weights_that_overflow(tmp_path, capsys):
    save_pretrained(one_layer_model(**{"ttt.lr": 1e25}), tmp_path / "m", dtype="float32")
    np.save(tmp_path / "ids.npy", np.stack(prompts([40, 40])))
    words = [
        "eval",
        "--model",
        str(tmp_path / "m"),
        "--perplexity",
        str(tmp_path / "ids.npy"),
        "--lengths",
        "16,32",
    ]
    assert main([*words, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "numbers that are not finite" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_eval_says_at_the_start_that_ttt_does_nothing(tmp_path, capsys):
    save_pretrained(
        changed(one_layer_model(), "conv", jnp.zeros_like), tmp_path / "m", dtype="float32"
    )
    np.save(tmp_path / "ids.npy", np.stack(prompts([40, 40])))
    words = [
        "eval",
        "--model",
        str(tmp_path / "m"),
        "--perplexity",
        str(tmp_path / "ids.npy"),
        "--lengths",
        "16",
    ]
    words += ["--no-shuffled"]
    with pytest.warns(UserWarning, match=ZERO) as caught:
        assert main([*words, "--block", "8", "--out", str(tmp_path / "out")]) == 0
    assert len(caught) == 1
    capsys.readouterr()


def test_text_of_a_row_that_is_lost_is_kept():
    """The bytes that waited for the rest of a character are shown when the row ends."""
    from ttt_jax.inference.writing import Writer

    writer = Writer(ByteTokenizer(), (), set(), 10)
    assert [writer.add(97, 0.0), writer.add(0xE2, 0.0), writer.end("not_finite")] == [
        "a",
        "",
        "\ufffd",
    ]
    assert writer.completion().text == "a\ufffd"
