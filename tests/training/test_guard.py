"""Steps that are not finite change nothing; fast weights out of range are named; rollbacks and the
end of patience.
"""

import dataclasses
import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_training import SMALL, batch, bits

from ttt_jax.checkpoint.checkpointer import Checkpointer
from ttt_jax.config import CheckpointConfig, GuardConfig, from_dict, load_config, replace
from ttt_jax.config import Config as RunConfig
from ttt_jax.data import Piece, load_tokenizer, make_loader
from ttt_jax.data.corpus import load_corpus
from ttt_jax.data.document_keys import find_documents
from ttt_jax.errors import ConfigError, TrainingError
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.run.logs import EventLog, read_events
from ttt_jax.training import guard as guard_module
from ttt_jax.training.guard import Guard, read_rollbacks, write_rollbacks
from ttt_jax.training.optimizer import updates_done
from ttt_jax.training.recovery import Recovery
from ttt_jax.training.step import TrainState, abstract_state, init_state, make_train_step


def test_a_step_that_is_not_finite_changes_nothing():
    config = from_dict(RunConfig, SMALL)
    abstract, tx = abstract_state(config, make_mesh(config.mesh))
    step = make_train_step(config, tx)
    state, metrics = step(init_state(config, abstract, tx), batch())
    assert float(metrics["skipped"]) == float(metrics["skipped_steps"]) == 0
    for bad, skipped in ((np.nan, 1), (np.inf, 2)):
        before = bits(state[:2])
        state, metrics = step(state, batch(bad))
        assert bits(state[:2]) == before, "parameters, moments and counts"
        assert (float(metrics["skipped"]), float(metrics["skipped_steps"])) == (1, skipped)
        assert not np.isfinite(float(metrics["loss"]))
    assert int(state.step) == 3
    assert int(updates_done(state.opt_state)) == 1
    before = bits(state.model)
    state, metrics = step(state, batch())
    assert (float(metrics["skipped"]), float(metrics["skipped_steps"])) == (0, 2)
    assert bits(state.model) != before
    assert int(updates_done(state.opt_state)) == 2


def guard_of(tmp_path, shown, **settings):
    config = dataclasses.replace(from_dict(RunConfig, SMALL), guard=GuardConfig(**settings))
    return Guard(
        config,
        EventLog(tmp_path, shown.append),
        lambda pieces: [Piece(r, "a.txt", r, 0, 9) for r in pieces],
    )


def scalars(skipped):
    loss = float("nan") if skipped else 1.0
    return {
        "skipped": jnp.float32(skipped),
        "loss": jnp.float32(loss),
        "grad_norm": jnp.float32(loss),
        "other": None,
    }


def test_skipped_steps_are_named_and_counted_in_a_row(tmp_path):
    shown = []
    guard = guard_of(tmp_path, shown, skips=3)
    pattern = [0, 1, 1, 0, 1, 1, 1]
    for step, skipped in enumerate(pattern, 1):
        guard.watch(step, scalars(skipped), range(6))
        assert not guard.must_roll_back, "it looks one step behind"
    guard.settle()
    assert guard.must_roll_back
    events = read_events(tmp_path)
    assert [(event["step"], event["in_a_row"]) for event in events] == [
        (2, 1),
        (3, 2),
        (5, 1),
        (6, 2),
        (7, 3),
    ]
    assert events[0]["documents"] == [[r, "a.txt", r, 0, 9] for r in range(6)]
    assert shown[0].endswith("its documents: a.txt #0, a.txt #1, a.txt #2, a.txt #3 and 2 more")
    guard.rolled_back()
    assert not guard.must_roll_back


def test_fast_weights_out_of_range_are_named_once(tmp_path):
    shown = []
    guard = guard_of(tmp_path, shown, min_state_ratio=1e-3, max_state_ratio=2.0)
    for step, ratio in enumerate(
        [0.0, 1e-4, 0.5, 2.5, 3.0, 1.0, 2.1, float("nan"), 0.5, 1e-5, 0.0, 0.5], 1
    ):
        guard.check_fast_weights(step, {"ttt/layer_01/state_ratio": ratio, "loss": 7.0})
    assert [(e["step"], e["layer"]) for e in read_events(tmp_path)] == [
        (4, "layer_01"),
        (7, "layer_01"),
        (10, "layer_01"),
    ]
    assert (
        "above guard.max_state_ratio = 2: it explodes; lower model.ttt.lr (now 3), or set "
        "model.ttt.write ridge" in shown[0]
    )
    assert "below guard.min_state_ratio = 0.001: it collapses" in shown[2]


