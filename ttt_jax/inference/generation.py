"""Generation: sessions that read and write, each row with its own fast weights, KV cache and chunk
clock.

B batch, V vocabulary, C chunk size.

A session is a batch of token streams. `read` feeds tokens in pieces, `generate` goes on from there
one token at a time. Updates of the fast weights happen when a row completes a chunk, while it reads
and while it writes. The last token of a stream stays unread until something follows: its logits are
computed when they are asked for.
"""

from __future__ import annotations

import collections
import dataclasses
import operator
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.errors import UserError
from ttt_jax.inference.decoding import decode_step, first_token
from ttt_jax.inference.prefill import (
    Frozen,
    check_ids,
    needs_capacity,
    piece_size,
    pieces,
    read_piece,
    warn_past_positions,
    with_capacity,
)
from ttt_jax.inference.sampling import Sampling
from ttt_jax.inference.watch import Watch, not_finite, warn_of_zero_targets
from ttt_jax.inference.writing import Completion, Writer, stop_strings
from ttt_jax.model.transformer import State, Transformer
from ttt_jax.process.interrupts import HeldBack

GREEDY = Sampling()
_ROUND_CAPACITY = 256  # KV slots: fewer shapes to compile for
_IN_FLIGHT = 3  # decode steps that the host dispatches before it looks at the first one's token


@dataclasses.dataclass
class Timings:
    """Seconds and tokens (summed over rows) of a session's reading and writing; compilation is
    included in the seconds.
    """

    read_tokens: int = 0
    read_seconds: float = 0.0
    first_token_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


