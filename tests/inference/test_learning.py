"""Texts that a conversation learns, and forgets but for what they wrote: what is left is a memory,
and nothing else.
"""

import signal

import jax
import numpy as np
import pytest
from support.conversations import (
    END,
    chatml,
    model_with_tokens,
    same,
    stream_text,
    talk_of,
    trimming,
)
from support.streams import C
from support.tolerance import relative_rms

from ttt_jax import Session
from ttt_jax.errors import UserError
from ttt_jax.inference.conversation import Conversation
from ttt_jax.inference.memory_reading import Text, read_texts
from ttt_jax.memory.fast_weights import memory_of, no_memory

pytestmark = pytest.mark.usefixtures("interruptible", "usual_promotion")


@pytest.fixture
def model():
    model = model_with_tokens()
    yield model
    model.tokenizer = None


def test_what_is_left_of_a_text_that_is_forgotten(model, tmp_path):
    """The memory, and nothing else: the conversation is a new one that begins with it."""
    text = "to be, or not to be, that is the question. " * 3
    talk = talk_of(model, system="be kind")
    talk.read(text)
    talk.ask("what?", max_new_tokens=5)
    memory, held = talk.session.memory(), sum(talk.tokens)
    assert talk.forget(2) == held
    assert (talk.tokens, talk.ids, talk.whole) == ((0, 0), [], True)
    assert talk.messages == [{"role": "system", "content": "be kind"}]
    with pytest.raises(UserError, match="no state before a turn"):
        talk.undo()
    start = talk.session.start
    assert start is not None
    assert (start.dW(0) == (2 * memory).dW(0)).all()
    again = Conversation(Session(model, memory=2 * memory), chatml, "be kind")
    answers = [x.ask("what?", max_new_tokens=12).text for x in (talk, again)]
    assert answers[0] == answers[1]
    assert talk.ids == again.ids
    off, question = talk.again(False)
    unread = talk_of(model, system="be kind").ask("what?", max_new_tokens=12).text
    assert answers[0] != unread
    frozen = Conversation(Session(model, ttt=False), chatml, "be kind")
    assert off.ask(question, max_new_tokens=12).text == frozen.ask(question, max_new_tokens=12).text
    talk.save(tmp_path / "s")
    loaded = Conversation(Session.load(tmp_path / "s", model), chatml)
    assert same(loaded, talk)


def memory_of_text(model, text, **options):
    ids = model.tokenizer.encode(text)
    ((_, memory),) = read_texts(model, [Text("text", ids)], context=2 * C, **options)
    return memory


BOOK = "a book of things that were never heard"


def test_a_text_that_is_learnt_is_not_in_the_context(model, tmp_path):
    """It is the memory that reading it alone gives; so is a second one behind it, and a turn."""
    talk = talk_of(model)
    source = talk.read(BOOK, 2 * C)
    assert (source.tokens, source.written, source.context) == (38, 36, 2 * C)
    assert (talk.tokens, talk.ids) == ((0, 0), [])
    memory = memory_of_text(model, BOOK)
    assert talk.session.memory() == memory
    other = Conversation(Session(model, memory=memory), chatml)
    answer = talk.ask("hello", max_new_tokens=5).text
    assert answer == other.ask("hello", max_new_tokens=5).text
    assert talk.ids == other.ids
    before = talk.session.branch()
    talk.read(BOOK[::-1], 2 * C)
    assert talk.ids == other.ids
    chunks = lambda session: session.state.layers[0][0].ttt.S_BDF
    written = memory_of_text(model, BOOK[::-1], start=as_memory(before))
    assert np.array_equal(chunks(talk.session)[0, 0, 0], written.dW(0))
    for x, y in zip(cached(talk.session), cached(before), strict=True):
        assert np.array_equal(x, y)
    names = [(source.name, source.written) for source in talk.session.memory().sources]
    assert names == [("text", 36), ("text", 36), ("session", len(talk.ids) // C * C)]
    talk.save(tmp_path / "s")
    again = Conversation(Session.load(tmp_path / "s", model), chatml)
    assert same(again, talk)
    talk.undo()
    talk.undo()
    assert talk.tokens == (0, 0)
    assert talk.session.memory() == memory


def as_memory(session):
    """The fast weights as they are, where `Session.memory` would read the last token, too."""
    return memory_of(no_memory(session.model), session.model, session.state, 0, session.learnt)


def cached(session):
    """Keys, values and pending tokens."""
    layer = session.state.layers[0][0]
    return jax.tree.leaves((layer.cache, layer.ttt._replace(S_BDF=None), session.state.position_B))


def test_a_template_that_rewrites_answers_learns_texts_again(model):
    talk, other = talk_of(model, trimming), Session(model)
    talk.ask("hello", max_new_tokens=5)
    answer = talk.messages[-1]["content"][1:]
    talk.read(BOOK, 2 * C)
    assert talk.ask("more", max_new_tokens=5).read_again > 0
    asked = f"[user]hello{END}\n[assistant]{answer}{END}\n[user]"
    assert stream_text(talk).startswith(asked)
    other.learn(BOOK, 2 * C)
    other.read([talk.ids])
    assert relative_rms(talk.session.memory().dW(0), other.memory().dW(0)) < 1e-6


@pytest.mark.parametrize("begun", [False, True])
def test_ctrl_c_while_a_text_is_learnt_takes_it_back(model, begun):
    talk = talk_of(model)
    if begun:
        talk.ask("hello", max_new_tokens=5)
    memory, tokens = talk.session.memory(), talk.tokens

    def stop(tokens):
        if tokens > 4 * C:
            signal.raise_signal(signal.SIGINT)

    talk.session.on_read = stop
    with pytest.raises(KeyboardInterrupt):
        talk.read(BOOK, 2 * C)
    talk.session.on_read = None
    assert (talk.tokens, talk.session.learnt, talk.session.holds_memory) == (tokens, (), False)
    assert talk.session.memory() == memory


def test_learning_is_refused_where_nothing_would_be_learnt(model):
    for session, context, match in [
        (Session(model, ttt=False), C, "learn: the session is read with TTT off"),
        (Session(model, 2), C, "learn: the session has 2 streams"),
        (Session(model), C + 1, f"context = {C + 1}: must be a multiple of"),
        (Session(model), C, f"learn: 3 tokens are less than a chunk of {C}"),
    ]:
        with pytest.raises(UserError, match=match):
            session.learn("abc", context)
        assert session.state is None
        assert not session.learnt


def test_forgetting_is_refused_where_nothing_would_be_left(model):
    talk = talk_of(model)
    for text in ("", "abc"):  # the chunk has four tokens
        if text:
            talk.read(text)
        with pytest.raises(UserError, match=f"{len(text)} tokens are less than a chunk of 4"):
            talk.forget()
    assert talk.tokens == (2, 1)
    talk.read("d")
    with pytest.raises(UserError, match="times 0 leaves nothing"):
        talk.forget(0)
    assert talk.forget() == 4
    unwritten = Conversation(Session(model, ttt=False), chatml)
    unwritten.read("abcdefgh")
    with pytest.raises(UserError, match="read with TTT off"):
        unwritten.forget()
