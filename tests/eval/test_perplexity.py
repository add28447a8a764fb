"""Loss by context and position: against `score`, against a slow model of the control, and through
files.
"""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import config, hidden, make

from ttt_jax import score
from ttt_jax.data.tokenizer import ByteTokenizer
from ttt_jax.errors import DataError, UserError
from ttt_jax.eval.documents import choose, names_of, open_documents
from ttt_jax.eval.perplexity import (
    batches,
    check_lengths,
    evaluate,
    position_edges,
    tokens_to_read,
)
from ttt_jax.eval.reader import Reader, exchanged
from ttt_jax.eval.statistics import mean_with_interval
from ttt_jax.inference.prefill import Frozen, read_piece, score_piece

C, L, K = 4, 32, 8


@functools.cache
def model_of(**changes):
    return make(
        config(**{"ttt.chunk_size": C, "num_layers": 2, "ttt.layers": (1,)} | changes), "float32"
    )


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).integers(0, 31, (3, L + 1)).astype(np.int32)


@pytest.fixture
def corpus(tmp_path, rows):
    np.save(tmp_path / "ids.npy", rows)
    return open_documents(model_of(), tmp_path / "ids.npy")


def losses_of(model, ids, ttt):
    return -score(model, ids, ttt=ttt, piece=16).logprobs_BT


# --------------------------------------------------------------------------------------- statistics


def test_interval_covers_the_mean_as_often_as_it_says():
    """Of 200 samples of 40 documents, about 95 % of the intervals hold the true mean (0.90 to 0.985
    is 3 sigma).
    """
    rng = np.random.default_rng(0)
    entries = [mean_with_interval(rng.normal(3.0, 2.0, 40), seed=i) for i in range(200)]
    assert 0.88 < np.mean([e["low"] < 3.0 < e["high"] for e in entries]) < 0.985
    assert mean_with_interval(np.array([2.0])) == {"mean": 2.0, "low": None, "high": None}
    assert mean_with_interval(np.array([]))["mean"] is None
    assert mean_with_interval(np.full(5, 1.5)) == {"mean": 1.5, "low": 1.5, "high": 1.5}


# ------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(
    ("changes", "block"),
    [({}, K), ({"sliding_window": 6}, 7)],
    ids=["full", "window, off the chunks"],
)
def test_block_losses_are_those_of_score(rows, changes, block):
    """The last K predictions after L tokens, in any alignment to chunks and pieces."""
    model = model_of(**changes)
    found = Reader(model, 8).block_losses(rows, block, ("off", "on"))
    for mode, ttt in (("off", False), ("on", True)):
        np.testing.assert_allclose(
            found[mode], losses_of(model, rows, ttt)[:, -block:], rtol=1e-4, atol=1e-5
        )
    assert np.abs(found["on"] - found["off"]).max() > 1e-2