@pytest.mark.parametrize(
    ("ttt", "advice"),
    [
        ({}, "lower model.ttt.lr (now 3), or set model.ttt.write ridge with lr 1"),
        ({"normalize_source": True, "lr": 1e7}, "set model.ttt.lr auto (76000 here, now 1e+07)"),
        ({"normalize_source": True, "lr": 0.1}, "lower model.ttt.lr (now 0.1), or"),
        ({"write": "ridge"}, "set model.ttt.lr auto (1 here, now 3), or set model.ttt.clip_norm"),
        ({"write": "ridge", "clip_norm": 1, "lr": 0.5}, "explodes; lower model.ttt.lr (now 0.5)"),
    ],
)
def test_the_advice_about_a_state_that_explodes_names_the_rule_where_there_is_one(
    tmp_path, ttt, advice
):
    shown, config = (
        [],
        replace(
            from_dict(RunConfig, SMALL), {f"model.ttt.{name}": value for name, value in ttt.items()}
        ),
    )
    guard = Guard(config, EventLog(tmp_path, shown.append), list)
    guard.check_fast_weights(4, {"ttt/layer_01/state_ratio": 5.0})
    assert advice in shown[0]
    assert ("clip_norm, which" in shown[0]) == ("clip_norm" not in ttt)


@pytest.mark.parametrize("ratio", [1e9, float("inf"), float("nan")])
def test_a_ratio_without_end_is_a_warning(tmp_path, ratio):
    """JSON has no infinity."""
    shown = []
    guard = guard_of(tmp_path, shown, min_state_ratio=1e-3, max_state_ratio=2.0)
    guard.check_fast_weights(3, {"ttt/layer_01/state_ratio": 0.5})
    guard.check_fast_weights(4, {"ttt/layer_01/state_ratio": ratio})
    (text,), (event,) = shown, read_events(tmp_path)
    assert (
        f"||S||/||W|| = {ratio:.3g} at step 4, above guard.max_state_ratio = 2: it explodes; "
        "lower" in text
    )
    assert (event["step"], event["ratio"]) == (4, ratio if np.isfinite(ratio) else str(ratio))


def test_a_range_needs_two_ends():
    with pytest.raises(
        ConfigError, match=r"guard\.min_state_ratio = 5: must be below guard\.max_state_ratio = 3"
    ):
        load_config(None, ["--guard.min_state_ratio=5"])


# ---------------------------------------------------------------------------------------- rollbacks


class Data:
    """What Recovery needs of a loader."""

    def __init__(self):
        self.at = 0

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]
        return []


