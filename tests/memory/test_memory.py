"""Memories: the algebra to the last bit, what sessions give, and where streams begin with one."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import RIDGE, hidden
from support.streams import C, model_of, one_layer_model, prompts
from support.tolerance import relative_rms

from ttt_jax import Session, generate, score
from ttt_jax.errors import UserError
from ttt_jax.memory.fast_weights import memory_of, no_memory, start_with
from ttt_jax.memory.memory import Memory, megabytes
from ttt_jax.memory.sources import IdsDigest, Source
from ttt_jax.memory.spectrum import best_factors, effective_rank, energies, rank_of_share
from ttt_jax.memory.terms import Term
from ttt_jax.model.param_path import param_path
from ttt_jax.model.stack import Runtime
from ttt_jax.pretrained.load import unstacked

pytestmark = pytest.mark.usefixtures("usual_promotion")


def read(ids, model=None, piece=None, name="text"):
    session = Session(model or model_of(), piece=piece)
    session.read([ids])
    return session.memory(name=name)


@pytest.fixture(scope="module")
def three():
    """Memories of three texts that were read on their own."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return [read(ids, name=n) for n, ids in zip("abc", prompts([24, 13, 30]), strict=True)]


def same_bits(a, b):
    assert a == b
    for layer in a.layers:
        np.testing.assert_array_equal(a.dW(layer), b.dW(layer))


# ------------------------------------------------------------------------------------------ algebra


def test_what_was_added_can_be_taken_out_bit_for_bit(three):
    a, b, c = three
    assert a != b
    same_bits((a + b) - b, a)
    same_bits(a + b + c - b, a + c)
    same_bits(a + b, b + a)
    same_bits((a + b) + c, a + (b + c))
    same_bits(sum(three), a + b + c)
    same_bits(10 * (0.1 * a), a)  # one tenth, not the float nearest to it
    same_bits(0.3 * a - 0.1 * a - 0.2 * a + b, b)
    same_bits(-1 * -a, a)
    same_bits(Fraction(1, 3) * a * 3, a)
    assert (a - a).terms == ()
    assert not (a - a).dW(a.layers[0]).any()
    assert (a - a).sources == ()


def test_the_sum_is_that_of_the_arrays(three):
    a, b, _ = three
    for layer in a.layers:
        expected = 0.5 * a.dW(layer).astype(np.float64) - 2 * b.dW(layer).astype(np.float64)
        got = (0.5 * a - 2 * b).dW(layer)
        assert got.dtype == np.float32
        assert relative_rms(got, expected) < 1e-7
        collapsed = (0.5 * a - 2 * b).collapse()
        np.testing.assert_array_equal(collapsed.dW(layer), got)
        assert len(collapsed.terms) == 1
        # Here it is a difference of floats, and no longer exact.
        assert relative_rms(((a + b).collapse() - b).dW(layer), a.dW(layer)) < 1e-6


def test_provenance_is_kept(three):
    a, b, c = three
    weights = lambda m: {source.name: source.weight for source in m.sources}
    assert weights(a + 2 * b - 0.5 * c) == {"a": 1, "b": 2, "c": Fraction(-1, 2)}
    assert weights((a + 2 * b).collapse() * 3) == {"a": 3, "b": 6}
    assert weights((a + b).truncate(2) - b) == {"a": 1}  # b's weights add up to nothing
    assert weights(a + b - b) == {"a": 1}
    assert (a + b).tokens == 37
    digest = IdsDigest()
    digest.update(prompts([24])[0])
    assert a.sources == (Source("a", 24, 24, digest.hexdigest()),)
    assert b.sources[0].written == 12


def test_one_source_is_taken_out_by_name_or_hash(three):
    a, b, c = three
    same_bits((a + b + c).without("b"), a + c)
    same_bits((a + b + c).without(b.sources[0].ids[:12]), a + c)
    with pytest.raises(UserError, match="source d: the memory does not come from it, but from a"):
        a.without("d")
    with pytest.raises(UserError, match="source a: was read or summed together with b"):
        (a + b).collapse().without("a")


