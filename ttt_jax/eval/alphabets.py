"""How the words of the synthetic suite become tokens: single ids of any model, or text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np

from ttt_jax.errors import UserError

_SYMBOLS = 64  # words of an alphabet; a task draws keys and values from them
_OTHERS = 32  # ids at least beside the symbols: 16 for the templates, and filler
_FILLER_TEXT = (
    "The grass is green . The sky is blue . The sun is yellow . Here we go . There and back again ."
)


class Alphabet(Protocol):
    """How words become tokens."""

    form: str  # "ids" or "text"
    symbols: list[str]  # words that may be keys, values and patterns

    def with_symbols(self, count: int) -> Self:
        """Return this alphabet, or one of more symbols when it has fewer than `count`."""
        ...

    def encode(self, word: str) -> list[int]:
        """Return the ids of one word."""
        ...

    def filler(self, rng: np.random.Generator, tokens: int) -> list[int]:
        """Write exactly `tokens` ids that answer nothing."""
        ...


class IdAlphabet:
    """Words are single ids, drawn from the vocabulary by the seed; half of the others are filler.

    Raises: UserError for a vocabulary that is too small.
    """

    form = "ids"

    def __init__(
        self, vocab_size: int, seed: int = 0, avoid: Sequence[int] = (), symbols: int = _SYMBOLS
    ) -> None:
        self._arguments = (vocab_size, seed, avoid)
        usable = np.setdiff1d(np.arange(vocab_size), np.asarray(avoid, np.int64))
        if len(usable) < symbols + _OTHERS:
            raise UserError(
                f"--tasks synthetic: the model's vocabulary has {vocab_size} ids; at least "
                f"{symbols + _OTHERS} are needed"
            )
        shuffled = np.random.default_rng(seed).permutation(usable)
        self.symbols = [f"w{i}" for i in range(symbols)]
        self._ids = {word: int(i) for word, i in zip(self.symbols, shuffled[:symbols], strict=True)}
        rest = shuffled[symbols:]
        self._marks, self._filler = rest[:16], rest[16:]
        self._used: dict[str, int] = {}

    def with_symbols(self, count: int) -> IdAlphabet:
        return self if count <= len(self.symbols) else IdAlphabet(*self._arguments, symbols=count)

    def encode(self, word: str) -> list[int]:
        if word in self._ids:
            return [self._ids[word]]
        # Words of the templates get ids of their own, in the order of their appearance.
        if word not in self._used:
            self._used[word] = int(self._marks[len(self._used)])
        return [self._used[word]]

    def filler(self, rng: np.random.Generator, tokens: int) -> list[int]:
        return rng.choice(self._filler, tokens).tolist()


class TextAlphabet:
    """Words are made-up text with a space before it, encoded one by one; filler is RULER's repeated
    sentences.
    """

    form = "text"

    def __init__(self, tokenizer: Any, seed: int = 0, symbols: int = _SYMBOLS) -> None:
        self._tokenizer, self._seed = tokenizer, seed
        rng, words = np.random.default_rng(seed), {}
        while len(words) < symbols:
            consonants, vowels = rng.choice(list("bdfgklmnprstvz"), 3), rng.choice(list("aeiou"), 3)
            words["".join(c + v for c, v in zip(consonants, vowels, strict=True))] = None
        self.symbols = list(words)
        self._cache: dict[str, list[int]] = {}
        self._text = tokenizer.encode(" " + _FILLER_TEXT)

    def with_symbols(self, count: int) -> TextAlphabet:
        if count <= len(self.symbols):
            return self
        return TextAlphabet(self._tokenizer, self._seed, count)

    def encode(self, word: str) -> list[int]:
        if word not in self._cache:
            self._cache[word] = list(self._tokenizer.encode(" " + word))
        return self._cache[word]

    def filler(self, rng: np.random.Generator, tokens: int) -> list[int]:
        start = int(rng.integers(len(self._text)))
        repeats = (start + tokens) // len(self._text) + 1
        return (self._text * repeats)[start : start + tokens]
