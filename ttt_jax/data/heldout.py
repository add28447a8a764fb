"""Training and held-out documents of a config, and the rule that no document is both.

Two documents are the same when their tokens are, an end token behind them left aside: the name and
the format of the file, its compression and a link to it do not matter. Copies are never evaluated:

- Held out of `data.train` itself: a held-out document that is a copy of a training document is left
  out, and counted.
- Named in `data.heldout`: refused when a copy has `LONG` tokens or more, or when copies hold more
  than `SHARE` of all held-out tokens. Fewer (an empty file, a licence that many files share) are
  left out, and counted.

Only whole documents are compared. A document that is part of a longer one, or differs by one token,
is another one.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from ttt_jax.config import Config
from ttt_jax.data.corpus import Corpus, load_corpus, locate, split_corpus
from ttt_jax.data.tokenizer import Tokenizer
from ttt_jax.errors import DataError

LONG = 4096  # tokens
SHARE = 0.01


class Split(NamedTuple):
    """Fields: the documents to train on, those to evaluate on, and a line for the user about what
    was left out, or None.
    """

    train: Corpus
    heldout: Corpus
    remark: str | None


def split(config: Config, tokenizer: Tokenizer) -> Split:
    """Split the documents of `config`.

    Raises:
      DataError: one line, for anything wrong with the files, and when held-out documents are
        training documents.
    """
    train = load_corpus(config, tokenizer, field="data.train")
    if config.data.heldout:
        heldout = load_corpus(config, tokenizer, field="data.heldout")
        copy_N = _copies(train, heldout)
        if copy_N.any():
            _refuse(config, train, heldout, copy_N)
    else:
        train, heldout = _parts(train, config.data.heldout_fraction)
        copy_N = _copies(train, heldout)
    if not copy_N.any():
        return Split(train, heldout, None)
    if copy_N.all():
        raise DataError(
            f"{heldout.label}: all {len(copy_N)} documents that data.heldout_fraction = "
            f"{config.data.heldout_fraction} holds out are copies of training documents; remove "
            "the copies, or name other files in data.heldout"
        )
    field = "data.heldout" if config.data.heldout else "data.heldout_fraction"
    remark = f"{field}: left out {_count(heldout, copy_N)}, which are copies of training documents"
    return Split(train, _without(heldout, copy_N.tobytes()), remark)


def _refuse(config: Config, train: Corpus, heldout: Corpus, copy_N: np.ndarray) -> None:
    """Raise DataError unless the copies are few and short."""
    tokens = int(heldout.length_N[copy_N].sum())
    longest = int(np.argmax(np.where(copy_N, heldout.length_N, -1)))
    if heldout.length_N[longest] < LONG and tokens <= SHARE * int(heldout.length_N.sum()):
        return
    twin = int(np.argmax(train.digest_N == heldout.digest_N[longest]))
    (here, record), (there, other) = (
        locate(config, corpus.key_N[[place]], field=field)[0]
        for corpus, place, field in (
            (heldout, longest, "data.heldout"),
            (train, twin, "data.train"),
        )
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
