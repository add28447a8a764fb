"""Stop strings as arguments, and text that becomes readable token by token: the whole text, at a
cost per token that stays.
"""

import numpy as np
import pytest

from ttt_jax.data.tokenizer import ByteTokenizer
from ttt_jax.errors import UserError
from ttt_jax.inference.writing import Writer, stop_strings


class Counting(ByteTokenizer):
    """Counts the tokens that it decodes."""

    decoded = 0

    def decode(self, ids):
        self.decoded += len(ids)
        return super().decode(ids)


def written(ids, stop=(), tokenizer=None):
    writer = Writer(tokenizer or ByteTokenizer(), stop_strings(stop), set(), len(ids))
    shown = []
    for token in ids:
        shown.append(writer.add(int(token), -1.0))
        if writer.finish_reason:
            break
    return "".join(shown), writer.completion()


def test_a_string_is_one_stop():
    assert stop_strings("XY") == ("XY",)
    assert stop_strings(["X", "YZ"]) == ("X", "YZ")
    assert stop_strings(()) == ()
    shown, completion = written(b"aXbYcXYd", "XY")
    assert (shown, completion.text, completion.finish_reason) == ("aXbYc", "aXbYc", "stop")


@pytest.mark.parametrize("stop", ["", ["a", ""], b"XY", 5, None, [5], [b"a"], {"a": 1}, [["a"]]])
def test_what_is_no_stop_is_one_line(stop):
    with pytest.raises(UserError, match=r"^stop") as error:
        stop_strings(stop)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", range(20))
def test_the_text_is_that_of_all_tokens(seed):
    """Any bytes, valid or not, in any mixture: pieces that are shown make up what decoding
    everything gives.
    """
    rng = np.random.default_rng(seed)
    parts = [
        "é漢😀 a".encode(),
        bytes([0xFF]),
        bytes([0xE2, 0x82]),
        bytes([0xF0, 0x9F]),
        bytes([0x80]),
        "\ufffd".encode(),
    ]
    ids = b"".join(parts[i] for i in rng.integers(0, len(parts), 60))
    shown, completion = written(ids)
    assert shown == completion.text == ids.decode("utf-8", errors="replace")


def test_a_character_is_shown_when_it_is_complete():
    writer = Writer(ByteTokenizer(), (), set(), 100)
    assert [writer.add(i, 0.0) for i in "é😀".encode()] == ["", "é", "", "", "", "😀"]


@pytest.mark.parametrize(
    "ids", [bytes([0xFF]) * 4000, bytes([0x80, 0xC0]) * 2000, "\ufffd".encode() * 1300]
)
def test_what_is_never_valid_costs_the_same_per_token(ids):
    """Quadratic before: 8 million tokens decoded for 4,000."""
    tokenizer = Counting()
    shown, completion = written(ids, tokenizer=tokenizer)
    assert shown == completion.text == ids.decode("utf-8", errors="replace")
    assert tokenizer.decoded < 80 * len(ids)


def test_a_stop_string_is_searched_in_what_is_new():
    """A stop string that is half there all the time holds text back, never more than its own
    length.
    """
    stop = "ab" * 8 + "!"
    writer = Writer(ByteTokenizer(), (stop,), set(), 10_000)
    shown = ""
    for token in b"ab" * 1000 + b"!x":
        shown += writer.add(token, 0.0)
        if writer.finish_reason:
            break
        assert len(writer._held) < len(stop)
    assert (shown, writer.finish_reason) == ("ab" * 992, "stop")
    assert writer.completion().text == shown


def test_a_stop_string_over_the_end():
    shown, completion = written(b"one two", ["two!", "zzz"])
    assert (shown, completion.finish_reason) == ("one two", "length")
