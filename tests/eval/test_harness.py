"""The lm-evaluation-harness adapter: equal to `score` and `generate`, and errors that help."""

import json

import numpy as np
import pytest
from support.harness import lm_of, model_of, requests

from ttt_jax import generate, score
from ttt_jax.data.tokenizer import ByteTokenizer
from ttt_jax.errors import DataError, UserError

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'ttt-jax[eval]'")
pytestmark = [
    pytest.mark.slow,  # importing the harness and indexing its tasks takes half a minute
    pytest.mark.filterwarnings("ignore"),  # of the harness and its packages
]


def direct(before, after, ttt):
    """(log-probability, greedy) of a continuation, from `score` on this request alone."""
    ids = [*before, *after]
    scores = score(model_of(), [ids], ttt=ttt, logits=True, piece=16)
    n = len(after)
    greedy = scores.logits_BTV[0, -n - 1 : -1].argmax(-1).tolist() == list(after)
    return float(scores.logprobs_BT[0, -n:].astype(np.float64).sum()), greedy


@pytest.mark.parametrize("ttt", [True, False])
def test_loglikelihood_equals_score(ttt):
    """Every request alone, from fresh fast weights: in any order and whatever its batch mates."""
    lm, byte = lm_of(ttt=ttt), ByteTokenizer().encode
    pairs = [
        ("a long context, read in pieces", " and an end"),
        ("short", "er"),
        ("trailing ", "space"),
        ("", "nothing before"),
    ]
    expected = [
        direct(byte(pairs[0][0]), byte(pairs[0][1]), ttt),
        direct(byte("short"), byte("er"), ttt),
        direct(byte("trailing"), byte(" space"), ttt),
        direct([256], byte("nothing before"), ttt),
    ]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        found = lm.loglikelihood(
            requests("loglikelihood", *(pairs[i] for i in order)), disable_tqdm=True
        )
        for (logprob, greedy), i in zip(found, order, strict=True):
            assert logprob == pytest.approx(expected[i][0], rel=1e-4)
            assert greedy == expected[i][1]


def test_rolling_reads_the_whole_text_as_one_stream():
    text = "one stream, however long it is " * 3
    found = lm_of().loglikelihood_rolling(requests("loglikelihood_rolling", (text,), ("",)))
    assert found[0] == pytest.approx(direct([256], ByteTokenizer().encode(text), True)[0], rel=1e-4)
    assert found[1] == 0.0


def test_generation_equals_generate():
    """Ragged prompts, an incomplete last batch, two kinds of settings."""
    prompts = ["first prompt", "second, which is longer", "3rd"]
    settings = {"until": [], "max_gen_toks": 6, "do_sample": False, "temperature": 0.0}
    found = lm_of().generate_until(
        requests("generate_until", *((prompt, settings) for prompt in prompts))
    )
    expected = [generate(model_of(), prompt, max_new_tokens=6)[0].text for prompt in prompts]
    assert found == expected
    stop = next(text for text in expected if text.strip())[1:2]
    cut = lm_of().generate_until(
        requests("generate_until", *((p, settings | {"until": [stop]}) for p in prompts))
    )
    assert cut == [text.split(stop)[0] for text in expected]


def test_max_length_cuts_from_the_left():
    (found,) = lm_of(max_length=8).loglikelihood(
        requests("loglikelihood", ("0123456789", "ab")), disable_tqdm=True
    )
    byte = ByteTokenizer().encode
    assert found[0] == pytest.approx(direct(byte("456789"), byte("ab"), True)[0], rel=1e-4)


def test_chat_template(tmp_path):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template, "eos_token": "</s>"})
    )
    lm, history = lm_of(tmp_path), [{"role": "user", "content": "hello"}]
    assert lm.apply_chat_template(history) == "<user>hello</s>\n<assistant>"
    history.append({"role": "assistant", "content": "it is "})
    assert (
        lm.apply_chat_template(history, add_generation_prompt=False)
        == "<user>hello</s>\n<assistant>it is"
    )
    with pytest.raises(UserError, match=r"no chat_template in tokenizer_config\.json"):
        lm_of(tmp_path / "x").chat_template()


def test_begin_token(tmp_path):
    """Added once when the settings want it; it then stands before texts without context."""
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "^", "add_bos_token": True})
    )
    lm = lm_of(tmp_path)
    assert lm.tok_encode("ab") == lm.tok_encode("^ab") == [94, 97, 98]
    assert lm.tok_encode("ab", add_special_tokens=False) == [97, 98]
    assert (lm.prefix_token_id, lm_of().prefix_token_id) == (94, 256)


def test_it_is_registered():
    from lm_eval.api.registry import get_model, model_registry

    import ttt_jax.eval.harness as harness

    assert get_model("ttt_jax") is harness.TTTJaxLM
    assert {"hf", "dummy"} <= set(model_registry.keys())  # lm_eval's own models are known beside it
    with pytest.raises(UserError, match="model_args path: missing"):
        get_model("ttt_jax").create_from_arg_string("ttt=false")
    with pytest.raises(UserError, match="batch_size = 'auto'"):
        lm_of(batch_size="auto")


def test_unknown_tasks_and_missing_data(monkeypatch):
    from ttt_jax.eval.harness_tasks import _no_data, check_tasks

    with pytest.raises(
        UserError,
        match=r"--tasks hellaswagg: neither 'synthetic' nor a task .* did you mean hellaswag",
    ):
        check_tasks(["hellaswagg"])
    missing = _no_data("hellaswag", ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub"))
    assert isinstance(missing, DataError)
    assert "into ./Rowan/hellaswag/ of the working folder" in str(missing)
    assert "example.org, which cannot be reached" in str(
        _no_data("x", OSError("Pool(host='example.org', port=443)"))
    )
