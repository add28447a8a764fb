"""Text as it is streamed and cut, in a batch whose rows say what the test wants them to say.

The model is random; the tokenizer gives the tokens that it happens to write the meaning that is
needed.
"""

import numpy as np
import pytest
from support.streams import model_of, prompts

from ttt_jax.inference.generation import Session
from ttt_jax.inference.sampling import Sampling

HOT = Sampling(temperature=5.0)


class Dictionary:
    """Tokens are bytes of UTF-8; those that are not in the dictionary are dots."""

    def __init__(self, tokens, text):
        self.bytes = dict(zip(tokens, text.encode(), strict=False))

    def decode(self, ids):
        return bytes(self.bytes.get(int(i), ord(".")) for i in ids).decode(errors="replace")


@pytest.fixture(scope="module")
def written():
    """The tokens of two rows, which go on without an end."""
    session = Session(model_of(vocab_size=251), 2)
    session.extend(prompts([9, 14], vocab=251))
    return [row.token_ids for row in session.generate(24, HOT, eos_ids=(), seed=[1, 6])]


def stream(written, text, stop):
    """(completions, pieces of text that row 0 showed, session) when row 0 writes `text`."""
    tokens = len(text.encode())
    assert len(set(written[0][:tokens])) == tokens, "each token one meaning"
    model = model_of(vocab_size=251)
    session, shown = Session(model, 2), []
    model.tokenizer = Dictionary(written[0], text)  # after the session, whose programs know it not
    session.extend(prompts([9, 14], vocab=251))
    show = lambda row, piece: shown.append(piece) if row == 0 else None
    rows = session.generate(24, HOT, stop=stop, eos_ids=(), seed=[1, 6], on_text=show)
    model.tokenizer = None
    return rows, shown, session


def test_no_half_characters_and_nothing_of_a_stop_string(written):
    rows, shown, session = stream(written, "aü€ STOP", ["STOP", "never"])
    assert (rows[0].text, rows[0].finish_reason) == ("aü€ ", "stop")
    assert shown == ["a", "ü", "€", " "], "characters whole, the stop string not at all"
    tokens = len("aü€ STOP".encode())
    assert rows[0].token_ids == written[0][:tokens], "those of the stop string included"
    assert rows[1].token_ids == written[1]
    assert session.position_B.tolist() == [9 + tokens - 1, 14 + 24 - 1], "nothing behind it is read"
    last = [written[0][tokens - 1], written[1][-1]]
    assert [ids.tolist() for ids in session.unread] == [[token] for token in last]


def test_what_only_begins_like_a_stop_string_is_shown(written):
    rows, shown, _ = stream(written, "xSTOx", ["STOP"])
    assert rows[0].finish_reason == "length"
    assert shown[:2] == ["x", "STOx"]
    assert "".join(shown) == rows[0].text


def test_a_row_that_was_stopped_reads_on_as_if_it_had_been_alone(written):
    """Row 0 stops while row 1 goes on; what both read later finds the state where each stopped."""
    _, _, session = stream(written, "aü€ STOP", ["STOP"])
    more = prompts([5, 5], vocab=251, seed=3)
    session.extend(more)
    went_on = session.generate(3, HOT, eos_ids=(), seed=[1, 6])
    fresh, starts = Session(model_of(vocab_size=251), 2), prompts([9, 14], vocab=251)
    lengths = (len("aü€ STOP".encode()), 24)
    fresh.extend([[*starts[b], *written[b][: lengths[b]], *more[b]] for b in range(2)])
    for row, expected in zip(went_on, fresh.generate(3, HOT, eos_ids=(), seed=[1, 6]), strict=True):
        assert row.token_ids == expected.token_ids
        np.testing.assert_allclose(row.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)


def test_a_branch_stands_where_its_stream_stands():
    """In the middle of a chunk: its clock and positions are those of the stream that it left."""
    model, (document,), (question,) = model_of(), prompts([23]), prompts([6], seed=1)
    session = Session(model)
    session.read([document])
    assert session.branch().position_B.tolist() == [22]
    branch = session.branch(2)
    assert branch.position_B.tolist() == [22, 22]
    branch.extend([question] * 2)
    whole = Session(model, 2)
    whole.extend([np.concatenate([document, question])] * 2)
    rows, wanted = (one.generate(6, eos_ids=()) for one in (branch, whole))
    for row, expected in zip(rows, wanted, strict=True):
        assert row.token_ids == expected.token_ids
        np.testing.assert_allclose(row.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)
