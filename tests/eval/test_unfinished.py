"""An evaluation that is interrupted: what is finished is kept, the same command goes on, another
one is refused.
"""

import json
import signal

import jax
import numpy as np
import pytest
from support.streams import one_layer_model, prompts

from ttt_jax import save_pretrained
from ttt_jax.command.cli import main
from ttt_jax.errors import CheckpointError, UserError
from ttt_jax.eval.output import check_out
from ttt_jax.eval.unfinished import UNFINISHED, Unfinished

ABOUT = {"lengths": [16, 32], "model": "m"}


pytestmark = pytest.mark.usefixtures("interruptible", "usual_promotion")


def forbidden():
    raise AssertionError("computed again")


def test_pieces_are_kept_exactly(tmp_path):
    kept = Unfinished(tmp_path / "out", ABOUT)
    assert not tmp_path.joinpath(
        "out"
    ).exists()  # nothing is written before there is something to keep
    value = {
        "on": np.random.default_rng(0).standard_normal(50).tolist(),
        "tiny": 5e-324,
        "big": 1.7e308,
    }
    assert kept.piece(("perplexity", 0), lambda: value) == value
    assert kept.piece(("perplexity", 0), forbidden) == value
    again = Unfinished(tmp_path / "out", ABOUT)
    assert len(again) == 1
    assert again.piece(("perplexity", 0), forbidden) == value
    assert again.piece(("perplexity", 1), lambda: [2]) == [2]
    assert len(Unfinished(tmp_path / "out", ABOUT)) == 2
    assert Unfinished(None, {}).piece(("x",), lambda: 3) == 3


def test_another_command_is_refused_and_may_be_dropped(tmp_path):
    Unfinished(tmp_path, ABOUT).piece(("a",), lambda: 1)
    before = (tmp_path / UNFINISHED).read_bytes()
    message = (
        r"another command \(lengths: \[16, 32\] there, \[16\] here\); give the same "
        r"command, another folder, or --over"
    )
    with pytest.raises(UserError, match=message):
        Unfinished(tmp_path, ABOUT | {"lengths": [16]})
    assert (tmp_path / UNFINISHED).read_bytes() == before
    dropped = Unfinished(tmp_path, ABOUT | {"lengths": [16]}, overwrite=True)
    assert len(dropped) == 0
    dropped.piece(("b",), lambda: 2)
    assert len(Unfinished(tmp_path, ABOUT | {"lengths": [16]})) == 1
    assert (
        len(Unfinished(tmp_path, ABOUT | {"lengths": [16]}, overwrite=True)) == 1
    )  # the same one goes on


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_a_kill_cut_short_is_dropped(cut, tmp_path):
    kept = Unfinished(tmp_path, ABOUT)
    for n in range(3):
        kept.piece((n,), lambda n=n: [n] * 5)
    path = tmp_path / UNFINISHED
    path.write_bytes(path.read_bytes()[:-cut])
    again = Unfinished(tmp_path, ABOUT)
    assert len(again) == 2
    again.piece((2,), lambda: "new")
    assert Unfinished(tmp_path, ABOUT).piece((2,), forbidden) == "new"


@pytest.mark.parametrize(
    "text", ["x\n", "[1]\n", '{"format": 1}\n{"key": 1}\n', "\ud800\n", "[" * 10000 + "\n"]
)
def test_damage_is_one_line(text, tmp_path):
    (tmp_path / UNFINISHED).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError) as error:
        Unfinished(tmp_path, ABOUT)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, CheckpointError) or "another command" in str(error.value)
    assert len(Unfinished(tmp_path, ABOUT, overwrite=True)) == 0


def test_a_full_disk_is_said_at_once(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"could not be written .*No space left"):
        Unfinished(tmp_path, ABOUT).piece(("a",), lambda: 1)


def test_only_an_unfinished_folder_may_be_filled(tmp_path):
    check_out(tmp_path, False)  # empty
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / UNFINISHED).write_text("")
    (tmp_path / UNFINISHED).write_text("")
    check_out(tmp_path, False)
    (tmp_path / "a" / "results.json").write_text("")
    with pytest.raises(UserError, match="exists already"):
        check_out(tmp_path, False)


