"""Fast weights against numpy, repeated n-grams against a slow search, and the coloured text."""

import html
import re

import numpy as np
import pytest
from support.models import config, make, run

from ttt_jax.data.tokenizer import ByteTokenizer
from ttt_jax.errors import UserError
from ttt_jax.eval.diagnostics import (
    diagnose,
    fast_weights,
    ngram_gain,
    repeated_ngrams,
    text_pieces,
)
from ttt_jax.eval.page import gain_colour, text_page

C = 4


@pytest.fixture(scope="module")
def model():
    return make(config(**{"ttt.chunk_size": C, "num_layers": 2, "ttt.layers": (1,)}), "float32")


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 31, 6 * C).astype(np.int32)


def test_fast_weights(model, ids):
    """Norm, rank and share of the output, from the states that the model returns and numpy's
    SVD.
    """
    (found,) = fast_weights(model, ids, points=3)
    assert found["layer"] == 1
    w_DF = np.asarray(model.groups[1].blocks[0].mlp.down[...], np.float64)[0, 0]
    assert [chunk["chunk"] for chunk in found["chunks"]] == [1, 2, 5]
    for chunk in found["chunks"]:
        end = chunk["chunk"] * C
        S_DF, z_CF = (
            np.asarray(x, np.float64)[0, 0, 0]
            for x in run(model, ids[None, : end + C - 1])[1].layers[1][0].ttt[:2]
        )
        assert chunk["state_ratio"] == pytest.approx(
            np.linalg.norm(S_DF) / np.linalg.norm(w_DF), rel=1e-4
        )
        p = np.linalg.svd(S_DF, compute_uv=False) ** 2
        p = p[p > 1e-12 * p.sum()] / p.sum()
        assert chunk["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)
        fast, all_ = (np.linalg.norm(z_CF[: C - 1] @ m.T) for m in (S_DF, S_DF + w_DF))
        assert chunk["output_share"] == pytest.approx(fast / all_, rel=1e-3)


def test_fast_weights_need_two_chunks(model, ids):
    with pytest.raises(UserError, match="--diagnostics: 7 tokens at chunk size 4"):
        fast_weights(model, ids[:7])
    assert fast_weights(make(config(**{"ttt.layers": ()}), "float32"), ids) == []


@pytest.mark.parametrize("n", [1, 2, 4])
def test_repeated_ngrams(n):
    ids = np.random.default_rng(n).integers(0, 3, 60).tolist()
    found = repeated_ngrams(ids, n)
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    for t in range(1, len(ids)):  # the n-gram that ends with token t begins at t - n + 1
        start = t - n + 1
        assert found[t - 1] == (start >= 0 and grams[start] in grams[:start])


def test_ngram_gain():
    ids = np.array([5, 6, 7, 5, 6, 7])
    off, on = np.full(5, -2.0), np.array([-2.0, -2.0, -2.0, -1.5, -1.0])
    found = ngram_gain(ids, on, off, n=2)
    assert found["repeated"] == {"tokens": 2, "on": 1.25, "off": 2.0, "gain": 0.75}
    assert found["novel"] == {"tokens": 3, "on": 2.0, "off": 2.0, "gain": 0.0}
    assert ngram_gain(ids[:2], on[:1], off[:1], n=2)["repeated"] == {
        "tokens": 0,
        "on": None,
        "off": None,
        "gain": None,
    }


def test_the_coloured_text_is_the_text():
    """Characters of several tokens are one piece; everything is escaped; the first token has no
    gain.
    """
    model = make(
        config(**{"ttt.chunk_size": C, "num_layers": 2, "ttt.layers": (1,), "vocab_size": 257}),
        "float32",
    )
    model.tokenizer = ByteTokenizer()
    text = "a <b> & 'naïve' 日本"
    ids = np.array(model.tokenizer.encode(text), np.int32)
    part, pieces = diagnose(model, ids)
    assert part["layers"][0]["layer"] == 1
    assert "".join(piece for piece, _, _ in pieces) == text
    assert pieces[0] == ("a", None, None)
    on = np.arange(len(ids) - 1, dtype=np.float64)
    joined = text_pieces(model, ids, on, 2 * on)
    assert sum(p[1] for p in joined[1:]) == on.sum()
    assert sum(p[2] for p in joined[1:]) == 2 * on.sum()
    page = text_page(pieces, "a & b")
    shown = re.search(r"<pre class='text'>(.*)</pre>", page, re.S)[1]
    assert html.unescape(re.sub(r"<[^>]*>", "", shown)) == text
    assert "a &amp; b" in page
    assert "<b>" not in page


def test_a_character_may_not_swallow_the_first_token():
    """The first token has no log-probability; a character that begins with it has none either."""
    model = make(config(vocab_size=257), "float32")
    model.tokenizer = ByteTokenizer()
    ids = np.array(model.tokenizer.encode("日a"), np.int32)
    assert text_pieces(model, ids, np.array([-1.0, -2.0, -3.0]), np.zeros(3)) == [
        ("日", None, None),
        ("a", -3.0, 0.0),
    ]


def test_gain_colour():
    assert gain_colour(0.0) == "#ffffff"
    assert gain_colour(2.0) == gain_colour(1.0) != gain_colour(-1.0)
    blue, orange = (
        tuple(int(gain_colour(x)[i : i + 2], 16) for i in (1, 3, 5)) for x in (0.5, -0.5)
    )
    assert blue[2] > blue[0]
    assert orange[0] > orange[2]