@pytest.mark.parametrize("modes", [("off", "on"), ("off", "on", "shuffled")])
def test_position_losses_are_those_of_score(rows, modes):
    found = Reader(model_of(), 8).position_losses(rows, modes)
    for mode, ttt in (("off", False), ("on", True)):
        np.testing.assert_allclose(
            found[mode], losses_of(model_of(), rows, ttt), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("block", [K, K - 1], ids=["on a chunk", "off the chunks"])
def test_shuffled_reads_each_chunk_with_the_next_documents_fast_weights(rows, block):
    """Built here document by document: states read alone, S taken from the next one's, everything
    else kept.
    """
    model, shuffled = (
        model_of(),
        Reader(model_of(), 8).block_losses(rows, block, ("on", "shuffled"))["shuffled"],
    )
    frozen, C = Frozen(model), model.config.ttt.chunk_size
    edges = [L - block, *range(-(-(L - block + 1) // C) * C, L, C), L]

    def state_at(row, position):
        logits, length = (
            jnp.zeros((1, model.config.vocab_size), jnp.float32),
            np.full(1, position, np.int32),
        )
        read = {"capacity": 64, "at_chunk_start": True, "ttt": True}
        return read_piece(frozen, None, logits, row[None, :position], length, **read)[0]

    take = lambda mine, theirs: (
        mine if mine.ttt is None else mine._replace(ttt=mine.ttt._replace(S_BDF=theirs.ttt.S_BDF))
    )
    for b, row in enumerate(rows):
        expected = []
        for start, stop in itertools.pairwise(edges):
            own, other = state_at(row, start), state_at(rows[(b + 1) % 3], start)
            layers = tuple(
                tuple(map(take, *runs)) for runs in zip(own.layers, other.layers, strict=True)
            )
            state = jax.tree.map(jnp.copy, own.replace(layers=layers))
            inputs, targets = row[None, start:stop], row[None, start + 1 : stop + 1]
            read = {
                "capacity": 64,
                "at_chunk_start": start % C == 0,
                "ttt": True,
                "with_logits": False,
            }
            _, logprobs, *_ = score_piece(
                frozen, state, inputs, targets, np.full(1, stop - start, np.int32), **read
            )
            expected.append(-np.asarray(logprobs)[0])
        np.testing.assert_allclose(shuffled[b], np.concatenate(expected), rtol=1e-4, atol=1e-5)
    on = losses_of(model, rows, True)[:, -block:]
    assert np.abs(shuffled - on).max() > 1e-2


def test_exchanging_equal_documents_changes_nothing(rows):
    same = np.repeat(rows[:1], 2, axis=0)
    found = Reader(model_of(), 8).position_losses(same, ("on", "shuffled"))
    np.testing.assert_allclose(found["on"], found["shuffled"], rtol=1e-5, atol=1e-6)


def test_the_control_equals_on_before_the_first_exchange(rows):
    found = Reader(model_of(), 8).position_losses(rows, ("on", "shuffled"))
    C = model_of().config.ttt.chunk_size
    np.testing.assert_array_equal(found["on"][:, :C], found["shuffled"][:, :C])
    assert np.abs(found["on"] - found["shuffled"])[:, C:].max() > 1e-2


def test_exchanged_leaves_the_state_alone(rows):
    model = model_of()
    _, state, _ = hidden(model, rows[:, :L], keep_state=True)
    copy = exchanged(state)
    old, new = (s.layers[1][0].ttt for s in (state, copy))
    np.testing.assert_array_equal(np.roll(old.S_BDF, -1, axis=2), new.S_BDF)
    np.testing.assert_array_equal(old.z_BCF, new.z_BCF)
    assert all(
        a is not b for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(copy), strict=True)
    )


# ----------------------------------------------------------------------------------------- evaluate


def test_evaluate(corpus, rows):
    """Means and per-document losses of every length and position, and the gains paired by
    document.
    """
    seen = []
    modes = ("off", "on", "shuffled")
    options = {
        "lengths": [16, L],
        "block": K,
        "batch_size": 2,
        "piece": 8,
        "on_progress": seen.append,
    }
    part = evaluate(model_of(), corpus, [0, 1, 2], modes=modes, **options)
    assert [e["length"] for e in part["lengths"]] == [16, L]
    assert [(e["start"], e["stop"]) for e in part["positions"]] == [
        (0, 8),
        (8, 16),
        (16, 24),
        (24, 32),
    ]
    assert seen[-1] == part["tokens_read"] == 3 * tokens_to_read([16, L], K, modes)
    for mode, ttt in (("off", False), ("on", True)):
        whole, short = (
            losses_of(model_of(), rows, ttt),
            losses_of(model_of(), rows[:, L - 16 :], ttt),
        )
        np.testing.assert_allclose(
            part["lengths"][1]["per_document"][mode], whole[:, -K:].mean(1), rtol=1e-4
        )
        np.testing.assert_allclose(
            part["lengths"][0]["per_document"][mode], short[:, -K:].mean(1), rtol=1e-4
        )
        np.testing.assert_allclose(
            part["positions"][1]["per_document"][mode], whole[:, 8:16].mean(1), rtol=1e-4
        )
    entry = part["lengths"][1]
    off, on = (np.array(entry["per_document"][mode]) for mode in ("off", "on"))
    assert entry["gain"] == mean_with_interval(off - on)
    assert entry["off"]["mean"] == pytest.approx(off.mean())
    assert part["positions"][-1]["shuffled"]["mean"] == pytest.approx(
        entry["shuffled"]["mean"], rel=1e-5
    )
    json.dumps(part, allow_nan=False)


def test_zero_initialised_targets_give_exactly_what_off_gives(corpus):
    """A model as continual training starts it: W_target alone, conv zero."""
    model = model_of()
    zero = lambda path, x: jnp.zeros_like(x) if "conv" in jax.tree_util.keystr(path) else x
    model = jax.tree_util.tree_map_with_path(zero, model)
    part = evaluate(
        model, corpus, [0, 1, 2], lengths=[16, L], modes=("off", "on", "shuffled"), piece=16
    )
    for entry in part["lengths"] + part["positions"]:
        np.testing.assert_array_equal(entry["per_document"]["on"], entry["per_document"]["off"])
        np.testing.assert_array_equal(
            entry["per_document"]["shuffled"], entry["per_document"]["off"]
        )


def test_all_modes_read_the_same_pieces(rows, monkeypatch):
    """Pieces longer than the block: "off" cut otherwise would differ from "on" by rounding where
    adaptation is nothing.
    """
    import ttt_jax.eval.reader as reader

    seen = {False: [], True: []}
    original = reader.score_piece

    def spy(frozen, state, ids_BP, *args, ttt, **options):
        seen[ttt].append(ids_BP.shape[1])
        return original(frozen, state, ids_BP, *args, ttt=ttt, **options)

    monkeypatch.setattr(reader, "score_piece", spy)
    Reader(model_of(), 4 * K).position_losses(rows, ("off", "on", "shuffled"))
    assert seen[True] == [n for n in seen[False] for _ in range(2)]


@pytest.mark.parametrize(
    ("count", "size", "least"), [(7, 3, 2), (1, 4, 1), (3, 2, 2), (9, 8, 2), (8, 8, 2), (5, 1, 2)]
)
def test_batches(count, size, least):
    parts = batches(count, size, least)
    assert np.concatenate(parts).tolist() == list(range(count))
    assert all(len(part) >= least for part in parts)
    assert max(map(len, parts)) == len(parts[0]) <= max(size, least + 1)


def test_all_batches_run_the_same_programs(tmp_path, monkeypatch):
    """Batches of three and two documents: the smaller is filled up, which changes nothing for its
    documents.
    """
    import ttt_jax.eval.reader as reader

    np.save(
        tmp_path / "ids.npy", np.random.default_rng(1).integers(0, 31, (5, L + 1)).astype(np.int32)
    )
    corpus = open_documents(model_of(), tmp_path / "ids.npy")
    options = {"lengths": [16, L], "block": K, "modes": ("off", "on", "shuffled"), "piece": 8}
    alone = evaluate(model_of(), corpus, [3, 4], batch_size=2, **options)
    seen = set()

    def spy(original):
        def run(frozen, state, *args, **more):
            seen.add({len(x) for x in args if isinstance(x, np.ndarray)}.pop())
            return original(frozen, state, *args, **more)

        return run

    for name in ("read_piece", "score_piece"):
        monkeypatch.setattr(reader, name, spy(getattr(reader, name)))
    both = evaluate(model_of(), corpus, list(range(5)), batch_size=3, **options)
    assert seen == {3}
    assert both["tokens_read"] == 5 * tokens_to_read([16, L], K, options["modes"])
    for part in ("lengths", "positions"):
        for entry, expected in zip(both[part], alone[part], strict=True):
            for mode in options["modes"]:
                np.testing.assert_allclose(
                    entry["per_document"][mode][3:], expected["per_document"][mode], rtol=1e-5
                )


def test_position_edges():
    assert position_edges(32, 8) == [0, 8, 16, 24, 32]
    assert position_edges(30, 8) == [0, 6, 14, 22, 30]
    edges = position_edges(1 << 20, 1024)
    assert (edges[0], edges[-1], len(edges)) == (0, 1 << 20, 17)
    assert check_lengths([64, 16, 64], None) == ([16, 64], 8)


def test_refusals(tmp_path, corpus):
    with pytest.raises(
        UserError, match="--block 16: must be shorter than the shortest of --lengths, 16"
    ):
        check_lengths([16, 32], 16)
    with pytest.raises(DataError, match=f"no document has 99 tokens .the longest of 3 has {L + 1}"):
        choose(corpus, 99, None)
    with pytest.raises(UserError, match="--shuffled: needs two documents"):
        evaluate(model_of(), corpus, [0], lengths=[16], modes=("off", "on", "shuffled"))
    with pytest.raises(UserError, match="no TTT layers"):
        evaluate(
            make(config(**{"ttt.layers": ()}), "float32"), corpus, [0], lengths=[16], modes=("on",)
        )
    with pytest.raises(DataError, match=r"--perplexity .*nowhere: no such file"):
        open_documents(model_of(), tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(
        DataError, match=r"--perplexity .*a.txt is text and the model's folder has no tokenizer"
    ):
        open_documents(model_of(), tmp_path / "a.txt")


def test_text_sources(tmp_path):
    model = make(config(vocab_size=257), "float32")
    model.tokenizer = ByteTokenizer()
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"text": word * 20}) + "\n" for word in ("one ", "two "))
    )
    corpus = open_documents(model, tmp_path / "d.jsonl")
    assert corpus.length_N.tolist() == [80, 80]  # no end token
    assert bytes(corpus.tokens(1, 0, 4).astype(np.uint8)) == b"two "
    # Results name documents by their tokens: another text in a file of that name is another one.
    first = names_of(corpus, [0, 1])
    (tmp_path / "d.jsonl").write_text((tmp_path / "d.jsonl").read_text().replace("two", "six"))
    second = names_of(open_documents(model, tmp_path / "d.jsonl"), [0, 1])
    assert (first[0] == second[0], first[1] == second[1]) == (True, False)
    unread = dataclasses.replace(corpus, digest_N=np.zeros(2, np.uint64))
    assert len({*names_of(unread, [0, 1]), *first}) == 4
