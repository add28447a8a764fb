"""Conversations: the stream holds what the template writes, no token of it twice, whatever is
taken back, read in between or saved.
"""

import signal

import jax
import numpy as np
import pytest
from support.streams import C, one_layer_model
from support.tolerance import relative_rms

from ttt_jax import Session, generate
from ttt_jax.data.tokenizer import ByteTokenizer
from ttt_jax.errors import NotFiniteError, UserError
from ttt_jax.inference import streams
from ttt_jax.inference.conversation import Conversation, render_plain
from ttt_jax.inference.memory_reading import Text, read_texts
from ttt_jax.memory.fast_weights import memory_of, no_memory
from ttt_jax.process.interrupts import Interrupt

pytestmark = pytest.mark.usefixtures("interruptible", "usual_promotion")
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


@pytest.fixture
def model():
    model = one_layer_model(vocab_size=257)
    model.tokenizer = Tokens()
    yield model
    model.tokenizer = None


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


def test_turns_are_what_the_template_writes(model):
    talk = talk_of(model, system="be kind")
    first = talk.ask("hello", max_new_tokens=5)
    assert first.finish_reason == "length"
    second = talk.ask("more", max_new_tokens=5)
    prompt = chatml([{"role": "system", "content": "be kind"}], False)
    prompt += f"[user]hello{END}\n[assistant]"
    alone = generate(model, [model.tokenizer.encode(prompt)], max_new_tokens=5)[0]
    assert first.text == alone.text
    ids = model.tokenizer.encode(prompt) + alone.token_ids
    ids += model.tokenizer.encode(f"{END}\n[user]more{END}\n[assistant]")
    again = generate(model, [ids], max_new_tokens=5)[0]
    assert second.text == again.text
    assert talk.ids == ids + again.token_ids
    read, waiting = talk.tokens
    assert (read, waiting) == (len(talk.ids) - 1, 1)
    assert [m["role"] for m in talk.messages] == ["system", *["user", "assistant"] * 2]


@pytest.mark.parametrize("closes", [True, False])
def test_an_end_token_stands_in_the_stream_once(model, closes):
    """Whether the template closes a turn with the model's end token or with another text."""
    alone = talk_of(model)
    alone.ask("hello", max_new_tokens=12)
    written = alone.ids[-12:]
    at = next(i for i in range(3, 12) if written[i] not in written[:i])
    model.tokenizer = Tokens(written[at])

    def other(messages, add_generation_prompt):
        return chatml(messages, add_generation_prompt).replace(END, "|")

    talk = talk_of(model, chatml if closes else other)
    if not closes:  # the same prompt gives the same tokens, then
        talk.session.read([model.tokenizer.encode(f"[user]hello{END}\n[assistant]")])
        talk.rendered = other([{"role": "user", "content": "hello"}], True)
        talk.ids = model.tokenizer.encode(f"[user]hello{END}\n[assistant]")
        talk.messages = [{"role": "user", "content": "hello"}]
        talk.session.generate(30)
        assert talk._take_answer() == "eos"
    else:
        assert talk.ask("hello", max_new_tokens=30).finish_reason == "eos"
    assert talk.ids[-1] == written[at]
    before = len(talk.ids)
    if closes:  # a document behind the end token: neither twice nor taken away
        talk.read("doc")
    talk.ask("more", max_new_tokens=2)
    new = talk.ids[before:-2] if closes else talk.ids[before - 1 : -2]
    expected = f"doc\n[user]more{END}\n[assistant]" if closes else "|\n[user]more|\n[assistant]"
    assert new == model.tokenizer.encode(expected)
    assert len(talk.ids) == sum(talk.tokens)


def test_a_template_that_rewrites_answers(model):
    """The last turn is read again as the template has it, documents included; not the ones
    before."""
    talk = talk_of(model, trimming)
    talk.read("a book")
    talk.ask("hello", max_new_tokens=4)
    talk.read("another")
    second = talk.ask("more", max_new_tokens=4)
    plain = trimming([*talk.messages[:2], {"role": "user", "content": "more"}], True)
    ids = model.tokenizer.encode("a book" + "another" + plain)
    assert talk.ids[:-4] == ids
    assert second.read_again > 0
    assert second.text == generate(model, [ids], max_new_tokens=4)[0].text
    third = talk.ask("last", max_new_tokens=4)
    assert stream_text(talk).startswith("a bookanother" + trimming(talk.messages[:-1], True))
    assert 0 < third.read_again < second.read_again + 25
    talk.undo()
    assert talk.ask("last", max_new_tokens=4).text == third.text