def test_factors_of_a_rank(three):
    a = three[0]
    D, F, layer = a.D, a.F, a.layers[0]
    exact = a.dW(layer).astype(np.float64)
    values = np.linalg.svd(exact, compute_uv=False)
    for rank in (1, 3, min(D, F)):
        short = a.truncate(rank)
        assert short.terms[0].rank == rank
        assert short.nbytes == len(a.layers) * 4 * rank * (D + F)
        lost = np.linalg.norm(short.dW(layer) - exact)
        assert lost == pytest.approx(np.sqrt((values[rank:] ** 2).sum()), abs=1e-6 * values[0])
    np.testing.assert_allclose(energies(exact), values**2, atol=1e-12 * values[0] ** 2)
    p = values**2 / (values**2).sum()
    assert effective_rank(energies(exact)) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    kept = np.cumsum(p)
    assert rank_of_share(energies(exact), 0.9) == np.flatnonzero(kept >= 0.9)[0] + 1
    tall = best_factors(exact.T, 2)
    wide = best_factors(exact, 2)
    np.testing.assert_allclose(tall.B_DR @ tall.A_RF, (wide.B_DR @ wide.A_RF).T, atol=1e-6)
    zeros = best_factors(np.zeros((3, 5), np.float32), 2)
    assert not zeros.B_DR.any()
    assert effective_rank(energies(np.zeros((3, 5)))) == rank_of_share(np.zeros(3), 0.5) == 0
    for rank in (0, min(D, F) + 1):
        with pytest.raises(UserError, match=f"rank {rank}: must be from 1 to {min(D, F)}"):
            a.truncate(rank)


def test_what_is_no_number_is_refused(three):
    a = three[0]
    for factor, match in [
        ("2", "is multiplied by a number"),
        (True, "is multiplied by a number"),
        (float("nan"), "must be finite"),
        (1e12, "of a size from 1e-9 to 1e9"),
        (1e-12, "of a size from 1e-9 to 1e9"),
        (Fraction(10**200 + 1, 10**200), "more than 200 digits"),
    ]:
        with pytest.raises(UserError, match=match):
            factor * a
    for wrong in (lambda: a + 1, lambda: a - 1, lambda: 1 + a):
        with pytest.raises(TypeError):
            wrong()
    other = read(prompts([24])[0], model_of(**{"ttt.layers": (1,), "num_layers": 3}))
    with pytest.raises(UserError, match="memories of two models"):
        a + other
    with pytest.raises(UserError, match="layer 0 does not adapt"):
        a.dW(0)


def test_a_digest_goes_on_where_it_was_left():
    ids = np.arange(3000, dtype=np.int32)
    whole, parts = IdsDigest(), IdsDigest()
    whole.update(ids)
    for part in np.split(ids, [1, 511, 512, 1500]):
        parts = IdsDigest.from_json(parts.to_json())
        parts.update(part)
    assert parts.hexdigest() == whole.hexdigest()
    assert parts.tokens == 3000
    good = parts.to_json()
    for bad in ([], {}, good | {"tokens": 5}, good | {"done": "x" * 64}, good | {"rest": "g"}):
        with pytest.raises(ValueError, match=r"digest|hex"):
            IdsDigest.from_json(bad)


# ----------------------------------------------------------------------------------------- sessions


@pytest.mark.parametrize(
    ("make", "changes", "length"),
    [
        (model_of, {}, 24),
        (one_layer_model, {"sliding_window": 3} | RIDGE, 27),
    ],
    ids=["sum", "window, ridge"],
)
def test_a_session_in_any_pieces_teaches_the_same(make, changes, length):
    """Whole, in pieces, token by token as it were, and by the model itself. 24 tokens are whole
    chunks: the session's last token, which it has not read, completes one.
    """
    model, (ids,) = make(**changes), prompts([length])
    whole = read(ids, model)
    S = hidden(model, ids[None], keep_state=True)[1]
    for found in (
        read(ids, model, piece=C),
        read_in_parts(ids, model, [6, 13]),
        memory_of(no_memory(model), model, S, 0, whole.sources),
    ):
        assert found.sources == whole.sources
        for layer in whole.layers:
            assert relative_rms(found.dW(layer), whole.dW(layer)) < 1e-6
    assert whole.sources[0].written == 24


