"""Where a memory comes from: the texts that were read, their hashes, and exact weights."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from fractions import Fraction
from typing import Any, cast

import numpy as np

from ttt_jax.errors import UserError

_BLOCK = 512  # token ids that one step of the digest takes
_MAX_DIGITS = 200  # of the numerator and the denominator of a weight
_MAX_NAME = 1000
_SMALLEST, _LARGEST = Fraction(1, 10**9), Fraction(10**9)
_WEIGHT = re.compile(rf"-?\d{{1,{_MAX_DIGITS}}}(/\d{{1,{_MAX_DIGITS}}})?", re.ASCII)
_HEX = re.compile("[0-9a-f]{64}")


class IdsDigest:
    """A hash of a stream's token ids that can be kept in a file and gone on with.

    It starts with 32 zero bytes. Every 512 ids (int32, little-endian) make it the SHA-256 of itself
    and those ids; the result is the SHA-256 of it and the ids that are left over.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._done = bytes(32)
        self._rest = b""

    def update(self, ids: np.ndarray) -> None:
        data = self._rest + np.asarray(ids).astype("<i4").tobytes()
        size = 4 * _BLOCK
        for start in range(0, len(data) - size + 1, size):
            self._done = hashlib.sha256(self._done + data[start : start + size]).digest()
        self._rest = data[len(data) // size * size :]
        self.tokens += len(ids)

    def hexdigest(self) -> str:
        return hashlib.sha256(self._done + self._rest).hexdigest()

    def copy(self) -> IdsDigest:
        new = IdsDigest()
        new.tokens, new._done, new._rest = self.tokens, self._done, self._rest
        return new

    def to_json(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "done": self._done.hex(), "rest": self._rest.hex()}

    @classmethod
    def from_json(cls, raw: Any) -> IdsDigest:
        """Go on with what `to_json` gave. Raises ValueError for anything else."""
        new = cls()
        if not isinstance(raw, dict) or not is_count(raw.get("tokens")):
            raise ValueError("a digest without its number of tokens")
        done, rest = cast(Any, raw.get("done")), raw.get("rest")
        if not is_sha256(done) or not isinstance(rest, str):
            raise ValueError("a digest that is none")
        new.tokens, new._done = raw["tokens"], bytes.fromhex(done)
        new._rest = bytes.fromhex(rest)  # ValueError for what is not hexadecimal
        if len(new._rest) != 4 * (new.tokens % _BLOCK):
            raise ValueError("a digest with another number of ids left over")
        return new


@dataclasses.dataclass(frozen=True)
class Source:
    """A text, or a stream, that was read.

    Fields:
      name: the file's name, or what the caller called the stream.
      tokens: how many of it were read.
      written: how many of them stand in whole chunks, and so in the memory.
      ids: `IdsDigest` of the tokens read; None: not known.
      file: SHA-256 of the file's bytes; None: it was no file.
      context: attention started anew every so many tokens; None: never.
      weight: factor on what it wrote.
    """

    name: str
    tokens: int
    written: int
    ids: str | None = None
    file: str | None = None
    context: int | None = None
    weight: Fraction = Fraction(1)

    def scaled(self, weight: Fraction) -> Source:
        return dataclasses.replace(self, weight=self.weight * weight)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"weight": str(self.weight)}

    @classmethod
    def from_json(cls, raw: Any) -> Source:
        """Read what `to_json` gave. Raises ValueError for anything else."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(raw, dict) or set(raw) != fields:
            raise ValueError("a source has other fields")
        name, tokens, written, context = (raw[k] for k in ("name", "tokens", "written", "context"))
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
            raise ValueError("a source's name is no name")
        if not is_count(tokens) or not is_count(written) or written > tokens:
            raise ValueError("a source's numbers of tokens are none")
        if context is not None and (not is_count(context) or context < 1):
            raise ValueError("a source's context is no number of tokens")
        for key in ("ids", "file"):
            if raw[key] is not None and not is_sha256(raw[key]):
                raise ValueError(f"a source's {key} is no SHA-256")
        weight = read_weight(raw["weight"])
        return cls(name, tokens, written, raw["ids"], raw["file"], context, weight)


def is_sha256(x: Any) -> bool:
    """Whether a value from a file is 64 hexadecimal digits."""
    return isinstance(x, str) and _HEX.fullmatch(x) is not None


def is_count(x: Any) -> bool:
    """Whether a value from a file is a number of tokens."""
    return type(x) is int and 0 <= x < 1 << 53


def total_sources(sources: list[Source]) -> tuple[Source, ...]:
    """Add the weights of equal sources, and leave out those that add up to zero."""
    weights: dict[Source, Fraction] = {}
    for source in sources:
        one = dataclasses.replace(source, weight=Fraction(1))
        weights[one] = weights.get(one, Fraction(0)) + source.weight
    return tuple(dataclasses.replace(one, weight=w) for one, w in weights.items() if w)


# ------------------------------------------------------------------------------------------ weights


def as_weight(factor: Any) -> Fraction:
    """Make an exact weight of a number: 0.1 is one tenth, not the float nearest to it.

    Raises: UserError for what is no number, and for one that is too large or too small.
    """
    if isinstance(factor, Fraction):
        return checked_weight(factor)
    if isinstance(factor, bool) or not isinstance(factor, int | float | np.integer | np.floating):
        raise UserError(f"factor {factor!r:.80}: a memory is multiplied by a number")
    if isinstance(factor, int | np.integer):
        return checked_weight(Fraction(int(factor)))
    if not math.isfinite(factor):
        raise UserError(f"factor {factor}: must be finite")
    return checked_weight(Fraction(repr(float(factor))))


def checked_weight(weight: Fraction) -> Fraction:
    """Return the weight. Raises UserError when it is too large, too small or too long to keep."""
    if weight and not _SMALLEST <= abs(weight) <= _LARGEST:
        raise UserError(f"factor {float(weight):g}: must be 0, or of a size from 1e-9 to 1e9")
    if max(abs(weight.numerator), weight.denominator) >= 10**_MAX_DIGITS:
        raise UserError(
            f"factor {float(weight):g}: has more than {_MAX_DIGITS} digits as an exact fraction; "
            "collapse the memory before it is scaled again"
        )
    return weight


def read_weight(text: Any) -> Fraction:
    """Read `str(weight)` from a file. Raises ValueError."""
    if not isinstance(text, str) or not _WEIGHT.fullmatch(text):
        raise ValueError("a weight is no fraction")
    try:
        return checked_weight(Fraction(text))
    except ZeroDivisionError:
        raise ValueError("a weight is no fraction") from None