def test_a_template_that_rewrites_what_is_not_kept(model, tmp_path):
    talk = talk_of(model, trimming)
    talk.ask("hello", max_new_tokens=4)
    talk.save(tmp_path / "s.safetensors")
    loaded = Conversation(Session.load(tmp_path / "s.safetensors", model), trimming)
    before = loaded.messages, loaded.rendered, loaded.tokens
    with pytest.raises(UserError, match="rewrites earlier turns"):
        loaded.ask("more")
    assert (loaded.messages, loaded.rendered, loaded.tokens) == before


def test_undo_is_as_if_nothing_had_been_asked(model):
    talk, other = talk_of(model), talk_of(model)
    for one in (talk, other):
        one.read("something to read")
        one.ask("hello", max_new_tokens=6)
    talk.ask("forget this", max_new_tokens=9)
    talk.read("and this")
    talk.undo()
    assert (talk.messages, talk.ids, talk.tokens) == (other.messages, other.ids, other.tokens)
    assert same(talk, other)
    talk.undo()
    talk.undo()
    with pytest.raises(UserError, match="no state before a turn is kept"):
        talk.undo()


def test_branches_do_not_see_each_other(model):
    talk, other = talk_of(model), talk_of(model)
    for one in (talk, other):
        one.ask("hello", max_new_tokens=6)
    branch = talk.branch()
    branch.ask("elsewhere", max_new_tokens=9)
    branch.read("more")
    assert same(talk, other)
    branch.undo()
    assert branch.messages == talk.messages[:2]


def test_the_last_question_without_what_was_learnt(model):
    talk = talk_of(model)
    talk.read("to be, or not to be, that is the question. " * 3)
    with pytest.raises(UserError, match="nothing has been asked"):
        talk.again(False)
    answer = talk.ask("what?", max_new_tokens=12).text
    before = list(talk.messages), talk.ids, talk.tokens
    on, off = (talk.again(ttt) for ttt in (True, False))
    assert {question for _, question in (on, off)} == {"what?"}
    assert on[0].ask("what?", max_new_tokens=12).text == answer
    assert off[0].ask("what?", max_new_tokens=12).text != answer
    assert (list(talk.messages), talk.ids, talk.tokens) == before
    unread = Conversation(Session(model, ttt=False), chatml)
    unread.ask("what?", max_new_tokens=2)
    with pytest.raises(UserError, match="was read with TTT off"):
        unread.again(True)


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


def test_a_saved_conversation_goes_on(model, tmp_path):
    talk = talk_of(model, system="be kind")
    talk.read("a book")
    talk.ask("hello", max_new_tokens=6)
    talk.save(tmp_path / "s.safetensors")
    again = Conversation(Session.load(tmp_path / "s.safetensors", model), chatml)
    assert (again.messages, again.ids, again.whole) == (talk.messages, talk.ids, True)
    assert same(talk, again)
    stored = Session.load(tmp_path / "s.safetensors", model)
    stored.save(tmp_path / "stream")  # whoever goes on with the stream alone leaves the turns out
    assert Session.load(tmp_path / "stream", model).conversation is None
    with pytest.raises(UserError, match="--system"):
        Conversation(stored, chatml, "be rude")
    older = Session.load(tmp_path / "s.safetensors", model)
    ids = older.conversation.pop("ids")
    assert (Conversation(older, chatml).ids, Conversation(older, chatml).whole) == ([], False)
    wrong = (
        ids[:-1],
        [1, *ids],
        [*ids[:-1], ids[-1] ^ 1],
        [-1, *ids[1:]],
        [*ids[1:], str(ids[0])],
        "x",
    )
    for broken in (
        {"messages": [{"role": "user"}]},
        {"rendered": 3},
        {"end": "x"},
        *({"ids": broken} for broken in wrong),
    ):
        stored.conversation = {"messages": [], "rendered": "", "end": None} | broken
        with pytest.raises(UserError, match="conversation is damaged"):
            Conversation(stored, chatml)


def test_ctrl_c_twice_while_it_reads_leaves_the_stream_whole(model):
    """Both come in the middle of a piece. What is unread is read before the next turn."""
    text = "to be, or not to be, that is the question. " * 9
    before = signal.getsignal(signal.SIGINT)
    whole, talk = (Conversation(Session(model, piece=16), chatml) for _ in range(2))
    whole.read(text)
    feed = talk.session._feed_piece

    def interrupted(*args):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        return feed(*args)

    talk.session._feed_piece = interrupted
    signal.signal(signal.SIGINT, Interrupt())
    try:
        with pytest.raises(KeyboardInterrupt):
            talk.read(text)
    finally:
        signal.signal(signal.SIGINT, before)
    del talk.session._feed_piece
    assert 0 < talk.tokens[0] < whole.tokens[0]
    assert same(whole, talk)


