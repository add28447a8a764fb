"""A corpus: all documents of some files as token ids, with random access and known lengths.

Text is tokenised once, before training. That finds every unreadable record before anything is
compiled, and it makes the order of training independent of the number of hosts, because document
lengths are known. A small corpus stays in memory, a large one goes to the cache folder
(`cache.py`). `.npy` files are mapped where they lie. Every document has a hash of its tokens
(`digests.py`): a run is not continued on other ones, and held-out documents are not training
documents.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.config import Config
from ttt_jax.data.cache import TokenArray, TokenWriter, load_cached
from ttt_jax.data.digests import digest_rows, digest_tokens
from ttt_jax.data.document_keys import document_keys, find_documents
from ttt_jax.data.progress import TokenProgress
from ttt_jax.data.quarantine import BadRecord, Rejected, Rejects
from ttt_jax.data.source_files import Found, SourceFile, find_files
from ttt_jax.data.sources import Record, open_npy, read_documents
from ttt_jax.data.tokenizer import Tokenizer
from ttt_jax.errors import DataError
from ttt_jax.files.text import reason_of

_CACHE_VERSION = 4  # of what `_tokenise` keeps
_BATCH_BYTES = 8 << 20  # text handed to the tokenizer at once
# Tokens of one .npy file that are checked up front; the rest is checked when it is read.
_CHECK_TOKENS = 1 << 30
# Training and held-out documents share one corpus.
_recent: collections.OrderedDict[str, Corpus] = collections.OrderedDict()


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Documents as slices of flat token arrays.

    Attributes:
      arrays: the flat token arrays.
      array_N: int32, which of `arrays` a document lies in.
      start_N: int64, its first token there.
      length_N: int64, its number of tokens.
      key_N: uint64, a hash of its identity (file name in the corpus, and index in the file);
        `locate` inverts it.
      digest_N: uint64, a hash of its tokens, without an end token behind them; 0 where they were
        not read (digests.py).
      rejected: the malformed records, which were left out.
      has_text: whether any document went through the tokenizer.
      label: the config field and value that errors name.
      files: where they come from.
      remarks: lines for the user: what was read, and what was skipped.
    """

    arrays: tuple[TokenArray, ...]
    array_N: np.ndarray
    start_N: np.ndarray
    length_N: np.ndarray
    key_N: np.ndarray
    digest_N: np.ndarray
    rejected: Rejected
    has_text: bool
    label: str
    files: tuple[SourceFile, ...] = ()
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.length_N)

    def tokens(self, document: int, start: int, length: int) -> np.ndarray:
        """Return tokens `start` to `start + length` of a document, in the array's own integer
        dtype, `[length]`.
        """
        first = int(self.start_N[document]) + start
        return self.arrays[self.array_N[document]].read(first, length)

    def select(self, keep_N: np.ndarray) -> Corpus:
        """Keep the documents where the boolean `keep_N` is true."""
        names = ("array_N", "start_N", "length_N", "key_N", "digest_N")
        return dataclasses.replace(self, **{name: getattr(self, name)[keep_N] for name in names})

    def fingerprint(self) -> str:
        """Hash which documents these are, and their lengths."""
        return hashlib.sha256(self.key_N.tobytes() + self.length_N.tobytes()).hexdigest()[:16]

    def content(self) -> str:
        """Hash the documents' tokens, as far as `digests.py` reads them."""
        return hashlib.sha256(self.digest_N.tobytes()).hexdigest()[:16]

    def locate(self, key_K: np.ndarray) -> list[tuple[str, int]]:
        """Find documents by their keys, as `find_documents` does."""
        return find_documents(list(self.files), key_K)


def files_of(config: Config, field: str) -> Found:
    """Find the files of `data.train` or `data.heldout`. Raises DataError."""
    entries = getattr(config.data, field.rpartition(".")[2])
    return find_files(entries, field=field, format=config.data.format)


def load_corpus(
    config: Config,
    tokenizer: Tokenizer,
    *,
    field: str = "data.train",
    found: Found | None = None,
) -> Corpus:
    """Load all documents of `data.train` or `data.heldout` that have at least `data.min_document`
    tokens.

    Args:
      found: `files_of` the field; None: they are looked for.

    Tokenised documents end with the end token if `data.eos`; pre-tokenised ones are taken as they
    are.

    Raises:
      DataError: one line, for anything wrong with the files or with the ids in them, and when more
        than `data.max_bad_records` of their records are malformed.
    """
    data = config.data
    entries = getattr(data, field.rpartition(".")[2])
    files, remarks = found or files_of(config, field)
    settings = [*_text_settings(config, tokenizer), data.min_document, data.max_bad_records]
    key = _key(files, [field, *settings, remarks])
    if key not in _recent:
        label = f"config field {field} = {', '.join(map(repr, entries))}"
        _recent[key] = _build(config, tokenizer, files, label, remarks)
        while len(_recent) > 2:
            _recent.popitem(last=False)
    _recent.move_to_end(key)
    return _recent[key]


