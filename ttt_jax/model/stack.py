"""Layers in a stack: the pre-norm block, groups of equal layers, and how they are computed.

B batch, T tokens, D model width, R repeats of a pattern, N layers of a run.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
from flax import nnx

from ttt_jax.config import ModelConfig, TargetSource
from ttt_jax.model.attention import Attention
from ttt_jax.model.layer_scan import layers_in_a_row, scan_layers
from ttt_jax.model.layers import Context, RMSNorm
from ttt_jax.model.ttt_mlp import MLP
from ttt_jax.model.ttt_stream import TTTState
from ttt_jax.ops.attention.cached import KVCache
from ttt_jax.parallel.one_device import ONE_DEVICE, Devices


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How a model is computed, as opposed to what it computes.

    Fields:
      dtype: compute dtype, "float32" or "bfloat16" (parameters are cast where they are used).
      remat_save: names of the activations that the backward keeps (config.REMAT_NAMES); None keeps
        all.
      attention: attention implementation; None picks the fastest.
      scan_layers: stack equal layers and scan over them, so that compile time does not grow with
        depth. Without, each layer has its own arrays, which decoding reads and updates in place (a
        scan copies a layer's slice first).
      unroll_layers: train without loops over the stacks, so that nothing that the backward keeps is
        copied into stacks and out of them; compile time grows with depth.
      parallel: how attention, the op and the loss run on the devices at hand.
    """

    dtype: str = "float32"
    remat_save: tuple[str, ...] | None = ()
    attention: str | None = None
    scan_layers: bool = True
    unroll_layers: bool = False
    parallel: Devices = ONE_DEVICE


DEFAULT_RUNTIME = Runtime()


class LayerKind(NamedTuple):
    """What makes two layers different programs."""

    target: TargetSource | None  # None: no TTT
    window: int | None

    @property
    def ttt(self) -> bool:
        return self.target is not None


class LayerState(NamedTuple):
    cache: KVCache
    ttt: TTTState | None


