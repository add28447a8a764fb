"""Chat templates: what they render, and hostile ones, which end in one line within their time and
memory.
"""

import os
import time

import pytest

from ttt_jax.errors import CheckpointError, UserError
from ttt_jax.inference.chat_template import ChatTemplate, find_template, special_tokens

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HISTORY = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "it is <b>ü"}]


def render(source, messages=HISTORY, seconds=10.0, generation=True):
    template = ChatTemplate(source, {"eos_token": "</s>"}, seconds)
    try:
        return template.render(messages, generation)
    finally:
        template.close()


def refusal(source, seconds=10.0, **options):
    with pytest.raises(UserError) as caught:
        render(source, seconds=seconds, **options)
    message = str(caught.value)
    assert message.startswith("chat template: ")
    assert message.isprintable()
    assert len(message) < 400
    return message


def test_what_is_rendered():
    assert render(CHATML) == "<user>hello</s>\n<assistant>it is <b>ü</s>\n<assistant>"
    assert render(CHATML, generation=False) == "<user>hello</s>\n<assistant>it is <b>ü"
    assert (
        render("{{ messages | tojson }}", HISTORY[:1]) == '[{"role": "user", "content": "hello"}]'
    )
    assert (
        render(
            "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}x{% endfor %}\n"
        )
        == "x"
    )
    assert "leaves out the last message" in refusal("fixed text", generation=False)


def test_one_process_renders_many():
    template = ChatTemplate(CHATML, {"eos_token": "</s>"})
    template.render(HISTORY, True)
    process = template._process
    for n in range(50):
        assert f"<user>{n}</s>" in template.render([{"role": "user", "content": str(n)}], True)
    assert template._process is process
    del template  # and the process ends with it
    assert process.poll() is not None


def test_a_template_that_failed_once_renders_again():
    template = ChatTemplate(
        "{{ 1 // (messages | length - 1) }}{% for i in range(90000) if "
        "messages | length > 2 %}"
        "{% for j in range(90000) %}{% endfor %}{% endfor %}",
        {},
        1.0,
    )
    for messages, words in (
        (HISTORY[:1], "ZeroDivisionError"),
        (HISTORY * 2, "took more than 1 s"),
    ):
        with pytest.raises(UserError, match=words):
            template.render(messages, True)
        assert template.render(HISTORY, True) == "1"
    template.close()


HOSTILE = {
    "memory": ("{{ 'x' * 10 ** 10 }}", "MemoryError"),
    "memory by doubling": (
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set "
        "ns.x = ns.x ~ ns.x %}"
        "{% endfor %}{{ ns.x }}",
        "MemoryError",
    ),
    "memory by format": ("{{ '%1000000000d' % 1 }}", "MemoryError"),
    "memory by filter": ("{{ 'x' | center(10 ** 10) }}", "MemoryError"),
    "too long": ("{{ 'x' * 70000000 }}", "gives 70000000 characters"),
    "range": ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError: Range too big"),
    "recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
    "nested": (
        "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
        "chat template: cannot be rendered (",
    ),
    "type": ("{{ 1 + 'a' }}", "TypeError"),
    "zero": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "undefined": ("{{ nobody.field.field }}", "UndefinedError"),
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "attribute": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "globals": ("{{ raise_exception.__globals__.x }}", "SecurityError"),
    "method of a string": (
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "SecurityError",
    ),
    "changes its input": ("{{ messages.append(1) }}", "SecurityError"),
    "include": ("{% include '/etc/passwd' %}", "no loader"),
    "integer": ("{{ 10 ** 5000 }}", "ValueError"),
    "escapes": ("{{ raise_exception('\x1b[31m\\n' * 1000) }}", r"\x1b[31m"),
    "long message": ("{{ raise_exception('abc' * 10 ** 6) }}", "abcabc"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_templates(case):
    source, words = HOSTILE[case]
    assert words in refusal(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 8) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) "
        "}}",
    ],
)
def test_templates_that_never_end(source):
    begin = time.monotonic()
    assert "took more than 0.5 s" in refusal(source, seconds=0.5)
    assert time.monotonic() - begin < 10  # half a second, and the start of a process


def test_templates_are_found(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("a")
    assert find_template(tmp_path, {}) == "a"
    assert find_template(tmp_path, {"chat_template": "b"}) == "b"
    several = {
        "chat_template": [
            {"name": "default", "template": "c"},
            {"name": "rag", "template": "d"},
            {"name": []},
            3,
        ]
    }
    assert (find_template(None, several), find_template(None, several, "rag")) == ("c", "d")
    with pytest.raises(UserError, match="the model has default, rag; name one of them"):
        find_template(None, several, "x")
    with pytest.raises(CheckpointError, match="is no text"):
        find_template(None, {"chat_template": [{"name": "default", "template": 3}]})
    with pytest.raises(CheckpointError, match="its chat_template has 1000001 characters"):
        find_template(None, {"chat_template": "x" * 1_000_001})
    with pytest.raises(UserError, match="no chat_template in tokenizer_config"):
        find_template(tmp_path / "nowhere", {})
    os.truncate(tmp_path / "chat_template.jinja", 1_000_001)
    with pytest.raises(CheckpointError, match="1000001 bytes; such a file has at most 1000000"):
        find_template(tmp_path, {})
    settings = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "pad_token": None,
        "unk_token": {},
        "other": "x",
    }
    assert special_tokens(settings) == {"bos_token": "<s>", "eos_token": "</s>"}
