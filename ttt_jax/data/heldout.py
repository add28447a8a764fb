"""Training and held-out documents of a config, and the rule that no document is both.

Two documents are the same when their tokens are, an end token behind them left aside: the name and
the format of the file, its compression and a link to it do not matter. Copies are never evaluated:

- Held out of `data.train` itself: a held-out document that is a copy of a training document is left
  out, and counted.
- Named in `data.heldout`: refused when a copy has `LONG` tokens or more, or when copies hold more
  than `SHARE` of all held-out tokens. Fewer (an empty file, a licence that many files share) are
  left out, and counted.

Only whole documents are compared. A document that is part of a longer one, or differs by one token,
is another one. A file that both fields name is refused before anything is read.

Without `data.heldout`, documents of `data.train` are held out whole, by a hash of their names. One
document, or few, cannot be shared out like this. Then the end of the longest is held out.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from typing import NamedTuple

import numpy as np

from ttt_jax.config import Config
from ttt_jax.data.corpus import Corpus, files_of, load_corpus
from ttt_jax.data.source_files import STDLIB, SourceFile
from ttt_jax.data.tokenizer import Tokenizer
from ttt_jax.errors import DataError
from ttt_jax.files.reading import show
from ttt_jax.files.text import reason_of

LONG = 4096  # tokens
SHARE = 0.01
MOST = 0.25  # share of all tokens that whole documents may take
SHORTEST = 64  # tokens of an end that is held out


class Split(NamedTuple):
    """Fields: the documents to train on, those to evaluate on; lines for the user, or None: what
    was left out, and what of `data.train` is held out.
    """

    train: Corpus
    heldout: Corpus
    remark: str | None
    held_out: str | None


def split(config: Config, tokenizer: Tokenizer) -> Split:
    """Split the documents of `config`.

    Raises:
      DataError: one line, for anything wrong with the files, and when held-out documents are
        training documents.
    """
    held_out = None
    fields = ("data.train", "data.heldout") if config.data.heldout else ("data.train",)
    found = {field: files_of(config, field) for field in fields}
    if config.data.heldout:
        _refuse_shared_files(config, *(files for files, _ in found.values()))
    train, *named = (
        load_corpus(config, tokenizer, field=field, found=files) for field, files in found.items()
    )
    if named:
        (heldout,) = named
        copy_N = _copies(train, heldout)
        if copy_N.any():
            _refuse(train, heldout, copy_N)
    else:
        train, heldout = _parts(train, config.data.heldout_fraction)
        copy_N = _copies(train, heldout)
        if config.data.train != (STDLIB,):
            held_out = _describe(config, train, heldout)
    if not copy_N.any():
        return Split(train, heldout, None, held_out)
    if copy_N.all():
        raise DataError(
            f"{heldout.label}: all {len(copy_N)} documents that data.heldout_fraction = "
            f"{config.data.heldout_fraction} holds out are copies of training documents; remove "
            "the copies, or name other files in data.heldout"
        )
    field = "data.heldout" if config.data.heldout else "data.heldout_fraction"
    remark = f"{field}: left out {_count(heldout, copy_N)}, which are copies of training documents"
    return Split(train, _without(heldout, copy_N.tobytes()), remark, held_out)


def _refuse_shared_files(
    config: Config, train: list[SourceFile], heldout: list[SourceFile]
) -> None:
    """Raise DataError when a file is named by both fields: by the same path, or by a link."""
    entries = ", ".join(map(repr, config.data.train))
    try:
        known = {file.identity(): file for file in train}
        shared = [file for file in heldout if file.identity() in known]
        if not shared:
            return
        twin = known[shared[0].identity()]
    except OSError as error:
        raise DataError(
            f"config field data.train = {entries}: a file has vanished ({reason_of(error)}); "
            "restore it"
        ) from None
    count = "" if len(shared) == 1 else f" ({len(shared)} files are)"
    raise shared[0].error(
        f"is a training file, too{count}: {twin.label.removeprefix('config field ')} names "
        f"{twin.name}; take it out of data.train, or name another file here"
    )


def _refuse(train: Corpus, heldout: Corpus, copy_N: np.ndarray) -> None:
    """Raise DataError unless the copies are few and short."""
    tokens = int(heldout.length_N[copy_N].sum())
    longest = int(np.argmax(np.where(copy_N, heldout.length_N, -1)))
    if heldout.length_N[longest] < LONG and tokens <= SHARE * int(heldout.length_N.sum()):
        return
    twin = int(np.argmax(train.digest_N == heldout.digest_N[longest]))
    (here, record), (there, other) = (
        corpus.locate(corpus.key_N[[place]])[0]
        for corpus, place in ((heldout, longest), (train, twin))
    )
    raise DataError(
        f"{heldout.label}: {_count(heldout, copy_N)}, are training documents too, for instance "
        f"{here} #{record} is data.train's {there} #{other}; name other files, or take them out of "
        "data.train"
    )


def _count(heldout: Corpus, copy_N: np.ndarray) -> str:
    """Say, for instance, "3 of 200 held-out documents (140 of 90000 tokens)"."""
    tokens, copied = int(heldout.length_N.sum()), int(heldout.length_N[copy_N].sum())
    return f"{int(copy_N.sum())} of {len(copy_N)} held-out documents ({copied} of {tokens} tokens)"


# ----------------------------------------------------------------------- held out of training files


def split_corpus(corpus: Corpus, fraction: float) -> tuple[Corpus, Corpus]:
    """Split `data.train` into (training, held-out) documents.

    Args:
      fraction: `data.heldout_fraction`.

    A document's side depends on nothing but a hash of its own name and index, so that growing the
    corpus moves no document. Where that would take more than `MOST` of all tokens, the end of the
    longest document is held out instead, `fraction` of all tokens.

    Raises: DataError, one line, when nothing would be left to train on, or the end is too short.
    """
    held_N = corpus.key_N < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))
    if not held_N.any():
        held_N[np.argmin(corpus.key_N)] = True
    longest = int(np.argmax(corpus.length_N))
    length, tokens = int(corpus.length_N[longest]), int(corpus.length_N.sum())
    end = round(fraction * tokens)
    if held_N.all():
        _check_end(corpus, fraction, end, longest)
        return _cut(corpus, longest, end)
    share = int(corpus.length_N[held_N].sum()) / tokens
    digest = corpus.digest_N[longest]
    alone = digest == 0 or int((corpus.digest_N == digest).sum()) == 1
    if share > max(MOST, 2 * fraction) and SHORTEST <= end <= length / 2 and alone:
        return _cut(corpus, longest, end)
    return corpus.select(~held_N), corpus.select(held_N)


def _check_end(corpus: Corpus, fraction: float, end: int, longest: int) -> None:
    """Raise DataError unless a document can be cut."""
    length, tokens = int(corpus.length_N[longest]), int(corpus.length_N.sum())
    if SHORTEST <= end <= length - SHORTEST:
        return
    least = math.ceil(SHORTEST / min(fraction, 1 - fraction))
    raise DataError(
        f"{corpus.label}: holding out data.heldout_fraction = {fraction} of {tokens} tokens at the "
        f"end of {corpus.locate(corpus.key_N[[longest]])[0][0]} gives {end} tokens and leaves "
        f"{length - end}, too short; give {least} tokens or more, or name held-out files in "
        "data.heldout"
    )


def _cut(corpus: Corpus, document: int, end: int) -> tuple[Corpus, Corpus]:
    """Hold out the last `end` tokens of a document. Both parts have hashes of their own, which are
    made of the document's.
    """
    cut = int(corpus.length_N[document]) - end
    parts = []
    for start, stop in ((0, cut), (cut, cut + end)):
        part = corpus.select(np.arange(len(corpus)) == document)
        whole = int(part.digest_N[0])
        name = f"{whole} {start} {stop}".encode()
        digest = int.from_bytes(hashlib.sha256(name).digest()[:8], "little") or 1
        parts.append(
            dataclasses.replace(
                part,
                start_N=part.start_N + start,
                length_N=part.length_N * 0 + (stop - start),
                digest_N=np.array([digest if whole else 0], np.uint64),
            )
        )
    train = {name: np.array(getattr(corpus, name)) for name in ("start_N", "length_N", "digest_N")}
    for name, column in train.items():
        column[document] = getattr(parts[0], name)[0]
    return dataclasses.replace(corpus, **train), parts[1]


def _describe(config: Config, train: Corpus, heldout: Corpus) -> str:
    """Say what is held out of `data.train`, for instance "data.heldout_fraction = 0.05: holds out
    the end of book.txt (5000 of 100000 tokens, 5 %)".
    """
    tokens = int(heldout.length_N.sum())
    both = tokens + int(train.length_N.sum())
    documents = len(train) + len(heldout)
    what = f"{len(heldout)} of {documents} documents"
    if len(heldout) == 1 and int(heldout.key_N[0]) in train.key_N:
        what = f"the end of {show(heldout.locate(heldout.key_N)[0][0])}"
    line = (
        f"data.heldout_fraction = {config.data.heldout_fraction:g}: holds out {what} ({tokens} of "
        f"{both} tokens, {100 * tokens / both:.3g} %)"
    )
    chunk = config.model.ttt.chunk_size
    if config.model.ttt.layers and int(heldout.length_N.max()) <= chunk:
        line += (
            f"; none is longer than model.ttt.chunk_size = {chunk}, so it cannot show what TTT does"
        )
    return line


# The loader, the held-out rows and the summary ask one after another, with the same corpora.


@functools.lru_cache(maxsize=2)
def _parts(corpus: Corpus, fraction: float) -> tuple[Corpus, Corpus]:
    return split_corpus(corpus, fraction)


@functools.lru_cache(maxsize=2)
def _copies(train: Corpus, heldout: Corpus) -> np.ndarray:
    """Return bool: which held-out documents are training documents. Those whose tokens were not
    read (digests.py) are none.
    """
    return np.isin(heldout.digest_N, train.digest_N) & (heldout.digest_N != 0)


@functools.lru_cache(maxsize=2)
def _without(heldout: Corpus, copies: bytes) -> Corpus:
    return heldout.select(~np.frombuffer(copies, bool))