def read_in_parts(ids, model, places):
    session = Session(model)
    for part in np.split(ids, places):
        session.read([part])
    before = [x.copy() for x in session.unread]
    memory = session.memory(name="text")
    np.testing.assert_array_equal(session.unread[0], before[0])
    return memory


def test_layers_with_arrays_of_their_own():
    """As decoding has them on accelerators."""
    model, (ids,) = model_of(), prompts([24])
    apart = unstacked(model)
    memory = read(ids, model)
    for layer in memory.layers:
        assert relative_rms(read(ids, apart).dW(layer), memory.dW(layer)) < 1e-6
    state = start_with(apart, memory, 1, 16)
    same_arrays(memory_of(no_memory(apart), apart, state, 0, ()), memory)


def test_rows_saved_sessions_and_generated_tokens(tmp_path):
    model, (a, b) = model_of(), prompts([21, 10])
    session = Session(model, 2)
    session.read([a, b])
    written = session.generate(6, eos_ids=())
    session.save(tmp_path / "s.safetensors")
    again = Session.load(tmp_path / "s.safetensors", model)
    for row, ids in enumerate((a, b)):
        expected = read(np.concatenate([ids, written[row].token_ids]), model)
        for s in (session, again, session.branch()):
            found = s.memory(row, name="text")
            assert found.sources == expected.sources
            for layer in found.layers:
                assert relative_rms(found.dW(layer), expected.dW(layer)) < 1e-6
    with pytest.raises(UserError, match="2 streams; give row=0"):
        session.memory()
    with pytest.raises(UserError, match="row = 2: the session has rows 0 to 1"):
        session.memory(2)
    with pytest.raises(UserError, match="TTT off; nothing was written"):
        Session(model, ttt=False).memory()
    with pytest.raises(UserError, match="no TTT layers"):
        Session(model_of(**{"ttt.layers": ()})).memory()


