"""Conversations: the stream holds what the template writes, no token of it twice, whatever is
taken back, read in between or saved.
"""

import signal

import pytest
from support.conversations import (
    END,
    Tokens,
    chatml,
    model_with_tokens,
    same,
    stream_text,
    talk_of,
    trimming,
)

from ttt_jax import Session, generate
from ttt_jax.errors import NotFiniteError, UserError
from ttt_jax.inference import streams
from ttt_jax.inference.conversation import Conversation, render_plain
from ttt_jax.process.interrupts import Interrupt

pytestmark = pytest.mark.usefixtures("interruptible", "usual_promotion")


@pytest.fixture
def model():
    model = model_with_tokens()
    yield model
    model.tokenizer = None


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