@pytest.fixture
def words(tmp_path):
    save_pretrained(one_layer_model(vocab_size=97), tmp_path / "m", dtype="float32")
    np.save(tmp_path / "ids.npy", np.stack(prompts([40] * 6, vocab=97)))
    words = [
        "eval",
        "--model",
        tmp_path / "m",
        "--perplexity",
        tmp_path / "ids.npy",
        "--lengths",
        "16,32",
    ]
    return [str(word) for word in [*words, "--batch-size", "2", "--piece", "16"]]


def results(folder):
    """What has to be equal: everything but times."""
    found = json.loads((folder / "results.json").read_text())
    for name in ("date", "seconds"):
        del found[name]
    for name in ("tokens_per_second", "seconds"):
        del found["perplexity"][name]
    return found


def test_the_same_command_goes_on(words, tmp_path, capsys, monkeypatch):
    """Ctrl-C in the second of three batches: exit 130; then two batches are read, and the figures
    are those of one run.
    """
    import ttt_jax.eval.perplexity as perplexity

    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    original, batches = perplexity._losses_of, []

    def counted(reader, ids, names, *more):
        batches.append(names)
        if len(batches) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(reader, ids, names, *more)

    monkeypatch.setattr(perplexity, "_losses_of", counted)
    out = tmp_path / "out"
    assert main([*words, "--out", str(out)]) == 130
    printed, error = capsys.readouterr()
    assert (printed, error.count("\n")) == ("", 1)
    assert "interrupted; 1 finished pieces of work are kept in" in error
    assert [path.name for path in out.iterdir()] == [UNFINISHED]
    assert main([*words, "--block", "4", "--out", str(out)]) == 2
    assert "another command (block: None there, 4 here)" in capsys.readouterr().err
    batches[:] = [[0, 1], [0, 1]]
    assert main([*words, "--out", str(out)]) == 0
    assert batches[2:] == [[2, 3], [4, 5]]
    assert "going on: 1 finished pieces of work" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.json"]
    assert results(out) == results(tmp_path / "whole")


def test_other_data_and_other_weights(words, tmp_path, capsys, monkeypatch):
    """A document that changed is read again, and weights that changed are another command."""
    import ttt_jax.eval.perplexity as perplexity

    original, batches = perplexity._losses_of, []

    def stops(reader, ids, names, *more):
        batches.append(names)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return original(reader, ids, names, *more)

    monkeypatch.setattr(perplexity, "_losses_of", stops)
    assert main([*words, "--out", str(tmp_path / "out")]) == 130
    ids = np.load(tmp_path / "ids.npy")
    ids[3, 7] += 1 if ids[3, 7] < 96 else -1
    np.save(tmp_path / "ids.npy", ids)
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert batches[3:] == [[2, 3], [4, 5]]
    batches.clear()
    assert main([*words, "--out", str(tmp_path / "two")]) == 130
    changed = jax.tree.map(lambda x: x * 1.01, one_layer_model(vocab_size=97))
    save_pretrained(changed, tmp_path / "other", dtype="float32")
    (tmp_path / "m").rename(tmp_path / "old")
    (tmp_path / "other").rename(tmp_path / "m")
    capsys.readouterr()
    assert main([*words, "--out", str(tmp_path / "two")]) == 2
    assert "another command (parameters: " in capsys.readouterr().err


def test_synthetic_tasks_are_kept_one_by_one(tmp_path):
    from ttt_jax.eval.synthetic import evaluate

    model = one_layer_model(vocab_size=128)
    seen = []

    class Right:
        def __call__(self, rows):
            from ttt_jax.eval.answers import Judgement

            seen.append(len(rows))
            if len(seen) == 4:
                raise KeyboardInterrupt
            return [
                Judgement(np.full(len(row) - 1, -0.5, np.float32), np.ones(len(row) - 1, bool))
                for row in rows
            ]

    options = {
        "lengths": [128],
        "examples": 2,
        "tasks": ("single_needle", "multi_needle", "induction"),
    }
    judges = {"off": Right(), "on": Right()}
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, **options, judges=judges, kept=Unfinished(tmp_path, ABOUT))
    again = evaluate(model, **options, judges=judges, kept=Unfinished(tmp_path, ABOUT))
    assert len(seen) == 7
    assert again == evaluate(model, **options, judges=judges)
