"""Generation: sessions that read and write, each row with its own fast weights, KV cache and chunk clock.

B batch, V vocabulary, C chunk size.

A session is a batch of token streams. `read` feeds tokens in pieces, `generate` goes on from there one token at a time. Updates
of the fast weights happen when a row completes a chunk, while it reads and while it writes. The last token of a stream stays
unread until something follows: its logits are computed when they are asked for.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.errors import UserError
from ttt_jax.model import State, Transformer
from ttt_jax.reading import (
    Frozen,
    check_ids,
    needs_capacity,
    piece_size,
    pieces,
    program,
    read_piece,
    ttt_scale,
    warn_past_positions,
    with_capacity,
)
from ttt_jax.sampling import Sampling, sample

GREEDY = Sampling()
_ROUND_CAPACITY = 256  # KV slots: fewer shapes to compile for
_IN_FLIGHT = 3  # decode steps that the host dispatches before it looks at the first one's token


@dataclasses.dataclass
class Completion:
    """What one row wrote.

    Fields:
      token_ids: the new tokens, the end token or those of the stop string included.
      logprobs: of each of them, under the model (before temperature and filters), nats.
      text: decoded, without special tokens and cut before the stop string; None without a tokenizer.
      finish_reason: "eos", "stop" or "length".
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str | None
    finish_reason: str


@dataclasses.dataclass
class Timings:
    """Seconds and tokens (summed over rows) of a session's reading and writing; compilation is included in the seconds."""

    read_tokens: int = 0
    read_seconds: float = 0.0
    first_token_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


