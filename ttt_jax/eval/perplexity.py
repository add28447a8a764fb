"""Perplexity as the preceding context grows, and loss by position: TTT on, off, with another
document's fast weights, and with nothing but the fast weights.

B documents of a batch, L tokens read, K tokens of the scored block, P tokens of a piece. arXiv
2604.06169, section 4.

Definitions (docs/evaluation.md). A document's excerpt is its first Lmax + 1 tokens. At context
length L the model reads the last L of the first Lmax tokens from a fresh state; the loss is that of
the last K of them, each predicting its successor. So every length scores the *same* K tokens, and
only the context differs. By position: the excerpt is read once from its start.

The control "shuffled": everything is computed as with TTT on (this document's keys and values, its
pending chunk), but each scored chunk is read with the fast weights S of the next document in the
batch, read to the same position. The stream that is read on keeps its own S. What is left of TTT's
gain is not due to this document's content.

The mode "strict" reads the L - K tokens before the block with TTT on, then drops keys, values,
positions and the pending chunk, and scores the block with the fast weights S alone, which stay as
they are. "cold" scores the same block from a fresh state with S = 0. Their difference is what S
carries.

The mode "memory" is "off" with a memory that was read before: W + dW, and nothing is written.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ttt_jax.data.corpus import Corpus
from ttt_jax.errors import UserError
from ttt_jax.eval.documents import names_of
from ttt_jax.eval.reader import Reader
from ttt_jax.eval.statistics import mean_with_interval
from ttt_jax.eval.unfinished import Unfinished
from ttt_jax.inference.prefill import check_ids
from ttt_jax.memory.memory import Memory
from ttt_jax.model.transformer import Transformer

MODES = ("off", "on", "shuffled")
STRICT = ("strict", "cold")  # by length only: both drop what the text before has left in attention
_BUCKETS = 16


def check_lengths(lengths: Sequence[int], block: int | None) -> tuple[list[int], int]:
    """Return the sorted lengths and the block K (default: half the shortest length).

    Raises: UserError when a length is not longer than the block.
    """
    lengths = sorted(set(lengths))
    if not lengths or lengths[0] < 2:
        raise UserError(
            f"--lengths {','.join(map(str, lengths))}: give lengths of at least 2 tokens, such as "
            "2k,4k"
        )
    block = block or lengths[0] // 2
    if not 1 <= block < lengths[0]:
        raise UserError(
            f"--block {block}: must be shorter than the shortest of --lengths, {lengths[0]}"
        )
    return lengths, block


def batches(count: int, size: int, at_least: int) -> list[np.ndarray]:
    """Put the indices 0 to count - 1 in batches of about equal size, each of `at_least` or more;
    none is larger than the first.
    """
    parts = min(-(-count // size), max(1, count // at_least))
    return [part for part in np.array_split(np.arange(count), parts) if len(part)]


def filled_up(rows_BX: np.ndarray, size: int) -> np.ndarray:
    """Repeat the rows in order up to `size` of them, so that all batches run the same compiled
    programs.

    The last row's neighbour (its control's fast weights) stays the first row, as if none had been
    added.
    """
    return rows_BX[np.arange(size) % len(rows_BX)]


def evaluate(
    model: Transformer,
    corpus: Corpus,
    documents: Sequence[int],
    *,
    lengths: Sequence[int],
    block: int | None = None,
    modes: Sequence[str] = MODES,
    batch_size: int = 8,
    piece: int | None = None,
    memory: Memory | None = None,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
    kept: Unfinished | None = None,
) -> dict[str, Any]:
    """Measure the loss of a fixed final block for each context length, and by position.

    Args:
      documents: indices of documents with at least max(lengths) + 1 tokens.
      lengths: context lengths L.
      block: K, tokens whose loss is taken; None: half the shortest length.
      modes: some of "off", "memory", "on", "shuffled", and "strict", which brings "cold"; the order
        of the result.
      batch_size: documents read at once.
      memory: of the mode "memory", of this model.
      on_progress: called with the number of tokens read so far, over all modes.
      kept: batches that an earlier start finished, and where this one keeps its own.

    Returns: the "perplexity" part of results.json: `lengths` and `positions` with loss and interval
      per mode, `gain` (off - on) paired by document, the losses per document, and tokens per second
      after the first batch (None for one batch).
    Raises: UserError for lengths that do not fit, "shuffled" with fewer than two documents or
      without TTT layers; NotFiniteError, naming the document.
    """
    lengths, block = check_lengths(lengths, block)
    check_modes(model, modes, len(documents))
    through = [mode for mode in modes if mode not in STRICT]
    modes = [*through, *STRICT] if "strict" in modes else through
    kept = Unfinished(None, {}) if kept is None else kept
    reader, count = Reader(model, piece, memory), _Count(on_progress)
    reader.on_tokens = count.read
    starts = position_edges(lengths[-1], block)
    by_length = {mode: np.zeros((len(lengths), len(documents))) for mode in modes}
    by_position = {mode: np.zeros((len(starts) - 1, len(documents))) for mode in through}
    parts = batches(len(documents), batch_size, 2 if "shuffled" in modes else 1)
    for part in parts:
        names = [int(documents[i]) for i in part]
        rows = [np.asarray(corpus.tokens(document, 0, lengths[-1] + 1)) for document in names]
        rows = np.stack(check_ids(rows, model.config.vocab_size, "documents"))
        ids_BL1 = filled_up(rows, len(parts[0]))
        key = ("perplexity", *names, hashlib.sha256(rows.tobytes()).hexdigest())
        compute = functools.partial(
            _losses_of, reader, ids_BL1, names, lengths, block, modes, starts
        )
        with count.batch(len(part), tokens_to_read(lengths, block, modes)):
            found = kept.piece(key, compute)
        for mode in modes:
            by_length[mode][:, part] = found["lengths"][mode]
        for mode in through:
            by_position[mode][:, part] = found["positions"][mode]
    return {
        "block": block,
        "documents": names_of(corpus, documents),
        "tokens_read": count.total,
        "tokens_per_second": count.rate(),
        "modes": list(modes),
        "lengths": [{"length": L} | _entry(by_length, n, seed) for n, L in enumerate(lengths)],
        "positions": [
            {"start": start, "stop": stop} | _entry(by_position, n, seed)
            for n, (start, stop) in enumerate(itertools.pairwise(starts))
        ],
    }


class _Count:
    """Counts the tokens of all documents and modes, and how fast they are read.

    Attributes:
      total: tokens read, by an earlier start or by this one.
    """

    def __init__(self, on_progress: Callable[[int], None] | None) -> None:
        self.total, self._fresh, self._rows = 0, 0, 0
        self._on_progress = on_progress or (lambda tokens: None)
        # (seconds, tokens) when the first batch, which compiles, was done
        self._first: tuple[float, int] | None = None
        self._last = 0.0

    def read(self, tokens: int) -> None:
        """Add tokens of every document of the batch, read by this start."""
        self._fresh += tokens * self._rows
        self._add(tokens)

    @contextlib.contextmanager
    def batch(self, documents: int, tokens: int) -> Iterator[None]:
        """Count a batch, of which so many tokens per document are read, or were by an earlier
        start.
        """
        self._rows, before = documents, self.total
        yield
        if self.total == before:
            self._add(tokens)
        else:
            self._first = self._first or (time.perf_counter(), self._fresh)
        self._last = time.perf_counter()

    def rate(self) -> float | None:
        """Return tokens per second after the first batch; None when there was no other."""
        if self._first is None or self._fresh <= self._first[1]:
            return None
        return (self._fresh - self._first[1]) / (self._last - self._first[0])

    def _add(self, tokens: int) -> None:
        self.total += tokens * self._rows
        self._on_progress(self.total)


def _losses_of(
    reader: Reader,
    ids_BL1: np.ndarray,
    names: list[int],
    lengths: list[int],
    block: int,
    modes: Sequence[str],
    starts: list[int],
) -> dict[str, dict[str, list]]:
    """Compute the mean losses of the documents of a batch, the first `len(names)` rows: per mode,
    by length and by position.

    Raises: NotFiniteError.
    """
    longest = lengths[-1]
    found: dict[str, dict[str, list]] = {
        "lengths": {mode: [] for mode in modes},
        "positions": {mode: [] for mode in modes if mode not in STRICT},
    }

    def take(part: str, mode: str, losses_BX: np.ndarray) -> None:
        found[part][mode].append(reader.means(losses_BX, names, mode))

    if "strict" in modes:
        cold_BK = reader.cold_losses(ids_BL1, block)
        for L in lengths:
            take("lengths", "strict", reader.strict_losses(ids_BL1[:, longest - L :], block))
            take("lengths", "cold", cold_BK)
    modes = [mode for mode in modes if mode not in STRICT]
    for L in lengths[:-1]:
        for mode, losses_BK in reader.block_losses(ids_BL1[:, longest - L :], block, modes).items():
            take("lengths", mode, losses_BK)
    for mode, losses_BL in reader.position_losses(ids_BL1, modes).items():
        take("lengths", mode, losses_BL[:, -block:])
        for start, stop in itertools.pairwise(starts):
            take("positions", mode, losses_BL[:, start:stop])
    reader.check(names, len(ids_BL1))
    return found


def check_modes(model: Transformer, modes: Sequence[str], documents: int) -> None:
    """Raise UserError for modes that mean nothing here."""
    if "shuffled" in modes and documents < 2:
        raise UserError(
            "--shuffled: needs two documents that are long enough, there is one; give more or "
            "shorter --lengths"
        )
    if not model.config.ttt.layers and set(modes) != {"off"}:
        raise UserError(
            "--ttt: the model has no TTT layers (model.ttt.layers is empty); pass --ttt off"
        )


def position_edges(length: int, block: int) -> list[int]:
    """Choose at most 16 position ranges that are made of whole stretches of `block` tokens, counted
    from the end.
    """
    edges = sorted({0, *range(length, 0, -block)})
    step = -(-(len(edges) - 1) // _BUCKETS)
    return sorted({0, *edges[::-1][::step]})


def _entry(losses: dict[str, np.ndarray], n: int, seed: int) -> dict[str, Any]:
    entry: dict[str, Any] = {
        mode: mean_with_interval(values[n], seed=seed) for mode, values in losses.items()
    }
    for mode, gain in (("memory", "gain_memory"), ("on", "gain"), ("shuffled", "gain_shuffled")):
        if mode in losses and "off" in losses:
            entry[gain] = mean_with_interval(losses["off"][n] - losses[mode][n], seed=seed)
    if "strict" in losses:
        entry["gain_strict"] = mean_with_interval(
            losses["cold"][n] - losses["strict"][n], seed=seed
        )
    return entry | {"per_document": {mode: values[n].tolist() for mode, values in losses.items()}}


def tokens_to_read(lengths: Sequence[int], block: int | None, modes: Sequence[str]) -> int:
    """Count the tokens per document that `evaluate` reads, over all modes; those of the control
    count as often as they are read.
    """
    lengths, block = check_lengths(lengths, block)
    passes = ("off" in modes) + ("memory" in modes) + ("on" in modes or "shuffled" in modes)
    extra = ((len(lengths) - 1) * block * ("on" in modes) + lengths[-1]) * ("shuffled" in modes)
    strict = (sum(lengths) + block) * ("strict" in modes)
    return sum(lengths) * passes + extra + strict
