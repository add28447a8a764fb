"""The training stream: deterministic, resumable at any batch, the same for any number of
processes.
"""

import itertools
import json

import numpy as np
import pytest

from ttt_jax.config import Config, replace
from ttt_jax.data import Loader, load_tokenizer, make_loader
from ttt_jax.errors import DataError

TOKENIZER = load_tokenizer("bytes")


@pytest.fixture
def config(tmp_path) -> Config:
    """60 documents of 5 to 200 bytes in rows of 64 with chunks of 8: an epoch is about 20 batches
    of 6 rows.
    """
    rng = np.random.default_rng(0)
    lines = [
        json.dumps({"text": "".join(chr(c) for c in rng.integers(97, 123, rng.integers(5, 200)))})
        for _ in range(60)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return replace(
        Config(),
        {
            "model.vocab_size": 257,
            "model.ttt.layers": [0],
            "model.ttt.chunk_size": 8,
            "data.train": [str(tmp_path / "data.jsonl")],
            "data.seq_len": 64,
            "data.batch_size": 6,
        },
    )


def take(loader: Loader, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(loader, count))


def assert_same(left: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def join(parts: list[list[dict[str, np.ndarray]]]) -> list[dict[str, np.ndarray]]:
    return [
        {name: np.concatenate([p[name] for p in batch]) for name in batch[0]}
        for batch in zip(*parts, strict=True)
    ]


def test_batches_have_the_documented_shapes_and_dtypes(config):
    batch = next(make_loader(config, tokenizer=TOKENIZER, process_index=1, process_count=2))
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "ids": ((3, 64), "int32"),
        "targets": ((3, 64), "int32"),
        "weights": ((3, 64), "float32"),
        "segment_ids": ((3, 64), "int32"),
        "positions": ((3, 64), "int32"),
    }


@pytest.mark.parametrize("layers", [[0], []])
def test_documents_start_where_the_model_expects_them(config, layers):
    """At chunks, with TTT layers or without: both kinds of model read the same rows."""
    config = replace(config, {"data.seq_len": 256})
    batches = take(
        make_loader(replace(config, {"model.ttt.layers": layers}), tokenizer=TOKENIZER), 3
    )
    assert_same(batches, take(make_loader(config, tokenizer=TOKENIZER), 3))
    for batch in batches:
        segment_ids = batch["segment_ids"]
        starts = np.argwhere(
            (segment_ids != np.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]) & (segment_ids != 0)
        )
        assert len(starts) > 6
        assert not (starts[:, 1] % 8).any()
        assert (starts[:, 1] % 16).any()


def test_deterministic_and_seeded(config):
    first = take(make_loader(config, tokenizer=TOKENIZER), 30)
    assert_same(first, take(make_loader(config, tokenizer=TOKENIZER), 30))
    other = take(make_loader(replace(config, {"seed": 1}), tokenizer=TOKENIZER), 1)
    assert not np.array_equal(first[0]["ids"], other[0]["ids"])


def test_epochs_are_shuffled_differently(config):
    loader = make_loader(
        replace(config, {"data.pack": False, "data.batch_size": 1}), tokenizer=TOKENIZER
    )
    pieces = len(loader._table)
    epochs = [[batch["ids"].tobytes() for batch in take(loader, pieces)] for _ in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_heldout_documents_are_never_trained_on(config):
    from ttt_jax.data import heldout_rows

    held = {row.tobytes() for row in heldout_rows(config, tokenizer=TOKENIZER, rows=100)["ids"]}
    unpacked = replace(config, {"data.pack": False})
    trained = {
        row.tobytes()
        for batch in take(make_loader(unpacked, tokenizer=TOKENIZER), 60)
        for row in batch["ids"]
    }
    assert held
    assert not held & trained


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("before", [0, 1, 2, 7, 19, 33, 80])
def test_resume_is_bit_identical(config, before, pack):
    config = replace(config, {"data.pack": pack})
    loader = make_loader(config, tokenizer=TOKENIZER)
    take(loader, before)
    state = json.loads(json.dumps(loader.get_state()))
    if pack and before > 1:
        assert any(slot["bins"] for slot in state["slots"].values())  # rows are half full
    expected = take(loader, 25)

    resumed = make_loader(config, tokenizer=TOKENIZER)
    take(resumed, 3)  # whatever it did before
    resumed.set_state(state)
    assert resumed.batches_done == before
    assert resumed.get_state() == state
    assert_same(take(resumed, 25), expected)
    assert resumed.get_state() == loader.get_state()


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_share_the_same_global_batch(config, processes):
    whole = take(make_loader(config, tokenizer=TOKENIZER), 40)
    parts = [
        take(make_loader(config, tokenizer=TOKENIZER, process_index=i, process_count=processes), 40)
        for i in range(processes)
    ]
    assert_same(join(parts), whole)


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (2, 3), (6, 2)])
def test_resume_with_another_number_of_processes(config, old, new):
    whole = take(make_loader(config, tokenizer=TOKENIZER), 50)
    loader = make_loader(config, tokenizer=TOKENIZER, process_index=old - 1, process_count=old)
    take(loader, 23)
    state = loader.get_state()  # of one process only
    resumed = [
        make_loader(config, tokenizer=TOKENIZER, process_index=i, process_count=new)
        for i in range(new)
    ]
    for part in resumed:
        part.set_state(state)
    assert_same(join([take(part, 27) for part in resumed]), whole[23:])


def test_changed_data_or_packing_is_refused(config, tmp_path):
    loader = make_loader(config, tokenizer=TOKENIZER)
    take(loader, 2)
    state = loader.get_state()
    for changes, name in [
        ({"data.seq_len": 128}, "data.seq_len"),
        ({"data.batch_size": 12}, "data.batch_size"),
        ({"model.ttt.chunk_size": 16}, "model.ttt.chunk_size"),
        ({"data.pack": False}, "data.pack"),
        ({"seed": 7}, "seed"),
        ({"data.eos": False}, "the training documents"),
    ]:
        with pytest.raises(DataError, match=name) as caught:
            make_loader(replace(config, changes), tokenizer=TOKENIZER).set_state(state)
        assert "\n" not in str(caught.value)
    for broken in ({}, {"version": 0}, None):
        with pytest.raises(DataError, match="data state"):
            loader.set_state(broken)


def test_fewer_pieces_than_rows(tmp_path, config):
    (tmp_path / "only.txt").write_text("one short document")
    data = str(tmp_path / "only.txt")
    (tmp_path / "other.txt").write_text("another document")
    heldout = str(tmp_path / "other.txt")
    loader = make_loader(
        replace(config, {"data.train": [data], "data.heldout": [heldout]}), tokenizer=TOKENIZER
    )
    batch = take(loader, 3)[-1]
    # 19 tokens take 24: two of them in a row of 64
    assert (batch["segment_ids"].max(-1) == 2).all()


def test_worker_processes_give_the_same_stream(config):
    config = replace(config, {"data.batch_size": 4})
    expected = take(make_loader(config, tokenizer=TOKENIZER), 12)
    loader = make_loader(replace(config, {"data.workers": 2}), tokenizer=TOKENIZER)
    try:
        assert_same(take(loader, 5), expected[:5])
        state = json.loads(json.dumps(loader.get_state()))
    finally:
        loader.close()
    # without workers: the state does not depend on them
    resumed = make_loader(config, tokenizer=TOKENIZER)
    resumed.set_state(state)
    assert_same(take(resumed, 7), expected[5:])
    loader.set_state(state)
    try:
        assert_same(take(loader, 2), expected[5:7])
    finally:
        loader.close()
