"""Tokenizers: a byte-level one that is built in, and `tokenizer.json` files through the
`tokenizers` library.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ttt_jax.data.rust_panics import panics_as_errors
from ttt_jax.errors import CheckpointError, DataError
from ttt_jax.files.reading import (
    MAX_TOKENIZER_BYTES,
    companion_fields,
    find_companion,
    read_bounded,
)
from ttt_jax.files.text import reason_of

# Tried in this order when no file beside tokenizer.json names the end token.
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>")


class Tokenizer(Protocol):
    """What the data pipeline and the command line need of a tokenizer."""

    vocab_size: int  # every id is below this
    eos_id: int | None  # end of text; None: the vocabulary has no such token
    fingerprint: str  # short hash of everything that changes the ids

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; no special tokens are added."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, special tokens left out."""
        ...

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Turn UTF-8 documents into 1-D integer arrays, as `encode` would, faster."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of the UTF-8 text, 256 ends it."""

    vocab_size: int = 257
    eos_id: int | None = 256
    fingerprint: str = "bytes-1"

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of `text`; a lone surrogate, which UTF-8 cannot hold, becomes a
        question mark.
        """
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`: what is not a byte is skipped, what is not UTF-8 becomes
        U+FFFD.
        """
        return bytes(i for i in map(int, ids) if 0 <= i < 256).decode("utf-8", errors="replace")

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """View the documents as uint8 `[length]` each; bytes that are not UTF-8 are kept as they
        are.
        """
        return [np.frombuffer(document, np.uint8) for document in documents]


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`.

    Args:
      path: the file; `tokenizer_config.json`, `generation_config.json` and `config.json` beside it
        name the end token.
    """

    def __init__(self, path: Path) -> None:
        import tokenizers  # a slow import that the byte tokenizer does not need

        raw = read_bounded(path, MAX_TOKENIZER_BYTES, CheckpointError)
        try:
            tokenizer = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
        # A malformed file raises bare Exception; a panic of its Rust code is no Exception.
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise _error(
                str(path), f"not a readable tokenizer.json ({reason_of(error)}); export it again"
            ) from None
        # Files often carry padding or truncation settings, which would silently change documents.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer, self.path = tokenizer, path
        ids = tokenizer.get_vocab(with_added_tokens=True).values()
        # Ids may have holes, so the number of entries is not enough.
        self.vocab_size: int = max(ids, default=-1) + 1
        self.eos_id: int | None = self._find_eos(path.parent)
        self.fingerprint: str = hashlib.sha256(raw + str(self.eos_id).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; no special tokens are added. Raises DataError when the
        tokenizer panics on it.
        """
        with self._panics():
            return self._tokenizer.encode(_well_formed(text), add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, special tokens left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def encode_documents(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Turn UTF-8 documents into uint32 `[length]` arrays, on all cores."""
        texts = [document.decode("utf-8", errors="replace") for document in documents]
        with self._panics():
            encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(item.ids, np.uint32) for item in encoded]

    def _panics(self) -> contextlib.AbstractContextManager[None]:
        """Turn panics into errors, for instance of a regular expression that gives up on a text."""
        return panics_as_errors(
            f"tokenizer {self.path}: fails on a text", "use another tokenizer.json"
        )

    def _find_eos(self, folder: Path) -> int | None:
        named = companion_fields(folder, "tokenizer_config.json").get("eos_token")
        if isinstance(named, dict):
            named = named.get("content")
        if isinstance(named, str) and (token := self._tokenizer.token_to_id(named)) is not None:
            return token
        for name in ("generation_config.json", "config.json"):
            value = companion_fields(folder, name).get("eos_token_id")
            value = value[0] if isinstance(value, list) and value else value
            # A config.json may belong to a larger vocabulary than the tokenizer's.
            if (
                isinstance(value, int)
                and not isinstance(value, bool)
                and 0 <= value < self.vocab_size
            ):
                return value
        for name in _EOS_NAMES:
            if (token := self._tokenizer.token_to_id(name)) is not None:
                return token
        return None


def load_tokenizer(spec: str) -> Tokenizer:
    """Load a tokenizer.

    Args:
      spec: `"bytes"`, a `tokenizer.json`, or a folder that holds one.

    Raises:
      DataError: one line, when there is no such file, or it (or a file beside it that names the end
        token) cannot be read.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    try:
        if os.path.isdir(path):  # False, not an error, for names that no file system takes
            found = find_companion(path, "tokenizer.json")
            if found is None:
                raise _error(spec, "the folder holds no tokenizer.json; export one, or use 'bytes'")
            return JsonTokenizer(found)
        if not os.path.lexists(path):
            raise _error(
                spec[:200],
                "no such file; give 'bytes', a tokenizer.json or a folder that holds one",
            )
        return JsonTokenizer(path)
    except CheckpointError as error:
        raise _error(spec[:200], str(error)) from None


def _error(spec: str, problem: str) -> DataError:
    return DataError(f"config field data.tokenizer = {spec!r}: {problem}")


def _well_formed(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode("utf-8")
