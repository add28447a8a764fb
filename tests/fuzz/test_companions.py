"""Damaged and hostile files beside a model, and chat templates: a result or one line that is a
`UserError`, in bounded time.

As in `fuzz/test_checkpoints.py`: a few examples of each run with the fast tests, `-m slow` runs
10,000.
"""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import (
    FLIPS,
    JSON,
    flip,
    fuzz,
)

from ttt_jax.errors import UserError
from ttt_jax.files.reading import companion_fields
from ttt_jax.inference.chat_template import ChatTemplate, find_template, special_tokens
from ttt_jax.pretrained.load import read_eos_ids

SECONDS = 0.5  # for a template
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + "
    "'<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PIECES = [
    "{% for i in range(99999) %}",
    "{% endfor %}",
    "{% if messages %}",
    "{% else %}",
    "{% endif %}",
    "{{ messages }}",
    "{{ i }}",
    "{% set x = 'x' * 10 ** 9 %}",
    "{{ x }}",
    "{% macro f(n) %}",
    "{% endmacro %}",
    "{{ f(f) }}",
    "{{ 9 ** 9 ** 2 }}",
    "{{ 1 / 0 }}",
    "{{ messages[0].content }}",
    "{{ ''.__class__ }}",
    "{{ cycler.__init__ }}",
    "{{ '%9999999d' % 1 }}",
    "{% break %}",
    "{#",
    "#}",
    "{{ raise_exception('no') }}",
    "{% include 'x' %}",
    "{{ lipsum(9999) }}",
    "{{ namespace(a=1).a }}",
    "{% raw %}",
    "{% endraw %}",
    "{{ [1] | map('string') | join | center(10 ** 8) }}",
    "{{ messages | tojson(indent=99999) }}",
    "\x00",
    "\x1b[2J",
    "ü",
]
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=20)}
)
MESSAGES = st.lists(MESSAGE, max_size=3)


def one_line(action):
    """What `action` returns, or None after a refusal."""
    try:
        return action()
    except UserError as error:
        message = str(error)
        assert message.isprintable()
        assert len(message) < 1000
        return None


def run_templates(examples):
    """Templates in pieces, and flips of a real one."""
    damaged = FLIPS.map(
        lambda places: flip(CHATML.encode(), places).decode("utf-8", errors="replace")
    )
    sources = (
        st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | damaged | st.text(max_size=30)
    )

    @fuzz(examples)
    @given(sources, MESSAGES, st.booleans())
    def example(source, messages, generation):
        template, begin = ChatTemplate(source, {"eos_token": "</s>"}, SECONDS), time.monotonic()
        try:
            text = one_line(lambda: template.render(messages, generation))
            assert text is None or isinstance(text, str)
        finally:
            template.close()
        # two frames of half a second, and the start of a process
        assert time.monotonic() - begin < 9

    example()


def run_settings(folder, examples):
    """Fields of tokenizer_config.json that the harness uses, of any shape, and its text, flipped
    and cut.
    """
    path = folder / "tokenizer_config.json"
    names = ["chat_template", "bos_token", "eos_token", "add_bos_token", "pad_token"]
    several = st.lists(st.fixed_dictionaries({"name": JSON, "template": JSON}) | JSON, max_size=3)
    fields = st.dictionaries(st.sampled_from(names), JSON | several, max_size=4)
    original = json.dumps({"chat_template": CHATML, "eos_token": {"content": "</s>"}}).encode()

    @fuzz(examples)
    @given(fields | FLIPS | st.integers(0, len(original)))
    def example(change):
        if isinstance(change, dict):
            path.write_text(json.dumps(change))
        else:
            path.write_bytes(
                flip(original, change) if isinstance(change, list) else original[:change]
            )
        settings = one_line(lambda: companion_fields(folder, path.name))
        if settings is not None:
            found = one_line(lambda: find_template(folder, settings))
            assert found is None or isinstance(found, str)
            assert all(isinstance(value, str) for value in special_tokens(settings).values())

    example()


def run_end_tokens(folder, examples):
    """Whatever `eos_token_id` is, what comes out are ids of the vocabulary."""
    ids = st.lists(st.integers(-2, 60) | JSON, max_size=70) | JSON

    @fuzz(examples)
    @given(ids, st.sampled_from(["generation_config.json", "config.json"]))
    def example(value, name):
        path = folder / name
        path.write_text(json.dumps({"eos_token_id": value}))
        found = one_line(lambda: read_eos_ids(folder, 50))
        path.unlink()
        assert found is None or (
            len(found) <= 64 and all(type(i) is int and 0 <= i < 50 for i in found)
        )

    example()


def test_templates():
    run_templates(15)


def test_settings(tmp_path):
    run_settings(tmp_path, 60)


def test_end_tokens(tmp_path):
    run_end_tokens(tmp_path, 100)


@pytest.mark.slow
def test_many_more(tmp_path):
    run_settings(tmp_path, 10_000)
    run_end_tokens(tmp_path, 10_000)


@pytest.mark.slow
def test_many_more_templates():
    run_templates(10_000)