# ----------------------------------------------------------------------------------------- building


class _Part(NamedTuple):
    """The documents of some files in one flat array."""

    tokens: TokenArray
    length_N: np.ndarray
    key_N: np.ndarray
    digest_N: np.ndarray
    rejected: Rejected = Rejected()
    has_text: bool = False


def _build(
    config: Config,
    tokenizer: Tokenizer,
    files: list[SourceFile],
    label: str,
    remarks: list[str],
) -> Corpus:
    text = [file for file in files if file.format != "npy"]
    mapped = [file for file in files if file.format == "npy"]
    parts = [_tokenise(config, tokenizer, text)] if text else []
    parts += [_map_npy(file, config.model.vocab_size, tokenizer.eos_id) for file in mapped]
    rejected = parts[0].rejected
    rejected.check(label, config.data.max_bad_records)
    length_N = np.concatenate([part.length_N for part in parts])
    corpus = Corpus(
        arrays=tuple(part.tokens for part in parts),
        array_N=np.repeat(
            np.arange(len(parts), dtype=np.int32), [len(part.length_N) for part in parts]
        ),
        start_N=np.concatenate([np.cumsum(part.length_N) - part.length_N for part in parts]),
        length_N=length_N,
        key_N=np.concatenate([part.key_N for part in parts]),
        digest_N=np.concatenate([part.digest_N for part in parts]),
        rejected=rejected,
        has_text=parts[0].has_text,
        label=label,
        files=tuple(files),
    )
    # One token alone predicts nothing, and a row without any target would make a mean loss 0/0.
    shortest = max(config.data.min_document, 2)
    corpus = corpus.select(length_N >= shortest)
    if short := len(length_N) - len(corpus):
        remarks = [
            *remarks,
            f"{label.removeprefix('config field ')}: leaves out {short} of {len(length_N)} "
            f"documents, which have fewer than {shortest} tokens (data.min_document)",
        ]
    corpus = dataclasses.replace(corpus, remarks=tuple(remarks))
    if not len(corpus):
        count = (
            f"none of its {len(length_N)} documents has"
            if len(length_N)
            else "it holds no document with"
        )
        raise DataError(
            f"{label}: empty: {count} {shortest} tokens or more; give more data or lower "
            "data.min_document"
        )
    return corpus


def _text_settings(config: Config, tokenizer: Tokenizer) -> list[Any]:
    """Return what the tokens of a text depend on, and how they are kept."""
    data = config.data
    vocabulary = (tokenizer.fingerprint, tokenizer.eos_id, config.model.vocab_size)
    return [_CACHE_VERSION, data.text_field, data.eos, data.max_record_bytes, *vocabulary]


def _tokenise(config: Config, tokenizer: Tokenizer, files: list[SourceFile]) -> _Part:
    data, vocab_size = config.data, config.model.vocab_size
    dtype = _dtype(vocab_size)
    key = _key(files, _text_settings(config, tokenizer))
    if (cached := _cached_part(key, dtype)) is not None:
        return cached
    lengths: list[int] = []
    digests: list[int] = []
    keys: list[np.ndarray] = []
    has_text = False
    rejects = Rejects(data.max_bad_records)
    with TokenWriter(key, dtype) as writer, TokenProgress("Tokenising") as progress:
        for file in files:
            index: list[int] = []
            read = read_documents(file, text_field=data.text_field, max_bytes=data.max_record_bytes)
            for batch in _batches(_good(file, read, rejects, index)):
                if isinstance(batch, np.ndarray):
                    _check_ids(file, batch, vocab_size)
                    documents, end = [batch], []
                else:
                    if not has_text:
                        _check_tokenizer(config, tokenizer)
                    has_text = True
                    documents = _encode(file, tokenizer, batch)
                    end = [tokenizer.eos_id] if data.eos and tokenizer.eos_id is not None else []
                for ids in documents:
                    writer.append(ids, end)
                    lengths.append(len(ids) + len(end))
                    digests.append(digest_tokens(ids, dtype, None if end else tokenizer.eos_id))
                progress.add(sum(map(len, documents)))
            keys.append(document_keys(file, np.asarray(index, np.int64)))
        columns = {
            "length_N": np.asarray(lengths, np.int64),
            "key_N": np.concatenate(keys),
            "digest_N": np.asarray(digests, np.uint64),
        }
        rejected = rejects.result()
        packed = np.frombuffer(rejected.to_json().encode(), np.uint8)
        tokens = writer.finish(**columns, rejected=packed, has_text=np.asarray(has_text))
        return _Part(tokens, **columns, rejected=rejected, has_text=has_text)


