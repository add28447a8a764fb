"""Invariants of packed rows, for any documents, row length and chunk."""

import collections
import json

import grain
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ttt_jax.config import Config, replace
from ttt_jax.data import load_tokenizer, make_loader
from ttt_jax.data.cache import TokenArray
from ttt_jax.data.corpus import Corpus
from ttt_jax.data.packing import PackedRows, SlotPlan, cut_pieces, render_row
from ttt_jax.data.quarantine import Rejected

PAD = 999_999


def make_corpus(lengths: list[int]) -> Corpus:
    """Documents of consecutive ids, so that every id of the corpus is different."""
    length_N = np.asarray(lengths, np.int64)
    return Corpus(
        arrays=(TokenArray(np.arange(length_N.sum(), dtype=np.uint32)),),
        array_N=np.zeros(len(lengths), np.int32),
        start_N=np.cumsum(length_N) - length_N,
        length_N=length_N,
        key_N=np.arange(len(lengths), dtype=np.uint64),
        digest_N=np.arange(1, len(lengths) + 1, dtype=np.uint64),
        rejected=Rejected(),
        has_text=False,
        label="test",
    )


@st.composite
def tables(draw):
    chunk = draw(st.sampled_from([1, 2, 3, 8]))
    row_length = chunk * draw(st.integers(2, 8))
    lengths = draw(st.lists(st.integers(2, 3 * row_length), min_size=1, max_size=20))
    pack = draw(st.booleans())
    corpus = make_corpus(lengths)
    table = cut_pieces(
        corpus, row_length=row_length, chunk=chunk, pack=pack, vocab_size=PAD, pad_id=PAD
    )
    order = (
        grain.MapDataset.range(len(table))
        .shuffle(seed=draw(st.integers(0, 2**32 - 1)))
        .repeat(None)
    )
    return table, order, chunk, pack


