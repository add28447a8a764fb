"""The small files beside a model's arrays: tokenizer, chat template, generation config.

A model is only of use with them, so they are copied into every run and every export. Nothing in
them is trusted (files/reading.py).
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ttt_jax.config import Config
from ttt_jax.data.tokenizer import JsonTokenizer, Tokenizer, load_tokenizer
from ttt_jax.errors import CheckpointError
from ttt_jax.files.reading import (
    MAX_TOKENIZER_BYTES,
    check_regular,
    companion_fields,
    find_companion,
    inside,
)
from ttt_jax.files.text import atomic_write_text

TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
    GENERATION,
)
_BESIDE = ("tokenizer_config.json", GENERATION)  # what a lone tokenizer.json takes its end from


def copy_companions(source: str | Path | None, folder: Path) -> None:
    """Copy the tokenizer, its chat template and the generation config.

    Args:
      source: a folder, or a tokenizer file alone; None copies nothing.
      folder: exists.

    Raises: CheckpointError for a link that leaves the source's folder, a pipe or device, and a file
    of absurd size; OSError when it cannot be written.
    """
    for name, path in ({} if source is None else _companions(source)).items():
        _copy(path, folder / name)


def carry_companions(source: str | Path, folder: Path) -> None:
    """Do as `copy_companions`, and write end tokens that the source's `config.json` alone names
    into `generation_config.json`: for folders that do not get that `config.json`.

    `tokenizer.json` comes last. Raises: as `copy_companions`.
    """
    found = _companions(source)
    tokenizer = found.pop(TOKENIZER, None)
    for name, path in found.items():
        _copy(path, folder / name)
    source = Path(source).expanduser()
    beside = source if source.is_dir() else source.parent
    fields = companion_fields(beside, GENERATION)
    ends = companion_fields(beside, "config.json").get("eos_token_id")
    if fields.get("eos_token_id") is None and ends is not None:
        write_end_tokens(ends, folder, fields)
    if tokenizer is not None:
        _copy(tokenizer, folder / TOKENIZER)


def write_end_tokens(ends: Any, folder: Path, fields: dict[str, Any] | None = None) -> None:
    """Write `generation_config.json` with these end tokens beside other `fields`."""
    text = json.dumps((fields or {}) | {"eos_token_id": ends}, indent=2) + "\n"
    atomic_write_text(folder / GENERATION, text)


def write_byte_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a `tokenizer.json` that does what the built-in tokenizer of bytes does, for folders
    that other programs read. Only the text of its end token, <|end|>, is read otherwise.
    """
    import tokenizers  # a slow import that nothing else here needs
    from tokenizers import decoders, models, pre_tokenizers

    # The letters by which tokenizers names bytes: those that show, then others in their order.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown}
    letters |= {chr(256 + n): byte for n, byte in enumerate(hidden)}
    tokenizer = tokenizers.Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if vocab_size > 256:
        tokenizer.add_special_tokens(["<|end|>"])
        settings = json.dumps({"eos_token": "<|end|>"}) + "\n"
        atomic_write_text(folder / "tokenizer_config.json", settings)
    atomic_write_text(folder / TOKENIZER, tokenizer.to_str())


def keep_companions(source: str, run: Path, tokenizer: Tokenizer) -> None:
    """Give a run folder its own copy of what belongs to its tokenizer, unless it has that already.

    Args:
      source: what `training_tokenizer` has found.
      tokenizer: the one that is there.

    Raises: CheckpointError, one line.
    """
    if source == "bytes" or Path(source).absolute() == run.absolute():
        return
    if find_companion(run, TOKENIZER) is not None:
        own = load_tokenizer(str(run))
        if own.fingerprint == tokenizer.fingerprint:
            return
    try:
        carry_companions(source, run)
    except OSError as error:
        raise CheckpointError(
            f"run folder {run}: could not be written ({error.strerror}); free space or choose "
            "another runs_dir"
        ) from None


def _companions(source: str | Path) -> dict[str, Path]:
    """Return name in the copy -> file."""
    source = Path(source).expanduser()
    if not source.is_dir():
        beside = [name for name in _BESIDE if os.path.lexists(source.parent / name)]
        return {name: inside(source.parent, name) for name in beside} | {TOKENIZER: source}
    found = {}
    # glob would pass over links that lead nowhere.
    for name in sorted(entry.name for entry in source.iterdir()):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPANIONS):
            path = inside(source, name)
            if not path.is_dir() or path.suffix:  # folders of further templates are left out
                found[name] = path
    return found


def companions_of(tokenizer: Any) -> Path | None:
    """Return the folder that a model's tokenizer was read from, or the lone file; its chat template
    and generation config lie there. None: it has none, or the built-in one.
    """
    if not isinstance(tokenizer, JsonTokenizer):
        return None
    return tokenizer.path.parent if tokenizer.path.name == TOKENIZER else tokenizer.path


def tokenizer_of_run(run: Path, config: Config) -> str:
    """Return where a run's tokenizer is: its own copy, or what its config names when it has none
    (runs of older versions, the built-in one).
    """
    has_own = config.data.tokenizer != "bytes" and find_companion(run, TOKENIZER) is not None
    return str(run) if has_own else config.data.tokenizer


def _copy(source: Path, target: Path) -> None:
    size = check_regular(source, CheckpointError)
    if size > MAX_TOKENIZER_BYTES:
        raise CheckpointError(
            f"{source}: {size} bytes; such a file has at most {MAX_TOKENIZER_BYTES}"
        )
    part = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, part)
    os.replace(part, target)
