"""One row of a generation: its tokens, and its text as it becomes readable. A token costs the same
however many came before."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ttt_jax.errors import UserError

_UNREADABLE = "\N{REPLACEMENT CHARACTER}"
# Tokens that may wait for the rest of a character. UTF-8 needs four bytes at most, so text that is
# still not readable then never will be.
_WAITING, _LONGEST = 8, 4


@dataclasses.dataclass
class Completion:
    """What one row wrote.

    Fields:
      token_ids: the new tokens, the end token or those of the stop string included.
      logprobs: of each of them, under the model (before temperature and filters), nats.
      text: decoded, without special tokens and cut before the stop string; None without a
        tokenizer.
      finish_reason: "eos", "stop", "length", "not_finite" (the model's next token was not a
        number), or "interrupted".
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str | None
    finish_reason: str


def stop_strings(stop: Any) -> tuple[str, ...]:
    """The strings of an argument `stop`: one string, or a sequence of them. Raises UserError for
    anything else."""
    words = (stop,) if isinstance(stop, str) else stop
    if not isinstance(words, Sequence) or isinstance(words, bytes | bytearray):
        raise UserError(
            f"stop = {stop!r:.80}: must be a string or a list of strings; leave it out for none"
        )
    for word in words:
        if not isinstance(word, str):
            raise UserError(
                f"stop: {word!r:.80} is not a string; give a string or a list of strings"
            )
        if not word:
            raise UserError("stop: an empty string would end everything at once; leave it out")
    return tuple(words)


class Writer:
    """Collects a row's tokens.

    Args:
      tokenizer: None: no text.
      stop: strings that end the row.
      eos: tokens that end it.
      limit: tokens that end it.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], eos: set[int], limit: int) -> None:
        self.tokenizer, self.stop, self.eos, self.limit = tokenizer, stop, eos, limit
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason = ""
        self._shown: list[str] = []  # pieces handed out
        self._held = ""  # readable, but it may be the beginning of a stop string
        # Tokens before `_read` are text already; decoding starts at `_context`, for spaces.
        self._context, self._read = 0, 0

    def add(self, token: int, logprob: float) -> str:
        """Take a token; returns the text that can be shown now."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        if token in self.eos:
            self.finish_reason = "eos"
        elif len(self.ids) == self.limit:
            self.finish_reason = "length"
        if self.tokenizer is None:
            return ""
        self._held += self._readable(final=bool(self.finish_reason))
        # What has been shown holds no beginning of a stop string, so that only the rest has to be
        # searched.
        cuts = [at for at in map(self._held.find, self.stop) if at >= 0]
        if cuts:
            self.finish_reason, self._held = "stop", self._held[: min(cuts)]
        return self._show()

    def end(self, reason: str) -> str:
        """End the row for another reason; returns the rest of its text."""
        self.finish_reason = reason
        if self.tokenizer is None:
            return ""
        self._held += self._readable(final=True)
        return self._show()

    def completion(self) -> Completion:
        text = None if self.tokenizer is None else "".join(self._shown)
        return Completion(self.ids, self.logprobs, text, self.finish_reason or "length")

    def _show(self) -> str:
        keep = 0
        if not self.finish_reason:
            beginning = lambda word: (
                n for n in range(1, len(word)) if self._held.endswith(word[:n])
            )
            keep = max((n for word in self.stop for n in beginning(word)), default=0)
        piece, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        if piece:
            self._shown.append(piece)
        return piece

    def _readable(self, final: bool) -> str:
        """Decode the tokens that are not text yet, as far as their characters are complete."""
        end = len(self.ids)
        now = self._decode(self._context, end)
        if not final and now.endswith(_UNREADABLE):
            if end - self._read <= _WAITING:
                return ""
            end, now = self._boundary(end, now)
        before = self._decode(self._context, self._read)
        self._context, self._read = self._read, end
        return now[len(before) :]

    def _boundary(self, end: int, now: str) -> tuple[int, str]:
        """A token a few before the end at which no character is cut, and the text up to it; the end
        if there is none."""
        for cut in range(end - _LONGEST, end - _WAITING, -1):
            head = self._decode(self._context, cut)
            if head + self._decode(cut, end) == now:
                return cut, head
        return end, now

    def _decode(self, start: int, stop: int) -> str:
        return self.tokenizer.decode(self.ids[start:stop])
