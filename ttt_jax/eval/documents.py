"""Documents to evaluate on: any source that train.py reads, as token ids of the model's
tokenizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ttt_jax.config import Config
from ttt_jax.data.corpus import Corpus, load_corpus
from ttt_jax.data.source_files import find_files
from ttt_jax.data.tokenizer import ByteTokenizer
from ttt_jax.errors import DataError
from ttt_jax.model.transformer import Transformer

_FIELD = "data.train"  # the loader's name for what is read


def open_documents(model: Transformer, data: str | Path, option: str = "--perplexity") -> Corpus:
    """Open all documents of a file, a folder or "stdlib", tokenised; text gets no end token.

    Raises: DataError naming the option when the source is missing, unreadable, empty, or text
    without a tokenizer.
    """
    data_config = dataclasses.replace(
        Config().data, train=(str(data),), eos=False, max_bad_records=0.0
    )
    config = Config(model=model.config, data=data_config)
    try:
        if model.tokenizer is None:
            files = find_files((str(data),), field=_FIELD, format="auto").files
            # ArrayRecord may hold ids; if it holds text, that is found below.
            if text := [file for file in files if file.format not in ("npy", "arrayrecord")]:
                raise DataError(
                    f"{option} {data}: {text[0].path.name} is text and the model's folder has "
                    "no tokenizer.json; add it, or give token ids in .npy"
                )
        corpus = load_corpus(config, model.tokenizer or ByteTokenizer())
    except DataError as error:
        text = str(error).replace(f"config field {_FIELD} = {str(data)!r}", f"{option} {data}")
        fix = "give more data or lower data.min_document"
        raise DataError(text.replace(fix, "give longer documents")) from None
    if corpus.has_text and model.tokenizer is None:
        raise DataError(
            f"{option} {data}: holds text and the model's folder has no tokenizer.json; add "
            "it, or give token ids"
        )
    return corpus


def choose(corpus: Corpus, tokens: int, limit: int | None) -> list[int]:
    """Choose the first `limit` documents that have at least `tokens` tokens.

    Raises: DataError when there is none, naming the longest.
    """
    found = [int(i) for i in np.flatnonzero(corpus.length_N >= tokens)]
    if not found:
        raise DataError(
            f"--lengths: no document has {tokens} tokens (the longest of {len(corpus)} has "
            f"{int(corpus.length_N.max())}); "
            f"give lengths below {int(corpus.length_N.max())} or longer documents"
        )
    return found[:limit]


def names_of(corpus: Corpus, documents: Sequence[int]) -> list[str]:
    """Name documents by a hash of their tokens, so that only losses of the same tokens are paired:
    not those of another text in a file of that name, nor those of another tokenizer. What is too
    large to be read whole has its file's name and index hashed.
    """
    return [f"{int(corpus.digest_N[i] or corpus.key_N[i]):016x}" for i in documents]
