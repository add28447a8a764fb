"""The training stream and the held-out rows that a `Config` describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from ttt_jax.config import Config
from ttt_jax.data.corpus import Corpus, load_corpus
from ttt_jax.data.heldout import split
from ttt_jax.data.packing import (
    OPEN_BINS,
    PATIENCE,
    PackedRows,
    PieceTable,
    SlotPlan,
    cut_pieces,
    render_row,
)
from ttt_jax.data.quarantine import Rejected
from ttt_jax.data.source_files import STDLIB
from ttt_jax.data.tokenizer import Tokenizer
from ttt_jax.errors import DataError

Batch = dict[str, np.ndarray]
_FIELDS = ("ids", "targets", "weights", "segment_ids", "positions")
_STATE_VERSION = 1
_NAMES = {
    "data": "the training documents (names or lengths)",
    "content": "the content of training documents",
    "heldout": "the held-out documents",
}
_NEWER = ("content", "heldout")  # what states of older versions do not have
_DAMAGED = "data state: damaged; go on from another checkpoint"


@dataclasses.dataclass(frozen=True)
class DataSummary:
    """What `check_data` found."""

    train_documents: int
    train_tokens: int
    heldout_documents: int
    heldout_tokens: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where tokens of a batch come from."""

    row: int  # of the global batch
    file: str
    # index of the record in the file, from 0, malformed ones counted (JSONL: of the lines that are
    # not blank)
    document: int
    start: int  # first token in the document
    tokens: int


