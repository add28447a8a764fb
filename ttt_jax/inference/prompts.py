"""Prompts in the forms in which people have them: texts, chat messages and token ids. Here they
become rows of ids, or one line that says what to pass.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from ttt_jax.errors import UserError
from ttt_jax.inference.chat_template import template_of
from ttt_jax.inference.prefill import check_ids
from ttt_jax.model.transformer import Transformer
from ttt_jax.pretrained.companions import companions_of

_FORMS = "give a text, chat messages, token ids, or a list of those"


def check_model(model: Any) -> None:
    """Raise UserError for what is not a model, such as the path of one."""
    if not isinstance(model, Transformer):
        raise UserError(f"model = {model!r:.80}: not a model; pass what load_pretrained returns")


def token_rows(model: Transformer, prompts: Any) -> list[np.ndarray]:
    """Rows of token ids, int32 [T] each.

    Args:
      model: its tokenizer encodes texts, the chat template of its folder renders messages.
      prompts: one prompt, or a list (or array [B, T]) of prompts. A prompt is a text, a
        conversation, or token ids (a list, a NumPy or jax array [T]). A conversation is a list of
        messages {"role": ..., "content": ...}; when the last one is the assistant's, it is left
        open to be continued (without space at its end).

    Raises: UserError, one line, for anything else: no prompt, text without a tokenizer, messages
      without a chat template, ids of another dtype, shape or outside the vocabulary.
    """
    check_model(model)
    rows = [_ids(model, row, i) for i, row in enumerate(_split(prompts))]
    return check_ids(rows, model.config.vocab_size, "prompt")


def _split(prompts: Any) -> list[Any]:
    """One entry for each prompt."""
    _refuse(prompts, "prompts")
    if isinstance(prompts, str):
        return [prompts]
    try:
        rows = list(np.asarray(prompts) if hasattr(prompts, "ndim") else prompts)
    except TypeError:  # a number, None
        raise UserError(f"prompts = {prompts!r:.80}: {_FORMS}") from None
    if not rows:
        raise UserError("prompts: none given; pass a text or token ids")
    one = all(map(_is_number, rows)) or all(isinstance(row, Mapping) for row in rows)
    return [rows] if one else rows


def _ids(model: Transformer, row: Any, i: int) -> Any:
    """A prompt's ids, not checked yet."""
    if isinstance(row, list | tuple) and row and all(isinstance(m, Mapping) for m in row):
        row = _render(model, row)
    _refuse(row, f"prompt: row {i}")
    if not isinstance(row, str):
        return row
    if model.tokenizer is None:
        raise UserError(
            "prompt: text needs a tokenizer; put tokenizer.json into the model's folder or "
            "pass token ids"
        )
    ids = model.tokenizer.encode(row)
    if not ids:
        raise UserError("prompt: the text is empty; give at least one token")
    return ids


def _refuse(value: Any, where: str) -> None:
    """Raise UserError for what Python would take apart into something that nobody meant."""
    if isinstance(value, bytes | bytearray):
        raise UserError(f"{where} = {value!r:.80}: bytes are no text; decode them")
    if isinstance(value, Mapping) and "role" in value:
        raise UserError(f"{where} is one chat message; give a conversation as a list of messages")
    if isinstance(value, Mapping):
        raise UserError(f"{where} = {value!r:.80}: {_FORMS}; of a tokenizer's output, its ids")


def _is_number(x: Any) -> bool:
    if isinstance(x, str):  # those of NumPy have no dimensions either
        return False
    return isinstance(x, numbers.Number) or getattr(x, "ndim", None) == 0


def _render(model: Transformer, messages: Any) -> str:
    """The text of a conversation, by the chat template of the model's folder."""
    for i, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise UserError(
                    f"prompt: message {i}: {key} = {message.get(key)!r:.80}; it must be a string"
                )
    folder = companions_of(model.tokenizer)
    template = None if folder is None else template_of(folder)
    if template is None:
        where = "its tokenizer is from no folder" if folder is None else f"folder {folder}"
        raise UserError(
            f"prompt: messages need a chat template and the model has none ({where}); pass a text"
        )
    try:
        ends_open = messages[-1]["role"] == "assistant"
        return template.render([dict(m) for m in messages], not ends_open)
    finally:
        template.close()
