"""The recall probe: what a second reading of a passage gains beyond the reach of attention.

B documents of a batch, L tokens of a sequence, P tokens of the passage, G tokens of the filler.

Of every document one sequence is read twice, TTT on and off: passage, filler of other documents,
the passage again. A control differs in its first P tokens alone, which are another document's
passage; so the final passage is new there. All scored tokens of the two stand at the same position
behind the same filler: their difference is what was kept of the passage, and nothing else.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ttt_jax.config import ModelConfig
from ttt_jax.data.corpus import Corpus
from ttt_jax.errors import DataError, UserError
from ttt_jax.eval.documents import names_of
from ttt_jax.eval.perplexity import batches, filled_up
from ttt_jax.eval.reader import Reader
from ttt_jax.eval.statistics import mean_with_interval
from ttt_jax.eval.unfinished import Unfinished
from ttt_jax.inference.prefill import check_ids
from ttt_jax.model.transformer import Transformer

READINGS = ("first", "second", "control")


def attention_reach(config: ModelConfig) -> int | None:
    """Count the tokens before a query that can reach it through attention, over all layers.

    Returns: None when some layer sees everything.
    """
    if config.sliding_window is None or config.full_attention_layers:
        return None
    return config.num_layers * (config.sliding_window - 1)


def check_recall(config: ModelConfig, lengths: Sequence[int], passage: int) -> None:
    """Check that the filler of every length is longer than attention reaches, and a chunk more.

    Raises: UserError for a passage without a token to score, and a length that is too short.
    """
    if passage < 2:
        raise UserError(f"--passage {passage}: must be 2 tokens or more; the first is not scored")
    reach = attention_reach(config)
    filler = 1 if reach is None else reach + config.ttt.chunk_size
    if min(lengths) < 2 * passage + filler:
        why = "" if reach is None else f" and {filler} of filler, beyond the reach of attention"
        raise UserError(
            f"--lengths {min(lengths)}: too short for --recall, which reads a passage of {passage} "
            f"tokens twice{why}; give lengths of {2 * passage + filler} or more"
        )


def choose_documents(corpus: Corpus, lengths: Sequence[int], passage: int, limit: int | None):
    """Choose the first `limit` documents that hold a passage.

    Raises: DataError for fewer than two, or too little other text to fill the longest sequence.
    """
    found = [int(i) for i in np.flatnonzero(corpus.length_N >= passage)][:limit]
    if len(found) < 2:
        raise DataError(
            f"--recall: needs two documents of --passage {passage} tokens, there "
            f"{'is one' if found else 'is none'} within --documents; give more or a shorter passage"
        )
    lengths_N = corpus.length_N[found]
    most = int(lengths_N.sum() - lengths_N.max()) - passage * (len(found) - 1)
    if most < (need := max(lengths) - 2 * passage):
        raise DataError(
            f"--recall: the other documents hold {most} tokens of filler and --lengths "
            f"{max(lengths)} needs {need}; give more documents or lengths below "
            f"{most + 2 * passage + 1}"
        )
    return found


class Material:
    """The passages and the filler of the chosen documents.

    A passage is the middle of its document: beginnings and ends are alike in many. Filler is what
    the next documents hold beside their passages, in order, from the passage's end on.
    """

    def __init__(self, corpus: Corpus, documents: Sequence[int], passage: int) -> None:
        self._corpus, self._documents, self._passage = corpus, documents, passage

    def passage(self, n: int) -> np.ndarray:
        """Return the passage of chosen document n; n counts round."""
        document = self._documents[n % len(self._documents)]
        return self._tokens(document, self._begin(document), self._passage)

    def filler(self, n: int, tokens: int) -> np.ndarray:
        """Write so many tokens of other documents than n, in the order of the documents after."""
        parts, missing = [], tokens
        for step in range(1, len(self._documents)):
            document = self._documents[(n + step) % len(self._documents)]
            begin, whole = self._begin(document), int(self._corpus.length_N[document])
            for start, stop in ((begin + self._passage, whole), (0, begin)):
                parts.append(self._tokens(document, start, min(stop - start, missing)))
                missing -= len(parts[-1])
        return np.concatenate(parts)

    def rows(self, n: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Write the sequence of document n and its control, both [L]."""
        middle = self.filler(n, length - 2 * self._passage)
        own = self.passage(n)
        return (
            np.concatenate([own, middle, own]),
            np.concatenate([self.passage(n + 1), middle, own]),
        )

    def _begin(self, document: int) -> int:
        return (int(self._corpus.length_N[document]) - self._passage) // 2

    def _tokens(self, document: int, start: int, count: int) -> np.ndarray:
        return np.asarray(self._corpus.tokens(document, start, count))


