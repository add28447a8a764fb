"""The recall probe: off is zero beyond the reach of attention, on is what `score` says."""

import functools
import json
from typing import Any

import numpy as np
import pytest
from support.models import config, make
from support.results import results_head

from ttt_jax import score
from ttt_jax.errors import DataError, UserError
from ttt_jax.eval import recall
from ttt_jax.eval.documents import open_documents
from ttt_jax.eval.output import comparison, files_of
from ttt_jax.eval.recall import (
    Material,
    attention_reach,
    check_recall,
    choose_documents,
    evaluate,
)
from ttt_jax.eval.statistics import mean_with_interval
from ttt_jax.eval.tables import tables
from ttt_jax.eval.unfinished import Unfinished

C, W, P, LENGTH = 4, 3, 7, 32
WINDOW = {"ttt.chunk_size": C, "num_layers": 2, "ttt.layers": (1,), "sliding_window": W}


@functools.cache
def model_of(**changes):
    return make(config(**WINDOW | changes), "float32")


@pytest.fixture
def corpus(tmp_path):
    ids = np.random.default_rng(0).integers(0, 31, (5, 24)).astype(np.int32)
    np.save(tmp_path / "ids.npy", ids)
    return open_documents(model_of(), tmp_path / "ids.npy", "--recall")


def options() -> dict[str, Any]:
    return {"lengths": [LENGTH, 40], "passage": P, "piece": 8, "batch_size": 2}


def test_sequences_differ_in_the_first_passage_alone(corpus):
    documents = [3, 0, 2]
    material = Material(corpus, documents, P)
    for n, document in enumerate(documents):
        own, control = material.rows(n, LENGTH)
        whole = np.asarray(corpus.tokens(document, 0, 24))
        assert len(own) == len(control) == LENGTH
        np.testing.assert_array_equal(own[:P], whole[8 : 8 + P])
        np.testing.assert_array_equal(own[-P:], own[:P])
        np.testing.assert_array_equal(control[P:], own[P:])
        np.testing.assert_array_equal(control[:P], material.passage((n + 1) % 3))
        # 18 tokens of filler: 9 behind the next document's passage, 8 before it, and one more
        following, last = (
            np.asarray(corpus.tokens(documents[(n + step) % 3], 0, 24)) for step in (1, 2)
        )
        expected = np.concatenate([following[15:], following[:8], last[15:16]])
        np.testing.assert_array_equal(own[P:-P], expected)


def test_off_is_zero_and_on_is_not(corpus):
    """Window 3 in two layers reaches four tokens back, the filler has 18: off recalls nothing, to
    the bit. Losses are those of `score`."""
    seen = []
    part = evaluate(model_of(), corpus, range(5), **options(), on_progress=seen.append)
    assert attention_reach(model_of().config) == part["reach"] == 4
    assert seen[-1] == 5 * 2 * 2 * (LENGTH + 40)
    for entry in part["lengths"]:
        assert entry["off"]["recall"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
        on = entry["on"]["per_document"]
        assert np.abs(np.subtract(on["control"], on["second"])).min() > 1e-4
        for mode in ("on", "off"):
            found = {name: np.array(x) for name, x in entry[mode]["per_document"].items()}
            assert entry[mode]["drop"] == mean_with_interval(found["first"] - found["second"])
            assert entry[mode]["recall"] == mean_with_interval(found["control"] - found["second"])
    material = Material(corpus, range(5), P)
    own, control = (
        np.stack(x) for x in zip(*(material.rows(n, LENGTH) for n in range(5)), strict=True)
    )
    for mode in ("on", "off"):
        losses, unread = (
            -score(model_of(), ids, ttt=mode == "on", piece=8).logprobs_BT for ids in (own, control)
        )
        expected = {
            "first": losses[:, : P - 1],
            "second": losses[:, 1 - P :],
            "control": unread[:, 1 - P :],
        }
        for name, value in expected.items():
            found = part["lengths"][0][mode]["per_document"][name]
            np.testing.assert_allclose(found, value.mean(1), rtol=1e-4, atol=1e-5)


def test_what_an_earlier_start_finished_is_not_read_again(corpus, tmp_path, monkeypatch):
    kept = functools.partial(Unfinished, tmp_path / "out", {"command": "one"})
    part = evaluate(model_of(), corpus, range(3), **options(), kept=kept())
    monkeypatch.setattr(recall, "passage_losses", None)
    assert evaluate(model_of(), corpus, range(3), **options(), kept=kept()) == part


def test_full_attention_is_said_to_see_the_first_reading(corpus):
    model = model_of(sliding_window=None)
    part = evaluate(model, corpus, range(3), **options() | {"lengths": [LENGTH]}, modes=["off"])
    assert part["reach"] is None
    assert abs(part["lengths"][0]["off"]["recall"]["mean"]) > 1e-4
    assert attention_reach(config(**WINDOW | {"full_attention_layers": (0,)})) is None


def test_pages_tables_and_comparison(corpus):
    from ttt_jax.config import to_dict

    part = evaluate(model_of(), corpus, range(3), **options())
    results = {
        **results_head("a"),
        "recall": part,
        "config": to_dict(model_of().config),
    }
    files = files_of(results)
    assert json.loads(files["results.json"])["recall"] == part
    assert "A passage read again" in files["report.html"]
    (table,) = tables(results)
    assert [row[:2] for row in table.rows] == [
        [length, mode] for length in ("32", "40") for mode in ("off", "on")
    ]
    assert table.rows[0][-1] == "+0.0000 [+0.0000, +0.0000]"
    assert "Attention reaches 4 tokens back" in table.note
    compared, _ = comparison(results, results)
    assert [row["what"] for row in compared["rows"]] == ["recall at 32"] * 2 + ["recall at 40"] * 2
    assert {row["difference"]["high"] for row in compared["rows"]} == {0.0}


def test_refusals(corpus):
    cfg = model_of().config
    check_recall(cfg, [2 * P + 4 + C], P)
    with pytest.raises(UserError, match=r"--lengths 21: too short for --recall.* lengths of 22"):
        check_recall(cfg, [21, 40], P)
    with pytest.raises(UserError, match="--passage 1: must be 2 tokens or more"):
        check_recall(cfg, [40], 1)
    with pytest.raises(DataError, match="two documents of --passage 25 tokens, there is none"):
        choose_documents(corpus, [99], 25, None)
    with pytest.raises(DataError, match="there is one within --documents"):
        choose_documents(corpus, [30], P, 1)
    # Two documents: the other one has 17 tokens beside its passage.
    assert choose_documents(corpus, [17 + 2 * P], P, 2) == [0, 1]
    with pytest.raises(DataError, match=r"hold 17 tokens of filler .* lengths below 32"):
        choose_documents(corpus, [18 + 2 * P], P, 2)
