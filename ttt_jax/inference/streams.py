"""A batch of token streams: what has been read of them, what has not, and how more is read.

B batch, V vocabulary, L TTT layers.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.errors import UserError
from ttt_jax.inference.prefill import (
    Adapts,
    Frozen,
    Piece,
    needs_capacity,
    piece_size,
    pieces,
    read_piece,
    warn_past_positions,
    with_capacity,
)
from ttt_jax.inference.prompts import check_model, token_rows
from ttt_jax.inference.watch import Watch, warn_of_zero_targets
from ttt_jax.memory.fast_weights import check_belongs, start_with
from ttt_jax.memory.memory import Memory
from ttt_jax.memory.sources import IdsDigest, Source
from ttt_jax.model.transformer import State, Transformer
from ttt_jax.parallel.inference_mesh import warn_of_rows
from ttt_jax.process.interrupts import HeldBack

_ROUND_CAPACITY = 256  # KV slots: fewer shapes to compile for


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


class Streams:
    """Token streams that one model reads side by side. `Session` (generation.py) is what users see.

    Args:
      model, batch_size, ttt, piece, memory: as `Session`.

    Fields:
      learnt: sources of the fast weights that the streams began with.
      digests: of the tokens that each stream has read; None: not known.
    """

    def __init__(
        self,
        model: Transformer,
        batch_size: int = 1,
        *,
        ttt: bool = True,
        piece: int | None = None,
        memory: Memory | None = None,
    ) -> None:
        check_model(model)
        if not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise UserError(f"batch_size = {batch_size!r:.80}: must be a whole number, at least 1")
        if memory is not None:
            check_belongs(memory, model)
        self.model, self.ttt, self.start = model, ttt, memory
        self.holds_memory = memory is not None
        self.learnt: tuple[Source, ...] = () if memory is None else memory.sources
        self.digests: list[IdsDigest | None] = [IdsDigest() for _ in range(batch_size)]
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

    @property
    def adapts(self) -> Adapts:
        """Whether it writes; "frozen": a memory is applied, and nothing is written."""
        return self.ttt or ("frozen" if self.holds_memory else False)

    def extend(self, rows: Any) -> None:
        """Append to each stream without reading yet; `generate` reads what is unread. Raises as
        `read` does.
        """
        new = token_rows(self.model, rows)
        if len(new) != self.batch_size:
            raise UserError(
                f"prompts: {len(new)} for a session of {self.batch_size} streams; give one for each"
            )
        self.unread = [np.concatenate(pair) for pair in zip(self.unread, new, strict=True)]

    def _feed(self, keep: int, signals: HeldBack, room: int = 0) -> jax.Array:
        """Feed each row what is unread but its last `keep` tokens, until a signal is there; what is
        fed is not unread any more.

        Args:
          room: tokens that will follow.

        Returns: logits [B, V] after each row's last token.
        """
        cfg, B = self.model.config, self.batch_size
        warn_of_rows(B, self.model.runtime.parallel)
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
                logits_BV, ratio_LB = self._feed_piece(part, logits_BV)
                read_B = read_B + part.lengths_B
                self.watch.note(ratio_LB)
                if self.on_read is not None:
                    jax.block_until_ready(logits_BV)
                    self.on_read(int(read_B.max()))
        finally:
            self.position_B = self.position_B + read_B
            for b, n in enumerate(read_B):
                self.note_read(b, self.unread[b][:n])
            self.unread = [ids[n:] for ids, n in zip(self.unread, read_B, strict=True)]
        jax.block_until_ready(logits_BV)
        self.watch.settle()
        self.timings.read_tokens += int(read_B.sum())
        self.timings.read_seconds += time.perf_counter() - start
        return logits_BV

    def _feed_piece(self, part: Piece, logits_BV) -> tuple[jax.Array, jax.Array | None]:
        """Returns the logits [B, V] after each row's last token so far, and ||S||/||W|| [L, B]."""
        width, capacity = part.ids_BP.shape[1], None
        if needs_capacity(self.model):
            capacity = max(self._capacity, width)
        self._begin(width)
        # The padded width may be larger than the tokens that there was made room for.
        if self.state is not None:
            self.state = with_capacity(self.model, self.state, width)
        self.state, logits_BV, ratio_LB = read_piece(
            self.frozen,
            self.state,
            logits_BV,
            part.ids_BP,
            part.lengths_B,
            capacity=capacity,
            at_chunk_start=part.at_chunk_start,
            ttt=self.adapts,
        )
        return logits_BV, ratio_LB

    def _begin(self, width: int = 1) -> None:
        """Put the memory, if there is one, into the state of streams that have none yet."""
        if self.state is None and self.start is not None:
            capacity = max(self._capacity, width) if needs_capacity(self.model) else None
            self.state = start_with(self.model, self.start, self.batch_size, capacity)

    def note_read(self, row: int, ids: np.ndarray) -> None:
        """Take tokens that a stream has read, up to its position, into its digest. If they are not
        all of them, the digest is not known any more.
        """
        digest = self.digests[row]
        if digest is not None:
            digest.update(ids)
            self.digests[row] = digest if digest.tokens == self.position_B[row] else None

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
