"""Several chunks a step: what one a step gives, with documents that start anywhere in a block."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from support.op_checks import BF16, F32, F64, check, make_inputs

from ttt_jax.ops import IMPLEMENTATIONS, in_place_ttt
from ttt_jax.ops.ttt import chunk_blocks as blocks

registry = importlib.import_module("ttt_jax.ops.ttt.api")  # the package has a function of this name


@pytest.fixture
def in_blocks(monkeypatch):
    """A function of n: the name of XLA in blocks of n chunks. `check` keeps its programs by name,
    so what else differs between tests has to be in it, too.
    """

    def register(n, more=""):
        name = f"xla in blocks of {n}{more}"
        of_n = registry._FAST["xla"]._replace(block=lambda call: n)
        monkeypatch.setitem(registry._FAST, name, of_n)
        monkeypatch.setattr(registry, "IMPLEMENTATIONS", (*IMPLEMENTATIONS, name))
        return name

    return register


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize(
    ("n", "T", "C"), [(2, 32, 8), (4, 37, 4), (8, 64, 4), (2, 24, 8), (4, 15, 4), (2, 9, 1)]
)
def test_blocks_of_chunks(in_blocks, n, T, C, dtype):
    """Whole blocks, chunks that fill none, a partial one, and fewer tokens than a block."""
    for clip_norm in (None, 0.05):
        check(*make_inputs(T=T), dtype, in_blocks(n), chunk_size=C, clip_norm=clip_norm)


@pytest.mark.parametrize(("tokens", "T"), [(1, 40), (32, 40), (40, 43)])
def test_a_few_blocks_at_a_time(monkeypatch, in_blocks, tokens, T):
    """10 blocks of two rows: one by one, four by four and two, five by five."""
    monkeypatch.setattr(blocks, "TOKENS", tokens)
    check(*make_inputs(T=T), F64, in_blocks(2, f", {tokens} at a time"), chunk_size=4)


def ids_of(starts, T, C):
    """Segment ids of a row whose documents start with these chunks, besides the first."""
    number_M = np.zeros(-(-T // C), int)
    number_M[list(starts)] = 1
    return np.repeat(np.cumsum(number_M) + 1, C)[:T]


# Chunks at which documents start, of three rows: with a block, inside, with its last chunk; several
# in a block, in all of it, none; behind the blocks and with the trailing partial chunk (10).
STARTS = {
    "at the edges of blocks": [(4,), (3, 7), (8,)],
    "several in a block": [(1, 2, 3), (), (4, 5, 6, 7)],
    "everywhere": [range(1, 11), (2, 6), (5,)],
    "behind the blocks": [(9,), (10,), (1, 8, 10)],
}


def packed(starts, T, C):
    return np.stack([ids_of(row, T, C) for row in starts]).astype(np.int32)


@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize(("n", "some"), [(2, 1), (4, 3)])
def test_documents_in_blocks(monkeypatch, in_blocks, n, some, starts):
    """Ten chunks and a partial one. Every gradient, those of both states included. Chunks without
    a state are computed one by one, or three by three.
    """
    T, C = 42, 4
    monkeypatch.setattr(blocks, "SOME_TOKENS", some * C)
    ids = packed(STARTS[starts], T, C)
    check(*make_inputs(B=3, T=T), F64, in_blocks(n), chunk_size=C, segment_ids=ids)


@pytest.mark.parametrize(
    "options",
    [{"fresh": True}, {"unread": True}, {"fresh": True, "unread": True}, {"clip_norm": 0.05}],
    ids=str,
)
def test_documents_in_blocks_and_other_options(in_blocks, options):
    """No initial state, a final state that nothing reads, clipping; nine whole chunks."""
    ids = packed(STARTS["at the edges of blocks"], 36, 4)
    options = {"chunk_size": 4, "segment_ids": ids} | options
    check(*make_inputs(B=3, T=36), F64, in_blocks(4), **options)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_documents_in_blocks_in_lower_precision(in_blocks, dtype):
    """With padding behind documents, which must not be written."""
    T, C = 43, 4
    ids = packed(STARTS["several in a block"], T, C)
    ids[0, 6:8] = ids[1, 18:20] = ids[2, :5] = 0
    check(*make_inputs(B=3, T=T), dtype, in_blocks(4), chunk_size=C, segment_ids=ids)


@pytest.mark.parametrize("starts", ["several in a block", "behind the blocks"])
def test_packed_documents_equal_each_alone(in_blocks, starts):
    """Outputs, and gradients of what each document holds."""
    T, C = 40, 4
    with jax.enable_x64(True):
        (z, v, w, lr, _), (do, _) = make_inputs(B=3, T=T)
        ids = packed([[k for k in row if k < 10] for row in STARTS[starts]], T, C)
        run = functools.partial(in_place_ttt, lr=lr, chunk_size=C, implementation=in_blocks(4))

        @jit
        def results(z, v, w, do, ids):
            o, pull = jax.vjp(lambda z, v, w: run(z, v, w, segment_ids=ids)[0], z, v, w)
            return o, *pull(do)

        together = jax.device_get(results(z, v, w, do, ids))
        dw = np.zeros_like(w)
        for b in range(3):
            for number in np.unique(ids[b]):
                at = ids[b] == number
                here = (*(x[b : b + 1, at] for x in (z, v)), w, do[b : b + 1, at])
                alone = jax.device_get(results(*here, None))
                for one, other in zip(together[:3], alone[:3], strict=True):
                    np.testing.assert_allclose(one[b, at], other[0], rtol=0, atol=1e-13)
                dw += alone[3]
        np.testing.assert_allclose(together[3], dw, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cuts", [(8,), (20, 24)])
def test_pieces_of_packed_rows_equal_the_whole(in_blocks, cuts):
    """Cut inside documents: the state is the first one's, whatever number its ids have."""
    T, C = 42, 4
    with jax.enable_x64(True):
        (z, v, w, lr, state), _ = make_inputs(B=3, T=T)
        ids = packed([(1, 3), (4, 7), (8,)], T, C)
        op = functools.partial(in_place_ttt, lr=lr, chunk_size=C, implementation=in_blocks(4))
        run = jit(lambda z, v, state, ids: op(z, v, w, state=state, segment_ids=ids))
        o, final = run(z, v, state, ids)
        parts, start = [], 0
        for end in (*cuts, T):
            some = slice(start, end)
            o_part, state = run(z[:, some], v[:, some], state, ids[:, some])
            parts, start = [*parts, o_part], end
        np.testing.assert_allclose(np.concatenate(parts, 1), o, rtol=0, atol=1e-13)
        np.testing.assert_allclose(state, final, rtol=0, atol=1e-13)


def test_decay_is_computed_chunk_by_chunk(in_blocks):
    """In a block every chunk would need another power of it."""
    ids = packed(STARTS["several in a block"], 42, 4)
    options = {"chunk_size": 4, "segment_ids": ids, "decay": 0.8}
    check(*make_inputs(B=3, T=42), F64, in_blocks(4), **options)


def test_without_documents_there_is_no_mask(in_blocks):
    """Rows of one document: no sort of chunks, no comparison, no selection."""
    (z, v, w, lr, _), _ = make_inputs(T=40)
    run = functools.partial(in_place_ttt, lr=lr, chunk_size=4, implementation=in_blocks(4))

    def masks(ids):
        loss = lambda z, v, w: run(z, v, w, segment_ids=ids)[0].sum()
        text = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(z, v, w))
        return [word in text for word in ("argsort", "where")]

    assert masks(None) == [False, False]
    assert masks(jnp.ones((2, 40), jnp.int32)) == [True, True]
