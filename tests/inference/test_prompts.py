"""Prompts as people have them: every form gives the same rows of ids, or one line that says what to
pass.
"""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from support.hf_folders import make_folder
from support.models import config, make
from support.streams import one_layer_model

import ttt_jax
from ttt_jax import Session, generate, load_pretrained, score
from ttt_jax.errors import UserError
from ttt_jax.inference.prompts import token_rows

IDS = [3, 1, 2]
ASKED = [{"role": "user", "content": "hi"}]
BEGUN = [*ASKED, {"role": "assistant", "content": "yes, but "}]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A loaded model with a chat template and a tokenizer.json in which an id is a byte."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    make_folder(folder, {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 257})
    settings = {"eos_token": "<end>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=bytes_of_bpe(), merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_pretrained(folder)


def bytes_of_bpe():
    """Byte-level BPE's letter for each byte -> the byte."""
    encode = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str
    plain = {encode(chr(b))[0][0]: b for b in range(128)}
    rest = sorted(set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) - set(plain))
    return plain | {letter: 128 + n for n, letter in enumerate(rest)}


def as_lists(rows):
    assert all(row.dtype == np.int32 for row in rows)
    return [row.tolist() for row in rows]


@pytest.mark.parametrize(
    "ids",
    [
        IDS,
        tuple(IDS),
        np.array(IDS),
        np.array(IDS, np.uint8),
        jnp.array(IDS),
        list(np.array(IDS)),
        list(jnp.array(IDS)),
        [IDS],
        np.array([IDS]),
        jnp.array([IDS]),
        (row for row in [IDS]),
    ],
    ids=lambda x: f"{type(x).__name__}{getattr(x, 'shape', '')}",
)
def test_ids_of_every_kind_are_one_prompt(ids):
    assert as_lists(token_rows(one_layer_model(), ids)) == [IDS]


def test_texts_and_messages(chatty):
    rendered = b"<user>hi\n<assistant>"
    begun = b"<user>hi\n<assistant>yes, but"  # as the template has it, without the last space
    for prompts, expected in [
        ("a", [b"a"]),
        (["a", "bc"], [b"a", b"bc"]),
        (np.array(["a", "bc"]), [b"a", b"bc"]),
        (["a", IDS], [b"a", bytes(IDS)]),
        (ASKED, [rendered]),
        ([ASKED, "a", BEGUN], [rendered, b"a", begun]),
    ]:
        assert as_lists(token_rows(chatty, prompts)) == [list(row) for row in expected], prompts


def test_every_form_gives_the_same_completion(chatty):
    """What generate, a session and score take."""
    text = "<user>hi\n<assistant>"
    first = generate(chatty, text, max_new_tokens=6, stop="XY", eos_ids=())[0]
    assert len(first.token_ids) == 6
    for prompts in (ASKED, [text], list(text.encode()), jnp.array(list(text.encode()))):
        assert generate(chatty, prompts, max_new_tokens=6, eos_ids=())[0] == first
    session = Session(chatty)
    session.read(ASKED)
    assert session.position_B.tolist() == [len(text) - 1]
    assert session.generate(6, eos_ids=())[0].token_ids == first.token_ids
    by_text, by_ids = (score(chatty, x).logprobs_BT for x in (text, [list(text.encode())]))
    np.testing.assert_array_equal(by_text, by_ids)


WRONG = {
    "no model": (lambda m: generate("checkpoints/x", "text"), r"pass what load_pretrained returns"),
    "swapped": (lambda m: score("text", m), r"model = 'text': not a model"),
    "a session of no model": (lambda m: Session("x"), "not a model"),
    "nothing": (lambda m: token_rows(m, []), "none given"),
    "None": (
        lambda m: token_rows(m, None),
        "prompts = None: give a text, chat messages, token ids",
    ),
    "a number": (lambda m: token_rows(m, 5), "prompts = 5: give a text"),
    "bytes": (lambda m: token_rows(m, b"ab"), "bytes are no text; decode them"),
    "bytes in a list": (lambda m: token_rows(m, ["a", b"ab"]), "row 1 = b'ab': bytes are no text"),
    "one message": (lambda m: token_rows(m, ASKED[0]), "as a list of messages"),
    "a message between": (lambda m: token_rows(m, ["a", ASKED[0]]), "row 1 is one chat message"),
    "an encoding": (lambda m: token_rows(m, {"input_ids": [IDS]}), "tokenizer's output, its ids"),
    "no content": (lambda m: token_rows(m, [{"role": "user"}]), "message 0: content = None"),
    "parts": (
        lambda m: token_rows(m, [{"role": "user", "content": [{"type": "text"}]}]),
        "must be a string",
    ),
    "floats": (lambda m: token_rows(m, [1.0, 2.0]), "dtype float64; token ids are integers: cast"),
    "a float array": (lambda m: token_rows(m, jnp.ones(3)), "dtype float32; token ids are integ"),
    "booleans": (lambda m: token_rows(m, [True, False]), "dtype bool"),
    "three axes": (lambda m: token_rows(m, np.ones((1, 2, 3), int)), r"row 0 has shape \(2, 3\)"),
    "a number between": (lambda m: token_rows(m, ["a", 5]), r"row 1 has shape \(\)"),
    "an empty text": (lambda m: token_rows(m, ["a", ""]), "the text is empty"),
    "an empty row": (lambda m: token_rows(m, [[1], []]), r"row 1 has shape \(0,\)"),
    "an id too large": (lambda m: token_rows(m, [257]), "holds id 257"),
    "rows for another batch": (lambda m: Session(m, 2).extend("text"), "1 for a session of 2"),
    "text to the model": (
        lambda m: m("text"),
        r"pass model\.tokenizer\.encode\(text\) as \[B, T\]",
    ),
    "a flat list to the model": (lambda m: m(IDS), r"ids: shape \(3,\); pass \[B, T\]"),
    "ragged rows to the model": (lambda m: m([[1, 2], [3]]), "rows of different lengths"),
    "floats to the model": (lambda m: m(jnp.ones((1, 3))), "ids: dtype float32; token ids are"),
    "strings to the model": (lambda m: m([["a", "b"]]), "ids: dtype <U1; token ids are integers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_line_says_what_to_pass(chatty, name):
    call, match = WRONG[name]
    with pytest.raises(UserError, match=match) as caught:
        call(chatty)
    assert "\n" not in str(caught.value)


def test_messages_without_a_template():
    model = make(config(num_layers=1, **{"ttt.layers": (0,)}), "float32")
    with pytest.raises(UserError, match=r"the model has none \(its tokenizer is from no folder\)"):
        token_rows(model, ASKED)


def test_the_public_names_are_shown_without_a_wait():
    """`dir` knows the names before their modules are imported, and shows nothing else."""
    code = (
        "import sys, ttt_jax; print(*dir(ttt_jax));"
        "print(*({'jax', 'numpy', 'flax', 'click'} & set(sys.modules)));"
        "from ttt_jax import *; print(generate.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, heavy, home = done.stdout.split("\n")[:3]
    assert {n for n in names.split() if not n.startswith("_")} == set(ttt_jax.__all__) - {
        "__version__"
    }
    assert set(ttt_jax.__all__) <= set(names.split())
    assert not any(n.startswith("_") and not n.startswith("__") for n in names.split())
    assert (heavy, home) == ("", "ttt_jax.inference.generation")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ttt_jax.nothing