def expected_counts(table) -> collections.Counter:
    """How often each id must appear in one epoch: once, but not the lonely last token of a
    document.
    """
    corpus, counts = table.corpus, collections.Counter()
    for start, length in zip(corpus.start_N.tolist(), corpus.length_N.tolist(), strict=True):
        counts.update(range(start, start + length - (length % table.row_length == 1)))
    return counts


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tables(), st.integers(1, 4))
def test_every_token_once_per_epoch(drawn, slots):
    """What the slots emitted and what their open rows hold is exactly the part of the stream that
    they have read.
    """
    table, order, _, _ = drawn
    rows = iter(PackedRows(table, order, range(slots), slots, {}))
    seen, states = collections.Counter(), {}
    for _ in range(slots * (2 * len(table) // slots + 2)):
        row = next(rows)
        seen.update(row["ids"][row["segment_ids"] > 0].tolist())
        states[row["slot"]] = row["state"]
    for state in states.values():
        for place in (place for places in state["bins"] for place in places):
            seen.update(table[order[place]].tolist())
    # Bring all slots to the end of one epoch, the same for all.
    epoch = -(-max(state["next"] for state in states.values()) // len(table))
    for state in states.values():
        for place in range(state["next"], epoch * len(table), slots):
            seen.update(table[order[place]].tolist())
    beyond = [
        p for state in states.values() for p in range(epoch * len(table), state["next"], slots)
    ]
    assert beyond == []
    assert seen == collections.Counter(
        {token: epoch * n for token, n in expected_counts(table).items()}
    )


@settings(max_examples=30, deadline=None)
@given(tables())
def test_rows_are_laid_out_right(drawn):
    table, order, chunk, pack = drawn
    ends = set((table.corpus.start_N + table.corpus.length_N - 1).tolist())
    rows = iter(PackedRows(table, order, [0], 1, {}))
    for _ in range(min(20, 2 * len(table))):
        row = next(rows)
        ids, targets, weights, segments, positions = (
            row[name] for name in ("ids", "targets", "weights", "segment_ids", "positions")
        )
        assert [a.dtype for a in (ids, targets, weights, segments, positions)] == [
            np.int32, np.int32, np.float32, np.int32, np.int32,
        ]  # fmt: skip
        assert all(
            a.shape == (table.row_length,) for a in (ids, targets, weights, segments, positions)
        )
        padding = segments == 0
        assert (ids[padding] == PAD).all()
        assert not weights[padding].any()
        assert not positions[padding].any()
        count = segments.max()
        assert count >= 1
        assert pack or count == 1
        chunks_seen: set[int] = set()
        for number in range(1, count + 1):
            (where,) = np.nonzero(segments == number)
            first, last = where[0], where[-1]
            assert (where == np.arange(first, last + 1)).all()
            assert first % (chunk if pack else table.row_length) == 0
            assert (positions[where] == np.arange(len(where))).all()
            assert (np.diff(ids[where]) == 1).all()  # consecutive tokens of one document
            assert not set(ids[where[:-1]].tolist()) & ends
            assert (targets[where[:-1]] == ids[where[1:]]).all()
            assert (weights[where[:-1]] == 1).all()
            assert weights[last] == 0
            chunks = set((where // chunk).tolist())
            assert not chunks & chunks_seen  # no two documents share a chunk
            chunks_seen |= chunks


@settings(max_examples=20, deadline=None)
@given(tables(), st.integers(0, 25), st.integers(1, 3))
def test_plan_state_restores_half_full_rows(drawn, rows, slots):
    table, order, _, _ = drawn
    plan = SlotPlan(order, table, 0, slots)
    for _ in range(rows):
        plan.next_row()
    copy = SlotPlan(order, table, 0, slots)
    copy.set_state(json.loads(json.dumps(plan.get_state())))
    assert [plan.next_row() for _ in range(15)] == [copy.next_row() for _ in range(15)]


def test_a_restored_plan_knows_how_full_rows_of_several_pieces_are():
    lengths = np.random.default_rng(0).integers(2, 12, 60).tolist()
    corpus = make_corpus(lengths)
    table = cut_pieces(corpus, row_length=32, chunk=1, pack=True, vocab_size=PAD, pad_id=PAD)
    order = grain.MapDataset.range(len(table)).shuffle(seed=0).repeat(None)
    plan, states, rows = SlotPlan(order, table, 0, 1), [], []
    for _ in range(40):
        states.append(plan.get_state())
        rows.append(plan.next_row())
    assert sum(any(len(places) > 2 for places in state["bins"]) for state in states[:12]) > 3
    for n in range(12):
        copy = SlotPlan(order, table, 0, 1)
        copy.set_state(states[n])
        assert [copy.next_row() for _ in range(25)] == rows[n : n + 25]


def test_row_iterator_follows_grains_state_protocol():
    table = cut_pieces(
        make_corpus([5, 9, 3, 30]), row_length=16, chunk=2, pack=True, vocab_size=PAD, pad_id=PAD
    )
    order = grain.MapDataset.range(len(table)).shuffle(seed=0).repeat(None)
    dataset = PackedRows(table, order, range(3), 3, {})
    rows = iter(dataset)
    for _ in range(7):  # in the middle of a turn
        next(rows)
    copy = iter(dataset)
    copy.set_state(rows.get_state())
    for _ in range(9):
        left, right = next(rows), next(copy)
        assert (left["slot"], left["state"]) == (right["slot"], right["state"])
        np.testing.assert_array_equal(left["ids"], right["ids"])


def test_render_row_by_hand():
    row = render_row([np.array([5, 6, 7]), np.array([8, 9])], [4, 4], 10, 0)
    assert row["ids"].tolist() == [5, 6, 7, 0, 8, 9, 0, 0, 0, 0]
    assert row["targets"].tolist() == [6, 7, 0, 0, 9, 0, 0, 0, 0, 0]
    assert row["weights"].tolist() == [1, 1, 0, 0, 1, 0, 0, 0, 0, 0]
    assert row["segment_ids"].tolist() == [1, 1, 1, 0, 2, 2, 0, 0, 0, 0]
    assert row["positions"].tolist() == [0, 1, 2, 0, 0, 1, 0, 0, 0, 0]


def test_long_documents_are_cut(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(40)))
    (tmp_path / "b.txt").write_bytes(b"held out")
    config = replace(
        Config(),
        {
            "model.vocab_size": 257,
            "model.ttt.layers": [0],
            "model.ttt.chunk_size": 4,
            "data.train": [str(tmp_path / "a.txt")],
            "data.heldout": [str(tmp_path / "b.txt")],
            "data.seq_len": 16,
            "data.batch_size": 3,
            "data.shuffle": False,
        },
    )
    batch = next(make_loader(config, tokenizer=load_tokenizer("bytes")))
    # 40 bytes and the end token: pieces of 16, 16 and 9 tokens. The last takes 12, so no second one
    # fits beside it.
    assert batch["ids"].tolist() == [
        list(range(16)),
        list(range(16, 32)),
        [*range(32, 40), 256, *[256] * 7],
    ]
    assert batch["positions"][1].tolist() == list(range(16))
    assert batch["weights"].sum(-1).tolist() == [15, 15, 8]
    assert batch["segment_ids"][2].tolist() == [1] * 9 + [0] * 7


def test_packing_wastes_little():
    rng = np.random.default_rng(0)
    corpus = make_corpus(rng.integers(10, 900, 2000).tolist())
    table = cut_pieces(corpus, row_length=1024, chunk=16, pack=True, vocab_size=10**9, pad_id=0)
    order = grain.MapDataset.range(len(table)).shuffle(seed=0).repeat(None)
    plan = SlotPlan(order, table, 0, 1)
    used = [
        sum(int(table.aligned_P[order[place]]) for place in plan.next_row()) for _ in range(500)
    ]
    assert np.mean(used) / 1024 > 0.94


def test_no_row_waits_for_ever(monkeypatch):
    """A piece of 40 in rows of 64 among pieces of 50 and 10: the tens go to the fuller rows, and it
    would never leave.
    """
    corpus = make_corpus([40, *[50, 50, 10] * 40])
    table = cut_pieces(corpus, row_length=64, chunk=1, pack=True, vocab_size=10**9, pad_id=0)
    order = grain.MapDataset.range(len(table)).repeat(None)

    def first_row_of_piece_0(patience):
        monkeypatch.setattr("ttt_jax.data.packing.PATIENCE", patience)
        plan = SlotPlan(order, table, 0, 1)
        return next((n for n in range(70) if 0 in plan.next_row()), None)

    assert first_row_of_piece_0(10**9) is None
    assert first_row_of_piece_0(30) < 30