def passage_losses(
    reader: Reader, ids_BL: np.ndarray, passage: int, *, ttt: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Read the sequences and take the losses of their first and their last P tokens.

    The first token of a passage is left out at both places: nothing precedes it at the first.

    Returns: (first, second), both float32 [B, P - 1].
    """
    last = ids_BL.shape[1] - passage
    # Read on from a chunk's start, which is the faster program.
    edge = min(-(-passage // reader.chunk) * reader.chunk, last)
    state, first = reader.score(ids_BL, 0, edge, None, ids_BL.shape[1], ttt=ttt)
    state = reader.read(ids_BL, edge, last, state, ids_BL.shape[1], ttt=ttt)
    _, second = reader.score(ids_BL, last, ids_BL.shape[1] - 1, state, ids_BL.shape[1], ttt=ttt)
    join = lambda logprobs: -np.concatenate([np.asarray(x) for x in logprobs], axis=1)
    return join(first)[:, : passage - 1], join(second)


def evaluate(
    model: Transformer,
    corpus: Corpus,
    documents: Sequence[int],
    *,
    lengths: Sequence[int],
    passage: int = 256,
    modes: Sequence[str] = ("off", "on"),
    batch_size: int = 8,
    piece: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
    kept: Unfinished | None = None,
) -> dict[str, Any]:
    """Measure the loss of every document's passage at its first and second reading.

    Args:
      documents: indices of documents with at least `passage` tokens, two or more.
      lengths: tokens of the sequences, both passages included.
      modes: "off", "on" or both.
      on_progress: called with the number of tokens read so far.
      kept: batches that an earlier start finished, and where this one keeps its own.

    Returns: the "recall" part of results.json: per length and mode the losses at the `first` and
      `second` reading and of the `control`, `drop` (first - second) and `recall` (control -
      second), paired by document, with intervals.
    Raises: UserError for lengths that do not fit; NotFiniteError, naming the document.
    """
    check_recall(model.config, lengths, passage)
    kept = Unfinished(None, {}) if kept is None else kept
    reader, material = Reader(model, piece), Material(corpus, documents, passage)
    parts, entries, done = batches(len(documents), batch_size, 1), [], 0
    for length in sorted(lengths):
        loss = {mode: {name: np.zeros(len(documents)) for name in READINGS} for mode in modes}
        for part in parts:
            pairs = [material.rows(n, length) for n in part]
            own, control = (np.stack(rows) for rows in zip(*pairs, strict=True))
            check_ids([*own, *control], model.config.vocab_size, "documents")
            rows_BL = [filled_up(rows, len(parts[0])).astype(np.int32) for rows in (own, control)]
            names = [int(documents[n]) for n in part]
            digest = hashlib.sha256(own.tobytes() + control.tobytes()).hexdigest()
            compute = functools.partial(_losses_of, reader, rows_BL, names, passage, modes)
            found = kept.piece(("recall", length, passage, *names, digest), compute)
            for mode in modes:
                for name in READINGS:
                    loss[mode][name][part] = found[mode][name]
            done += 2 * length * len(part) * len(modes)
            if on_progress is not None:
                on_progress(done)
        entries.append({"length": length} | {mode: _entry(loss[mode], seed) for mode in modes})
    return {
        "passage": passage,
        "reach": attention_reach(model.config),
        "documents": names_of(corpus, documents),
        "modes": list(modes),
        "lengths": entries,
    }


def _losses_of(
    reader: Reader,
    rows_BL: list[np.ndarray],
    names: list[int],
    passage: int,
    modes: Sequence[str],
) -> dict[str, dict[str, list[float]]]:
    """Compute the mean losses of the documents of a batch, the first `len(names)` rows."""
    found: dict[str, dict[str, list[float]]] = {}
    for mode in modes:
        read = functools.partial(passage_losses, reader, passage=passage, ttt=mode == "on")
        (first, second), (_, control) = (read(ids_BL) for ids_BL in rows_BL)
        found[mode] = {
            reading: reader.means(losses_BP, names, mode)
            for reading, losses_BP in zip(READINGS, (first, second, control), strict=True)
        }
    reader.check(names, len(rows_BL[0]))
    return found


def _entry(loss: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    values = loss | {
        "drop": loss["first"] - loss["second"],
        "recall": loss["control"] - loss["second"],
    }
    entry: dict[str, Any] = {
        name: mean_with_interval(value, seed=seed) for name, value in values.items()
    }
    return entry | {"per_document": {name: value.tolist() for name, value in loss.items()}}
