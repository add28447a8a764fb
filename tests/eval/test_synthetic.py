"""The recall suite: every task is solvable from its own tokens, seeded, graded as it says; answers
as `score` judges.
"""

import functools

import numpy as np
import pytest
from support.models import config, make

from ttt_jax import score
from ttt_jax.data.tokenizer import ByteTokenizer
from ttt_jax.errors import UserError
from ttt_jax.eval import synthetic
from ttt_jax.eval.answers import Judge, Judgement
from ttt_jax.eval.page import _pairs_picture
from ttt_jax.eval.synthetic import (
    TASKS,
    IdAlphabet,
    TextAlphabet,
    distances,
    evaluate,
    make_examples,
)
from ttt_jax.eval.tables import tables

LENGTH = 400
ALPHABETS = {"ids": IdAlphabet(200), "text": TextAlphabet(ByteTokenizer())}


@functools.cache
def model_of():
    return make(
        config(**{"ttt.chunk_size": 4, "num_layers": 2, "ttt.layers": (1,), "vocab_size": 257}),
        "float32",
    )


def examples_of(task, form, count=6, seed=0):
    length = {"ids": LENGTH, "text": 3 * LENGTH}[form]
    distance = 64 if task == "distance" else None
    return make_examples(
        task, ALPHABETS[form], length=length, count=count, seed=seed, distance=distance
    )


def lookup(ids, start, stop):
    """An oracle for every task but `variables`: the longest context that stood before, and what
    followed it there.
    """
    text, answer = "".join(map(chr, ids)), []
    for end in range(start, stop):
        n = 1
        # a longer context stood before, too
        while text.find(text[end - n - 1 : end], 0, end - 1) >= 0:
            n += 1
        answer.append(ids[text.rfind(text[end - n : end], 0, end - 1) + n])
    return answer


@pytest.mark.parametrize("form", ["ids", "text"])
@pytest.mark.parametrize("task", [task for task in TASKS if task != "variables"])
def test_the_longest_match_answers(task, form):
    for example in examples_of(task, form, count=3):
        for start, stop in example.answers:
            assert lookup(example.ids, start, stop) == example.ids[start:stop]


def test_variables_follow_their_chain():
    """Resolved by reading the assignments: ( name = source )."""
    alphabet = ALPHABETS["ids"]
    opening, equals, closing = (alphabet.encode(word)[0] for word in ("(", "=", ")"))
    for example in examples_of("variables", "ids"):
        ((start, _),) = example.answers
        ids, values = example.ids, {}
        for i in range(start - 4):
            if ids[i] == opening and ids[i + 2] == equals and ids[i + 4] == closing:
                values[ids[i + 1]] = values.get(ids[i + 3], ids[i + 3])
        assert len(values) == synthetic.CHAINS * (synthetic.HOPS + 1)
        assert values[ids[start - 2]] == ids[start]


