"""What chunks write, against oracles that form the D x F matrices in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from support.tolerance import TOLERANCE, assert_close

from ttt_jax.ops.ttt import writes
from ttt_jax.ops.ttt.chunk_products import Matmuls
from ttt_jax.ops.ttt.inverse_root import inverse_root

B, M, C, D, F = 2, 3, 40, 12, 20  # more tokens than keys have dimensions, and not a power of two

transformed = jit(writes.transformed, static_argnums=(0, 3), static_argnames="ridge")


def chunk_arrays(dtype, C=C, D=D, F=F, seed=0, like=0.5):
    """Keys that share a direction, as keys of text do, and targets."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((B, M * C, F)) + like * np.sqrt(F)
    v = rng.standard_normal((B, M * C, D)) + 0.3
    return tuple(jnp.asarray(x, dtype) for x in (z, v))


def written(v_BTD, z_BTF, C=C):
    """v^T z of every chunk, float64 [B M D F]."""
    chunks = lambda x: np.asarray(x, np.float64).reshape(B, M, C, -1)
    return np.einsum("bmcd,bmcf->bmdf", chunks(v_BTD), chunks(z_BTF))


def ridge_oracle(z_BTF, v_BTD, lam, C=C):
    """V^T Z (Z^T Z + lambda m I)^-1, m the mean squared norm of the chunk's keys."""
    z = np.asarray(z_BTF, np.float64).reshape(B, M, C, -1)
    mean = np.square(z).sum(-1).mean(-1)[..., None, None]
    system = np.einsum("bmcf,bmcg->bmfg", z, z) + lam * mean * np.eye(z.shape[-1])
    return written(v_BTD, z_BTF, C) @ np.linalg.inv(system)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("like", "lam"), [(0.0, 0.1), (0.5, 1.0), (5.0, 0.1), (60.0, 1.0)])
def test_ridge_is_least_squares(dtype, lam, like):
    """Also where all keys are alike, as in a table of dots: a product with the inverse alone would
    lose cond^2 there.
    """
    with jax.enable_x64(dtype == "float64"):
        z, v = chunk_arrays(dtype, like=like)
        out = jit(lambda z, v: transformed("ridge", z, v, C, ridge=lam))(z, v)
        assert out.dtype == v.dtype
        assert_close("write", written(out, z), ridge_oracle(z, v, lam), TOLERANCE[dtype])


def test_bfloat16_rounds_the_targets_once(x64):
    """What is written then differs by more where keys are alike (docs/writes.md): v' is of bf16 as
    v is.
    """
    z, v = chunk_arrays("bfloat16")
    exact = transformed("ridge", z.astype("float64"), v.astype("float64"), C)
    # Op by op: within a program XLA may keep more bits than were asked for.
    out = writes.transformed("ridge", z, v, C)
    assert_close("targets", out, exact, TOLERANCE["bfloat16"])


def test_lambda_and_rate_have_no_unit(x64):
    """Keys k times as large are written 1 / k times as strongly: what is read back stays."""
    z, v = chunk_arrays("float64")
    one, three = (transformed("ridge", k * z, v, C) for k in (1.0, 3.0))
    np.testing.assert_allclose(written(three, 3 * z), written(one, z) / 3, rtol=1e-9)


def test_gradients(x64):
    """The write's gradient against differences of the oracle, in random directions of z and v."""
    z, v = chunk_arrays("float64")
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((B, M, D, F))

    def loss(z, v):
        chunks = lambda x: x.reshape(B, M, C, -1)
        out = transformed("ridge", z, v, C)
        return jnp.sum(jnp.einsum("bmcd,bmcf->bmdf", chunks(out), chunks(z)) * weight)

    dz, dv = jit(jax.grad(loss, (0, 1)))(z, v)
    for _ in range(3):
        step_z, step_v = rng.standard_normal(z.shape), rng.standard_normal(v.shape)
        ends = [
            np.sum(ridge_oracle(z + h * step_z, v + h * step_v, 1.0) * weight)
            for h in (1e-5, -1e-5)
        ]
        along = float(np.sum(dz * step_z) + np.sum(dv * step_v))
        assert along == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("C", [1, 31, 32, 33, 100, 256])
def test_inverse_root_by_halves(C, x64):
    rng = np.random.default_rng(0)
    root = rng.standard_normal((2, C, C))
    a = root @ np.swapaxes(root, 1, 2) / C + np.eye(C) + 1.0  # one direction that all share
    run = jit(lambda a, shift: inverse_root(a, shift, Matmuls("float64"))[0])
    got = np.asarray(run(jnp.asarray(a), jnp.zeros(2)))
    np.testing.assert_array_equal(got, np.tril(got))
    np.testing.assert_allclose(got, np.linalg.inv(np.linalg.cholesky(a)), rtol=0, atol=1e-12)


def text_keys(kind, C, F, rng):
    """Keys as a chunk of text has them: `tokens` repeat as often as words do, `few` lie in six
    dimensions, `same` are one.
    """
    if kind == "tokens":
        return (rng.standard_normal((301, F)) + 1)[np.minimum(rng.zipf(1.3, C), 300)]
    if kind == "few":
        return (
            rng.standard_normal((C, 6))
            @ rng.standard_normal((6, F))
            * np.exp(rng.standard_normal((C, 1)))
        )
    return np.broadcast_to(rng.standard_normal(F), (C, F))


