"""Associative recall and induction on made-up sequences: seeded, for any vocabulary, with a known
answer.

Every task writes a sequence of *words* in which some are answers that follow from the words before
them. Words become token ids through an `Alphabet`: single random ids (for any model), or text
through the model's tokenizer. A model's answer is right when each of its tokens is the most likely
one given everything before it, which is what greedy decoding would write.

Tasks (docs/evaluation.md shows one of each):
  single_needle   one key-value pair in filler, then the key
  multi_needle    eight pairs in filler, then one of the keys
  multi_query     eight pairs in filler, then four of the keys, each with its value
  variables       chains of assignments, each hop naming the variable before it; asked: the value
                  at a chain's end
  induction       a random pattern, then decoys that share every other step's context but one word,
                  then the pattern again
  distance        single_needle with the pair at given distances before the question
  mqar_N          multi-query associative recall: N bare pairs "key value" in filler, then up to 16
                  of the keys, each with its value
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ttt_jax.errors import UserError
from ttt_jax.eval.alphabets import Alphabet, IdAlphabet, TextAlphabet
from ttt_jax.eval.answers import Judge, Judgement
from ttt_jax.eval.statistics import mean_with_interval
from ttt_jax.eval.unfinished import Unfinished
from ttt_jax.model.transformer import Transformer

PAIRS, QUERIES, CHAINS, HOPS, PATTERN, DECOYS = 8, 4, 3, 3, 12, 4
MQAR = {f"mqar_{pairs}": pairs for pairs in (4, 16, 64)}
MQAR_QUERIES = 16  # at most
TASKS = (
    "single_needle",
    "multi_needle",
    "multi_query",
    "variables",
    "induction",
    "distance",
    *MQAR,
)


@dataclasses.dataclass
class Example:
    """A sequence with marked answers.

    Fields:
      ids: token ids.
      answers: [start, stop) of each answer in `ids`.
    """

    ids: list[int]
    answers: list[tuple[int, int]]


class _Draft:
    """A sequence being written: statements and questions, with filler put between statements at the
    end.
    """

    def __init__(self, alphabet: Alphabet) -> None:
        self.alphabet = alphabet

    def ids(self, *words: str) -> list[int]:
        return [i for word in words for i in self.alphabet.encode(word)]

    def finish(
        self,
        rng: np.random.Generator,
        length: int,
        statements: list[list[int]],
        questions: list[tuple[list[int], list[int]]],
        distance: int | None = None,
    ) -> Example:
        """Write `length` tokens: statements spread in filler at random, then (question, answer)
        pairs.

        With `distance`, that many tokens lie between the end of the last statement and the first
        question.
        """
        asked = sum(len(question) + len(answer) for question, answer in questions)
        free = length - asked - sum(map(len, statements))
        if free < 0 or (distance is not None and distance > free):
            need = length - free + (distance or 0)
            raise UserError(
                f"--lengths {length}: too short for the task, which needs {need} tokens; give "
                "longer ones"
            )
        if distance is None:
            cuts = np.sort(rng.integers(0, free + 1, len(statements)))
        else:
            cuts = np.full(len(statements), free - distance)
        gaps, ids = np.diff(np.concatenate([[0], cuts, [free]])), []
        for gap, statement in zip(gaps, [*statements, []], strict=True):
            ids += self.alphabet.filler(rng, int(gap)) + statement
        answers = []
        for question, answer in questions:
            ids += question
            answers.append((len(ids), len(ids) + len(answer)))
            ids += answer
        return Example(ids, answers)


def _pairs(
    alphabet: Alphabet,
    rng: np.random.Generator,
    length: int,
    pairs: int,
    queries: int,
    distance=None,
) -> Example:
    draft, words = _Draft(alphabet), rng.permutation(alphabet.symbols).tolist()
    keys, values = words[:pairs], words[pairs : 2 * pairs]
    statements = [
        draft.ids("(", key, "is", value, ")") for key, value in zip(keys, values, strict=True)
    ]
    asked = rng.permutation(pairs)[:queries]
    questions = [(draft.ids("(", keys[i], "is"), draft.ids(values[i])) for i in asked]
    return draft.finish(rng, length, statements, questions, distance)


def _mqar(alphabet: Alphabet, rng: np.random.Generator, length: int, pairs: int) -> Example:
    draft, words = _Draft(alphabet), rng.permutation(alphabet.symbols).tolist()
    keys, values = words[:pairs], words[pairs : 2 * pairs]
    statements = [draft.ids(key, value) for key, value in zip(keys, values, strict=True)]
    asked = rng.permutation(pairs)[:MQAR_QUERIES]
    return draft.finish(
        rng, length, statements, [(draft.ids(keys[i]), draft.ids(values[i])) for i in asked]
    )


def _variables(alphabet: Alphabet, rng: np.random.Generator, length: int) -> Example:
    draft, words = _Draft(alphabet), rng.permutation(alphabet.symbols).tolist()
    chains = [words[i * (HOPS + 1) : (i + 1) * (HOPS + 1)] for i in range(CHAINS)]
    values = words[CHAINS * (HOPS + 1) : CHAINS * (HOPS + 2)]
    statements: list[list[int]] = []
    for hop in range(HOPS + 1):  # the chains are interleaved, each in its own order
        for i in rng.permutation(CHAINS):
            source = values[i] if hop == 0 else chains[i][hop - 1]
            statements.append(draft.ids("(", chains[i][hop], "=", source, ")"))
    asked = int(rng.integers(CHAINS))
    question = draft.ids("( value of", chains[asked][HOPS], "=")
    return draft.finish(rng, length, statements, [(question, draft.ids(values[asked]))])


def _induction(alphabet: Alphabet, rng: np.random.Generator, length: int) -> Example:
    """Write a pattern in which what follows a word depends on the word before it too: decoys hold
    each word of the pattern after other words.
    """
    draft, words = _Draft(alphabet), rng.permutation(alphabet.symbols).tolist()
    pattern, others = words[:PATTERN], words[PATTERN:]
    statements = [draft.ids("(", *pattern, ")")]
    for _ in range(DECOYS):
        decoy = list(pattern)
        for place in range(int(rng.integers(2)), PATTERN, 2):  # every other word is replaced
            decoy[place] = others[int(rng.integers(len(others)))]
        statements.append(draft.ids("(", *decoy, ")"))
    order = rng.permutation(len(statements))
    question = draft.ids("(", *pattern[:2])
    questions = [(question, draft.ids(pattern[2]))] + [
        ([], draft.ids(word)) for word in pattern[3:]
    ]
    return draft.finish(rng, length, [statements[i] for i in order], questions)


_MAKERS: dict[str, Callable[[Alphabet, np.random.Generator, int], Example]] = {
    "single_needle": lambda alphabet, rng, length: _pairs(alphabet, rng, length, 1, 1),
    "multi_needle": lambda alphabet, rng, length: _pairs(alphabet, rng, length, PAIRS, 1),
    "multi_query": lambda alphabet, rng, length: _pairs(alphabet, rng, length, PAIRS, QUERIES),
    "variables": _variables,
    "induction": _induction,
} | {task: functools.partial(_mqar, pairs=pairs) for task, pairs in MQAR.items()}


def make_examples(
    task: str,
    alphabet: Alphabet,
    *,
    length: int,
    count: int,
    seed: int = 0,
    distance: int | None = None,
) -> list[Example]:
    """Make `count` examples of exactly `length` tokens. The same arguments give the same examples,
    on every machine.

    Raises: UserError when the task does not fit the length.
    """
    examples = []
    alphabet = alphabet.with_symbols(2 * MQAR.get(task, 0))
    for i in range(count):
        digest = hashlib.sha256(f"{task} {length} {distance} {seed} {i}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        if task == "distance":
            examples.append(_pairs(alphabet, rng, length, 1, 1, distance))
        else:
            examples.append(_MAKERS[task](alphabet, rng, length))
    return examples


def distances(length: int) -> list[int]:
    """Choose the distances of the sweep: powers of two from 16 to what fits, with room for the pair
    and the question.
    """
    return [1 << n for n in range(4, length.bit_length()) if (1 << n) <= length - 64]


def evaluate(
    model: Transformer,
    *,
    lengths: Sequence[int],
    ttt: Sequence[str] = ("off", "on"),
    tasks: Sequence[str] = TASKS,
    examples: int = 32,
    form: str = "ids",
    batch_size: int = 8,
    piece: int | None = None,
    seed: int = 0,
    judges: dict[str, Callable[[list[list[int]]], list[Judgement]]] | None = None,
    on_progress: Callable[[int], None] | None = None,
    kept: Unfinished | None = None,
) -> dict[str, Any]:
    """Judge the whole suite.

    Args:
      lengths: tokens of the sequences.
      ttt: "off", "on" or both.
      examples: per task and length.
      form: "ids" (any model) or "text" (needs a tokenizer).
      judges: who answers, per mode; None: the model. Tests put oracles here.
      on_progress: called with the number of sequences judged.
      kept: tasks that an earlier start finished, and where this one keeps its own.

    Returns: the "synthetic" part of results.json.
    Raises: UserError when a task does not fit a length, the vocabulary is too small, or text is
    asked for without a tokenizer.
    """
    alphabet = make_alphabet(model, form, seed)
    cases, left_out = _cases(alphabet, tasks, lengths, examples, seed)
    judges = judges or {
        mode: Judge(model, ttt=mode == "on", batch_size=batch_size, piece=piece) for mode in ttt
    }
    kept = Unfinished(None, {}) if kept is None else kept
    entries, done = [], len(left_out) * examples * len(ttt)
    for task, length, distance, made in cases:
        entry: dict[str, Any] = {"task": task, "length": length, "distance": distance}
        if task in MQAR:
            entry["pairs"] = MQAR[task]
        accuracy: dict[str, np.ndarray] = {}
        for mode in ttt:
            key = ("synthetic", task, length, distance, mode)
            found = kept.piece(key, functools.partial(_grades, judges[mode], made))
            accuracy[mode] = np.array(found["right"])
            measured = {"accuracy": accuracy[mode], "nll": np.array(found["nll"])}
            entry[mode] = {
                name: mean_with_interval(values, seed=seed) for name, values in measured.items()
            }
            done += len(made)
            if on_progress is not None:
                on_progress(done)
        if len(ttt) == 2:
            entry["gain"] = mean_with_interval(accuracy["on"] - accuracy["off"], seed=seed)
        entries.append(entry)
    return {
        "modes": list(ttt),
        "examples": examples,
        "form": alphabet.form,
        "seed": seed,
        "left_out": left_out,
        "entries": entries,
    }


def _cases(
    alphabet: Alphabet, tasks: Sequence[str], lengths: Sequence[int], examples: int, seed: int
) -> tuple[list[tuple[str, int, int | None, list[Example]]], list[str]]:
    """Make the examples: (task, length, distance or None, examples) of every case.

    Returns: the cases, and names of those of MQAR that are left out. Many pairs need a large
    vocabulary and a long sequence; the suite is for any model.
    """
    cases, left_out = [], []
    for task in tasks:
        for length in lengths if task != "distance" else lengths[-1:]:
            for distance in distances(length) if task == "distance" else [None]:
                make = functools.partial(make_examples, task, alphabet, length=length, seed=seed)
                try:
                    made = make(count=examples, distance=distance)
                except UserError:
                    if task not in MQAR:
                        raise
                    left_out.append(f"{task} at {length}")
                else:
                    cases.append((task, length, distance, made))
    return cases, left_out


def _grades(
    judge: Callable[[list[list[int]]], list[Judgement]], made: list[Example]
) -> dict[str, list[float]]:
    judged = judge([example.ids for example in made])
    right, nll = zip(
        *(_grade(example, j) for example, j in zip(made, judged, strict=True)), strict=True
    )
    return {"right": list(right), "nll": list(nll)}


def make_alphabet(model: Transformer, form: str, seed: int) -> Alphabet:
    """Make the alphabet. Raises UserError for text without a tokenizer, or a vocabulary that is too
    small.
    """
    if form == "text":
        if model.tokenizer is None:
            raise UserError(
                "--form text: the model's folder has no tokenizer.json; add it or use --form ids"
            )
        return TextAlphabet(model.tokenizer, seed)
    end = (
        []
        if model.tokenizer is None or model.tokenizer.eos_id is None
        else [model.tokenizer.eos_id]
    )
    return IdAlphabet(model.config.vocab_size, seed, [*model.eos_ids, *end])


def count_sequences(lengths: Sequence[int], tasks: Sequence[str], examples: int, modes: int) -> int:
    """Count the sequences that `evaluate` judges, and those that it leaves out."""
    cases = sum(
        len(distances(lengths[-1])) if task == "distance" else len(lengths) for task in tasks
    )
    return cases * examples * modes


def _grade(example: Example, judgement: Judgement) -> tuple[float, float]:
    """Grade an answer: (share of the answers whose every token is greedy, mean loss of their
    tokens).
    """
    # Token t is judged at t - 1.
    spans = [slice(start - 1, stop - 1) for start, stop in example.answers]
    right = np.mean([bool(judgement.greedy_T[span].all()) for span in spans])
    nll = -np.concatenate([judgement.logprobs_T[span] for span in spans]).mean(dtype=np.float64)
    return float(right), float(nll)