class Session:
    """A batch of streams of one model: read, generate, branch, save.

    Args:
      model: from `load_pretrained`.
      batch_size: number of streams.
      ttt: False switches the adaptation off.
      piece: tokens read at a time, rounded to chunks; None: 8192, on CPUs 2048. Bounds the memory of reading.
    """

    def __init__(self, model: Transformer, batch_size: int = 1, *, ttt: bool = True, piece: int | None = None) -> None:
        self.model, self.ttt = model, ttt
        self.frozen = Frozen(model)
        self.size = piece_size(model, piece)
        self.state: State | None = None
        self.unread = [np.zeros((0,), np.int32) for _ in range(batch_size)]
        self.position_B = np.zeros(batch_size, np.int64)  # the host's copy, so that nothing waits for the device
        self.timings = Timings()
        self.on_read: Callable[[int], None] | None = None  # called with the tokens per row that one `read` has fed so far
        self._capacity = 0  # KV slots of a state that does not exist yet

    @property
    def batch_size(self) -> int:
        return len(self.unread)

    def read(self, rows: Sequence[str | Sequence[int] | np.ndarray]) -> None:
        """Append a text or token ids to each stream and read them, all but the last token.

        Raises: UserError for another number of rows, text without a tokenizer, ids outside the vocabulary.
        """
        self.extend(rows)
        self._read([ids[:-1] for ids in self.unread])
        self.unread = [ids[-1:] for ids in self.unread]

    def extend(self, rows: Sequence[str | Sequence[int] | np.ndarray]) -> None:
        """Append to each stream without reading yet; `generate` reads what is unread. Raises as `read` does."""
        if len(rows) != self.batch_size:
            raise UserError(f"prompts: {len(rows)} for a session of {self.batch_size} streams; give one for each")
        new = check_ids([self._encode(row) for row in rows], self.model.config.vocab_size, "prompt")
        self.unread = [np.concatenate(pair) for pair in zip(self.unread, new, strict=True)]

    def branch(self, copies: int | None = None) -> Session:
        """A copy that goes its own way; a session of one stream can become `copies` equal streams."""
        if copies is not None and self.batch_size != 1:
            raise UserError(f"session: only one stream can be copied {copies} times, this one has {self.batch_size}")
        new = Session(self.model, copies or self.batch_size, ttt=self.ttt, piece=self.size)
        new.unread = [ids.copy() for ids in self.unread] * (copies or 1)
        new.position_B = np.tile(self.position_B, copies or 1)
        if self.state is not None:
            # Layer arrays are [repeats, count, B, ...]; jnp.repeat copies also when copies is 1.
            repeat = lambda x: jnp.repeat(x, copies or 1, axis=2)
            layers = jax.tree.map(repeat, self.state.layers)
            layers = jax.tree.map(lambda new, old: new.copy() if new is old else new, layers, self.state.layers)
            new.state = State(jnp.repeat(self.state.position_B, copies or 1), layers, self.state.capacity)
        return new

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file (session_file.py). Raises CheckpointError when it cannot be written."""
        from ttt_jax.session_file import save_session

        save_session(self, path)

    @classmethod
    def load(cls, path: str | Path, model: Transformer, *, piece: int | None = None) -> Session:
        """Go on where `save` left off. Raises CheckpointError when the file is damaged or of another model."""
        from ttt_jax.session_file import load_session

        return load_session(path, model, piece=piece)

    def generate(
        self,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        *,
        stop: Sequence[str] = (),
        eos_ids: Sequence[int] | None = None,
        seed: int | Sequence[int] = 0,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """Go on with each stream until it ends, a stop string appears or `max_new_tokens` are written.

        A row's result does not depend on the other rows. The new tokens belong to the stream: the next `read` follows them.

        Args:
          stop: strings that end a row; the completion's text is cut before them.
          eos_ids: tokens that end a row; None: those of the model's tokenizer and generation config; () for none.
          seed: of a row's randomness; one number gives row i the seed `seed + i`.
          on_text: called with (row, piece of text) as text comes.

        Raises: UserError when a stream is empty, or for stop strings without a tokenizer.
        """
        B = self.batch_size
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
        empty = [b for b, ids in enumerate(self.unread) if not len(ids)]
        if empty:
            raise UserError(f"prompt: stream {empty[0]} is empty; read at least one token first")
        if (stop or on_text) and self.model.tokenizer is None:
            raise UserError("stop strings and streamed text need a tokenizer; put tokenizer.json into the model's folder")
        if any(not text for text in stop):
            raise UserError("stop: an empty string would end everything at once; leave it out")
        eos = model_eos_ids(self.model) if eos_ids is None else tuple(eos_ids)
        seeds = [seed + b for b in range(B)] if isinstance(seed, int) else list(seed)
        if len(seeds) != B:
            raise UserError(f"seed: {len(seeds)} seeds for {B} streams; give one number or one for each stream")
        seed_B = jnp.asarray(np.array(seeds) % 2**31, jnp.int32)
        writers = [_Writer(self.model.tokenizer, stop, set(eos), max_new_tokens) for _ in range(B)]

        start = time.perf_counter()
        logits_BV = self._read(self.unread, room=max_new_tokens)
        self.unread = [np.zeros((0,), np.int32) for _ in range(B)]
        alive_B = jnp.ones((B,), bool)
        position_B = jnp.asarray(self.position_B, jnp.int32)
        out = first_token(logits_BV, position_B, alive_B, seed_B, sampling=sampling, eos=eos)
        in_flight = collections.deque([out])
        dispatched, first_seen = 1, None
        synchronous = bool(stop)  # a stop string is found by the host, and nothing may be read behind it
        clock_C = self.model.config.ttt.chunk_size if self.model.config.ttt.layers and self.ttt else None
        while True:
            running = [not writer.finish_reason for writer in writers]
            if dispatched < max_new_tokens and any(running) and len(in_flight) < (1 if synchronous else _IN_FLIGHT):
                assert self.state is not None
                token_B, _, _, alive_B = out
                self.state, out = decode_step(
                    self.frozen,
                    self.state,
                    token_B,
                    alive_B,
                    seed_B,
                    sampling=sampling,
                    eos=eos,
                    ends_chunk=clock_C is not None and bool(((self.position_B + 1) % clock_C == 0)[running].any()),
                    ttt=self.ttt,
                )
                self.position_B += running
                in_flight.append(out)
                dispatched += 1
                continue
            if not in_flight:
                break
            ids_B, logprobs_B, written_B, _ = (np.asarray(x) for x in in_flight.popleft())
            first_seen = first_seen or time.perf_counter()
            for b, writer in enumerate(writers):
                if written_B[b] and not writer.finish_reason:
                    text = writer.add(int(ids_B[b]), float(logprobs_B[b]))
                    if on_text is not None and text:
                        on_text(b, text)
            if synchronous:  # rows that the host has stopped stop on the device too
                still_B = np.array([not writer.finish_reason for writer in writers])
                out = (*out[:3], jnp.asarray(still_B))
        assert self.state is not None
        self.position_B = np.asarray(self.state.position_B).astype(np.int64)
        for b, writer in enumerate(writers):
            self.unread[b] = np.array(writer.ids[-1:], np.int32)
        end = time.perf_counter()
        self.timings.first_token_seconds = (first_seen or end) - start
        self.timings.decode_tokens += sum(len(writer.ids) - 1 for writer in writers)
        self.timings.decode_seconds += end - (first_seen or end)
        return [writer.completion() for writer in writers]

    def _encode(self, row: str | Sequence[int] | np.ndarray) -> Any:
        if not isinstance(row, str):
            return row
        if self.model.tokenizer is None:
            raise UserError("prompt: text needs a tokenizer; put tokenizer.json into the model's folder or pass token ids")
        ids = self.model.tokenizer.encode(row)
        if not ids:
            raise UserError("prompt: the text is empty; give at least one token")
        return ids

    def _read(self, rows: Sequence[np.ndarray], room: int = 0) -> jax.Array:
        """Feed each row its ids; logits after each row's last token. `room`: tokens that will follow."""
        cfg, B = self.model.config, self.batch_size
        start = time.perf_counter()
        logits_BV = jnp.zeros((B, cfg.vocab_size), jnp.float32)
        longest = max(int(p) + len(row) for p, row in zip(self.position_B, rows, strict=True)) + room
        warn_past_positions(self.model, longest - min(room, 1))  # the last new token stays unread
        if needs_capacity(self.model):
            self._make_room(longest)
        for part in pieces(rows, self.position_B, self.size, cfg.ttt.chunk_size):
            if self.state is not None and self.state.capacity is not None:  # the padded width may be larger
                self.state = with_capacity(self.model, self.state, part.ids_BP.shape[1])
            self.state, logits_BV = read_piece(
                self.frozen,
                self.state,
                logits_BV,
                part.ids_BP,
                part.lengths_B,
                capacity=max(self._capacity, part.ids_BP.shape[1]) if needs_capacity(self.model) else None,
                at_chunk_start=part.at_chunk_start,
                ttt=self.ttt,
            )
            if self.on_read is not None:
                jax.block_until_ready(logits_BV)
                self.on_read(part.start + int(part.lengths_B.max()))
        self.position_B = self.position_B + np.array([len(row) for row in rows])
        jax.block_until_ready(logits_BV)
        self.timings.read_tokens += sum(len(row) for row in rows)
        self.timings.read_seconds += time.perf_counter() - start
        return logits_BV

    def _make_room(self, tokens: int) -> None:
        """Let the caches hold `tokens` positions; they at least double, so that a long session grows them seldom."""
        rounded = -(-tokens // _ROUND_CAPACITY) * _ROUND_CAPACITY
        if self.state is None:
            self._capacity = rounded
        elif self.state.capacity is not None and self.state.capacity < rounded:
            self.state = with_capacity(self.model, self.state, max(rounded, 2 * self.state.capacity))


class _Writer:
    """One row's tokens, and its text as it becomes readable."""

    def __init__(self, tokenizer, stop: Sequence[str], eos: set[int], limit: int) -> None:
        self.tokenizer, self.stop, self.eos, self.limit = tokenizer, tuple(stop), eos, limit
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason = ""
        self.text = ""
        self._context, self._read = 0, 0  # tokens before `_read` are in the text; decoding starts at `_context`, for spaces
        self._shown = 0  # characters handed out

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
        before = self.tokenizer.decode(self.ids[self._context : self._read])
        now = self.tokenizer.decode(self.ids[self._context :])
        if self.finish_reason or not now.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character may be incomplete
            self.text += now[len(before) :]
            self._context, self._read = self._read, len(self.ids)
        cuts = [at for at in map(self.text.find, self.stop) if at >= 0]
        held = 0
        if cuts:
            self.finish_reason, self.text = "stop", self.text[: min(cuts)]
        elif not self.finish_reason:  # the end of the text may be the beginning of a stop string
            held = max((n for word in self.stop for n in range(1, len(word)) if self.text.endswith(word[:n])), default=0)
        piece = self.text[self._shown : len(self.text) - held]
        self._shown += len(piece)
        return piece

    def completion(self) -> Completion:
        text = None if self.tokenizer is None else self.text
        return Completion(self.ids, self.logprobs, text, self.finish_reason or "length")


def generate(
    model: Transformer,
    prompts: str | Sequence[Any],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: Sequence[str] = (),
    eos_ids: Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    session: Session | None = None,
    ttt: bool = True,
) -> list[Completion]:
    """Continue prompts, adapting while reading and writing (arXiv 2604.06169, section 3).

    Args:
      model: from `load_pretrained`.
      prompts: a text, a list of texts, a list of token ids, or a list (or array [B, T]) of those. Lengths may differ; the
        result for a prompt does not depend on its batch mates.
      temperature, top_k, top_p, min_p: see `Sampling`; temperature 0 is greedy.
      stop, eos_ids, seed: see `Session.generate`.
      session: streams that the prompts continue (it advances); None starts fresh.
      ttt: False switches the adaptation off; a session keeps its own setting.

    Returns: one `Completion` per prompt.
    Raises: UserError for empty prompts, ids outside the vocabulary, settings out of range.
    """
    rows = _as_rows(prompts)
    sampling = Sampling(temperature, top_k, top_p, min_p)
    session = session or Session(model, len(rows), ttt=ttt)
    session.extend(rows)
    return session.generate(max_new_tokens, sampling, stop=stop, eos_ids=eos_ids, seed=seed)


def _as_rows(prompts: str | Sequence[Any]) -> list[Any]:
    if isinstance(prompts, str):
        return [prompts]
    rows = list(prompts)
    if not rows:
        raise UserError("prompts: none given; pass a text or token ids")
    return [rows] if all(isinstance(x, (int, np.integer)) for x in rows) else rows


def model_eos_ids(model: Transformer) -> tuple[int, ...]:
    """The tokens that end a text: those of the generation config, and the tokenizer's."""
    ids = set(model.eos_ids)
    if model.tokenizer is not None and model.tokenizer.eos_id is not None:
        ids.add(model.tokenizer.eos_id)
    return tuple(sorted(ids))


# ------------------------------------------------------------------------------------------------------------ programs


@functools.partial(jax.jit, static_argnames=("sampling", "eos"))
def first_token(logits_BV, position_B, alive_B, seed_B, *, sampling: Sampling, eos: tuple[int, ...]):
    """Sample. Returns (token_B, logprob_B, alive_B before, alive_B after): a row that is not alive has written nothing."""
    token_B, logprob_B = sample(logits_BV, sampling, seed_B, position_B)
    ended_B = jnp.zeros_like(alive_B)
    for token in eos:
        ended_B |= token_B == token
    return token_B, logprob_B, alive_B, alive_B & ~ended_B


@program(("sampling", "eos", "ends_chunk", "ttt"))
def decode_step(model, state: State, token_B, alive_B, seed_B, *, sampling, eos, ends_chunk, ttt):
    """Read the token of each row that is alive, and sample the next. Returns (state, as `first_token`)."""
    h_B1D, new_state, _ = model.hidden(
        token_B[:, None], state, lengths=alive_B.astype(jnp.int32), ttt_scale=ttt_scale(ttt), ends_chunk=ends_chunk
    )
    logits_BV = model.logits(h_B1D)[:, 0]
    return new_state, first_token(logits_BV, new_state.position_B, alive_B, seed_B, sampling=sampling, eos=eos)
