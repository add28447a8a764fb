"""A conversation on one stream: documents that are read, turns that are asked and answered.

The stream holds documents and the template's text of the turns. A template writes a whole
conversation; what it wrote up to the last answer stands in the stream already, so only the rest is
read. Where a template rewrites what was read (it trims an answer, or drops its reasoning), the
stream goes back to a copy from before that turn and reads the turn again as the template has it.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ttt_jax.errors import NotFiniteError, UserError
from ttt_jax.inference.generation import GREEDY, Session
from ttt_jax.inference.sampling import Sampling
from ttt_jax.memory.sources import Source
from ttt_jax.process.interrupts import HeldBack

Message = dict[str, str]
Render = Callable[[list[Message], bool], str]
PLAIN_STOP = "\nUser:"
_STATES = 2  # that are kept: each is a copy of fast weights, keys and values
_ROLES = ("system", "user", "assistant")


def render_plain(messages: list[Message], add_generation_prompt: bool = True) -> str:
    """Write a conversation for a model without a chat template: one "Role:" a turn."""
    ends = {"system": "\n", "user": "\n", "assistant": ""}
    lines = []
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        before = "\n" if i and messages[i - 1]["role"] == "assistant" else ""
        space = "" if role == "assistant" else " "  # an answer begins with the model's own space
        lines.append(f"{before}{role.capitalize()}:{space}{content}{ends[role]}")
    return "".join(lines) + ("Assistant:" if add_generation_prompt else "")


class Answer(NamedTuple):
    """What `Conversation.ask` returns.

    Fields:
      text: without special tokens.
      finish_reason: as `Completion.finish_reason`.
      read_again: tokens of earlier turns that were read once more, since the template has rewritten
        them.
    """

    text: str
    finish_reason: str
    read_again: int = 0


class _Kept(NamedTuple):
    """A state to which a conversation can go back."""

    session: Session
    rendered: str
    end: int | None
    ids: list[int]
    read: list[_Document]  # what was read behind it


class _Document(NamedTuple):
    """A document, and the context that it was learnt from (`Session.learn`); None: it stands in the
    stream.
    """

    ids: list[int]
    context: int | None
    name: str


class Conversation:
    """Turns on a session of one stream. Prints nothing.

    Args:
      session: one stream, new or loaded. If it was saved by `save`, its turns go on.
      render: (messages, add_generation_prompt) -> text; the model's template, or `render_plain`.
      system: text of a system message, at the beginning of a new conversation.

    Fields:
      messages: all turns, {"role", "content"}.
      ids: tokens of this conversation, documents included; since it was loaded, where a stream was
        loaded that has no tokens of its own.
      whole: `ids` is all that the stream holds.
    """

    def __init__(self, session: Session, render: Render, system: str | None = None) -> None:
        if session.batch_size != 1:
            raise UserError(f"chat: a session of {session.batch_size} streams; use one of one")
        if session.model.tokenizer is None:
            raise UserError("chat: the model's folder has no tokenizer.json; put it there")
        self.session, self.render = session, render
        self.messages: list[Message] = []
        self.rendered = ""  # the part of the template's text that the stream holds
        self._end: int | None = None  # the end token that closed the last answer, if one did
        self.ids: list[int] = []
        self.whole = session.position_B[0] == 0 and not len(session.unread[0])
        self._kept: list[_Kept] = []  # the states before the last turns
        if session.conversation is not None:
            self._resume(session.conversation, system)
        elif system is not None:
            self.messages = [{"role": "system", "content": system}]

    def _resume(self, stored: dict[str, Any], system: str | None) -> None:
        messages, rendered, end, ids = (
            stored.get(k) for k in ("messages", "rendered", "end", "ids")
        )
        if (
            not isinstance(messages, list)
            or not all(_is_message(m) for m in messages)
            or not isinstance(rendered, str)
            or not (end is None or type(end) is int)
            or not (ids is None or self._is_stream(ids))
        ):
            raise UserError("session: its conversation is damaged; restore the file from a copy")
        begun = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        if system is not None and system != begun:
            raise UserError("--system: the session's conversation has begun without it; drop it")
        self.messages, self.rendered, self._end = list(messages), rendered, end
        if ids is not None:  # files of older versions have none
            self.ids, self.whole = ids, True

    def _is_stream(self, ids: Any) -> bool:
        """Say whether `ids` may be all tokens of the stream; its unread ones are known."""
        vocab_size, unread = self.session.model.config.vocab_size, self.session.unread[0].tolist()
        return (
            isinstance(ids, list)
            and all(type(i) is int and 0 <= i < vocab_size for i in ids)
            and len(ids) == sum(self.tokens)
            and ids[len(ids) - len(unread) :] == unread
        )

    # ------------------------------------------------------------------------------------- reading

    def read(
        self, document: str | list[int], context: int | None = None, name: str = "text"
    ) -> Source | None:
        """Read a document, a text or its ids, into the stream. After a Ctrl-C the rest of it is
        unread, and is read before the next turn.

        Args:
          context: read it into the fast weights alone, with attention anew every so many tokens, as
            `Session.learn` does; the stream then has none of it, and a Ctrl-C takes it back.
          name: what memories call it then.

        Returns: what was learnt, with a context.
        Raises: UserError for an empty one, and as `Session.learn`; NotFiniteError.
        """
        ids = self._encode(document) if isinstance(document, str) else document
        if not ids:
            raise UserError("read: the text is empty; give at least one token")
        if context is not None:
            source = self.session.learn(ids, context, name)
            if self._kept:
                self._kept[-1].read.append(_Document(ids, context, name))
            return source
        with HeldBack():
            if self._kept:
                self._kept[-1].read.append(_Document(ids, None, name))
            self._extend(ids, read=True)
        return None

    def ask(
        self,
        text: str,
        sampling: Sampling = GREEDY,
        *,
        max_new_tokens: int = 512,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer a turn of the user.

        When Ctrl-C comes, or `on_text` fails, what has been written stays as the answer; with
        nothing written yet, and for numbers that are not finite, the turn is taken back.

        Raises: UserError when the template fails, or rewrites turns that cannot be read again; the
        conversation is then as before. NotFiniteError.
        """
        with HeldBack():  # one Ctrl-C stops the writing; what follows it is whole
            messages = [*self.messages, {"role": "user", "content": text}]
            read_again = self._read_turn(messages)
            self.messages = messages
            try:
                self.session.generate(
                    max_new_tokens,
                    sampling,
                    seed=seed,
                    stop=PLAIN_STOP if self.render is render_plain else (),
                    on_text=None if on_text is None else lambda _, piece: on_text(piece),
                )
            except NotFiniteError:
                self.undo()
                raise
            except BaseException:
                if self.session.written and self.session.written[0].token_ids:
                    self._take_answer()
                else:
                    self.undo()
                raise
            reason = self._take_answer()
            return Answer(self.messages[-1]["content"], reason, read_again)

    def _take_answer(self) -> str:
        """Note what the session has written; returns why it stopped."""
        done = self.session.written[0]
        text, ids = done.text or "", done.token_ids
        # The tokens of a stop string are in the stream, although the answer is cut before them.
        stopped = done.finish_reason == "stop"
        self.rendered += self.session.model.tokenizer.decode(ids) if stopped else text
        self._end = ids[-1] if done.finish_reason == "eos" else None
        self.ids = self.ids + ids
        self.messages = [*self.messages, {"role": "assistant", "content": text}]
        return done.finish_reason

    # ------------------------------------------------------------------------------------ template

    def _read_turn(self, messages: list[Message]) -> int:
        """Keep the state before the turn and append the turn; returns the tokens read again."""
        full, read_again = self.render(messages, True), 0
        if not full.startswith(self.rendered):
            read_again = self._go_back(full, messages)
        kept = self._keep()
        self._append(full)
        self._kept = [*self._kept, kept][-_STATES:]
        return read_again

    def _go_back(self, full: str, messages: list[Message]) -> int:
        """Read the last turns as the template has them now, up to the new question."""
        fitting = [i for i, k in enumerate(self._kept) if full.startswith(k.rendered)]
        if not fitting:
            raise UserError(
                "chat template: rewrites earlier turns, and no state before them is kept; "
                "begin a new session"
            )
        # What stands before the question stays as it is in the turns to come.
        other = "y" if messages[-1]["content"].startswith("x") else "x"
        changed = self.render([*messages[:-1], messages[-1] | {"content": other}], True)
        begin = _common_beginning(full, changed)
        kept = self._kept[fitting[-1]]
        documents = [document for later in self._kept[fitting[-1] :] for document in later.read]
        self._go_to(kept)
        for ids, context, name in documents:
            if context is None:
                self._extend(ids)
            else:
                self.session.learn(ids, context, name)
        self._kept = self._kept[: fitting[-1] + 1]
        if len(begin) > len(self.rendered):
            self._append(begin, read=True)
        return len(self.ids) - len(kept.ids)

    def _append(self, full: str, read: bool = False) -> None:
        """Put what the template adds to `rendered` into the stream."""
        ids = self._encode(full[len(self.rendered) :])
        if self._end is not None:
            if ids[:1] == [self._end]:  # the model has closed its turn as the template does
                ids = ids[1:]
            elif self.session.unread[0][-1:].tolist() == [self._end]:  # the template has it not
                self.session.unread[0], self.ids = self.session.unread[0][:-1], self.ids[:-1]
        self._end, self.rendered = None, full
        self._extend(ids, read)

    def _extend(self, ids: list[int], read: bool = False) -> None:
        if ids:
            self.ids = self.ids + ids
            (self.session.read if read else self.session.extend)([ids])

    def _encode(self, text: str) -> list[int]:
        return list(self.session.model.tokenizer.encode(text)) if text else []

    # -------------------------------------------------------------------------------------- states

    def _keep(self) -> _Kept:
        return _Kept(self.session.branch(), self.rendered, self._end, self.ids, [])

    def _go_to(self, kept: _Kept) -> None:
        on_read, timings = self.session.on_read, self.session.timings
        self.session = kept.session.branch()
        self.session.on_read, self.session.timings = on_read, timings
        self.rendered, self._end, self.ids = kept.rendered, kept.end, kept.ids

    def undo(self) -> None:
        """Go back to the state before the last turn; documents read after it go, too.

        Raises UserError when no such state is kept: those of the last two turns are, and none of
        turns before a session was loaded.
        """
        if not self._kept:
            raise UserError("undo: no state before a turn is kept; ask something first")
        with HeldBack():
            self._go_to(self._kept[-1])
            last = max(i for i, m in enumerate(self.messages) if m["role"] == "user")
            self.messages = self.messages[:last]
            self._kept = self._kept[:-1]

    def forget(self, factor: float | Fraction = 1) -> int:
        """Begin anew with what was learnt, times a factor: the fast weights stay, keys, values and
        turns go. Returns the tokens that are gone.

        Raises: UserError for a factor of 0 and when no whole chunk was written, so that nothing
        would be left, and as `Session.memory`, for a session without fast weights.
        """
        if not factor:
            raise UserError("forget: times 0 leaves nothing; begin a new conversation")
        old, gone = self.session, sum(self.tokens)
        memory = factor * old.memory(name="conversation")
        if not any(source.written for source in memory.sources):
            raise UserError(
                f"forget: {gone:,} tokens are less than a chunk of "
                f"{old.model.config.ttt.chunk_size}, nothing would be left; read more first"
            )
        with HeldBack():
            new = Session(old.model, ttt=old.ttt, piece=old.size, memory=memory)
            new.on_read, new.timings = old.on_read, old.timings
            self.session, self.messages = new, [m for m in self.messages if m["role"] == "system"]
            self.rendered, self._end, self.ids, self._kept = "", None, [], []
            self.whole = True
        return gone

    def branch(self) -> Conversation:
        """A copy that goes its own way, with the state before its last turn."""
        new = Conversation(self.session.branch(), self.render)
        new.messages, new.rendered, new._end = list(self.messages), self.rendered, self._end
        new.ids, new.whole = self.ids, self.whole
        new._kept = [kept._replace(read=list(kept.read)) for kept in self._kept]
        return new

    def again(self, ttt: bool) -> tuple[Conversation, str]:
        """Prepare the last question once more: (a copy from before it, the question).

        Without TTT the copy does not use the fast weights: what they learnt from all that was read
        is away. Its keys and values are those of the stream.
        """
        if not self._kept or self.messages[-1]["role"] != "assistant":
            raise UserError("/ttt: nothing has been asked yet; ask something first")
        if ttt and not self.session.ttt:
            raise UserError("/ttt on: this conversation was read with TTT off; drop --no-ttt")
        kept = self._kept[-1]
        copy = Conversation(kept.session.branch(), self.render)
        copy.messages, copy._kept = self.messages[:-2], self._kept[:-1]
        copy.rendered, copy._end, copy.ids = kept.rendered, kept.end, kept.ids
        copy.session.ttt = ttt
        if not ttt:  # a memory is put away, too
            copy.session.holds_memory, copy.session.start = False, None
        return copy, self.messages[-2]["content"]

    def save(self, path: Any) -> None:
        """Save the session with its turns. Raises as `Session.save`."""
        turns = {"messages": self.messages, "rendered": self.rendered, "end": self._end}
        turns |= {"ids": self.ids} if self.whole else {}
        self.session.save(path, turns)

    # ----------------------------------------------------------------------------------- what it is

    @property
    def tokens(self) -> tuple[int, int]:
        """(tokens read, tokens that wait)."""
        return int(self.session.position_B[0]), len(self.session.unread[0])

    def fast_weights(self) -> dict[int, float]:
        """||S||_F / ||W||_F of every TTT layer; empty before anything has been read, and no memory
        stands at the beginning.
        """
        state, model = self.session.state, self.session.model
        found: dict[int, float] = {}
        if state is None:
            if (start := self.session.start) is not None:
                norm_of = lambda layer: float(np.linalg.norm(start.dW(layer)))
                found = {i: norm_of(i) / (start.slow_norms[i] or 1) for i in start.layers}
            return found
        norm = lambda x, axes: jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axes))
        for g, r, layers in model.ttt_runs():
            ttt = state.layers[g][r].ttt
            if ttt is None:  # it was read with TTT off
                continue
            fast = norm(ttt.S_BDF[:, :, 0], (2, 3)).reshape(-1)
            slow = norm(model.groups[g].blocks[r].mlp.down[...], (2, 3)).reshape(-1)
            found |= dict(zip(layers, (fast / slow).tolist(), strict=True))
        return dict(sorted(found.items()))


def _common_beginning(a: str, b: str) -> str:
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return a[: next(differ, min(len(a), len(b)))]


def _is_message(x: Any) -> bool:
    return isinstance(x, dict) and x.get("role") in _ROLES and isinstance(x.get("content"), str)