class Block(nnx.Module):
    """Pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, cfg: ModelConfig, kind: LayerKind, *, key: jax.Array):
        k_attention, k_mlp, k_norm = jax.random.split(key, 3)
        self.attention_norm = RMSNorm(cfg.d_model, "embed", cfg.norm_eps, key=k_norm)
        self.attention = Attention(cfg, kind.window, key=k_attention)
        self.mlp_norm = RMSNorm(cfg.d_model, "embed", cfg.norm_eps, key=k_norm)
        self.mlp = MLP(cfg, kind.target, key=k_mlp)

    def __call__(self, h_BTD, ctx: Context, state: LayerState | None, attention: str | None):
        cache, ttt = (None, None) if state is None else state
        y_BTD, cache = self.attention(ctx.pin(self.attention_norm(h_BTD)), ctx, cache, attention)
        h_BTD = ctx.pin(h_BTD + ctx.pin(y_BTD))
        y_BTD, ttt, stats = self.mlp(ctx.pin(self.mlp_norm(h_BTD)), ctx, ttt, h_BTD)
        return (
            ctx.pin(h_BTD + ctx.pin(y_BTD)),
            None if cache is None else LayerState(cache, ttt),
            stats,
        )


class LayerRun(NamedTuple):
    """`count` equal layers in a row."""

    kind: LayerKind
    count: int


class Group(nnx.Module):
    """`repeats` copies of a pattern of runs, for instance (1 TTT layer, 5 plain layers) x 6.

    One scan goes over the repeats and one, inside it, over the layers of each run, so every
    distinct block is compiled once and the backward holds the recomputed activations of one block
    at a time. The parameters of `blocks[i]` are stacked [repeats, pattern[i].count, ...].
    """

    def __init__(
        self,
        cfg: ModelConfig,
        first: int,
        pattern: tuple[LayerRun, ...],
        repeats: int,
        *,
        key: jax.Array,
    ):
        self.first, self.pattern, self.repeats = first, pattern, repeats
        blocks = []
        for i, run in enumerate(pattern):
            keys = jax.random.split(
                jax.random.fold_in(key, self.layer_index(0, i, 0)), repeats * run.count
            )
            make = functools.partial(_make_block, cfg, run.kind)
            blocks.append(jax.vmap(jax.vmap(make))(keys.reshape(repeats, run.count)))
        self.blocks = nnx.List(blocks)

    def layer_index(self, repeat: int, run: int, number: int) -> int:
        """Index in the model of layer `number` of a run in a repeat of the pattern."""
        counts = [run.count for run in self.pattern]
        return self.first + repeat * sum(counts) + sum(counts[:run]) + number

    def layer_indices(self, run: int) -> list[int]:
        """Indices of the layers stacked in `blocks[run]`, in the order of the flattened stack
        axes.
        """
        count = self.pattern[run].count
        return [self.layer_index(r, run, n) for r in range(self.repeats) for n in range(count)]

    def __call__(
        self, h_BTD, ctx: Context, states: tuple[LayerState, ...] | None, runtime: Runtime
    ):
        """Returns h, the states and the stats of each run (None where it has no TTT), stacked like
        the parameters.
        """

        def apply(block, h_BTD, ctx, state):
            return block(h_BTD, ctx, state, runtime.attention)

        if runtime.remat_save is not None:
            # Without loops the compiler would find what is computed again equal to what was.
            apply = jax.checkpoint(
                apply, policy=_remat_policy(runtime.remat_save), prevent_cse=runtime.unroll_layers
            )

        single = self.repeats == 1 and all(run.count == 1 for run in self.pattern)
        # The loops' own backward takes no traced rate (`optimizer.ttt_drop`).
        own = runtime.unroll_layers or isinstance(ctx.ttt_scale, float)
        if states is None and not ctx.keep_state and own and not single:
            return self._train(apply, h_BTD, ctx, runtime.unroll_layers)

        def layer(h_BTD, xs):
            h_BTD, state, stats = apply(xs[0], h_BTD, ctx, xs[1])
            return h_BTD, (state, stats)

        def pattern(h_BTD, xs):
            blocks, states = xs
            outs = []
            for i, block in enumerate(blocks):
                h_BTD, out = jax.lax.scan(
                    layer, h_BTD, (block, None if states is None else states[i])
                )
                outs.append(out)
            return h_BTD, tuple(outs)

        if single:  # a stack of one is the array itself
            outs = []
            for i, block in enumerate(self.blocks):
                only = lambda tree: jax.tree.map(lambda x: x.reshape(x.shape[2:]), tree)
                h_BTD, out = layer(
                    h_BTD, (only(block), None if states is None else only(states[i]))
                )
                outs.append(jax.tree.map(lambda x: x[None, None], out))
        else:
            h_BTD, outs = jax.lax.scan(pattern, h_BTD, (tuple(self.blocks), states))
        return h_BTD, tuple(state for state, _ in outs), tuple(stats for _, stats in outs)

    def _train(self, apply, h_BTD, ctx: Context, unroll: bool):
        """As `__call__` without states, by a scan that copies no parameters out of the stacks, or
        without loops.
        """

        def layer(block, h_BTD, embed_BTD, ctx):
            ctx = dataclasses.replace(ctx, embed_BTD=embed_BTD)
            h_BTD, _, stats = apply(block, h_BTD, ctx, None)
            return h_BTD, stats

        runs, rest = len(self.blocks), dataclasses.replace(ctx, embed_BTD=None)
        run: Any = layers_in_a_row if unroll else scan_layers
        results: Any = run((layer,) * runs, tuple(self.blocks), h_BTD, ctx.embed_BTD, rest)
        return results[0], (None,) * runs, results[1]


def _make_block(cfg: ModelConfig, kind: LayerKind, key: jax.Array) -> Block:
    return Block(cfg, kind, key=key)


def layer_kinds(cfg: ModelConfig) -> list[LayerKind]:
    full = set(cfg.full_attention_layers)
    return [
        LayerKind(cfg.ttt.target_of(i), None if i in full else cfg.sliding_window)
        for i in range(cfg.num_layers)
    ]


def find_groups(kinds: list[LayerKind]) -> list[tuple[tuple[LayerRun, ...], int]]:
    """Cut a list of layer kinds into (pattern of runs, repeats), so that few distinct blocks are
    compiled.

    At each place take the pattern that covers most layers per run; ties go to the longer cover.
    """
    runs = [LayerRun(kind, len(list(same))) for kind, same in itertools.groupby(kinds)]
    groups = []
    while runs:
        best, best_value = (1, 1), (0.0, 0)
        for period in range(1, len(runs) + 1):
            repeats = 1
            while runs[repeats * period : (repeats + 1) * period] == runs[:period]:
                repeats += 1
            covered = sum(run.count for run in runs[:period]) * repeats
            if repeats > 1 or period == 1:
                best, best_value = max(
                    (best, best_value),
                    ((period, repeats), (covered / period, covered)),
                    key=lambda x: x[1],
                )
        period, repeats = best
        groups.append((tuple(runs[:period]), repeats))
        runs = runs[period * repeats :]
    return groups


def _remat_policy(names: tuple[str, ...]):
    """Keep the named activations; "attention" keeps what attention's own backward needs (output and
    softmax statistics).
    """
    by_name = jax.checkpoint_policies.save_only_these_names(*names)
    if "attention" not in names:
        return by_name

    def policy(primitive, *args, **params):
        return "dot_product_attention" in primitive.name or by_name(primitive, *args, **params)

    return policy
