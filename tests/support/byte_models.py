"""A small model folder that reads text: every byte is a token."""

from __future__ import annotations

from support.models import make
from support.streams import one_layer_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ttt_jax import save_pretrained


def byte_model(path, **changes):
    """Write a random Hugging Face folder with a tokenizer of bytes; id 256 is its end token."""
    model = make(one_layer_model(vocab_size=257, **changes).config, "float32")
    model.head[...] = model.head[...].at[256].set(0.0)  # never the likeliest: no text ends early
    save_pretrained(model, path, dtype="float32")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    return path
