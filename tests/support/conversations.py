"""Conversations of a tiny model with bytes for tokens, and what their streams hold."""

from __future__ import annotations

from support.streams import one_layer_model

from ttt_jax import Session
from ttt_jax.data.tokenizer import ByteTokenizer
from ttt_jax.inference.conversation import Conversation

END = "<end>"


class Tokens(ByteTokenizer):
    """Bytes, and one special token END that has the id of a byte, which has its id. Equal ones
    share what is compiled for a model.
    """

    def __init__(self, end=256):
        self.eos_id = end

    def __eq__(self, other):
        return isinstance(other, Tokens) and self.eos_id == other.eos_id

    def __hash__(self):
        return hash(self.eos_id)

    def _swap(self, ids):
        return [{256: self.eos_id, self.eos_id: 256}.get(i, i) for i in ids]

    def encode(self, text):
        ids = []
        for i, part in enumerate(text.split(END)):
            ids += ([256] if i else []) + super().encode(part)
        return self._swap(ids)

    def decode(self, ids):
        return super().decode(self._swap(ids))


def chatml(messages, add_generation_prompt):
    text = "".join(f"[{m['role']}]{m['content']}{END}\n" for m in messages)
    return text + ("[assistant]" if add_generation_prompt else "")


def trimming(messages, add_generation_prompt):
    """Answers but the last lose their first character, as templates drop reasoning."""
    cut = [m | {"content": m["content"][1:]} if m["role"] == "assistant" else m for m in messages]
    return chatml(cut, add_generation_prompt)


def talk_of(model, render=chatml, **options):
    return Conversation(Session(model), render, **options)


def stream_text(talk):
    """What the stream holds, with END spelt out."""
    end = talk.session.model.tokenizer.eos_id
    parts, held = [], []
    for i in talk.ids:
        if i == end:
            parts.append(talk.session.model.tokenizer.decode(held))
            held = []
        else:
            held.append(i)
    return END.join([*parts, talk.session.model.tokenizer.decode(held)])


def same(talk, other):
    """The next answer of both: nothing else of their states can be seen."""
    return talk.ask("ok", max_new_tokens=8).text == other.ask("ok", max_new_tokens=8).text


def model_with_tokens():
    model = one_layer_model(vocab_size=257)
    model.tokenizer = Tokens()
    return model
