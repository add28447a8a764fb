"""The literal loop: what the rule says, one chunk after the other, in float32 (float64 for float64
inputs).

B batch, T tokens, D model width, F MLP width, C chunk size, S accumulated update of the fast weight
(D F).

Slow, memory-hungry and differentiated by plain autodiff: the oracle that the other implementations
are tested against.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def in_place_ttt_reference(
    z_BTF,
    v_BTD,
    w_DF,
    *,
    lr,
    chunk_size,
    state_BDF,
    segment_ids_BT=None,
    clip_norm=None,
    decay=1.0,
    whole_chunks_B=None,
):
    """See `ttt_jax.ops.ttt.api`; same arguments and results, `state_BDF` required."""
    acc = state_BDF.dtype
    z_BTF, v_BTD, w_DF_acc, out_dtype = (
        z_BTF.astype(acc),
        v_BTD.astype(acc),
        w_DF.astype(acc),
        z_BTF.dtype,
    )
    T, C = z_BTF.shape[1], chunk_size
    S_BDF, o_parts = state_BDF, [jnp.zeros((z_BTF.shape[0], 0, w_DF.shape[0]), acc)]
    with jax.default_matmul_precision("highest"):
        for start in range(0, T, C):
            end = min(start + C, T)
            z_BCF, v_BCD = z_BTF[:, start:end], v_BTD[:, start:end]
            whole_B = jnp.full(z_BTF.shape[:1], end - start == C)
            if whole_chunks_B is not None:
                whole_B &= start // C < whole_chunks_B
            if segment_ids_BT is not None:
                ids_BC = segment_ids_BT[:, start:end]
                # the initial state belongs to the first document, later ones start from zero
                if start:
                    same_B = ids_BC[:, 0] == segment_ids_BT[:, start - C]
                    S_BDF = jnp.where(same_B[:, None, None], S_BDF, 0)
                whole_B &= (ids_BC == ids_BC[:, :1]).all(1) & (ids_BC[:, 0] != 0)

            # apply, before the update
            o_parts.append(jnp.einsum("bcf,bdf->bcd", z_BCF, w_DF_acc[None] + S_BDF))

            delta_BDF = lr * jnp.einsum("bcd,bcf->bdf", v_BCD, z_BCF)
            if clip_norm is not None:
                square_B = jnp.sum(delta_BDF**2, axis=(1, 2))
                clipped_B = square_B > clip_norm**2
                scale_B = jnp.where(
                    clipped_B, clip_norm * jax.lax.rsqrt(jnp.where(clipped_B, square_B, 1)), 1
                )
                delta_BDF = scale_B[:, None, None] * delta_BDF
            S_BDF = jnp.where(whole_B[:, None, None], decay * S_BDF + delta_BDF, S_BDF)
    return jnp.concatenate(o_parts, axis=1).astype(out_dtype), S_BDF
