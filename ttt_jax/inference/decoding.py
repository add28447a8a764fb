"""Writing: the programs that choose a token and read it, and the loop that runs them.

B batch, V vocabulary, L TTT layers, C chunk size.
"""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.inference.prefill import program, ttt_scale
from ttt_jax.inference.sampling import Sampling, sample
from ttt_jax.inference.streams import Streams
from ttt_jax.inference.watch import state_ratios
from ttt_jax.inference.writing import Writer
from ttt_jax.model.transformer import State
from ttt_jax.process.interrupts import HeldBack

_IN_FLIGHT = 3  # decode steps that the host dispatches before it looks at the first one's token


@functools.partial(jax.jit, static_argnames=("sampling", "eos"))
def first_token(
    logits_BV, position_B, alive_B, seed_B, *, sampling: Sampling, eos: tuple[int, ...]
):
    """Sample. Returns (token_B, logprob_B, alive_B before, alive_B after, None).

    A row that is not alive has written nothing. One whose log-probability is not finite ends.
    """
    token_B, logprob_B = sample(logits_BV, sampling, seed_B, position_B)
    ended_B = ~jnp.isfinite(logprob_B)
    for token in eos:
        ended_B |= token_B == token
    return token_B, logprob_B, alive_B, alive_B & ~ended_B, None


@program(("sampling", "eos", "ends_chunk", "ttt"))
def decode_step(model, state: State, token_B, alive_B, seed_B, *, sampling, eos, ends_chunk, ttt):
    """Read the token of each row that is alive, and sample the next.

    Returns: (state, as `first_token`, but last ||S||/||W|| [L, B] where a chunk may have been
      completed).
    """
    h_B1D, new_state, stats = model.hidden(
        token_B[:, None],
        state,
        lengths=alive_B.astype(jnp.int32),
        ttt_scale=ttt_scale(ttt),
        ends_chunk=ends_chunk,
    )
    logits_BV = model.runtime.parallel.lay(model.logits(h_B1D)[:, 0], (None, None))
    out = first_token(logits_BV, new_state.position_B, alive_B, seed_B, sampling=sampling, eos=eos)
    return new_state, (*out[:4], state_ratios(stats) if ends_chunk else None)


class Decoding:
    """Lets a writer for each stream write, starting from logits.

    Args:
      streams: read to their end; they are whole again after `run`.
      writers: one for each stream, of one limit and the same stop strings.
      seed_B: int32.
      eos: tokens that end a row.
      signals: ends the writing when one is requested.
      on_text: called with (row, piece of text).

    Fields:
      failure: what `on_text` raised; ends the writing.
    """

    def __init__(
        self,
        streams: Streams,
        writers: list[Writer],
        *,
        seed_B: jax.Array,
        sampling: Sampling,
        eos: tuple[int, ...],
        signals: HeldBack,
        on_text: Callable[[int, str], None] | None,
    ) -> None:
        self.streams, self.writers = streams, writers
        self.seed_B, self.sampling, self.eos = seed_B, sampling, eos
        self.signals, self.on_text = signals, on_text
        self.failure: BaseException | None = None
        # A stop string is found by the host, and nothing may be read behind it.
        self._synchronous = bool(writers[0].stop)
        ttt = streams.model.config.ttt
        self._clock_C = ttt.chunk_size if ttt.layers and streams.ttt else None
        self._in_flight: collections.deque[Any] = collections.deque()
        self._dispatched = 0

    def run(self, logits_BV, start: float) -> None:
        """Write until every row has ended, a signal came or `on_text` failed.

        Args:
          logits_BV: after each stream's last token.
          start: the clock (`time.perf_counter`) when the generation began.
        """
        self._first_token(logits_BV)
        first_seen = None
        while True:
            running_B = np.array([not writer.finish_reason for writer in self.writers])
            if self._may_dispatch(running_B):
                self._dispatch(running_B)
            elif self._in_flight:
                self._receive()
                first_seen = first_seen or time.perf_counter()
            else:
                break
        streams, writers = self.streams, self.writers
        assert streams.state is not None
        streams.position_B = np.asarray(streams.state.position_B).astype(np.int64)
        for b, writer in enumerate(writers):
            streams.note_read(b, np.array(writer.ids[:-1], np.int32))
            streams.unread[b] = np.array(writer.ids[-1:], np.int32)
            if not writer.finish_reason:
                writer.end("interrupted")
        end, timings = time.perf_counter(), streams.timings
        timings.first_token_seconds = (first_seen or end) - start
        timings.decode_tokens += sum(max(len(writer.ids) - 1, 0) for writer in writers)
        timings.decode_seconds += end - (first_seen or end)

    def _first_token(self, logits_BV) -> None:
        """Sample from the logits; rows whose numbers are lost end at once."""
        lost_B = np.array([b in self.streams.watch.lost for b in range(len(self.writers))])
        self._out = first_token(
            logits_BV,
            jnp.asarray(self.streams.position_B, jnp.int32),
            jnp.asarray(~lost_B),
            self.seed_B,
            sampling=self.sampling,
            eos=self.eos,
        )
        self._in_flight.append(self._out)
        self._dispatched = 1
        for b in np.flatnonzero(lost_B):
            self.writers[b].end("not_finite")

    def _may_dispatch(self, running_B) -> bool:
        return bool(
            running_B.any()
            and self._dispatched < self.writers[0].limit
            and not self.signals.requested
            and self.failure is None
            and len(self._in_flight) < (1 if self._synchronous else _IN_FLIGHT)
        )

    def _dispatch(self, running_B) -> None:
        """Start the step that reads the newest tokens, and samples the next."""
        streams, C = self.streams, self._clock_C
        assert streams.state is not None
        token_B, _, _, alive_B, _ = self._out
        ends_B = False if C is None else ((streams.position_B + 1) % C == 0)[running_B]
        streams.state, self._out = decode_step(
            streams.frozen,
            streams.state,
            token_B,
            alive_B,
            self.seed_B,
            sampling=self.sampling,
            eos=self.eos,
            ends_chunk=bool(np.any(ends_B)),
            ttt=streams.adapts,
        )
        streams.position_B += running_B
        self._in_flight.append(self._out)
        self._dispatched += 1

    def _receive(self) -> None:
        """Wait for the oldest step's tokens."""
        show = self.on_text if self.failure is None else None
        try:
            self._take(self._in_flight.popleft(), show)
        # What a caller's function raises must not leave half a stream behind.
        except BaseException as error:
            self.failure = error
        if self._synchronous:  # rows that the host has stopped stop on the device too
            still_B = np.array([not writer.finish_reason for writer in self.writers])
            still_B = self.streams.model.runtime.parallel.lay(still_B, (None,))
            self._out = (*self._out[:3], still_B, self._out[4])

    def _take(self, out, on_text: Callable[[int, str], None] | None) -> None:
        """Give each row that runs its token of one step, then show the text."""
        ids_B, logprobs_B, written_B = (np.asarray(x) for x in out[:3])
        watch = self.streams.watch
        if out[4] is not None:  # computed by the step that the tokens come from
            watch.look(out[4])
        texts = []
        for b, writer in enumerate(self.writers):
            if not written_B[b] or writer.finish_reason:
                continue
            if np.isfinite(logprobs_B[b]):
                texts.append((b, writer.add(int(ids_B[b]), float(logprobs_B[b]))))
            else:
                watch.lost.setdefault(b, f"the next token's log-probability is {logprobs_B[b]}")
            if b in watch.lost:
                texts.append((b, writer.end("not_finite")))
        for b, text in texts:
            if on_text is not None and text:
                on_text(b, text)
