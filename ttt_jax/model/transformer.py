"""The Transformer: blocks, groups of scanned layers, and the state of a stream.

B batch, T tokens, D model width, V vocabulary, C chunk size.

Layers that repeat are stacked and scanned: the model finds the repeating pattern of layer kinds
(say one TTT layer followed by five plain ones) and compiles each kind once, so HLO size and compile
time do not grow with depth. Read top down: `Transformer.__call__` -> `Group` -> `Block` ->
`Attention` (attention.py) and `MLP` (ttt_mlp.py) -> the op (ops/).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.core import Tracer

from ttt_jax.config import ModelConfig, validate_model
from ttt_jax.errors import UserError
from ttt_jax.model.layers import Context, Head, RMSNorm, param, rope_tables
from ttt_jax.model.stack import (
    DEFAULT_RUNTIME,
    Group,
    LayerRun,
    LayerState,
    Runtime,
    find_groups,
    layer_kinds,
)
from ttt_jax.model.ttt_stream import SOURCE_AXES, Z_AXES, TTTState
from ttt_jax.ops.attention.cached import KVCache
from ttt_jax.ops.numerics import accumulator, precision_for


@struct.dataclass
class State:
    """What the model needs to read on. A pytree; `layers[group][run]` is stacked like the
    parameters of the run.

    Fields:
      position_B: tokens read by each row, int32.
      layers: KV cache and TTT state of every layer.
      capacity: tokens that full-attention caches can hold; None: they grow with every call.
    """

    position_B: jax.Array
    layers: tuple[tuple[LayerState, ...], ...]
    capacity: int | None = struct.field(pytree_node=False, default=None)


# How the arrays of a layer's state lie on a mesh: heads are split as the weights that make them. S
# lies as W_down does, so that a step that reads one token moves neither.
_SLOTS = ("batch", "kv_heads", "tokens", None)
_S = ("step_rows", "embed", "mlp")


def map_state(function: Callable[[Any, tuple[str | None, ...]], Any], state: State) -> State:
    """Call `function` with every array of a state and its logical axes, those of the layers' stacks
    left out. Returns the state of the results.
    """

    def on_layer(layer: LayerState) -> LayerState:
        cache = KVCache(*(function(x, _SLOTS) for x in layer.cache))
        if layer.ttt is None:
            return LayerState(cache, None)
        arrays = zip(layer.ttt, (_S, Z_AXES, SOURCE_AXES), strict=True)
        return LayerState(cache, TTTState(*(function(x, axes) for x, axes in arrays)))

    layers = tuple(tuple(map(on_layer, runs)) for runs in state.layers)
    return State(function(state.position_B, (None,)), layers, state.capacity)


class Transformer(nnx.Module):
    """A decoder-only language model of the LLaMA / Qwen family with In-Place TTT on
    `cfg.ttt.layers`.

    A plain pytree of float32 parameters: use it with `jax.jit`, `jax.grad`, optax. It holds no
    mutable state.
    """

    def __init__(self, cfg: ModelConfig, runtime: Runtime = DEFAULT_RUNTIME, *, key: jax.Array):
        """Raises `ConfigError` if the config contradicts itself."""
        validate_model(cfg)
        self.config, self.runtime = cfg, runtime
        self.tokenizer: Any = None  # `load_pretrained` puts the folder's here, for convenience
        self.eos_ids: tuple[int, ...] = ()  # end tokens of the generation config, likewise
        k_embed, k_head, k_layers = jax.random.split(key, 3)
        self.embed = param(k_embed, (cfg.vocab_size, cfg.d_model), ("vocab", "embed"), cfg.init_std)
        groups, first = [], 0
        kinds = layer_kinds(cfg)
        for pattern, repeats in (
            find_groups(kinds)
            if runtime.scan_layers
            else [((LayerRun(kind, 1),), 1) for kind in kinds]
        ):
            groups.append(Group(cfg, first, pattern, repeats, key=k_layers))
            first += sum(run.count for run in pattern) * repeats
        self.groups = nnx.List(groups)
        self.norm = RMSNorm(cfg.d_model, "embed", cfg.norm_eps, key=k_head)
        shape = (cfg.vocab_size, cfg.d_model)
        self.head = (
            None if cfg.tie_embeddings else param(k_head, shape, ("vocab", "embed"), cfg.init_std)
        )

    @property
    def output_weight(self) -> jax.Array:
        """[V, D], tied to the embedding or not."""
        return (self.embed if self.head is None else self.head)[...]

    def __call__(self, ids_BT, state: State | None = None, **options) -> tuple[jax.Array, State]:
        """Read tokens and return logits for each next token.

        Args:
          ids_BT: integer token ids, an array or a nested list. Inside of `jax.jit` their values are
            not known: ids outside the vocabulary then give NaN (negative ones count from its end);
            `token_rows` of inference/prompts.py looks at them before.
          state: where the stream was left; None starts fresh.
          options: see `hidden`.

        Returns: logits_BTV in float32, and the state to read on with. Reading in any pieces gives
        the same logits. Raises: UserError for a text, no tokens, another shape or dtype, ids
        outside the vocabulary, and documents that start inside of a chunk, where their values are
        known.
        """
        ids_BT = _check_ids(ids_BT, self.config.vocab_size)
        if self.config.ttt.layers:
            _check_documents(options.get("segment_ids"), self.config.ttt.chunk_size)
        h_BTD, new_state, _ = self.hidden(ids_BT, state, keep_state=True, **options)
        assert new_state is not None
        return self.logits(h_BTD), new_state

    def hidden(
        self,
        ids_BT,
        state: State | None = None,
        *,
        keep_state: bool = False,
        lengths=None,
        segment_ids=None,
        positions=None,
        ttt_scale: float | jax.Array = 1.0,
        capacity: int | None = None,
        at_chunk_start: bool = False,
        ends_chunk: bool | None = None,
        probe: bool = False,
    ):
        """Final hidden states (after the last norm).

        Args:
          ids_BT: int32 token ids inside the vocabulary; their values are not looked at, and others
            give NaN.
          state: from an earlier call, or `init_state`; None starts fresh.
          keep_state: return a state (training does without).
          lengths: int32 [B], real tokens per row when rows are padded at the right; outputs past
            them mean nothing.
          segment_ids, positions: int32 [B, T] of packed rows (0 is padding), whose documents start
            at multiples of `config.ttt.chunk_size`; only for a fresh start.
          ttt_scale: factor on the inner learning rate of the chunks that end in this call. The
            number 0 switches TTT off: fast weights are not applied, and these tokens write nothing,
            also in a chunk that ends later. An array of 0 applies them.
          capacity: slots of the KV caches that a fresh start allocates; None lets them grow with
            every call.
          at_chunk_start: the caller knows that every row that reads here stands at a chunk
            boundary: pieces then cost what a fresh start costs.
          ends_chunk: of a one-token step, whether it may complete a chunk of some row; None finds
            out on the device.
          probe: of a fresh start, add "update_cosine_B" to the stats, which costs about one more
            update of one row.

        Returns: (h_BTD in the compute dtype, State or None, {layer index: {"state_ratio_B",
        "update_norm_B"}}). Raises: UserError when packed rows meet a state, and when a stream that
        was begun with TTT off is to adapt from here on.
        """
        cfg, dtype = self.config, jnp.dtype(self.runtime.dtype)
        B, T = ids_BT.shape
        if isinstance(ttt_scale, int | float | np.number):
            ttt_scale = float(ttt_scale)
        off = isinstance(ttt_scale, float) and ttt_scale == 0.0
        if state is not None and not (off or at_chunk_start):
            self._check_begun(state)
        capacity = _check_state(T, state, capacity, segment_ids, positions)
        if positions is None:
            start_B1 = jnp.zeros((1, 1), jnp.int32) if state is None else state.position_B[:, None]
            positions = start_B1 + jnp.arange(T, dtype=jnp.int32)[None]
        with jax.named_scope("embed"):
            embed_BTD = self.runtime.parallel.embed(self.embed[...], ids_BT).astype(dtype)
        ctx = Context(
            rope=rope_tables(cfg.rope, cfg.head_dim, positions),
            start_B=None if state is None else state.position_B,
            lengths_B=lengths,
            segment_ids_BT=segment_ids,
            embed_BTD=embed_BTD,
            head=self._head(ids_BT),
            ttt_scale=ttt_scale,
            keep_state=keep_state or state is not None,
            capacity=capacity,
            at_chunk_start=at_chunk_start,
            ends_chunk=ends_chunk,
            probe=probe,
            parallel=self.runtime.parallel,
        )
        h_BTD, layers, stats = self._through_layers(ctx, state)
        h_BTD = self.norm(h_BTD)
        if not ctx.keep_state:
            return h_BTD, None, stats
        read_B = jnp.full((B,), T, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
        position_B = read_B if state is None else state.position_B + read_B
        return h_BTD, self.laid(State(position_B, layers, ctx.capacity)), stats

    def _check_begun(self, state: State) -> None:
        """Raise UserError for a state that has no pending chunk."""
        if any(state.layers[g][r].ttt is None for g, r, _ in self.ttt_runs()):
            raise UserError(
                "state: was begun with TTT off, and its chunk is not known; begin anew, or pass "
                "at_chunk_start=True where every row stands at a chunk's start"
            )

    def _head(self, ids_BT) -> Head | None:
        if not self.config.ttt.error_layers:
            return None
        dtype = jnp.dtype(self.runtime.dtype)
        rows_BTD = self.runtime.parallel.embed(self.output_weight, ids_BT).astype(dtype)
        head = Head(self.norm, self.output_weight.astype(dtype), rows_BTD)
        return jax.tree.map(jax.lax.stop_gradient, head)

    def _through_layers(self, ctx: Context, state: State | None):
        """Apply all layers to the embeddings. Returns h_BTD, the layers' states, and the stats by
        layer index.
        """
        h_BTD, states, stats = ctx.embed_BTD, [], {}
        B = h_BTD.shape[0]
        for g, group in enumerate(self.groups):
            group_states = None if state is None else state.layers[g]
            h_BTD, new_states, group_stats = group(h_BTD, ctx, group_states, self.runtime)
            states.append(new_states)
            for run, stat in enumerate(group_stats):
                if stat is not None:
                    flat = {name: x_RNB.reshape(-1, B) for name, x_RNB in stat.items()}
                    for n, layer in enumerate(group.layer_indices(run)):
                        stats[layer] = {name: x_LB[n] for name, x_LB in flat.items()}
        return h_BTD, tuple(states), stats

    def logits(self, h_BTD):
        """float32 logits [B, T, V] (float64 for float64)."""
        acc = accumulator(h_BTD.dtype)
        with jax.named_scope("logits"):
            logits_BTV = jnp.einsum(
                "btd,vd->btv",
                h_BTD,
                self.output_weight.astype(h_BTD.dtype),
                preferred_element_type=acc,
                precision=precision_for(h_BTD.dtype),
            )
            # Made where the weight lies, whoever wants all of them.
            return self.runtime.parallel.pin(logits_BTV, "vocab")

    def ttt_runs(self) -> list[tuple[int, int, list[int]]]:
        """List the runs of TTT layers: group, run of its pattern, and the numbers of its layers."""
        return [
            (g, r, group.layer_indices(r))
            for g, group in enumerate(self.groups)
            for r, run in enumerate(group.pattern)
            if run.kind.ttt
        ]

    def laid(self, state: State) -> State:
        """The state as the programs leave it on the devices (`Devices.lay`)."""
        return map_state(self.runtime.parallel.lay, state)

    def init_state(self, batch_size: int, capacity: int) -> State:
        """An empty state whose full-attention caches hold `capacity` tokens."""
        abstract = self.abstract_state(batch_size, capacity)
        return map_state(self.runtime.parallel.zeros, abstract)

    def abstract_state(self, batch_size: int, capacity: int) -> State:
        """`init_state` without its arrays: leaves are `jax.ShapeDtypeStruct` with their places."""
        empty = jax.eval_shape(lambda: self._empty_state(batch_size, capacity))
        return map_state(self.runtime.parallel.abstract, empty)

    def _empty_state(self, batch_size: int, capacity: int) -> State:
        dtype = jnp.dtype(self.runtime.dtype)
        layers = []
        for group in self.groups:
            runs = []
            for run, block in zip(group.pattern, group.blocks, strict=True):
                ttt = block.mlp.init_state(batch_size, dtype) if run.kind.ttt else None
                layer = LayerState(block.attention.init_cache(batch_size, capacity, dtype), ttt)
                stack = (group.repeats, run.count)
                runs.append(
                    jax.tree.map(
                        lambda x, s=stack: jnp.broadcast_to(x[None, None], (*s, *x.shape)), layer
                    )
                )
            layers.append(tuple(runs))
        return State(jnp.zeros((batch_size,), jnp.int32), tuple(layers), capacity)


def _check_state(T: int, state: State | None, capacity: int | None, segment_ids, positions):
    """The capacity of the caches that T tokens go to. Raises UserError, see `hidden`."""
    if state is not None and (segment_ids is not None or positions is not None):
        raise UserError(
            "segment_ids and positions: packed rows start fresh; pass state=None or drop them"
        )
    capacity = capacity if state is None else state.capacity
    # Caches would drop what does not fit without a word.
    if capacity is not None and capacity < T:
        raise UserError(
            f"ids: {T} tokens do not fit the state's capacity of {capacity}; make a larger state"
        )
    return capacity


def _check_ids(ids_BT: Any, vocab_size: int) -> Any:
    """The ids as an array. Raises UserError as `Transformer.__call__`; of the values of traced
    arrays, and of other processes' parts, nothing is known.
    """
    if isinstance(ids_BT, str):
        raise UserError("ids: a text; pass model.tokenizer.encode(text) as [B, T], or use generate")
    try:
        ids_BT = ids_BT if hasattr(ids_BT, "ndim") else np.asarray(ids_BT)
    except ValueError:
        raise UserError("ids: rows of different lengths; pad them, or use generate") from None
    if ids_BT.ndim != 2:
        raise UserError(f"ids: shape {ids_BT.shape}; pass [B, T], such as ids[None] for one row")
    if 0 in ids_BT.shape:
        raise UserError(f"ids: shape {ids_BT.shape}; give at least one token")
    if not jnp.issubdtype(ids_BT.dtype, jnp.integer):
        raise UserError(f"ids: dtype {ids_BT.dtype}; token ids are integers: cast them")
    if isinstance(ids_BT, Tracer) or not getattr(ids_BT, "is_fully_addressable", True):
        return ids_BT
    known_BT = np.asarray(ids_BT)
    if known_BT.size and (known_BT.min() < 0 or known_BT.max() >= vocab_size):
        bad = known_BT[(known_BT < 0) | (known_BT >= vocab_size)][0]
        raise UserError(f"ids: hold id {bad}; the model's vocabulary has ids 0 to {vocab_size - 1}")
    return ids_BT


def _check_documents(segment_ids_BT: Any, chunk_size: int) -> None:
    """Raise UserError where a document begins inside of a chunk: it would learn from the one before
    it. Of traced arrays, and of other processes' parts, nothing is known.
    """
    if segment_ids_BT is None or isinstance(segment_ids_BT, Tracer):
        return
    if not getattr(segment_ids_BT, "is_fully_addressable", True):
        return
    ids_BT = np.asarray(segment_ids_BT)
    begins_BT = (ids_BT[:, 1:] != ids_BT[:, :-1]) & (ids_BT[:, 1:] > 0)
    for row, before in np.argwhere(begins_BT):
        if (before + 1) % chunk_size:
            raise UserError(
                f"segment_ids: document {ids_BT[row, before + 1]} of row {row} begins at token "
                f"{before + 1}; documents begin at multiples of model.ttt.chunk_size = "
                f"{chunk_size}: pad the one before with 0"
            )


def abstract_transformer(cfg: ModelConfig, runtime: Runtime = DEFAULT_RUNTIME) -> Transformer:
    """The structure of a model without its arrays: leaves are float32 `jax.ShapeDtypeStruct`.

    Raises: ConfigError if the config contradicts itself.
    """
    return jax.eval_shape(lambda: Transformer(cfg, runtime, key=jax.random.key(0)))