def _encode(file: SourceFile, tokenizer: Tokenizer, texts: list[bytes]) -> list[np.ndarray]:
    try:
        return tokenizer.encode_documents(texts)
    except DataError as error:
        raise file.error(str(error)) from None


def _cached_part(key: str, dtype: np.dtype) -> _Part | None:
    """Return what an earlier run has tokenised; None when there is nothing, or it is damaged."""
    if (cached := load_cached(key, dtype)) is None:
        return None
    tokens, arrays = cached
    try:
        columns = {name: arrays[name] for name in ("length_N", "key_N", "digest_N")}
        rejected = Rejected.from_json(arrays["rejected"].tobytes().decode())
        return _Part(tokens, **columns, rejected=rejected, has_text=bool(arrays["has_text"]))
    except (KeyError, ValueError, TypeError):
        return None


def _good(
    file: SourceFile, records: Iterator[Record], rejects: Rejects, index: list[int]
) -> Iterator[bytes | np.ndarray]:
    """Yield the documents among a file's records. Bad records are counted in `rejects`; `index`
    gets each document's place.
    """
    for number, record in enumerate(records):
        if isinstance(record, BadRecord):
            rejects.bad(file.path, file.label, record)
        else:
            rejects.good()
            index.append(number)
            yield record


def _batches(documents: Iterator[bytes | np.ndarray]) -> Iterator[list[bytes] | np.ndarray]:
    """Group consecutive text documents, so that a tokenizer can use all cores; token documents pass
    singly.
    """
    batch: list[bytes] = []
    size = 0
    for document in documents:
        if batch and (isinstance(document, np.ndarray) or size + len(document) > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        if isinstance(document, np.ndarray):
            yield document
        else:
            batch.append(document)
            size += len(document)
    if batch:
        yield batch


def _dtype(vocab_size: int) -> np.dtype:
    """Say how token ids are stored and hashed."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _map_npy(file: SourceFile, vocab_size: int, eos_id: int | None) -> _Part:
    array = open_npy(file)
    mappable = array.flags.c_contiguous  # a file in Fortran order is copied
    flat = array.reshape(-1)
    for start in range(0, min(flat.size, _CHECK_TOKENS), 1 << 24):
        _check_ids(file, flat[start : min(start + (1 << 24), _CHECK_TOKENS)], vocab_size)
    rows, width = (1, array.size) if array.ndim == 1 else array.shape
    tokens = TokenArray(path=file.local()) if mappable else TokenArray(flat)
    digest_N = digest_rows(flat, rows, width, _dtype(vocab_size), eos_id)
    return _Part(
        tokens,
        np.full(rows, width, np.int64),
        document_keys(file, np.arange(rows, dtype=np.int64)),
        digest_N,
    )


def _check_ids(file: SourceFile, ids: np.ndarray, vocab_size: int) -> None:
    if ids.size and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
        bad = next(int(i) for i in (ids.max(), ids.min()) if not 0 <= int(i) < vocab_size)
        raise file.error(
            f"token id {bad} is outside model.vocab_size = {vocab_size}; use the model's own "
            "tokenizer"
        )


def _check_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    name, vocab_size = config.data.tokenizer, config.model.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"config field data.tokenizer = {name!r}: its {tokenizer.vocab_size} ids do not fit "
            "model.vocab_size = "
            f"{vocab_size}; set model.vocab_size to {tokenizer.vocab_size} or more"
        )
    if config.data.eos and tokenizer.eos_id is None:
        raise DataError(
            f"config field data.eos = true: tokenizer {name!r} has no end token; set data.eos false"
        )


def _key(files: list[SourceFile], settings: list[Any]) -> str:
    """Make a hash that changes when a file or a setting does."""
    digest = hashlib.sha256(repr(settings).encode())
    for file in files:
        try:
            identity = (file.name, file.format, *file.version())
        except (OSError, RuntimeError) as error:  # gone; a link that leads nowhere, or in a circle
            raise file.error(f"is not there ({reason_of(error)}); restore or remove it") from None
        digest.update(repr(identity).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:24]
