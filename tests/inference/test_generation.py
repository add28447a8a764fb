"""Generation against the official code's decoding, against scoring, and against itself in other
pieces and batches.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import ERRORS, config, make
from support.streams import CHANGES, C, model_of, prompts
from support.tolerance import assert_close

from ttt_jax import Session, generate, load_pretrained, score
from ttt_jax.config import RopeConfig
from ttt_jax.data.tokenizer import ByteTokenizer
from ttt_jax.errors import UserError
from ttt_jax.inference.sampling import Sampling
from ttt_jax.model.stack import Runtime
from ttt_jax.pretrained.load import unstacked

WINDOW = {"sliding_window": 6}
SAMPLED = Sampling(temperature=0.9, top_k=20, top_p=0.95)


# ------------------------------------------------------------------------------------------- golden


@pytest.mark.parametrize("scan_layers", [True, False])
def test_official_decoding(golden_model, scan_layers):
    """The official greedy decoding, across several chunk boundaries: same ids, and scores agree
    with its logits.
    """
    folder, io = golden_model
    model = load_pretrained(folder, runtime=Runtime(scan_layers=scan_layers))
    prompt, ids = io["decode_prompt"], io["decode_ids"]
    steps = ids.shape[1] - prompt.shape[1]
    assert steps > 2 * model.config.ttt.chunk_size
    (completion,) = generate(model, prompt, max_new_tokens=steps, eos_ids=())
    assert completion.token_ids == ids[0, prompt.shape[1] :].tolist()
    assert (completion.finish_reason, completion.text) == ("length", None)
    log_softmax = io["decode_logits"][0] - np.log(
        np.exp(io["decode_logits"][0].astype(np.float64)).sum(-1, keepdims=True)
    )
    expected = log_softmax[np.arange(steps), completion.token_ids]
    assert_close("logprobs", completion.logprobs, expected, 1e-5)
    if scan_layers:
        scores = score(model, ids, logits=True, piece=16)
        assert_close(
            "logits", scores.logits_BTV[:, prompt.shape[1] - 1 : -1], io["decode_logits"], 1e-4
        )
        assert_close(
            "scores", scores.logprobs_BT[0, prompt.shape[1] - 1 :], completion.logprobs, 1e-5
        )


def test_official_logits_in_pieces(golden_model):
    folder, io = golden_model
    model = load_pretrained(folder)
    assert_close(
        "logits",
        score(model, io["input_ids"], logits=True, piece=16).logits_BTV,
        io["logits"],
        1e-4,
    )


# ---------------------------------------------------------------------------------- batches, pieces


@pytest.mark.parametrize(
    ("changes", "sampling"), [({}, SAMPLED), (WINDOW, Sampling())], ids=["full", "window"]
)
def test_a_ragged_batch_equals_single_runs(changes, sampling):
    """Eight prompts of different lengths, sampled and greedy: what a row gets does not depend on
    its batch mates.
    """
    model, rows = model_of(**changes), prompts([1, 2, 3, 4, 8, 13, 21, 40])
    session = Session(model, 8, piece=16)
    session.extend(rows)
    together = session.generate(11, sampling, eos_ids=(7,), seed=5)
    for b, row in enumerate(rows):
        single = Session(model, 1, piece=16)
        single.extend([row])
        (alone,) = single.generate(11, sampling, eos_ids=(7,), seed=5 + b)
        assert together[b].token_ids == alone.token_ids
        assert together[b].finish_reason == alone.finish_reason
        np.testing.assert_allclose(together[b].logprobs, alone.logprobs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("ttt", [True, False])
def test_generated_tokens_score_as_they_were_generated(changes, ttt):
    model, (row,) = model_of(**changes), prompts([19])
    (completion,) = generate(model, row, max_new_tokens=14, eos_ids=(), ttt=ttt)
    for piece in (4, 64):
        scores = score(model, [np.concatenate([row, completion.token_ids])], ttt=ttt, piece=piece)
        np.testing.assert_allclose(
            scores.logprobs_BT[0, 18:], completion.logprobs, rtol=1e-4, atol=1e-5
        )


def test_ttt_changes_what_is_read():
    model, (row,) = model_of(), prompts([30])
    on, off = (score(model, [row], ttt=ttt).logprobs_BT for ttt in (True, False))
    np.testing.assert_allclose(on[0, : C - 1], off[0, : C - 1], rtol=1e-4, atol=1e-5)
    assert np.abs(on - off)[0, C:].max() > 1e-2


def test_scores_of_ragged_rows():
    """Behind a row's end there is nothing; one token has no score but has logits."""
    model, rows = model_of(), prompts([1, 9, 30])
    together = score(model, rows, logits=True, piece=8)
    assert together.logprobs_BT.shape == (3, 29)
    for b, row in enumerate(rows):
        alone = score(model, [row], logits=True, piece=8)
        n = len(row)
        np.testing.assert_allclose(
            together.logprobs_BT[b, : n - 1], alone.logprobs_BT[0], rtol=1e-4, atol=1e-5
        )
        assert_close("logits", together.logits_BTV[b, :n], alone.logits_BTV[0], 1e-5)
        assert np.isnan(together.logprobs_BT[b, n - 1 :]).all()
        assert np.isnan(together.logits_BTV[b, n:]).all()


