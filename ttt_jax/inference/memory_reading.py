"""Reading texts for their memories: many rows side by side, any length, nothing kept but S.

B batch, C chunk size, P tokens of a piece.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ttt_jax.errors import UserError
from ttt_jax.inference.prefill import (
    Frozen,
    check_ids,
    needs_capacity,
    piece_size,
    pieces,
    read_piece,
    warn_past_positions,
)
from ttt_jax.inference.watch import Watch, warn_of_zero_targets
from ttt_jax.memory.fast_weights import memory_of, no_memory, only_fast_weights, start_with
from ttt_jax.memory.memory import Memory
from ttt_jax.memory.sources import IdsDigest, Source
from ttt_jax.model.transformer import State, Transformer
from ttt_jax.parallel.mesh import mesh_axes, model_shardings
from ttt_jax.parallel.shard_mapped import make_parallel


class Text(NamedTuple):
    """A text to read.

    Fields:
      name: what the memory calls it.
      ids: token ids: has a length, and slices that are integer arrays (one that lies on the disk is
        never in memory as a whole).
      file: SHA-256 of the file's bytes; None: it is no file.
    """

    name: str
    ids: Any
    file: str | None = None


def read_texts(
    model: Transformer,
    texts: Sequence[Text],
    *,
    batch_size: int = 8,
    piece: int | None = None,
    context: int | None = None,
    start: Memory | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Memory]]:
    """Read each text from a fresh state, and yield (its number, what it taught) as they are done,
    the longest first.

    Tokens behind a text's last whole chunk write nothing and are not read. The memory of the device
    does not depend on the length for layers with a sliding window. Layers with full attention keep
    all keys and values, unless `context` is given.

    Args:
      model: on one device, or on a mesh (`on_mesh`), whose devices then share the rows.
      batch_size: texts read side by side.
      piece: tokens of each that are read at a time; None: 8192, on CPUs 2048.
      context: attention and positions start anew every so many tokens, a multiple of the chunk; the
        fast weights go on. None: never.
      start: fast weights of this model that each text is read with from its beginning; they are in
        its memory, too.
      on_progress: called with the number of tokens read so far, of all texts.

    Raises: UserError for a context that does not fit, and for ids outside the vocabulary;
      NotFiniteError, naming the text.
    """
    check_context(model, context)
    none, learnt = no_memory(model), () if start is None else start.sources
    warn_of_zero_targets(model)
    reader, rows = (
        _Reader(model, piece, context, start, on_progress),
        _rows(model, batch_size, len(texts)),
    )
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].ids))
    for first in range(0, len(order), rows):
        chosen = order[first : first + rows]
        batch = [texts[i] for i in chosen]
        state = reader.read(batch, rows)
        for row, i in enumerate(chosen):
            sources = (*learnt, reader.source(texts[i], row))
            yield i, memory_of(none, model, state, row, sources)


def check_context(model: Transformer, context: int | None) -> None:
    """Raise UserError for a context that this model's chunks do not divide, and for a model without
    TTT layers.
    """
    C = model.config.ttt.chunk_size
    if not model.config.ttt.layers:
        raise UserError("memory: the model has no TTT layers (model.ttt.layers is empty)")
    if context is not None and (context < C or context % C):
        raise UserError(f"context = {context}: must be a multiple of model.ttt.chunk_size = {C}")


def on_mesh(model: Transformer, mesh: Mesh) -> Transformer:
    """Put the model on a mesh, to read rows side by side on its devices: a copy on each one of
    `data`, split over the other axes.
    """
    new = jax.tree.map(jax.device_put, model, model_shardings(model, mesh))
    new.runtime = dataclasses.replace(model.runtime, parallel=make_parallel(mesh))
    return new


def _rows(model: Transformer, batch_size: int, texts: int) -> int:
    """The rows of a batch: no more than there are texts, but as many for every device."""
    mesh = getattr(model.runtime.parallel, "mesh", None)
    shards = 1
    if mesh is not None:
        shards = int(np.prod([mesh.shape[axis] for axis in mesh_axes("batch", mesh)]))
    return -(-min(batch_size, texts) // shards) * shards


class _Reader:
    """Reads one batch after the other by the same programs."""

    def __init__(
        self,
        model: Transformer,
        piece: int | None,
        context: int | None,
        start: Memory | None,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self.model, self.frozen, self.context, self.start = model, Frozen(model), context, start
        self.chunk, self.size = model.config.ttt.chunk_size, piece_size(model, piece)
        self.on_progress = on_progress or (lambda tokens: None)
        self.tokens = 0
        self.digests: list[IdsDigest] = []

    def read(self, texts: list[Text], rows: int) -> State | None:
        """The state behind the whole chunks of some texts; None when there are none, and no fast
        weights to start with. Rows without a text read nothing.
        """
        self.digests = [IdsDigest() for _ in range(rows)]
        filled = [*texts, *[Text("", np.zeros(0, np.int32))] * (rows - len(texts))]
        whole = [len(text.ids) // self.chunk * self.chunk for text in filled]
        longest, watch, state = max(whole), Watch(self.model), None
        if self.start is not None:
            capacity = 1 if needs_capacity(self.model) else None
            state = start_with(self.model, self.start, rows, capacity)
        step = self.context or max(longest, 1)
        warn_past_positions(self.model, min(step, longest))
        for start in range(0, longest, step):
            parts = [
                _Part(text, start, min(n, start + step), self.model.config.vocab_size)
                for text, n in zip(filled, whole, strict=True)
            ]
            state = self._read_on(parts, state, min(step, longest), watch)
        watch.check("memory:", [text.name for text in filled])
        return state

    def source(self, text: Text, row: int) -> Source:
        """Say what was read of a text. The digest is of all its tokens, also those behind its last
        whole chunk.
        """
        digest, T = self.digests[row], len(text.ids)
        read = digest.tokens
        digest.update(_Part(text, read, T, self.model.config.vocab_size)[: T - read])
        return Source(text.name, T, read, digest.hexdigest(), text.file, self.context)

    def _read_on(self, rows, state: State | None, tokens: int, watch: Watch) -> State | None:
        """Read a part of each row from position 0, with the fast weights of the state."""
        B, zeros_B = len(rows), np.zeros(len(rows), np.int64)
        capacity = -(-tokens // self.size) * self.size if needs_capacity(self.model) else None
        if state is not None:
            state = only_fast_weights(self.model, state, B, capacity)
        logits_BV = jnp.zeros((B, self.model.config.vocab_size), jnp.float32)
        for part in pieces(rows, zeros_B, self.size, self.chunk):
            state, logits_BV, ratio_LB = read_piece(
                self.frozen,
                state,
                logits_BV,
                part.ids_BP,
                part.lengths_B,
                capacity=capacity,
                at_chunk_start=part.at_chunk_start,
                ttt=True,
            )
            for digest, ids_P, n in zip(self.digests, part.ids_BP, part.lengths_B, strict=True):
                digest.update(ids_P[:n])
            watch.note(ratio_LB)
            self.tokens += int(part.lengths_B.sum())
            self.on_progress(self.tokens)
        watch.settle()
        return state


class _Part:
    """Tokens `start` to `end` of a text, checked when they are sliced."""

    def __init__(self, text: Text, start: int, end: int, vocab_size: int) -> None:
        self.text, self.start, self.end, self.vocab_size = text, start, end, vocab_size

    def __len__(self) -> int:
        return max(self.end - self.start, 0)

    def __getitem__(self, place: slice) -> np.ndarray:
        first, last, _ = place.indices(len(self))
        if last <= first:
            return np.zeros(0, np.int32)
        ids = np.asarray(self.text.ids[self.start + first : self.start + last])
        return check_ids([ids], self.vocab_size, f"text {self.text.name}")[0]
