"""Prediction errors as targets: what dynamic evaluation would write, in closed form.

B batch, T tokens, D model width, V vocabulary, C chunk size, M chunks.

With n_t the hidden state behind the final norm and p_t = softmax(W n_t), the loss of token t + 1
has the negative gradient

    -d(-log p_t(x_{t+1})) / dn_t = W^T (onehot(x_{t+1}) - p_t) = w[x_{t+1}] - sum_v p_t(v) w[v]

where W (V D) is the output weight. That is the prediction error of token t + 1: nothing where the
model was sure and right. Unlike the next token's embedding it holds nothing that keys predict
already, so what all keys share is not written again by every chunk.

n_t is that of the layer itself with S = 0: its MLP's input, keys and slow weight are at hand, so no
chunk waits for the fast weights of another. In the last layer p_t is the model's prediction without
its S; in an earlier one it is what the final norm and the output weight make of that layer's output
(the logit lens).

The error of a token belongs to the key of the token before it. As a source it stands at its own
token, where the embedding of `input_embed` would stand: tap 3 of the convolution is the next
token's. The first token of a chunk has none, since what predicted it is another chunk's.

No gradient flows through an error: it is a step of gradient descent, and training does not
differentiate it again.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ttt_jax.model.layers import Head
from ttt_jax.model.loss import expected_row
from ttt_jax.ops.ttt.targets import unit_rms
from ttt_jax.parallel.one_device import ONE_DEVICE, Devices


def source(h_BTD, head: Head):
    """What the errors of a chunk are made of, in h's dtype: each token's row of the output weight,
    and its hidden state behind the final norm, [B, T, 2 D]. No gradient flows to h.

    Args:
      h_BTD: the output of the layer with S = 0.
    """
    n_BTD = head.norm(jax.lax.stop_gradient(h_BTD))
    return jnp.concatenate([head.rows_BTD, n_BTD], axis=2)


def prediction_error(
    source_BTX, head: Head, chunk_size: int, normalize: bool, devices: Devices = ONE_DEVICE
):
    """Errors [B, T, D] of the tokens of whole chunks, zero for each chunk's first one.

    Args:
      source_BTX: what `source` has made, T a multiple of `chunk_size`.
      normalize: divide every row of the output weight by its root mean square, where it stands for
        a token. Predictions stay as they are.
    """
    (B, T, X), C = source_BTX.shape, chunk_size
    rows_BTD, n_BTD = jnp.split(source_BTX, 2, axis=2)
    rows_BTD = unit_rms(rows_BTD) if normalize else rows_BTD
    expected = functools.partial(expected_row, normalize=normalize)
    expected_BTD = devices.pin(devices.over_vocabulary(expected, n_BTD, head.weight_VD))
    rows_BMCD, expected_BMCD = (x.reshape(B, T // C, C, X // 2) for x in (rows_BTD, expected_BTD))
    error_BMCD = rows_BMCD[:, :, 1:] - expected_BMCD[:, :, :-1]
    error_BMCD = jnp.pad(error_BMCD, ((0, 0), (0, 0), (1, 0), (0, 0)))
    return error_BMCD.reshape(B, T, X // 2)
