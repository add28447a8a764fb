"""What reading and writing cost on devices that are not there: their programs, and tokens a second
by roofline.

B rows, T tokens of a row, N query heads, H head dim, C chunk size.

The roofline of a program is the longest of three times on one device: its FLOPs at the peak rate,
its bytes at the memory's bandwidth, and what it sends at the links'. A decode step that completes
no chunk reads every parameter once (of the embedding only rows), the keys and values and S; a
prefill reads every parameter once. Latencies are not in it: a step of a few milliseconds with a
hundred collectives is slower.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ttt_jax.config import Config
from ttt_jax.plan.result import Roofline
from ttt_jax.plan.topology import RATES, Topology
from ttt_jax.plan.work import Work


def abstract_prefill(
    config: Config, mesh: Any, rows: int, tokens: int
) -> tuple[Any, tuple[Any, Any]]:
    """A jitted `(model, ids) -> (logits of the last token, state)` and its abstract arguments, in
    the compute dtype.
    """
    import jax
    import jax.numpy as jnp

    from ttt_jax.model.transformer import Transformer
    from ttt_jax.parallel.mesh import batch_sharding

    model = _abstract_model(config, mesh, scan_layers=True)
    ids = jax.ShapeDtypeStruct(
        (rows, tokens), jnp.int32, sharding=batch_sharding(mesh, (rows, tokens))
    )

    def prefill(model: Transformer, ids_BT):
        h_BTD, state, _ = model.hidden(ids_BT, keep_state=True)
        return model.logits(h_BTD[:, -1:]), state

    return jax.jit(prefill), (model, ids)


def abstract_decode(config: Config, mesh: Any, rows: int, tokens: int) -> tuple[Any, Any]:
    """The decode step that completes a chunk, the largest one, as a jitted function, and its
    abstract arguments `(model, state, ...)`: streams of `tokens` tokens, layers with arrays of
    their own.
    """
    import jax
    import jax.numpy as jnp

    from ttt_jax.inference.decoding import decode_step
    from ttt_jax.inference.sampling import Sampling

    model = _abstract_model(config, mesh, scan_layers=False)
    state = model.abstract_state(rows, tokens)
    per_row = lambda dtype: model.runtime.parallel.abstract(
        jax.ShapeDtypeStruct((rows,), dtype), (None,)
    )
    options = {"sampling": Sampling(), "eos": (), "ends_chunk": True, "ttt": True}

    def step(model, state, token_B, alive_B, seed_B):
        return decode_step.__wrapped__(model, state, token_B, alive_B, seed_B, **options)

    arguments = (model, state, per_row(jnp.int32), per_row(jnp.bool_), per_row(jnp.int32))
    return jax.jit(step, donate_argnums=1), arguments


def _abstract_model(config: Config, mesh: Any, *, scan_layers: bool) -> Any:
    import jax.numpy as jnp

    from ttt_jax.model.transformer import abstract_transformer
    from ttt_jax.parallel.mesh import abstract_parameters
    from ttt_jax.training.step import runtime_of

    runtime = dataclasses.replace(runtime_of(config, mesh), scan_layers=scan_layers)
    dtype = jnp.dtype(config.compute_dtype)
    return abstract_parameters(abstract_transformer(config.model, runtime), dtype, mesh)


def decode_reads(model: Any, state: Any) -> float:
    """Bytes of one device that a decode step reads: all parameters but an embedding that is only
    looked up, the caches, and S.
    """
    from ttt_jax.flops import shard_bytes

    looked_up = 0 if model.head is None else shard_bytes(model.embed)
    layers = [layer for runs in state.layers for layer in runs]
    fast = [layer.ttt.S_BDF for layer in layers if layer.ttt is not None]
    return float(shard_bytes(model) - looked_up + shard_bytes([fast, [x.cache for x in layers]]))


def model_flops(config: Config, work: Work, rows: int, tokens: int) -> float:
    """The model's FLOPs in one call of the program, on all devices. A prefill makes the logits of
    its last token alone.
    """
    from ttt_jax.flops import decode_flops, model_flops_per_token

    if work.decode is not None:
        return rows * decode_flops(config.model, tokens)
    flops = tokens * model_flops_per_token(config.model, tokens, work.trains)
    unmade = 0 if work.trains else tokens - 1
    return rows * (flops - unmade * 2.0 * config.model.d_model * config.model.vocab_size)


def roofline(
    config: Config,
    topology: Topology,
    work: Work,
    rows: int,
    tokens: int,
    read: float,
    sent: float | None = None,
) -> Roofline | None:
    """Tokens a second, of all rows together; None for a train step.

    Args:
      tokens: of a row: what a prefill reads, or what a decode step has behind it.
      read: bytes that one device reads from its memory.
      sent: bytes of the results of its collectives; None: not known, and left out.
    """
    if work.trains:
        return None
    rates, new = RATES[topology.kind], rows if work.decode is not None else rows * tokens
    compute = model_flops(config, work, rows, tokens) / topology.devices / rates.flops
    memory = read / rates.memory
    links = None if sent is None else sent / rates.links
    seconds = max(compute, memory, links or 0.0)
    return Roofline(new / seconds, seconds, compute, memory, links)