# ----------------------------------------------------------------------------------------- sessions


@pytest.mark.parametrize(
    ("changes", "cuts"),
    [({}, (5, 22)), ({}, (8, 3)), (WINDOW, (1, 1)), (ERRORS, (5, 22))],
    ids=str,
)
def test_a_restored_session_goes_on_as_if_never_stopped(changes, cuts, tmp_path):
    """Read, save, restore into the other layout, read, write, save, restore, write: equals one
    run.
    """
    model, other = model_of(**changes), model_of_unrolled(**changes)
    rows = prompts([37, 30])
    whole = Session(model, 2)
    whole.extend(rows)
    expected = whole.generate(12, SAMPLED, eos_ids=())
    a, b = cuts
    session = Session(model, 2, piece=8)
    session.read([row[:a] for row in rows])
    session.save(tmp_path / "1.safetensors")
    session = Session.load(tmp_path / "1.safetensors", other, piece=8)
    session.read([row[a : a + b] for row in rows])
    session.extend([row[a + b :] for row in rows])
    first = session.generate(5, SAMPLED, eos_ids=())
    session.save(tmp_path / "2.safetensors")
    session = Session.load(tmp_path / "2.safetensors", model)
    second = session.generate(7, SAMPLED, eos_ids=())
    for one, two, all_of_it in zip(first, second, expected, strict=True):
        assert one.token_ids + two.token_ids == all_of_it.token_ids
        np.testing.assert_allclose(
            one.logprobs + two.logprobs, all_of_it.logprobs, rtol=1e-4, atol=1e-5
        )
    np.testing.assert_array_equal(session.position_B, whole.position_B)


@functools.cache
def model_of_unrolled(**changes):
    return unstacked(model_of(**changes))


def test_branches_go_their_own_ways():
    model, (document,) = model_of(), prompts([21])
    questions = prompts([3, 5, 2], seed=1)
    session = Session(model)
    session.read([document])
    fast_weights = lambda: [
        x
        for runs in session.state.layers
        for run in runs
        if run.ttt
        for x in (np.asarray(run.ttt.S_BDF),)
    ]
    before = fast_weights()
    asked = session.branch(3)
    asked.extend(questions)
    together = asked.generate(6, eos_ids=())
    for question, completion in zip(questions, together, strict=True):
        fresh = generate(
            model, [np.concatenate([document, question])], max_new_tokens=6, eos_ids=()
        )
        assert completion.token_ids == fresh[0].token_ids
        copy = session.branch()
        copy.extend([question])
        assert copy.generate(6, eos_ids=())[0].token_ids == completion.token_ids
    jax.tree.map(np.testing.assert_array_equal, fast_weights(), before)
    assert before
    with pytest.raises(UserError, match="only one stream can be copied 2 times, this one has 3"):
        asked.branch(2)


def test_after_the_end_token_nothing_is_read():
    """A row that ended keeps its state while others go on: the session continues from the end
    token.
    """
    model, rows = model_of(), prompts([9, 12])
    free = generate(model, rows, max_new_tokens=12, eos_ids=())
    eos = free[0].token_ids[2]
    session = Session(model, 2)
    session.extend(rows)
    first, second = session.generate(12, eos_ids=(eos,))
    cut = free[0].token_ids.index(eos) + 1
    assert (first.token_ids, first.finish_reason) == (free[0].token_ids[:cut], "eos")
    assert session.position_B.tolist() == [9 + cut - 1, 12 + len(second.token_ids) - 1]
    assert session.unread[0].tolist() == [eos]
    more = [np.array([1, 2, 3], np.int32)] * 2
    session.extend(more)
    went_on = session.generate(4, eos_ids=())
    whole = np.concatenate([rows[0], first.token_ids, more[0]])
    assert (
        went_on[0].token_ids == generate(model, [whole], max_new_tokens=4, eos_ids=())[0].token_ids
    )


def test_stop_strings_and_streamed_text():
    """The text ends before the stop string, which may be spread over tokens; nothing behind it is
    read or shown.
    """
    model = make(config(**CHANGES, vocab_size=257), "float32")
    model.tokenizer = ByteTokenizer()
    free = generate(model, "Once", max_new_tokens=40, temperature=2.0, eos_ids=(), seed=3)[0]
    text = bytes(i for i in free.token_ids if i < 256).decode("utf-8", errors="replace")
    assert free.text == text
    stop = text[10:13]
    session, shown = Session(model), []
    session.extend(["Once"])
    stopped = session.generate(
        40,
        Sampling(2.0),
        stop=["never seen", stop],
        eos_ids=(),
        seed=3,
        on_text=lambda row, piece: shown.append(piece),
    )[0]
    assert (stopped.finish_reason, stopped.text) == ("stop", text[: text.index(stop)])
    assert "".join(shown) == stopped.text
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert session.position_B[0] == 4 + len(stopped.token_ids) - 1