@pytest.mark.parametrize("form", ["ids", "text"])
@pytest.mark.parametrize("task", TASKS)
def test_examples_are_seeded_and_as_long_as_asked(task, form):
    first, again, other = (examples_of(task, form, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert all(a.ids != b.ids for a, b in zip(first, other, strict=True))
    assert {len(example.ids) for example in first} == {LENGTH if form == "ids" else 3 * LENGTH}
    assert {len(example.answers) for example in first} == {
        {"multi_query": 4, "induction": 10, "mqar_4": 4, "mqar_16": 16, "mqar_64": 16}.get(task, 1)
    }
    assert all(example.answers[-1][1] == len(example.ids) for example in first)


def test_induction_needs_more_than_the_last_word():
    """Decoys put other words behind most words of the pattern: the last occurrence of the word
    alone misleads.
    """
    wrong = total = 0
    for example in examples_of("induction", "ids", count=20):
        for start, _ in example.answers:
            before = [i for i in range(start - 1) if example.ids[i] == example.ids[start - 1]]
            wrong += example.ids[before[-1] + 1] != example.ids[start]
            total += 1
    assert wrong / total > 0.3


@pytest.mark.parametrize("pairs", [4, 16, 64])
def test_mqar_asks_keys_that_stand_once_before_with_their_values(pairs):
    """With single ids, whose symbols are told from filler by the alphabet."""
    alphabet = ALPHABETS["ids"].with_symbols(2 * pairs)
    symbols = {i for word in alphabet.symbols for i in alphabet.encode(word)}
    assert len(symbols) == max(64, 2 * pairs)
    for example in make_examples(f"mqar_{pairs}", ALPHABETS["ids"], length=LENGTH, count=3):
        body = example.ids[: example.answers[0][0] - 1]
        told = [i for i in body if i in symbols]
        values = dict(zip(told[::2], told[1::2], strict=True))
        assert len(values) == pairs == len(set(values.values()))
        assert not set(values) & set(values.values())
        for key, value in values.items():
            assert body[body.index(key) + 1] == value
        asked = [example.ids[start - 1] for start, _ in example.answers]
        assert len(set(asked)) == len(asked) == min(pairs, 16)
        for start, stop in example.answers:
            assert example.ids[start:stop] == [values[example.ids[start - 1]]]


def test_mqar_is_graded_per_query_and_left_out_where_it_does_not_fit():
    """Every second query is answered: half of them are right."""

    def half(rows):
        judged = []
        for row in rows:
            greedy_T = np.zeros(len(row) - 1, bool)
            greedy_T[-1::-4] = True
            judged.append(Judgement(np.zeros(len(row) - 1, np.float32), greedy_T))
        return judged

    counted = []
    options = {"tasks": list(synthetic.MQAR), "ttt": ["on"], "examples": 3, "judges": {"on": half}}
    part = evaluate(model_of(), lengths=[128, LENGTH], **options, on_progress=counted.append)
    assert [(e["task"], e["pairs"], e["length"]) for e in part["entries"]] == [
        ("mqar_4", 4, 128),
        ("mqar_4", 4, LENGTH),
        ("mqar_16", 16, 128),
        ("mqar_16", 16, LENGTH),
        ("mqar_64", 64, LENGTH),
    ]
    assert {e["on"]["accuracy"]["mean"] for e in part["entries"]} == {0.5}
    assert part["left_out"] == ["mqar_64 at 128"]
    assert counted[-1] == synthetic.count_sequences([128, LENGTH], synthetic.MQAR, 3, 1)
    (table,) = tables({"synthetic": part})
    assert "Too many pairs for the length or the vocabulary: mqar_64 at 128." in table.note
    assert _pairs_picture(part)
    assert not _pairs_picture(part | {"entries": part["entries"][:1]})


def test_the_distance_is_what_it_says():
    alphabet = ALPHABETS["ids"]
    closing, opening = alphabet.encode(")")[0], alphabet.encode("(")[0]
    for distance in distances(LENGTH):
        for example in make_examples(
            "distance", alphabet, length=LENGTH, count=2, distance=distance
        ):
            question = len(example.ids) - 1 - example.ids[::-1].index(opening)
            assert question - example.ids.index(closing) - 1 == distance


def test_an_oracle_scores_one_and_a_guess_scores_zero():
    right = lambda rows: [
        Judgement(np.zeros(len(row) - 1, np.float32), np.ones(len(row) - 1, bool)) for row in rows
    ]
    wrong = lambda rows: [
        Judgement(np.full(len(row) - 1, -9.0, np.float32), np.zeros(len(row) - 1, bool))
        for row in rows
    ]
    part = evaluate(model_of(), lengths=[LENGTH], examples=3, judges={"on": right, "off": wrong})
    for entry in part["entries"]:
        assert (entry["on"]["accuracy"]["mean"], entry["off"]["accuracy"]["mean"]) == (1.0, 0.0)
        assert entry["gain"]["mean"] == 1.0
        assert (entry["on"]["nll"]["mean"], entry["off"]["nll"]["mean"]) == (0.0, 9.0)
    assert [e["distance"] for e in part["entries"] if e["task"] == "distance"] == distances(LENGTH)


def test_one_wrong_token_of_an_answer_makes_it_wrong():
    def almost(rows):
        judged = [
            Judgement(np.zeros(len(row) - 1, np.float32), np.ones(len(row) - 1, bool))
            for row in rows
        ]
        for judgement in judged:
            judgement.greedy_T[-1] = False
        return judged

    part = evaluate(
        model_of(),
        lengths=[LENGTH],
        tasks=["multi_query"],
        ttt=["on"],
        examples=3,
        judges={"on": almost},
    )
    assert part["entries"][0]["on"]["accuracy"]["mean"] == 0.75


@pytest.mark.parametrize("ttt", [True, False])
def test_a_judge_agrees_with_score(ttt):
    """Ragged rows in batches of two, in pieces: log-probabilities and argmax as of `score`, in the
    order given.
    """
    model, rng = model_of(), np.random.default_rng(0)
    rows = [rng.integers(0, 257, n) for n in (5, 19, 1, 30, 2)]
    counted = []
    judged = Judge(model, ttt=ttt, batch_size=2, piece=8)(rows, counted.append)
    assert counted == [2, 4, 5]
    whole = score(model, rows, ttt=ttt, logits=True, piece=32)
    for b, row in enumerate(rows):
        n = len(row) - 1
        np.testing.assert_allclose(
            judged[b].logprobs_T, whole.logprobs_BT[b, :n], rtol=1e-4, atol=1e-5
        )
        np.testing.assert_array_equal(
            judged[b].greedy_T, whole.logits_BTV[b, :n].argmax(-1) == row[1:]
        )


def test_the_suite_runs_on_a_model():
    part = evaluate(
        model_of(), lengths=[128], tasks=["single_needle"], examples=2, batch_size=2, piece=128
    )
    for mode in ("off", "on"):
        assert part["entries"][0][mode]["nll"]["mean"] > 0


def test_refusals():
    with pytest.raises(UserError, match="vocabulary has 31 ids; at least 96"):
        IdAlphabet(31)
    with pytest.raises(UserError, match=r"--form text: the model's folder has no tokenizer\.json"):
        evaluate(model_of(), lengths=[LENGTH], form="text")
    with pytest.raises(UserError, match="--lengths 16: too short for the task, which needs"):
        make_examples("multi_needle", ALPHABETS["ids"], length=16, count=1)
