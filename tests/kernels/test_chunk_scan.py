"""The scan of the Triton kernels with launches in plain jnp: what lies between launches, anywhere
and in float32.
"""

import dataclasses
import functools
import importlib

import jax.numpy as jnp
import numpy as np
import pytest
from support import unwritten
from support.op_checks import DOCUMENTS, F32, check, make_inputs

from ttt_jax.kernels_pallas import chunk_scan

registry = importlib.import_module("ttt_jax.ops.ttt.api")  # the package has a function of this name
dot = functools.partial(jnp.einsum, precision="highest")


@dataclasses.dataclass(frozen=True)
class PlainLaunches:
    def forward(self, C, scalars, z, u, base, o, S, R):
        i, row, live, z_i, u_i = self._chunk(C, scalars, z, u)
        base_i = base[:, row + jnp.arange(C)]
        sums = jnp.where(live, dot("bcf,bdf->bcd", z_i, R[i % 2]), 0)
        S, R = self._update(scalars, 1, u_i, z_i, S, R)
        return o.at[:, i * C + jnp.arange(C)].set(base_i + sums), S, R

    def replay(self, C, scalars, z, u, do, w, dz, S, R):
        i, _, _, z_i, u_i = self._chunk(C, scalars, z, u)
        at = i * C + jnp.arange(C)
        dz = dz.at[:, at].set(dot("bcd,bdf->bcf", do[:, at], R[i % 2]))
        return dz, *self._update(scalars, 1, u_i, z_i, S, R, w[None])

    def reverse(self, C, scalars, z, u, v, do, dz, dv, G, R):
        i, _, _, z_i, u_i = self._chunk(C, scalars, z, u)
        at = i * C + jnp.arange(C)
        sums = dot("bcf,bdf->bcd", z_i, R[i % 2])
        dz = dz.at[:, at].add(dot("bcd,bdf->bcf", u_i, R[i % 2]))
        G, R = self._update(scalars, 1, do[:, at], z_i, G, R)
        return dz, dv.at[:, at].set(scalars.lr[0] * sums), G, R, v[:, at] * sums

    def _chunk(self, C, scalars, z, u):
        i, at = scalars.i[0], scalars.i[0] * C + jnp.arange(C)
        return i, scalars.row[0], scalars.live_BM[:, i, None, None] != 0, z[:, at], u[:, at]

    def _update(self, scalars, scale, left, right, S, R, w=0.0):
        keep = scalars.keep_BM[:, scalars.i[0], None, None]
        S = keep * S + scale * dot("bcd,bcf->bdf", left, right)
        return S, R.at[(scalars.i[0] + 1) % 2].set(S + w)


@pytest.fixture
def n():
    """Chunks of a block."""
    return 1


@pytest.fixture
def plain(monkeypatch, n):
    """With memory that starts as NaN: the name of an implementation that runs such launches."""
    unwritten.show(monkeypatch)
    name = f"plain-{n}"
    run = functools.partial(chunk_scan.in_place_ttt, PlainLaunches())
    implementation = registry._Implementation(lambda call: None, run, block=lambda call: n)
    monkeypatch.setattr(registry, "_FAST", registry._FAST | {name: implementation})
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", (*registry.IMPLEMENTATIONS, name))
    return name


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("T", [5 * 8 + 3, 4 * 8, 5])
def test_the_scan_matches_the_float64_reference(plain, documents, T):
    segment_ids = DOCUMENTS[documents]
    ids = None if segment_ids is None else np.broadcast_to(segment_ids(T, 8), (2, T))
    check(*make_inputs(T=T), F32, plain, chunk_size=8, segment_ids=ids)


@pytest.mark.parametrize(("documents", "T"), [("padding", 45), ("none", 40), ("none", 43)])
def test_decay(plain, documents, T):
    """Factors between 0 and 1, which documents alone never give."""
    segment_ids = DOCUMENTS[documents]
    ids = None if segment_ids is None else np.broadcast_to(segment_ids(T, 8), (2, T))
    check(*make_inputs(T=T), F32, plain, chunk_size=8, segment_ids=ids, decay=0.6)


def test_the_last_document_starts_with_the_partial_chunk(plain):
    ids = np.broadcast_to(DOCUMENTS["boundaries"](35, 8), (2, 35))
    assert ids[0, 31] != ids[0, 32]
    check(*make_inputs(T=35), F32, plain, chunk_size=8, segment_ids=ids)


@pytest.mark.parametrize("n", [2, 4])
def test_documents_start_inside_blocks(plain):
    """Nine whole chunks: blocks whose state is dropped by an update that writes, too."""
    ids = np.stack([np.arange(75) // 24, (np.arange(75) >= 8) + (np.arange(75) >= 40)])
    for fresh in (False, True):
        check(*make_inputs(T=75), F32, plain, chunk_size=8, segment_ids=ids, fresh=fresh)


def test_decay_where_documents_end(plain):
    """Every update drops some of G, which is some of dW."""
    ids = np.stack([np.arange(43) // 24, np.zeros(43, int) + 1])
    check(*make_inputs(T=43), F32, plain, chunk_size=8, segment_ids=ids, decay=0.7)


@pytest.mark.parametrize("T", [5 * 8 + 3, 8, 5])
def test_a_long_sequence_in_stretches(plain, T, monkeypatch):
    """z W^T of a part of the tokens at a time."""
    monkeypatch.setattr(chunk_scan, "BASE_TOKENS", 16)
    assert chunk_scan._stretches(1, 5, 8) == [range(2), range(2, 4), range(4, 5)]
    check(*make_inputs(B=1, T=T), F32, plain, chunk_size=8)


def test_stretches_of_a_sequence():
    assert chunk_scan._stretches(1, 32, 1024) == [range(32)]
    assert chunk_scan._stretches(1, 128, 1024) == [range(k, k + 32) for k in range(0, 128, 32)]
    assert chunk_scan._stretches(4, 128, 1024) == [range(128)]
    # of a million tokens, each 5 % of what z takes
    assert len(chunk_scan._stretches(1, 1024, 1024)) == 8
    assert chunk_scan._stretches(1, 3, 2**20) == [range(1), range(1, 2), range(2, 3)]
    assert chunk_scan._stretches(2, 0, 8) == []