def test_errors_name_what_is_wrong():
    model = model_of()
    for bad, match in [
        (lambda: generate(model, []), "none given"),
        (lambda: generate(model, [[]]), "row 0 has shape"),
        (lambda: generate(model, [[1, 99]]), "holds id 99"),
        (lambda: generate(model, [[1, -1]]), "holds id -1"),
        (lambda: generate(model, [[0.5]]), "dtype float64"),
        (lambda: generate(model, "text"), "needs a tokenizer"),
        (lambda: generate(model, [[1]], max_new_tokens=0), "max_new_tokens = 0"),
        (lambda: generate(model, [[1]], stop=["x"]), "need a tokenizer"),
        (lambda: generate(model, [[1]], temperature=-1), "temperature = -1"),
        (lambda: generate(model, [[1], [2]], seed=[1]), "1 seeds for 2"),
        (lambda: generate(model, [[1], [2]], seed=1.5), "seed = 1.5: must be a whole number"),
        (lambda: Session(model).generate(1), "stream 0 is empty"),
        (lambda: Session(model, 2).read([[1]]), "1 for a session of 2"),
        (lambda: Session(model, 0), "batch_size = 0: must be a whole number, at least 1"),
        (lambda: Session(model, 1.5), "batch_size = 1.5: must be"),
        (lambda: Session(model).branch(0), "batch_size = 0: must be"),
        (lambda: Session(model, piece=0), "piece = 0: must be at least 1 token"),
        (lambda: score(model, [[1, 2]], piece=-4), "piece = -4: must be"),
        (
            lambda: score(model, [[1, 2], [model.config.vocab_size]]),
            f"holds id {model.config.vocab_size}",
        ),
    ]:
        with pytest.raises(UserError, match=match):
            bad()


# ------------------------------------------------------------------------------------------- memory


def test_a_ring_does_not_grow():
    """With sliding windows the state of a stream is as large after a thousand tokens as after
    ten.
    """
    model, sizes = model_of(**WINDOW), []
    session = Session(model, piece=64)
    for n in (10, 1000):
        session.read(prompts([n]))
        sizes.append(sum(x.nbytes for x in jax.tree.leaves(session.state)))
    assert sizes[0] == sizes[1]
    assert session.state.capacity is None


def test_caches_grow_when_a_session_reads_on():
    model, (row,) = model_of(), prompts([700])
    session = Session(model, piece=64)
    for a in range(0, 700, 350):
        session.read([row[a : a + 350]])
    assert session.state.capacity >= 700
    session.extend([[3]])
    whole = generate(model, [np.append(row, 3)], max_new_tokens=5, eos_ids=())
    assert session.generate(5, eos_ids=())[0].token_ids == whole[0].token_ids
    assert jnp.asarray(session.state.position_B).tolist() == [705]


# ---------------------------------------------------------------------------------- past the length


def test_one_warning_past_max_positions():
    """Reading, writing and scoring past the length of the config say so, once; a window sees no new
    distances.
    """
    from ttt_jax.eval.answers import Judge
    from ttt_jax.inference.prefill import _say_past_positions

    model, (ids,) = model_of(max_positions=16), prompts([20])
    actions = {
        "score": lambda: score(model, [ids]),
        "prompt": lambda: generate(model, [ids], max_new_tokens=1),
        "new tokens": lambda: generate(model, [ids[:8]], max_new_tokens=10),
        "pieces": lambda: [
            session.extend([part]) or session.generate(2) for part in (ids[:8], ids[8:])
        ],
        "judge": lambda: Judge(model)([ids]),
    }
    for name, action in actions.items():
        _say_past_positions.cache_clear()
        session = Session(model)
        with pytest.warns(
            UserWarning, match=r"input past position 16, the last that .*model\.max_positions"
        ) as caught:
            action()
        assert sum("past position" in str(w.message) for w in caught) == 1, name
        action()  # warnings are errors in tests
    _say_past_positions.cache_clear()
    score(model, [ids[:16]])
    generate(model, [ids[:8]], max_new_tokens=9)  # the last one is not read
    score(model_of(max_positions=16, **WINDOW), [ids])
    yarn = {"rope": RopeConfig(kind="yarn", factor=2.0, original_max_positions=12)}
    score(model_of(max_positions=16, **yarn), [ids])  # knows 24


@pytest.mark.slow
def test_sessions_in_a_loop_leave_nothing_behind(tmp_path):
    """200 sessions read, write, branch, are saved and loaded: the memory of the process stays where
    the first ones left it.
    """
    import gc
    from pathlib import Path

    model, rows = model_of(), prompts([60] * 200)
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
    measured = []
    for n, row in enumerate(rows):
        session = Session(model, piece=16)
        session.read([row])
        session.save(tmp_path / "s.safetensors")
        asked = Session.load(tmp_path / "s.safetensors", model, piece=16).branch(2)
        asked.extend([[1, 2], [3]])
        asked.generate(9, SAMPLED, seed=n, eos_ids=())
        if n % 20 == 19:
            gc.collect()
            measured.append(resident())
    print("MiB after 20, 40, ... sessions:", ", ".join(f"{x:.0f}" for x in measured))
    assert measured[-1] - measured[1] < 8, measured