class Loader(Iterator[Batch]):
    """An endless iterator over this process' rows of every batch.

    A batch holds, for `b` rows (data.batch_size, unless processes share them out) of `T =
    data.seq_len` tokens:

      ids          int32 [b, T]    token ids; padding holds the end token (or 0)
      targets      int32 [b, T]    the next token of the same document
      weights      float32 [b, T]  1 where the target is real, else 0
      segment_ids  int32 [b, T]    documents of a row from 1; 0 is padding
      positions    int32 [b, T]    from 0 in each document

    The global batch does not depend on how processes and `data.workers` share its rows out.
    """

    def __init__(
        self,
        config: Config,
        table: PieceTable,
        *,
        tokenizer: Tokenizer,
        slots: Sequence[int],
        heldout: Corpus,
    ) -> None:
        data = config.data
        rows = len(slots)
        self._table = table
        self._total_slots = data.batch_size
        self._slots = tuple(slots)
        # Each worker serves its own slots, so their number has to divide the rows; the stream does
        # not depend on it.
        self._workers = next((n for n in range(min(data.workers, rows), 0, -1) if rows % n == 0), 0)
        order = grain.MapDataset.range(len(table))
        if data.shuffle:
            order = order.shuffle(seed=config.seed % 2**32)
        self._order = order.repeat(None)  # reshuffles with another seed in each epoch
        self._identity = {
            "data": table.corpus.fingerprint(),
            "content": table.corpus.content(),
            "heldout": heldout.fingerprint() + heldout.content(),
            "data.tokenizer": tokenizer.fingerprint,
            "data.seq_len": data.seq_len,
            "data.batch_size": data.batch_size,
            "data.pack": data.pack,
            "data.shuffle": data.shuffle,
            "seed": config.seed,
            "model.ttt.chunk_size": config.model.ttt.chunk_size,
            "open rows": [OPEN_BINS, PATIENCE],
        }
        self._rows_done = 0
        self._states: dict[int, dict[str, Any]] = {}
        self._pieces: dict[int, list[int]] = {}
        self._rows: grain.DatasetIterator | None = None

    @property
    def batches_done(self) -> int:
        """Batches delivered so far, over all runs that this state has been through."""
        return self._rows_done

    def __next__(self) -> Batch:
        if self._rows is None:
            self._rows = self._start()
        rows = []
        for slot in self._slots:
            row = next(self._rows)
            if row["slot"] != slot:
                raise RuntimeError(f"rows out of order: slot {row['slot']} came instead of {slot}")
            rows.append(row)
        self._states = {row["slot"]: row["state"] for row in rows}
        self._pieces = {row["slot"]: row["pieces"] for row in rows}
        self._rows_done += 1
        return {name: np.stack([row[name] for row in rows]) for name in _FIELDS}

    @property
    def pieces(self) -> dict[int, list[int]]:
        """Row of the global batch -> numbers of the pieces in it, for this process' rows of the
        last batch.
        """
        return self._pieces

    def documents(self, pieces: dict[int, list[int]]) -> list[Piece]:
        """Return the documents behind `pieces`, in the order of rows and of places in a row."""
        table = self._table
        flat = [(row, piece) for row, numbers in sorted(pieces.items()) for piece in numbers]
        document_P = table.document_P[[piece for _, piece in flat]] if flat else []
        names = table.corpus.locate(table.corpus.key_N[document_P]) if flat else []
        return [
            Piece(row, file, index, int(table.start_P[piece]), int(table.length_P[piece]))
            for (row, piece), (file, index) in zip(flat, names, strict=True)
        ]

    def get_state(self) -> dict[str, Any]:
        """Return where the stream stands after the last batch; JSON-serialisable."""
        return {
            "version": _STATE_VERSION,
            "identity": dict(self._identity),
            "batches": self._rows_done,
            "slots": {str(slot): state for slot, state in self._states.items()},
        }

    def check_state(self, state: dict[str, Any]) -> list[str]:
        """Compare what a state was taken of with this loader's data and settings; nothing changes.

        Returns: lines for the user about what could not be compared.

        Raises:
          DataError: one line, when the data or how it is packed has changed since.
        """
        if not isinstance(state, dict) or state.get("version") != _STATE_VERSION:
            raise DataError(
                "data state: not one of this version's; start a new run, or use the version that "
                "wrote it"
            )
        identity = state.get("identity")
        if not isinstance(identity, dict):
            raise DataError(_DAMAGED)
        for name, value in self._identity.items():
            before = identity.get(name)
            if before != value and not (name in _NEWER and name not in identity):
                raise DataError(
                    f"data state: {_NAMES.get(name, name)} changed since the checkpoint ({before} "
                    f"then, {value} now); restore the old ones, or start a new run from the "
                    "checkpoint's weights with init_from"
                )
        if "content" in identity:
            return []
        return [
            "data state: the checkpoint is of a version that recorded names and lengths of "
            "documents only; that their content is the same was not compared, and will be from the "
            "next checkpoint on"
        ]

    def set_state(self, state: dict[str, Any]) -> list[str]:
        """Continue where `state` was taken, bit for bit.

        `state` may come from any process of a run with any number of them. Rows whose state it does
        not hold are found by planning the stream again from its start, which takes about 15
        microseconds for each piece of a document.

        Returns, raises: as `check_state`.
        """
        remarks = self.check_state(state)
        done, slots = state.get("batches"), state.get("slots")
        if not isinstance(slots, dict) or type(done) is not int or done < 0:
            raise DataError(_DAMAGED)
        states: dict[int, dict[str, Any]] = {}
        for slot in self._slots if done else ():
            plan = SlotPlan(self._order, self._table, slot, self._total_slots)
            known = slots.get(str(slot))
            if known is None:
                for _ in range(done):
                    plan.next_row()
            else:
                try:
                    plan.set_state(known)
                except (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError):
                    raise DataError(_DAMAGED) from None
            states[slot] = plan.get_state()
        self.close()
        self._rows_done, self._states = done, states
        return remarks

    def close(self) -> None:
        """Stop the worker processes. Iterating again starts them where the stream stands."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def _start(self) -> grain.DatasetIterator:
        rows: grain.IterDataset = PackedRows(
            self._table, self._order, self._slots, self._total_slots, self._states
        )
        if self._workers:
            _mark_flags_parsed()
            ahead = max(1, 2 * len(self._slots) // self._workers)  # two batches
            rows = rows.mp_prefetch(
                grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=ahead)
            )
        return iter(rows)


def make_loader(
    config: Config,
    *,
    tokenizer: Tokenizer,
    process_index: int = 0,
    process_count: int = 1,
    rows: Sequence[int] | None = None,
) -> Loader:
    """Make the training stream, for one process.

    Args:
      rows: indices of the rows of the global batch that it reads; several processes may read the
        same.
      process_index, process_count: without `rows`: it reads the `process_index`-th of
        `process_count` equal parts.

    `data.workers` processes read ahead (the largest number up to it that divides the rows of this
    process); scripts that use them need an `if __name__ == "__main__"` guard, because Python starts
    workers by importing the main script.

    Raises:
      DataError: one line, for anything wrong with the data; all of it is read once here, before
        anything is compiled.
    """
    batch_size = config.data.batch_size
    if not 0 <= process_index < process_count:
        raise DataError(
            f"process_index = {process_index}: must be from 0 to process_count - 1 = "
            f"{process_count - 1}"
        )
    if batch_size % process_count:
        raise DataError(
            f"config field data.batch_size = {batch_size}: must be a multiple of the "
            f"{process_count} processes"
        )
    train, heldout, *_ = split(config, tokenizer)
    table = _table(config, tokenizer, train, pack=config.data.pack)
    share = batch_size // process_count
    slots = range(process_index * share, (process_index + 1) * share) if rows is None else rows
    return Loader(config, table, tokenizer=tokenizer, slots=slots, heldout=heldout)


def check_data(config: Config, *, tokenizer: Tokenizer) -> DataSummary:
    """Read all data once and count it.

    Raises:
      DataError: one line, for anything wrong with the data.
    """
    train, heldout, *_ = split(config, tokenizer)
    return DataSummary(
        len(train), int(train.length_N.sum()), len(heldout), int(heldout.length_N.sum())
    )


def rejected_records(config: Config, tokenizer: Tokenizer) -> dict[str, Rejected]:
    """Return config field -> the malformed records of its files, for the loader's and the held-out
    rows' data.
    """
    fields = ["data.train", *(["data.heldout"] if config.data.heldout else [])]
    return {field: load_corpus(config, tokenizer, field=field).rejected for field in fields}


def heldout_remarks(config: Config, tokenizer: Tokenizer) -> list[str]:
    """Lines for the user about the held-out documents: how many are left out because they are
    training documents.
    """
    remark = split(config, tokenizer).remark
    return [] if remark is None else [remark]


def data_remarks(config: Config, tokenizer: Tokenizer) -> list[str]:
    """Lines for the user about the files that are read and skipped, and what is held out of them
    when `data.heldout` names nothing.
    """
    found = split(config, tokenizer)
    if config.data.train == (STDLIB,) and not config.data.heldout:
        return []
    return [
        *found.train.remarks,
        *(found.heldout.remarks if config.data.heldout else ()),
        *([found.held_out] if found.held_out else ()),
    ]


def heldout_rows(config: Config, *, tokenizer: Tokenizer, rows: int) -> Batch:
    """Make held-out rows, one piece of a document each, with the fields of `Loader`'s batches.

    First pieces of documents of at least T tokens come first, then the other documents, then second
    pieces, and so on.

    Returns:
      Arrays `[R, T]`, R = `rows` or fewer when there are not enough documents.
    """
    corpus = split(config, tokenizer).heldout
    table = _table(config, tokenizer, corpus, pack=False)
    short_P = corpus.length_N[table.document_P] < table.row_length
    # By hash within a rank, so that the rows do not all come from the first folder of the corpus.
    chosen = np.lexsort((corpus.key_N[table.document_P], short_P, table.start_P))[:rows]
    rendered = [
        render_row([table[i]], [table.row_length], table.row_length, table.pad_id)
        for i in chosen.tolist()
    ]
    return {name: np.stack([row[name] for row in rendered]) for name in _FIELDS}


def _table(config: Config, tokenizer: Tokenizer, corpus: Corpus, *, pack: bool) -> PieceTable:
    eos_id, vocab_size = tokenizer.eos_id, config.model.vocab_size
    # With pre-tokenised data nothing has checked the tokenizer, and padding has to be an id of the
    # model.
    pad_id = eos_id if eos_id is not None and eos_id < vocab_size else 0
    return cut_pieces(
        corpus,
        row_length=config.data.seq_len,
        chunk=config.model.ttt.chunk_size,
        pack=pack,
        vocab_size=vocab_size,
        pad_id=pad_id,
    )


def _mark_flags_parsed() -> None:
    """Parse absl's flags, which grain's workers read and a program without absl never parses."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