@pytest.mark.parametrize("lam", [1.0, 0.1])
@pytest.mark.parametrize("kind", ["tokens", "few", "same"])
def test_ridge_on_keys_of_text(kind, lam):
    """In float32, with chunks as long as in training: an inverse by halves that takes symmetry for
    granted fails here.
    """
    rng = np.random.default_rng(0)
    C, F, D = 512, 256, 24
    z = jnp.asarray(text_keys(kind, C, F, rng)[None], "bfloat16")
    v = jnp.asarray(rng.standard_normal((1, C, D)), "bfloat16")

    def all_three(z, v):
        out, vjp = jax.vjp(lambda z, v: transformed("ridge", z, v, C, ridge=lam), z, v)
        return out, *vjp(v)

    out, dz, dv = jit(all_three)(z.astype("float32"), v.astype("float32"))

    z, v = (np.asarray(x[0], np.float64) for x in (z, v))
    gram = z @ z.T
    mean = np.trace(gram) / C
    a = gram + lam * mean * np.eye(C)
    exact = np.linalg.solve(a, v)
    # the gradient of sum(v * A^-1 v) by A, and by v A^-1 v itself
    by_a = -np.linalg.solve(a, v) @ exact.T
    by_z = (by_a + by_a.T) @ z + 2 * lam / C * np.trace(by_a) * z
    for name, got, want in (("targets", out[0], exact), ("dv", dv[0], exact), ("dz", dz[0], by_z)):
        error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
        assert error < 1e-3, f"{name}: {error:.1e}"
    written = np.asarray(out[0], np.float64).T @ z
    assert np.linalg.norm(written - exact.T @ z) < 1e-2 * np.linalg.norm(exact.T @ z)


@pytest.mark.parametrize(("kind", "most"), [("tokens", 2e-3), ("few", 2e-3), ("same", 2.5e-3)])
def test_bfloat16_on_keys_of_text(kind, most):
    """Targets and their gradient are those of float64 rounded once: 1.7e-3. An inverse of 8 bits
    makes 2.3e-3 and more of each.
    """
    z, v, do = bfloat16_chunk(kind)
    out, vjp = jit(lambda v: jax.vjp(lambda v: transformed("ridge", z, v, v.shape[1]), v))(v)
    z, v, do_CD, a = (*map(float64, (z, v, do)), system(float64(z)))
    assert_close("targets", out[0], np.linalg.solve(a, v), most)
    assert_close("dv", vjp(do)[0][0], np.linalg.solve(a, do_CD), most)


@pytest.mark.parametrize(("kind", "most"), [("tokens", 4e-3), ("few", 3.2e-3), ("same", 3.2e-3)])
def test_bfloat16_gradient_of_what_is_written(kind, most):
    """By the keys, of v'^T z: the op rounds v' and its gradient. With an exact dA
    that makes 3.6e-3 of `tokens`, and 2.9e-3 of the others.
    """
    z, v, _ = bfloat16_chunk(kind)
    G = jnp.asarray(np.random.default_rng(1).standard_normal((v.shape[2], z.shape[2])), "bfloat16")

    def weighed(z):
        out = transformed("ridge", z, v, v.shape[1])
        return jnp.einsum("bcd,bcf,df->", out, z, G)

    dz = jit(jax.grad(weighed))(z)[0]
    z, v, G = map(float64, (z, v, G))
    a = system(z)
    out, dv = np.linalg.solve(a, v), np.linalg.solve(a, z @ G.T)
    by_a = -dv @ out.T
    want = out @ G + (by_a + by_a.T) @ z + 2 / len(z) * np.trace(by_a) * z
    assert_close("dz", dz, want, most)


def bfloat16_chunk(kind, C=256, F=128, D=48):
    """Keys, targets and a cotangent of one chunk, [1 C .]."""
    rng = np.random.default_rng(0)
    z = jnp.asarray(text_keys(kind, C, F, rng)[None], "bfloat16")
    v, do = (jnp.asarray(rng.standard_normal((1, C, D)), "bfloat16") for _ in range(2))
    return z, v, do


def float64(x):
    """The only chunk of an array, or the array."""
    return np.asarray(x[0] if x.ndim == 3 else x, np.float64)


def system(z_CF):
    """A at lambda 1."""
    gram_CC = z_CF @ z_CF.T
    return gram_CC + np.trace(gram_CC) / len(gram_CC) * np.eye(len(gram_CC))


def test_chunks_of_zeros_write_nothing_and_have_a_gradient():
    """At a model's start the targets are zero; slots of a pending chunk that hold nothing are zero
    on both sides.
    """
    z, v = chunk_arrays("float32")
    z, v = z.at[:, :C].set(0), v.at[:, : 2 * C].set(0)

    def both(z, v):
        out, vjp = jax.vjp(lambda z, v: transformed("ridge", z, v, C), z, v)
        return out, vjp(jnp.ones_like(out))

    out, gradients = jax.device_get(jit(both)(z, v))
    assert not out[:, : 2 * C].any()
    assert out[:, 2 * C :].any()
    for gradient in gradients:
        assert np.isfinite(gradient).all()


def test_chunks_know_nothing_of_each_other(x64):
    z, v = chunk_arrays("float64")
    whole = transformed("ridge", z, v, C)
    alone = transformed("ridge", z[:, C : 2 * C], v[:, C : 2 * C], C)
    np.testing.assert_allclose(whole[:, C : 2 * C], alone, rtol=0, atol=1e-13)


def test_sum_is_the_papers_rule():
    z, v = chunk_arrays("float32")
    assert writes.transformed("sum", z, v, C) is v