class Session:
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
    """

    def __init__(
        self, model: Transformer, batch_size: int = 1, *, ttt: bool = True, piece: int | None = None
    ) -> None:
        self.model, self.ttt = model, ttt
        self.frozen = Frozen(model)
        self.size = piece_size(model, piece)
        self.state: State | None = None
        self.unread = [np.zeros((0,), np.int32) for _ in range(batch_size)]
        # the host's copy, so that nothing waits for the device
        self.position_B = np.zeros(batch_size, np.int64)
        self.timings = Timings()
        self.watch = Watch(model)
        if ttt:
            warn_of_zero_targets(model)
        # called with the tokens per row that one `read` has fed so far
        self.on_read: Callable[[int], None] | None = None
        self._capacity = 0  # KV slots of a state that does not exist yet

    @property
    def batch_size(self) -> int:
        return len(self.unread)

    def read(self, rows: Sequence[str | Sequence[int] | np.ndarray]) -> None:
        """Append a text or token ids to each stream and read them, all but the last token.

        Raises: UserError for another number of rows, text without a tokenizer, ids outside the
        vocabulary; NotFiniteError.
        """
        self.extend(rows)
        with HeldBack() as signals:
            self._read(1, signals)
        self.watch.check("session: row")

    def extend(self, rows: Sequence[str | Sequence[int] | np.ndarray]) -> None:
        """Append to each stream without reading yet; `generate` reads what is unread. Raises as
        `read` does.
        """
        if len(rows) != self.batch_size:
            raise UserError(
                f"prompts: {len(rows)} for a session of {self.batch_size} streams; give one for "
                "each"
            )
        new = check_ids([self._encode(row) for row in rows], self.model.config.vocab_size, "prompt")
        self.unread = [np.concatenate(pair) for pair in zip(self.unread, new, strict=True)]

    def branch(self, copies: int | None = None) -> Session:
        """A copy that goes its own way; a session of one stream can become `copies` equal
        streams.
        """
        if copies is not None and self.batch_size != 1:
            raise UserError(
                f"session: only one stream can be copied {copies} times, this one has "
                f"{self.batch_size}"
            )
        new = Session(self.model, copies or self.batch_size, ttt=self.ttt, piece=self.size)
        new.unread = [ids.copy() for ids in self.unread] * (copies or 1)
        new.position_B = np.tile(self.position_B, copies or 1)
        if self.state is not None:
            # Layer arrays are [repeats, count, B, ...]; jnp.repeat copies also when copies is 1.
            repeat = lambda x: jnp.repeat(x, copies or 1, axis=2)
            layers = jax.tree.map(repeat, self.state.layers)
            layers = jax.tree.map(
                lambda new, old: new.copy() if new is old else new, layers, self.state.layers
            )
            new.state = State(
                jnp.repeat(self.state.position_B, copies or 1), layers, self.state.capacity
            )
        return new

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file (session_file.py). Raises CheckpointError when
        it cannot be written.
        """
        from ttt_jax.inference.session_file import save_session

        save_session(self, path)

    @classmethod
    def load(cls, path: str | Path, model: Transformer, *, piece: int | None = None) -> Session:
        """Go on where `save` left off. Raises CheckpointError when the file is damaged or of
        another model.
        """
        from ttt_jax.inference.session_file import load_session

        return load_session(path, model, piece=piece)

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
        outside the vocabulary;
          NotFiniteError when a row's next token is not a number: its `partial` holds the
          completions so far.
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
        one = isinstance(seed, (int, np.integer))
        seeds = [int(seed) + b for b in range(B)] if one else [_whole("seed", n) for n in seed]  # pyright: ignore
        if len(seeds) != B:
            raise UserError(
                f"seed: {len(seeds)} seeds for {B} streams; give one number or one for each stream"
            )
        self.watch.check("session: row")
        writers = [Writer(self.model.tokenizer, words, set(eos), max_new_tokens) for _ in range(B)]
        failure = None
        with HeldBack() as signals:
            start = time.perf_counter()
            logits_BV = self._read(0, signals, room=max_new_tokens)
            if not any(len(ids) for ids in self.unread):  # else a signal came while it read
                seed_B = jnp.asarray([n % 2**31 for n in seeds], jnp.int32)
                failure = self._write(
                    logits_BV, writers, seed_B, sampling, eos, signals, on_text, start
                )
        if failure is not None:
            raise failure
        completions = [writer.completion() for writer in writers]
        if self.watch.lost:
            row = min(self.watch.lost)
            error = not_finite(
                f"row {row} after {len(writers[row].ids)} new tokens", self.watch.lost[row]
            )
            error.partial = completions
            raise error
        return completions

    def _write(
        self,
        logits_BV,
        writers: list[Writer],
        seed_B,
        sampling: Sampling,
        eos: tuple[int, ...],
        signals: HeldBack,
        on_text: Callable[[int, str], None] | None,
        start: float,
    ) -> BaseException | None:
        """Let the writers write, starting from logits; returns what `on_text` raised. The streams
        are whole afterwards.
        """
        lost_B = np.array([b in self.watch.lost for b in range(len(writers))])
        out = first_token(
            logits_BV,
            jnp.asarray(self.position_B, jnp.int32),
            jnp.asarray(~lost_B),
            seed_B,
            sampling=sampling,
            eos=eos,
        )
        in_flight = collections.deque([out])
        dispatched, first_seen, failure = 1, None, None
        for b in np.flatnonzero(lost_B):
            writers[b].end("not_finite")
        # a stop string is found by the host, and nothing may be read behind it
        synchronous = bool(writers[0].stop)
        clock_C = (
            self.model.config.ttt.chunk_size if self.model.config.ttt.layers and self.ttt else None
        )
        while True:
            running = np.array([not writer.finish_reason for writer in writers])
            go_on = (
                running.any()
                and dispatched < writers[0].limit
                and not signals.requested
                and failure is None
            )
            if go_on and len(in_flight) < (1 if synchronous else _IN_FLIGHT):
                assert self.state is not None
                token_B, _, _, alive_B, _ = out
                self.state, out = decode_step(
                    self.frozen,
                    self.state,
                    token_B,
                    alive_B,
                    seed_B,
                    sampling=sampling,
                    eos=eos,
                    ends_chunk=clock_C is not None
                    and bool(((self.position_B + 1) % clock_C == 0)[running].any()),
                    ttt=self.ttt,
                )
                self.position_B += running
                in_flight.append(out)
                dispatched += 1
                continue
            if not in_flight:
                break
            show = on_text if failure is None else None
            try:
                self._take(in_flight.popleft(), writers, show)
            # what a caller's function raises must not leave half a stream behind
            except BaseException as error:
                failure = error
            first_seen = first_seen or time.perf_counter()
            if synchronous:  # rows that the host has stopped stop on the device too
                still_B = np.array([not writer.finish_reason for writer in writers])
                out = (*out[:3], jnp.asarray(still_B), out[4])
        assert self.state is not None
        self.position_B = np.asarray(self.state.position_B).astype(np.int64)
        for b, writer in enumerate(writers):
            self.unread[b] = np.array(writer.ids[-1:], np.int32)
            if not writer.finish_reason:
                writer.end("interrupted")
        end = time.perf_counter()
        self.timings.first_token_seconds = (first_seen or end) - start
        self.timings.decode_tokens += sum(max(len(writer.ids) - 1, 0) for writer in writers)
        self.timings.decode_seconds += end - (first_seen or end)
        return failure

    def _take(self, out, writers: list[Writer], on_text: Callable[[int, str], None] | None) -> None:
        """Give each row that runs its token of one step, then show the text."""
        ids_B, logprobs_B, written_B = (np.asarray(x) for x in out[:3])
        if out[4] is not None:  # computed by the step that the tokens come from
            self.watch.look(out[4])
        pieces = []
        for b, writer in enumerate(writers):
            if not written_B[b] or writer.finish_reason:
                continue
            if np.isfinite(logprobs_B[b]):
                pieces.append((b, writer.add(int(ids_B[b]), float(logprobs_B[b]))))
            else:
                self.watch.lost.setdefault(
                    b, f"the next token's log-probability is {logprobs_B[b]}"
                )
            if b in self.watch.lost:
                pieces.append((b, writer.end("not_finite")))
        for b, text in pieces:
            if on_text is not None and text:
                on_text(b, text)

    def _eos_ids(self, eos_ids: int | Sequence[int] | None) -> tuple[int, ...]:
        if eos_ids is None:
            return model_eos_ids(self.model)
        ids = [eos_ids] if isinstance(eos_ids, (int, np.integer)) else list(eos_ids)
        return (
            tuple(check_ids([ids], self.model.config.vocab_size, "eos_ids")[0].tolist())
            if ids
            else ()
        )

    def _encode(self, row: str | Sequence[int] | np.ndarray) -> Any:
        if not isinstance(row, str):
            return row
        if self.model.tokenizer is None:
            raise UserError(
                "prompt: text needs a tokenizer; put tokenizer.json into the model's folder or "
                "pass token ids"
            )
        ids = self.model.tokenizer.encode(row)
        if not ids:
            raise UserError("prompt: the text is empty; give at least one token")
        return ids

    def _read(self, keep: int, signals: HeldBack, room: int = 0) -> jax.Array:
        """Feed each row what is unread but its last `keep` tokens, until a signal is there; what is
        fed is not unread any more.

        Args:
          room: tokens that will follow.

        Returns: logits [B, V] after each row's last token.
        """
        cfg, B = self.model.config, self.batch_size
        start = time.perf_counter()
        rows = [ids[: len(ids) - keep] for ids in self.unread]
        logits_BV = jnp.zeros((B, cfg.vocab_size), jnp.float32)
        longest = (
            max(int(p) + len(row) for p, row in zip(self.position_B, rows, strict=True)) + room
        )
        warn_past_positions(self.model, longest - min(room, 1))  # the last new token stays unread
        if needs_capacity(self.model):
            self._make_room(longest)
        read_B = np.zeros(B, np.int64)
        try:
            for part in pieces(rows, self.position_B, self.size, cfg.ttt.chunk_size):
                if signals.requested:
                    break
                # the padded width may be larger
                if self.state is not None and self.state.capacity is not None:
                    self.state = with_capacity(self.model, self.state, part.ids_BP.shape[1])
                self.state, logits_BV, ratio_LB = read_piece(
                    self.frozen,
                    self.state,
                    logits_BV,
                    part.ids_BP,
                    part.lengths_B,
                    capacity=max(self._capacity, part.ids_BP.shape[1])
                    if needs_capacity(self.model)
                    else None,
                    at_chunk_start=part.at_chunk_start,
                    ttt=self.ttt,
                )
                read_B = read_B + part.lengths_B
                self.watch.note(ratio_LB)
                if self.on_read is not None:
                    jax.block_until_ready(logits_BV)
                    self.on_read(int(read_B.max()))
        finally:
            self.position_B = self.position_B + read_B
            self.unread = [ids[n:] for ids, n in zip(self.unread, read_B, strict=True)]
        jax.block_until_ready(logits_BV)
        self.watch.settle()
        self.timings.read_tokens += int(read_B.sum())
        self.timings.read_seconds += time.perf_counter() - start
        return logits_BV

    def _make_room(self, tokens: int) -> None:
        """Let the caches hold `tokens` positions; they at least double, so that a long session
        grows them seldom.
        """
        rounded = -(-tokens // _ROUND_CAPACITY) * _ROUND_CAPACITY
        if self.state is None:
            self._capacity = rounded
        elif self.state.capacity is not None and self.state.capacity < rounded:
            self.state = with_capacity(
                self.model, self.state, max(rounded, 2 * self.state.capacity)
            )


def generate(
    model: Transformer,
    prompts: str | Sequence[Any],
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
) -> list[Completion]:
    """Continue prompts, adapting while reading and writing (arXiv 2604.06169, section 3).

    Args:
      model: from `load_pretrained`.
      prompts: a text, a list of texts, a list of token ids, or a list (or array [B, T]) of those.
        Lengths may differ; the result for a prompt does not depend on its batch mates.
      temperature, top_k, top_p, min_p: see `Sampling`; temperature 0 is greedy.
      stop, eos_ids, seed: see `Session.generate`.
      session: streams that the prompts continue (it advances); None starts fresh.
      ttt: False switches the adaptation off; a session keeps its own setting.

    Returns: one `Completion` per prompt.
    Raises: UserError for empty prompts, ids outside the vocabulary, settings out of range;
    NotFiniteError, see
      `Session.generate`.
    """
    rows = _as_rows(prompts)
    sampling = Sampling(temperature, top_k, top_p, min_p)
    session = session or Session(model, len(rows), ttt=ttt)
    session.extend(rows)
    return session.generate(max_new_tokens, sampling, stop=stop, eos_ids=eos_ids, seed=seed)


def _as_rows(prompts: str | Sequence[Any]) -> list[Any]:
    if isinstance(prompts, str):
        return [prompts]
    try:
        rows = list(prompts)
    except TypeError:
        raise UserError(
            f"prompts = {prompts!r:.80}: give a text, token ids, or a list of those"
        ) from None
    if not rows:
        raise UserError("prompts: none given; pass a text or token ids")
    return [rows] if all(isinstance(x, (int, np.integer)) for x in rows) else rows


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