def frozen_in(model, memory):
    """A model without TTT whose slow weights are W + dW."""

    def leaf(path, x):
        name = param_path(path)
        if not name.endswith("mlp.down"):
            return x
        g, r = (int(part) for part in name.split(".")[1:4:2])
        layers = model.groups[g].layer_indices(r)
        dW = [memory.dW(i) if i in memory.layers else np.zeros(x.shape[2:]) for i in layers]
        return x + jnp.asarray(np.stack(dW).reshape(x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, model)


@pytest.mark.parametrize(
    ("make", "changes"),
    [(model_of, {}), (one_layer_model, {"sliding_window": 3}), (model_of, {"ttt.decay": 0.5})],
    ids=["full", "window", "decay"],
)
def test_a_frozen_memory_is_a_model_of_W_plus_dW(make, changes):
    model, (ids,) = make(**changes), prompts([19], seed=3)
    memory = read(prompts([24])[0], model)
    merged = frozen_in(model, memory)
    expected = score(merged, [ids], ttt=False, logits=True).logits_BTV
    for piece in (C, None):
        got = score(model, [ids], ttt=False, memory=memory, logits=True, piece=piece).logits_BTV
        assert relative_rms(got, expected) < 1e-5
    assert relative_rms(score(model, [ids], ttt=False, logits=True).logits_BTV, expected) > 1e-2
    greedy = {"max_new_tokens": 9, "eos_ids": ()}
    expected = generate(merged, [ids], ttt=False, **greedy)[0].token_ids
    assert generate(model, [ids], ttt=False, memory=memory, **greedy)[0].token_ids == expected
    session = Session(model, ttt=False, memory=memory)
    session.read([ids])
    session.generate(9, eos_ids=())
    same_arrays(session.memory(), memory)
    assert session.memory().sources == memory.sources


def same_arrays(a, b):
    for layer in b.layers:
        np.testing.assert_array_equal(a.dW(layer), b.dW(layer))


def test_a_stream_that_begins_with_a_memory_goes_on_writing(three, tmp_path):
    """As one whose keys, values and positions were dropped behind the memory's text."""
    model, (ids,) = model_of(), prompts([15], seed=3)
    memory = 0.5 * three[0] + three[1]
    session = Session(model, 2, memory=memory)
    session.read([ids, ids[:9]])
    session.save(tmp_path / "s.safetensors")
    again = Session.load(tmp_path / "s.safetensors", model)
    for row, length in enumerate((15, 9)):
        state = with_S(model, model.init_state(1, 16), memory)
        _, state, _ = hidden(model, ids[None, :length], state, at_chunk_start=True)
        expected = memory_of(no_memory(model), model, state, 0, ())
        for s in (session, again):
            found = s.memory(row, name="more")
            names = [(source.name, source.weight) for source in found.sources]
            assert sorted(names) == [("a", Fraction(1, 2)), ("b", 1), ("more", 1)]
            for layer in memory.layers:
                assert relative_rms(found.dW(layer), expected.dW(layer)) < 1e-6
                assert relative_rms(found.dW(layer), memory.dW(layer)) > 1e-2


def with_S(model, state, memory):
    """The state with the memory in the place of S, written out once more."""

    def put(group, r, layer):
        if layer.ttt is None:
            return layer
        dW = np.stack([memory.dW(i) for i in group.layer_indices(r)])
        S_BDF = jnp.asarray(dW.reshape(layer.ttt.S_BDF.shape))
        return layer._replace(ttt=layer.ttt._replace(S_BDF=S_BDF))

    both = zip(model.groups, state.layers, strict=True)
    layers = tuple(tuple(put(g, r, x) for r, x in enumerate(runs)) for g, runs in both)
    return dataclasses.replace(state, layers=layers)


def test_a_memory_that_has_read_nothing_more_is_itself(three, tmp_path):
    a, model = three[0], model_of()
    session = Session(model, memory=a)
    same_bits(session.memory(), a)
    session.extend([[1, 2]])
    session.branch(2).generate(2)
    session.save(tmp_path / "s.safetensors")
    again = Session.load(tmp_path / "s.safetensors", model)
    same_arrays(again.memory(), a)
    assert again.generate(3)[0].token_ids == session.generate(3)[0].token_ids
    none = Session(model)
    none.extend([[1, 2]])
    assert not none.memory().dW(a.layers[0]).any()


def test_one_model_in_two_dtypes_and_another_model(three):
    """A memory that was read under bfloat16 belongs to the float32 model, too; not to others."""
    model = model_of()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    half.runtime = Runtime(dtype="bfloat16")
    memory = read(prompts([24])[0], half)
    Session(model, memory=memory)
    assert memory.model == three[0].model
    assert relative_rms(memory.dW(1), three[0].dW(1)) < 0.1
    other = jax.tree.map(lambda x: x, model)
    other.norm.scale = type(other.norm.scale)(other.norm.scale[...].at[3].add(0.1), axes=("embed",))
    for wrong in (
        lambda: Session(other, memory=memory),
        lambda: score(other, [[1, 2]], memory=memory),
        lambda: generate(other, [[1, 2]], memory=memory),
    ):
        with pytest.raises(UserError, match="memory: was read by another model"):
            wrong()
    with pytest.raises(UserError, match="memory: a session has its own fast weights"):
        generate(model, [[1, 2]], memory=memory, session=Session(model))


def test_terms_are_the_same_whatever_their_text_is_called(three):
    a = three[0]
    term = a.terms[0]
    renamed = Term(term.deltas, tuple(dataclasses.replace(s, name="z") for s in term.sources))
    assert renamed.key == term.key
    again = Memory(a.model, a.D, a.F, a.slow_norms, (renamed,))
    same_bits((a + again) - 2 * a, a - a)
    changed = {layer: x.copy() for layer, x in term.deltas.items()}
    changed[a.layers[-1]][0, 0] += np.float32(1e-6)
    assert Term(changed, term.sources).key != term.key


@pytest.mark.parametrize(
    ("nbytes", "text"), [(23_616, "0.024 MB"), (1_000_000, "1.0 MB"), (2_345_678_901, "2,345.7 MB")]
)
def test_a_small_size_is_not_rounded_to_nothing(nbytes, text):
    assert megabytes(nbytes) == text
