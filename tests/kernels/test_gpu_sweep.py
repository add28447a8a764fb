"""The op as sweeps and products of all chunks, with launches in plain jnp: what lies between
launches, anywhere and in float32.
"""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import unwritten
from support.op_checks import DOCUMENTS, F32, check, make_inputs

from ttt_jax.kernels_pallas import gpu_sweep

registry = importlib.import_module("ttt_jax.ops.ttt.api")  # the package has a function of this name
dot = functools.partial(jnp.einsum, precision="highest")


@dataclasses.dataclass(frozen=True)
class PlainLaunches:
    """What `gpu.MosaicLaunches` computes."""

    def states(self, C, chunks, backwards, right, left, keep, w, S):
        R = [S] * len(chunks)
        for i in reversed(chunks) if backwards else chunks:
            R[i - chunks.start] = S if w is None else S + w[None]
            at = slice(i * C, (i + 1) * C)
            S = keep[:, i, None, None] * S + dot("bcd,bcf->bdf", left[:, at], right[:, at])
        return jnp.stack(R, axis=1), S

    def forward(self, C, chunks, z, w, R, o):
        read = R if w is None else R + w[None, None]
        return self._put(C, o, chunks, dot("bmcf,bmdf->bmcd", self._cut(C, z, chunks), read))

    def replay(self, C, chunks, do, R, dz):
        return self._put(C, dz, chunks, self._times(C, chunks, do, R))

    def reverse(self, C, chunks, lr, z, v, R, dz, du):
        dz = self._put(C, dz, chunks, self._cut(C, dz, chunks) + lr * self._times(C, chunks, v, R))
        return dz, self._put(C, du, chunks, dot("bmcf,bmdf->bmcd", self._cut(C, z, chunks), R))

    def turn(self, C, chunks, z, u, do, W, R, dz, du):
        return self.reverse(C, chunks, 1, z, u, R, self.replay(C, chunks, do, W, dz), du)

    def _times(self, C, chunks, x, R):
        return dot("bmcd,bmdf->bmcf", self._cut(C, x, chunks), R)

    def _cut(self, C, x, chunks):
        at = slice(chunks.start * C, chunks.stop * C)
        return x[:, at].reshape(x.shape[0], len(chunks), C, x.shape[2])

    def _put(self, C, x, chunks, new):
        at = slice(chunks.start * C, chunks.stop * C)
        return x.at[:, at].set(new.reshape(x[:, at].shape))


@pytest.fixture
def block():
    """Chunks that go through as one."""
    return 1


@pytest.fixture
def plain(monkeypatch, chunks, block):
    """The name of an implementation with stretches of so many chunks, and memory that starts as
    NaN. Another name for each length: `check` keeps its programs by name.
    """
    name = f"plain, {chunks} chunks, {block} in a block"
    unwritten.show(monkeypatch)
    monkeypatch.setattr(gpu_sweep, "_stretches", functools.partial(stretches, chunks))
    run = functools.partial(gpu_sweep.in_place_ttt, PlainLaunches())
    implementation = registry._Implementation(lambda call: None, run, block=lambda call: block)
    monkeypatch.setattr(registry, "_FAST", registry._FAST | {name: implementation})
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", (*registry.IMPLEMENTATIONS, name))
    return name


def stretches(chunks, B, M, C, D, F):
    return [range(first, min(first + chunks, M)) for first in range(0, M, chunks)]


@pytest.mark.parametrize(("chunks", "block"), [(64, 2)])
def test_one_product_in_blocks(plain):
    """Documents that start inside a block, where W + S is read."""
    T = 5 * 8 + 3
    ids = np.broadcast_to(DOCUMENTS["boundaries"](T, 8), (2, T))
    for fresh in (False, True):
        options = {"segment_ids": ids, "apply": "fused", "fresh": fresh}
        check(*make_inputs(T=T), F32, plain, chunk_size=8, **options)


@pytest.mark.parametrize("chunks", [2, 64])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("B", "T"), [(2, 5 * 8 + 3), (1, 4 * 8), (2, 5)])
def test_sweeps_match_the_float64_reference(plain, documents, B, T):
    segment_ids = DOCUMENTS[documents]
    ids = None if segment_ids is None else np.broadcast_to(segment_ids(T, 8), (B, T))
    for options in ({"fresh": True}, {"apply": "fused"}, {"decay": 0.6}):
        check(*make_inputs(B=B, T=T), F32, plain, chunk_size=8, segment_ids=ids, **options)


@dataclasses.dataclass(frozen=True)
class CountedLaunches(PlainLaunches):
    """Adds a line to `swept` for each sweep that runs."""

    swept: list[int] = dataclasses.field(default_factory=list, compare=False)

    def states(self, *arguments):
        def count(*arrays):
            self.swept.append(len(self.swept))
            return arrays

        results = super().states(*arguments)
        return jax.pure_callback(count, tuple(results), *results)


@pytest.mark.parametrize(
    ("apply", "tail", "save", "sweeps"),
    [
        ("fused", 0, ["ttt_states"], 2),  # forward, and of the gradient
        ("fused", 0, [], 3),  # and forward in time again
        ("fused", 3, ["ttt_states"], 3),  # a tail needs the last state
        ("split", 0, ["ttt_states"], 3),  # the forward has other copies
    ],
)
def test_kept_states_are_not_swept_again(monkeypatch, apply, tail, save, sweeps):
    """In a layer that is computed again, with the value and gradients of one that is not."""
    monkeypatch.setattr(gpu_sweep, "_stretches", functools.partial(stretches, 64))
    (z, v, w, lr, _), (do, _) = make_inputs(B=1, T=4 * 8 + tail)
    z, v, w, do = (jnp.asarray(x, F32) for x in (z, v, w, do))

    def gradients(launches, wrap):
        def layer(z, v, w):
            options = {"lr": lr, "chunk_size": 8, "state_BDF": None, "apply": apply}
            return gpu_sweep.in_place_ttt(launches, jnp.sin(z), v, w, **options)[0]

        loss = lambda *arrays: jnp.sum(do * wrap(layer)(*arrays))
        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(z, v, w))

    launches, policy = CountedLaunches(), jax.checkpoint_policies.save_only_these_names(*save)
    got = gradients(launches, functools.partial(jax.checkpoint, policy=policy))
    for x, y in zip(got, gradients(PlainLaunches(), lambda layer: layer), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    jax.effects_barrier()
    assert len(launches.swept) == sweeps


def test_stretches_leave_few_clusters_idle(monkeypatch):
    """At the shape of 4B, 8 chunks of 50 MB at a time: their 320 tiles of o fill 4.8 rounds of 66
    clusters, those of the 10 that memory allows 6.1. Of eight small rows all chunks.
    """
    monkeypatch.setattr(gpu_sweep, "device_multiprocessors", lambda: 132)
    eights = [range(k, k + 8) for k in range(0, 32, 8)]
    assert gpu_sweep._stretches(1, 32, 1024, 2560, 9728) == eights
    assert gpu_sweep._stretches(1, 30, 1024, 2560, 9728) == [*eights[:3], range(24, 30)]
    assert gpu_sweep._stretches(8, 32, 512, 768, 2048) == [range(32)]
    assert gpu_sweep._stretches(1, 3, 512, 768, 2048) == [range(3)]
    assert gpu_sweep._stretches(64, 3, 512, 5120, 17408) == [range(k, k + 1) for k in range(3)]
    assert gpu_sweep._stretches(2, 0, 256, 256, 256) == []