def tree(value):
    return {"w": jnp.full((4,), value, jnp.float32)}


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints 3, 6, 9 (the last one taken in the middle of skipped steps), whose
    weights are their steps.
    """
    config = dataclasses.replace(from_dict(RunConfig, SMALL), runs_dir=str(tmp_path), name="run")
    placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
        TrainState(tree(0), tree(0), jnp.int32(0)),
    )
    config.run_dir.mkdir()
    with Checkpointer(config.run_dir / "checkpoints", CheckpointConfig(keep=5)) as checkpointer:
        for step, in_a_row in ((3, 0), (6, 0), (9, 1)):
            extra, data = {"skipped_in_a_row": in_a_row}, {"at": step}
            checkpointer.save(
                step, model=tree(step), opt_state=tree(step), data_state=data, extra=extra
            )
        checkpointer.wait()
        fresh = lambda: TrainState(tree(0), tree(0), jnp.int32(0))
        yield Recovery(
            config,
            checkpointer,
            abstract,
            Data(),
            fresh,
            EventLog(config.run_dir, lambda text: None),
        )


def value(state):
    return float(state.model["w"][0])


def test_rollback_takes_good_weights_and_goes_on_with_the_data(run):
    state, step, in_a_row = run.resume()
    assert (value(state), step, in_a_row, run.loader.at) == (9, 9, 1, 9)
    run.loader.at = 10
    state = run.roll_back(state, 10)
    assert (value(state), int(state.step)) == (6, 10), "9 was saved while steps were skipped"
    # A kill before the next checkpoint: the same weights, and the data where the run had left it.
    run.loader.at = 0
    state, step, in_a_row = run.resume()
    assert (value(state), int(state.step), step, in_a_row, run.loader.at) == (6, 10, 10, 0, 10)
    run.loader.at = 12
    state = run.roll_back(state, 12)
    assert value(state) == 3, "an older one, because 6 led to the same place"
    assert run.resume()[1] == 12
    with pytest.raises(TrainingError, match="after 2 rollback") as error:
        run.roll_back(state, 14)
    assert "\n" not in str(error.value)
    report = (run.config.run_dir / "failure.md").read_text()
    assert (
        "back to the weights of step 6; the data of steps 7 to 10 is left out (rollback 1 of 2)"
        in report
    )
    assert [event["kind"] for event in read_events(run.config.run_dir)] == [
        "rolled_back",
        "rolled_back",
        "gave_up",
    ]


@pytest.mark.parametrize("fault", ["full disk", "damaged events"])
def test_giving_up_is_one_line_whatever_the_folder_holds(run, monkeypatch, fault):
    run.config = dataclasses.replace(run.config, guard=GuardConfig(rollbacks=0))
    if fault == "damaged events":
        lines = [
            '{"a": 1}',
            '{"kind": "step_skipped", "documents": [[1], 2]}',
            '{"kind": "rolled_back"}',
        ]
        (run.config.run_dir / "events.jsonl").write_text("\n".join(lines) + "\n")
    else:

        def full(path, text):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(guard_module, "atomic_write_text", full)
    state = run.resume()[0]
    told = r"no failure\.md \(No space" if fault == "full disk" else r"see .*failure\.md$"
    with pytest.raises(TrainingError, match=told):
        run.roll_back(state, 10)
    assert (run.config.run_dir / "failure.md").exists() is (fault == "damaged events")


def test_a_checkpoint_after_a_rollback_ends_it(run):
    state = run.roll_back(run.resume()[0], 10)
    run.checkpointer.save(
        12, model=tree(12), opt_state=tree(12), data_state={"at": 12}, extra={"skipped_in_a_row": 0}
    )
    run.checkpointer.wait()
    state, step, _ = run.resume()
    assert (value(state), step, run.loader.at) == (12, 12, 12)
    shutil.rmtree(run.config.run_dir / "checkpoints" / "12")
    assert run.resume()[1] == 10, "without it, the rollback counts again"


def test_before_any_checkpoint_the_run_begins_again(run):
    shutil.rmtree(run.config.run_dir / "checkpoints")
    (run.config.run_dir / "checkpoints").mkdir()
    state, step, _ = run.resume()
    assert (value(state), step) == (0, 0)
    run.loader.at = 2
    state = run.roll_back(state, 2)
    assert (value(state), int(state.step)) == (0, 2)
    assert run.resume()[1] == 2


def test_a_damaged_record_of_rollbacks_is_one_line(tmp_path):
    write_rollbacks(tmp_path, [])
    assert read_rollbacks(tmp_path) == []
    (tmp_path / "rollbacks.json").write_text('[{"step": 1}]')
    with pytest.raises(TrainingError, match=r"rollbacks\.json: damaged"):
        read_rollbacks(tmp_path)


# ----------------------------------------------------------------------------------- document names


def test_a_batch_names_its_documents(tmp_path):
    for name, texts in {"a": ["x" * 50, "y" * 9], "b": ["z" * 5, "u" * 7, "v" * 20]}.items():
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    (heldout := tmp_path / ".heldout").mkdir()
    (heldout / "c.jsonl").write_text('{"text": "held out"}\n')
    settings = {
        "train": [str(tmp_path)],
        "seq_len": 16,
        "batch_size": 4,
        "heldout": [str(heldout)],
        "format": "jsonl",
    }
    config = from_dict(RunConfig, {"data": settings})
    tokenizer = load_tokenizer("bytes")
    corpus = load_corpus(config, tokenizer)
    assert corpus.locate(corpus.key_N) == [
        ("a.jsonl", 0),
        ("a.jsonl", 1),
        ("b.jsonl", 0),
        ("b.jsonl", 1),
        ("b.jsonl", 2),
    ]
    loader, letters = (
        make_loader(config, tokenizer=tokenizer),
        {("a.jsonl", 0): "x", ("b.jsonl", 2): "v"},
    )
    for _ in range(3):
        rows = next(loader)
        for row in range(4):
            place = 0
            for piece in (piece for piece in loader.documents(loader.pieces) if piece.row == row):
                ids = rows["ids"][row, place : place + piece.tokens]
                place += piece.tokens
                text = bytes(ids[ids < 256].astype(np.uint8)).decode()
                assert set(text) <= {letters.get((piece.file, piece.document), text[:1])}
                assert (
                    piece.tokens
                    == (rows["segment_ids"][row] == rows["segment_ids"][row, place - 1]).sum()
                )
    (tmp_path / "a.jsonl").unlink()
    assert corpus.locate(corpus.key_N)[0] == ("a.jsonl", 0)
    assert find_documents(list(corpus.files)[1:], corpus.key_N)[0][0].startswith("unknown file (")
