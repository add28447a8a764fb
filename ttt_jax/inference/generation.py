"""Generation: sessions that read and write, each row with its own fast weights, KV cache and chunk
clock.

B batch, V vocabulary.

A session is a batch of token streams. `read` feeds tokens in pieces, `generate` goes on from there
one token at a time. Updates of the fast weights happen when a row completes a chunk, while it reads
and while it writes. The last token of a stream stays unread until something follows: its logits are
computed when they are asked for.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.errors import UserError
from ttt_jax.inference.decoding import Decoding
from ttt_jax.inference.memory_reading import Text, check_context, read_texts
from ttt_jax.inference.prefill import check_ids
from ttt_jax.inference.prompts import token_rows
from ttt_jax.inference.sampling import Sampling
from ttt_jax.inference.session_file import StoredSession, load_session, save_session
from ttt_jax.inference.streams import Streams
from ttt_jax.inference.watch import not_finite
from ttt_jax.inference.writing import Completion, Writer, stop_strings
from ttt_jax.memory.fast_weights import go_on_with, memory_of, no_memory
from ttt_jax.memory.memory import Memory
from ttt_jax.memory.sources import Source
from ttt_jax.model.transformer import State, Transformer
from ttt_jax.process.interrupts import HeldBack

GREEDY = Sampling()


class Session(Streams):
    """A batch of streams of one model: read, generate, branch, save.

    Fast weights are watched (watch.py): one warning when ||S||/||W|| leaves its range, and
    NotFiniteError, then and ever after, for numbers that are not finite. Ctrl-C takes effect
    between two pieces or tokens: the session is whole, and may be saved.

    Args:
      model: from `load_pretrained`.
      batch_size: number of streams.
      ttt: False switches the adaptation off.
      piece: tokens read at a time, rounded to chunks; None: 8192, on CPUs 2048. Bounds the memory
        of reading.
      memory: fast weights that every stream begins with (docs/memory.md). Without `ttt` they are
        applied and stay as they are.

    Raises: UserError for a memory of another model.

    Fields:
      written: the completions of the last `generate`, also of one that was interrupted.
      conversation: the turns that `load` found beside the streams (conversation.py).
    """

    written: list[Completion]
    conversation: dict[str, Any] | None = None

    def read(self, rows: Any) -> None:
        """Append a text, chat messages or token ids to each stream and read them, all but the last
        token.

        Raises: UserError for another number of rows, and for rows as `token_rows` does;
        NotFiniteError.
        """
        self.extend(rows)
        with HeldBack() as signals:
            self._feed(1, signals)
        self.watch.check("session: row")

    def learn(self, text: str | Sequence[int], context: int, name: str = "text") -> Source:
        """Read a text into the fast weights alone, as `ttt-jax memory read --context` does: from a
        context of its own, which starts anew every `context` tokens.

        What the stream holds stays as it is: positions, keys, values and tokens. Tokens behind the
        text's last whole chunk write nothing, and are nowhere then. After any error, and after a
        Ctrl-C, nothing is learnt.

        Args:
          context: tokens that attention sees at most; a multiple of the chunk.
          name: what a memory of the stream calls the text.

        Returns: what was read.
        Raises: UserError for several streams, with TTT off, for a context that does not fit, and
          for a text without a whole chunk; NotFiniteError.
        """
        if self.batch_size != 1:
            raise UserError(f"learn: the session has {self.batch_size} streams; use one of one")
        if not self.ttt:
            raise UserError("learn: the session is read with TTT off; switch it on")
        check_context(self.model, context)
        self.watch.check("session: row")
        (ids,) = token_rows(self.model, [text])
        if len(ids) < (C := self.model.config.ttt.chunk_size):
            raise UserError(
                f"learn: {len(ids):,} tokens are less than a chunk of {C}, nothing would be "
                "learnt; use a longer text, or read it without a context of its own"
            )
        before = self.start
        if self.state is not None:
            before = memory_of(no_memory(self.model), self.model, self.state, 0, self.learnt)
        reading = read_texts(
            self.model,
            [Text(name, ids)],
            piece=self.size,
            context=context,
            start=before,
            on_progress=self.on_read,
        )
        ((_, after),) = reading
        with HeldBack():
            self.holds_memory, self.learnt = True, after.sources
            if self.state is None:
                self.start = after
            else:  # what the stream began with is no more what it would begin with
                self.start, self.state = None, go_on_with(self.model, after, self.state)
        return after.terms[0].sources[-1]

    def branch(self, copies: int | None = None) -> Session:
        """A copy that goes its own way; a session of one stream can become `copies` equal
        streams.
        """
        if copies is not None and self.batch_size != 1:
            raise UserError(
                f"session: only one stream can be copied {copies} times, this one has "
                f"{self.batch_size}"
            )
        number = self.batch_size if copies is None else copies
        new = Session(self.model, number, ttt=self.ttt, piece=self.size)
        new.start, new.holds_memory, new.learnt = self.start, self.holds_memory, self.learnt
        new.digests = [d and d.copy() for d in self.digests * (copies or 1)]
        new.unread = [ids.copy() for ids in self.unread] * (copies or 1)
        new.position_B = np.tile(self.position_B, copies or 1)
        if self.state is not None:
            # Layer arrays are [repeats, count, B, ...]; jnp.repeat copies also when copies is 1.
            repeat = lambda x: jnp.repeat(x, copies or 1, axis=2)
            layers = jax.tree.map(repeat, self.state.layers)
            layers = jax.tree.map(
                lambda new, old: new.copy() if new is old else new, layers, self.state.layers
            )
            position_B = jnp.repeat(self.state.position_B, copies or 1)
            new.state = self.model.laid(State(position_B, layers, self.state.capacity))
        return new

    def memory(self, row: int | None = None, name: str = "session") -> Memory:
        """What a stream taught, as one term: its fast weights, and what it read.

        They are those behind the stream's last whole chunk, the token that is still unread counted
        as read. The stream stays as it is.

        Args:
          row: the stream; None: the only one.
          name: what the memory calls the stream among its sources.

        Raises: UserError without fast weights, or for a row that there is not; NotFiniteError.
        """
        if row is None and self.batch_size != 1:
            raise UserError(f"memory: the session has {self.batch_size} streams; give row=0 or so")
        row = 0 if row is None else _whole("row", row)
        if not 0 <= row < self.batch_size:
            raise UserError(f"row = {row}: the session has rows 0 to {self.batch_size - 1}")
        if not self.adapts:
            raise UserError("memory: the session was read with TTT off; nothing was written")
        C, session = self.model.config.ttt.chunk_size, self
        if (self.position_B[row] % C + len(self.unread[row])) // C:  # a chunk becomes whole
            session = self.branch()
            with HeldBack() as signals:
                session._feed(0, signals)
        session.watch.check("session: row")
        read = self.position_B[row] + len(self.unread[row])
        digest, ids = self.digests[row], None
        if digest is not None:
            digest = digest.copy()
            digest.update(self.unread[row])
            ids = digest.hexdigest()
        own = Source(name, int(read), int(read // C * C), ids)
        sources = (*self.learnt, own) if self.ttt else self.learnt
        if session.state is None and self.start is not None:
            return self.start
        return memory_of(no_memory(self.model), self.model, session.state, row, sources)

    def save(self, path: str | Path, conversation: dict[str, Any] | None = None) -> None:
        """Write everything to one safetensors file (session_file.py), with the turns of a
        conversation if there are any.

        Raises: CheckpointError when it cannot be written; NotFiniteError for numbers that are not
        finite.
        """
        self.watch.check("session: row")
        self._begin()
        stored = StoredSession(
            self.ttt,
            self.position_B,
            self.unread,
            self.state,
            conversation,
            self.holds_memory,
            self.learnt,
            self.digests,
        )
        save_session(stored, path, self.model)

    @classmethod
    def load(cls, path: str | Path, model: Transformer, *, piece: int | None = None) -> Session:
        """Go on where `save` left off. Raises CheckpointError when the file is damaged or of
        another model.
        """
        stored = load_session(path, model)
        session = cls(model, len(stored.unread), ttt=stored.ttt, piece=piece)
        session.position_B, session.unread = stored.position_B, stored.unread
        session.state, session.conversation = stored.state, stored.conversation
        session.holds_memory, session.learnt = stored.holds_memory, stored.learnt
        session.digests = stored.digests
        return session

    def generate(
        self,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        *,
        stop: str | Sequence[str] = (),
        eos_ids: int | Sequence[int] | None = None,
        seed: int | Sequence[int] = 0,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """Go on with each stream until it ends, a stop string appears or `max_new_tokens` are
        written.

        A row's result does not depend on the other rows. The new tokens belong to the stream: the
        next `read` follows them.

        Args:
          stop: a string that ends a row, or several; the completion's text is cut before it.
          eos_ids: tokens that end a row; None: those of the model's tokenizer and generation
            config; () for none.
          seed: of a row's randomness; one number gives row i the seed `seed + i`.
          on_text: called with (row, piece of text) as text comes. What it raises ends the
            generation and comes out of it,
            when the tokens that were on their way belong to the stream.

        Raises: UserError when a stream is empty, for stop strings without a tokenizer, for ids
          outside the vocabulary; NotFiniteError when a row's next token is not a number: its
          `partial` holds the completions so far.
        """
        B = self.batch_size
        max_new_tokens = _whole("max_new_tokens", max_new_tokens)
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
        empty = [b for b, ids in enumerate(self.unread) if not len(ids)]
        if empty:
            raise UserError(f"prompt: stream {empty[0]} is empty; read at least one token first")
        words, eos = stop_strings(stop), self._eos_ids(eos_ids)
        if (words or on_text) and self.model.tokenizer is None:
            raise UserError(
                "stop strings and streamed text need a tokenizer; put tokenizer.json into the "
                "model's folder"
            )
        seed_B = _seeds(seed, B)
        self.watch.check("session: row")
        writers = [Writer(self.model.tokenizer, words, set(eos), max_new_tokens) for _ in range(B)]
        self.written = []
        with HeldBack() as signals:
            start = time.perf_counter()
            logits_BV = self._feed(0, signals, room=max_new_tokens)
            decoding = Decoding(
                self,
                writers,
                seed_B=seed_B,
                sampling=sampling,
                eos=eos,
                signals=signals,
                on_text=on_text,
            )
            if not any(len(ids) for ids in self.unread):  # else a signal came while it read
                decoding.run(logits_BV, start)
                self.written = [writer.completion() for writer in writers]
        if decoding.failure is not None:
            raise decoding.failure
        completions = [writer.completion() for writer in writers]
        if self.watch.lost:
            row = min(self.watch.lost)
            where = f"row {row} after {len(writers[row].ids)} new tokens"
            error = not_finite(where, self.watch.lost[row])
            error.partial = completions
            raise error
        return completions

    def _eos_ids(self, eos_ids: int | Sequence[int] | None) -> tuple[int, ...]:
        if eos_ids is None:
            return model_eos_ids(self.model)
        ids = [eos_ids] if isinstance(eos_ids, (int, np.integer)) else list(eos_ids)
        return (
            tuple(check_ids([ids], self.model.config.vocab_size, "eos_ids")[0].tolist())
            if ids
            else ()
        )


def generate(
    model: Transformer,
    prompts: Any,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: str | Sequence[str] = (),
    eos_ids: int | Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    session: Session | None = None,
    ttt: bool = True,
    memory: Memory | None = None,
) -> list[Completion]:
    """Continue prompts, adapting while reading and writing (arXiv 2604.06169, section 3).

    Args:
      model: from `load_pretrained`.
      prompts: a text, chat messages, token ids (a list or an array [T]), or a list (or array
        [B, T]) of those; see `token_rows`. Lengths may differ; the result for a prompt does not
        depend on its batch mates.
      temperature, top_k, top_p, min_p: see `Sampling`; temperature 0 is greedy.
      stop, eos_ids, seed: see `Session.generate`.
      session: streams that the prompts continue (it advances); None starts fresh.
      ttt: False switches the adaptation off; a session keeps its own setting.
      memory: fast weights to begin with, see `Session`; not for a session.

    Returns: one `Completion` per prompt.
    Raises: UserError for prompts as `token_rows` does, and for settings out of range;
      NotFiniteError, see `Session.generate`.
    """
    rows = token_rows(model, prompts)
    sampling = Sampling(temperature, top_k, top_p, min_p)
    if session is not None and memory is not None:
        raise UserError("memory: a session has its own fast weights; pass the memory to Session")
    session = session or Session(model, len(rows), ttt=ttt, memory=memory)
    session.extend(rows)
    return session.generate(max_new_tokens, sampling, stop=stop, eos_ids=eos_ids, seed=seed)


def _seeds(seed: int | Sequence[int], B: int) -> jax.Array:
    """int32 [B]; one number gives row i the seed `seed + i`."""
    if isinstance(seed, (int, np.integer)):
        seeds = [int(seed) + b for b in range(B)]
    elif not isinstance(seed, Iterable):
        raise UserError(f"seed = {seed!r:.80}: must be a whole number, or one for each stream")
    else:
        seeds = [_whole("seed", n) for n in seed]
    if len(seeds) != B:
        raise UserError(
            f"seed: {len(seeds)} seeds for {B} streams; give one number or one for each stream"
        )
    return jnp.asarray([n % 2**31 for n in seeds], jnp.int32)


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name} = {value!r:.80}: must be a whole number") from None


def model_eos_ids(model: Transformer) -> tuple[int, ...]:
    """The tokens that end a text: those of the generation config, and the tokenizer's."""
    ids = set(model.eos_ids)
    if model.tokenizer is not None and model.tokenizer.eos_id is not None:
        ids.add(model.tokenizer.eos_id)
    return tuple(sorted(ids))