@pytest.mark.parametrize("pieces", [0, 3])
def test_ctrl_c_stops_an_answer(model, pieces):
    """What is written stays; a turn of which nothing is written goes."""
    talk, seen = Conversation(Session(model, piece=8), chatml), []
    talk.read("something")

    def show(text):
        seen.append(text)
        if len(seen) == pieces:
            signal.raise_signal(signal.SIGINT)

    if not pieces:
        talk.session.on_read = lambda done: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        talk.ask("hello", max_new_tokens=40, on_text=show)
    talk.session.on_read = None
    if pieces:
        assert talk.messages[-1]["role"] == "assistant"
        assert talk.messages[-1]["content"].startswith("".join(seen))
        assert 0 < len(talk.ids) - len("something[user]hello\n[assistant]") - 1 < 40
    else:
        assert (talk.messages, talk.ids) == ([], model.tokenizer.encode("something"))
    assert sum(talk.tokens) == len(talk.ids)
    talk.ask("on", max_new_tokens=2)
    assert stream_text(talk).startswith("something" + chatml(talk.messages[:-1], True))


def test_lost_numbers_take_the_turn_back(model, monkeypatch):
    talk, other = talk_of(model), talk_of(model)
    talk.read("something")
    other.read("something")

    def lost(*arguments, **options):
        talk.session.watch.lost[0] = "S"
        raise NotFiniteError("lost")

    monkeypatch.setattr(talk.session, "generate", lost)
    with pytest.raises(NotFiniteError):
        talk.ask("hello")
    assert talk.messages == []
    assert same(talk, other)


def test_without_a_template(model):
    talk = talk_of(model, render_plain, system="s")
    talk.ask("hello", max_new_tokens=5)
    talk.ask("more", max_new_tokens=5)
    answers = [m["content"] for m in talk.messages if m["role"] == "assistant"]
    expected = f"System: s\nUser: hello\nAssistant:{answers[0]}\nUser: more\nAssistant:"
    assert talk.rendered == expected + answers[1]
    assert talk.ids[:-5] == [
        *model.tokenizer.encode("System: s\nUser: hello\nAssistant:"),
        *talk.ids[len("System: s\nUser: hello\nAssistant:") :][:5],
        *model.tokenizer.encode("\nUser: more\nAssistant:"),
    ]


def test_norms_of_the_fast_weights(model):
    talk = talk_of(model)
    assert talk.fast_weights() == {}
    talk.read("something to read")
    (layer, ratio), *rest = talk.fast_weights().items()
    assert (layer, rest) == (0, [])
    assert 0 < ratio < 100
    talk.forget(3)
    assert talk.session.state is None
    assert talk.fast_weights() == {0: pytest.approx(3 * ratio, rel=1e-5)}


def test_refusals(model):
    with pytest.raises(UserError, match="session of 2 streams"):
        Conversation(Session(model, 2), chatml)
    with pytest.raises(UserError, match="the text is empty"):
        talk_of(model).read("")
    model.tokenizer = None
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        talk_of(model)


def consistent(talk):
    """Says whether what the conversation knows is what its stream holds."""
    unread = talk.session.unread[0].tolist()
    return sum(talk.tokens) == len(talk.ids) and talk.ids[len(talk.ids) - len(unread) :] == unread


def test_ctrl_c_while_a_text_is_taken_in_keeps_it_for_later(model, monkeypatch):
    """It comes after the conversation has noted the text and before the stream has it."""
    whole, talk = (Conversation(Session(model, piece=16), chatml) for _ in range(2))
    check = streams.token_rows

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return check(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(streams, "token_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            talk.read("something to read")
    whole.read("something to read")
    assert talk.tokens == (0, len(whole.ids))
    assert consistent(talk)
    assert same(whole, talk)


@pytest.mark.parametrize(("pieces", "tidies"), [(3, "_take_answer"), (0, "undo")])
def test_ctrl_c_again_does_not_disturb_the_order_after_the_first(
    model, monkeypatch, pieces, tidies
):
    """The second one comes in the middle of what the first one made necessary."""
    talk, seen = Conversation(Session(model, piece=8), chatml), []
    talk.read("something")
    tidy = getattr(Conversation, tidies)

    def show(text):
        seen.append(text)
        if len(seen) == pieces:
            signal.raise_signal(signal.SIGINT)

    def disturbed(self):
        signal.raise_signal(signal.SIGINT)
        return tidy(self)

    monkeypatch.setattr(Conversation, tidies, disturbed)
    if not pieces:
        talk.session.on_read = lambda done: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        talk.ask("hello", max_new_tokens=40, on_text=show)
    talk.session.on_read = None
    assert [m["role"] for m in talk.messages] == (["user", "assistant"] if pieces else [])
    assert consistent(talk)


def test_ctrl_c_raises_once_until_it_is_asked_for_again():
    interrupt, raised = Interrupt(), []
    for turn in (1, 2):
        for _ in range(3):
            try:
                interrupt(signal.SIGINT, None)
            except KeyboardInterrupt:
                raised.append(turn)
        interrupt.ready = True
    assert raised == [1, 2]
