"""Sessions on disk: one safetensors file that holds a batch of streams and the model's fingerprint.

B streams, L slots, K KV heads, H head dim, C chunk size, D model width, F MLP width.

    position        int32 [B]            tokens read by each stream
    unread.B        int32 [n]            tokens that stream B has still to read
    layers.I.k, .v  [B, K, L, H]         keys and values: as many slots as were used, or a ring
    layers.I.S      float32 [B, D, F]    accumulated update of a TTT layer
    layers.I.z      [B, n, F]            MLP activations of the n pending tokens of the longest row
    layers.I.source [B, n, D]            sources of their targets

The metadata's `manifest` says which model wrote the file and has a CRC-32 of every tensor;
`manifest_crc32` protects it. Nothing in the file is executed or unpickled. The layout does not
depend on how the model stacks its layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from ttt_jax.errors import CheckpointError
from ttt_jax.files.sealed import SealedKind, Specs, is_finite
from ttt_jax.inference.prefill import needs_capacity
from ttt_jax.inference.watch import not_finite
from ttt_jax.memory.sources import IdsDigest, Source
from ttt_jax.model.stack import LayerState
from ttt_jax.model.transformer import State, Transformer
from ttt_jax.model.ttt_mlp import source_width
from ttt_jax.model.ttt_stream import TTTState
from ttt_jax.ops.attention.cached import KVCache
from ttt_jax.pretrained.fingerprint import fingerprint

KIND = SealedKind("session", "ttt_jax session 1", "a file that an earlier --session wrote")


class StoredSession(NamedTuple):
    """What a file holds of a session.

    Fields:
      ttt: whether it adapts.
      position_B: tokens read by each stream, int64.
      unread: tokens that each stream has still to read, int32.
      state: None before anything has been read.
      conversation: the turns that the stream holds, as conversation.py writes them; None: no chat.
      holds_memory: the streams began with a memory.
      learnt: its sources.
      digests: of the tokens that each stream has read; None: not known.
    """

    ttt: bool
    position_B: np.ndarray
    unread: list[np.ndarray]
    state: State | None
    conversation: dict[str, Any] | None
    holds_memory: bool
    learnt: tuple[Source, ...]
    digests: list[IdsDigest | None]


def save_session(session: StoredSession, path: str | Path, model: Transformer) -> None:
    """Write the session; a file of that name is replaced when the new one is complete.

    Raises: CheckpointError when it cannot be written; NotFiniteError for numbers that are not
    finite.
    """
    path = Path(path)
    tensors = _tensors(session, model)
    for name, x in tensors.items():
        if not is_finite(x):
            raise not_finite(f"session {path}: not written, {name}")
    fields: dict[str, Any] = {
        "model": fingerprint(model),
        "compute_dtype": model.runtime.dtype,
        "ttt": session.ttt,
    }
    # Readers that know nothing of these pass them over.
    if session.conversation is not None:
        fields["conversation"] = session.conversation
    if any(session.digests):
        fields["digests"] = [digest and digest.to_json() for digest in session.digests]
    if session.holds_memory:
        fields["learnt"] = [source.to_json() for source in session.learnt]
    KIND.write(path, tensors, fields)


def load_session(path: str | Path, model: Transformer) -> StoredSession:
    """Read a session that the same model wrote (on any devices, with layers stacked in any way).

    Raises: CheckpointError when the file is missing, damaged, not a session, or of another model.
    """
    path = Path(path)

    def check(manifest: dict[str, Any], specs: Specs) -> None:
        _check_manifest(path, manifest, model)
        shapes = {name: shape for name, (shape, _) in specs.items()}
        for name, (want, dtype) in _expected(path, model, shapes, _has_S(manifest)).items():
            shape, found = specs[name]
            if (shape, found) != (want, np.dtype(dtype)):
                raise KIND.damaged(
                    path, f"tensor {name} is {found} {list(shape)}, not {dtype} {list(want)}"
                )

    manifest, tensors = KIND.read(path, check)
    if tensors["position"].min() < 0:
        raise KIND.damaged(path, "a position is negative")
    position_B = tensors["position"].astype(np.int64)
    unread = [tensors[f"unread.{b}"] for b in range(len(position_B))]
    for b, ids in enumerate(unread):
        if len(ids) and (ids.min() < 0 or ids.max() >= model.config.vocab_size):
            raise KIND.damaged(path, f"tensor unread.{b} holds ids outside the vocabulary")
    state = _state(model, tensors) if "layers.0.k" in tensors else None
    if state is not None and state.capacity is not None and position_B.max() > state.capacity:
        raise KIND.damaged(path, "positions lie behind the keys that it holds")
    conversation = manifest.get("conversation")
    if conversation is not None and not isinstance(conversation, dict):
        raise KIND.damaged(path, "its conversation is not an object")
    try:
        learnt, digests = _provenance(manifest, position_B)
    except ValueError as error:
        raise KIND.damaged(path, f"its manifest: {error}") from None
    return StoredSession(
        manifest["ttt"],
        position_B,
        unread,
        state,
        conversation,
        "learnt" in manifest,
        learnt,
        digests,
    )


def _has_S(manifest: dict[str, Any]) -> bool:
    """Whether the streams have fast weights: they adapt, or apply a memory."""
    return manifest["ttt"] or "learnt" in manifest


def _provenance(
    manifest: dict[str, Any], position_B: np.ndarray
) -> tuple[tuple[Source, ...], list[IdsDigest | None]]:
    """What the streams began with, and the digests of what they read: None each in files of before
    there were any. Raises ValueError.
    """
    learnt, found = manifest.get("learnt", []), manifest.get("digests", [None] * len(position_B))
    if not isinstance(learnt, list) or not isinstance(found, list):
        raise ValueError("what it has learnt is no list")
    digests = [None if raw is None else IdsDigest.from_json(raw) for raw in found]
    read = [p if d is None else d.tokens for p, d in zip(position_B, digests, strict=True)]
    if read != position_B.tolist():
        raise ValueError("its digests are of other numbers of tokens")
    return tuple(map(Source.from_json, learnt)), digests


# ------------------------------------------------------------------------------------------- layers


def _layers(model: Transformer):
    """(group, run, flattened index in the run's stack, layer index) of every layer."""
    for g, group in enumerate(model.groups):
        for r in range(len(group.pattern)):
            for n, layer in enumerate(group.layer_indices(r)):
                yield g, r, n, layer


def _window(model: Transformer, layer: int) -> int | None:
    cfg = model.config
    return None if layer in cfg.full_attention_layers else cfg.sliding_window


def _tensors(session: StoredSession, model: Transformer) -> dict[str, np.ndarray]:
    state = session.state
    tensors = {"position": session.position_B.astype(np.int32)}
    tensors |= {f"unread.{b}": ids.astype(np.int32) for b, ids in enumerate(session.unread)}
    if state is None:
        return tensors
    used = max(int(session.position_B.max()), 1)  # streams that hold a memory and nothing else
    pending = int((session.position_B % model.config.ttt.chunk_size).max())
    for g, r, n, layer in _layers(model):
        run = state.layers[g][r]
        take = lambda x, n=n: np.asarray(x).reshape(-1, *x.shape[2:])[n]
        slots = slice(None) if _window(model, layer) else slice(used)
        tensors[f"layers.{layer}.k"] = np.ascontiguousarray(take(run.cache.k_BKLH)[:, :, slots])
        tensors[f"layers.{layer}.v"] = np.ascontiguousarray(take(run.cache.v_BKLH)[:, :, slots])
        if run.ttt is not None:
            tensors[f"layers.{layer}.S"] = take(run.ttt.S_BDF)
            tensors[f"layers.{layer}.z"] = np.ascontiguousarray(take(run.ttt.z_BCF)[:, :pending])
            tensors[f"layers.{layer}.source"] = np.ascontiguousarray(
                take(run.ttt.source_BCX)[:, :pending]
            )
    return tensors


def _expected(
    path: Path, model: Transformer, shapes: dict[str, tuple[int, ...]], ttt: bool
) -> dict[str, tuple[Any, Any]]:
    """Shape and dtype of every tensor that a session of this many streams and slots has."""
    cfg, dtype = model.config, model.runtime.dtype
    if len(shapes.get("position", ())) != 1:
        raise KIND.damaged(path, "tensor position is missing")
    B = shapes["position"][0]
    unread = {f"unread.{b}" for b in range(min(B, len(shapes)))}
    if B < 1 or not unread <= set(shapes) or len(unread) < B:
        raise KIND.damaged(path, f"it has {B} positions but not as many streams")
    expected: dict[str, tuple[Any, Any]] = {"position": ((B,), "int32")}
    for name in unread:
        expected[name] = ((shapes[name][0] if shapes[name] else 0,), "int32")
    if set(shapes) == set(expected):
        return expected
    size = lambda name, axis: shapes[name][axis] if len(shapes.get(name, ())) > axis else 0
    full = [layer for layer in range(cfg.num_layers) if _window(model, layer) is None]
    full_slots = size(f"layers.{full[0]}.k", 2) if full else 0
    for layer in range(cfg.num_layers):
        slots = _window(model, layer) or full_slots
        for name in ("k", "v"):
            expected[f"layers.{layer}.{name}"] = ((B, cfg.num_kv_heads, slots, cfg.head_dim), dtype)
        if ttt and layer in cfg.ttt.layers:
            pending = min(size(f"layers.{layer}.z", 1), cfg.ttt.chunk_size)
            width = source_width(cfg.d_model, cfg.ttt.target_of(layer))
            expected[f"layers.{layer}.S"] = (
                (B, cfg.d_model, cfg.d_ff),
                "float64" if dtype == "float64" else "float32",
            )
            expected[f"layers.{layer}.z"] = ((B, pending, cfg.d_ff), dtype)
            expected[f"layers.{layer}.source"] = ((B, pending, width), dtype)
    if set(shapes) != set(expected):
        name = sorted(set(shapes) ^ set(expected))[0]
        raise KIND.damaged(path, f"tensor {name} is {'missing' if name in expected else 'unknown'}")
    return expected


def _state(model: Transformer, tensors: dict[str, np.ndarray]) -> State:
    cfg = model.config
    full = [layer for layer in range(cfg.num_layers) if _window(model, layer) is None]
    capacity = max(tensors[f"layers.{full[0]}.k"].shape[2], 1) if needs_capacity(model) else None
    layers: dict[tuple[int, int], list[LayerState]] = {}
    C = cfg.ttt.chunk_size

    def whole_chunk(x_BnX) -> Any:
        return np.pad(x_BnX, ((0, 0), (0, C - x_BnX.shape[1]), (0, 0)))

    for g, r, _, layer in _layers(model):
        get: Any = lambda name, layer=layer: tensors[f"layers.{layer}.{name}"]
        ttt = None
        if f"layers.{layer}.S" in tensors:
            ttt = TTTState(get("S"), whole_chunk(get("z")), whole_chunk(get("source")))
        layers.setdefault((g, r), []).append(LayerState(KVCache(get("k"), get("v")), ttt))
    groups = []
    for g, group in enumerate(model.groups):
        runs = []
        for r, run in enumerate(group.pattern):
            stack = lambda *xs, run=run, group=group: np.stack(xs).reshape(
                group.repeats, run.count, *xs[0].shape
            )
            runs.append(jax.tree.map(stack, *layers[g, r]))
        groups.append(tuple(runs))
    return model.laid(State(cast(Any, tensors["position"]), tuple(groups), capacity))


# ------------------------------------------------------------------------------------------- checks


def _check_manifest(path: Path, manifest: dict[str, Any], model: Transformer) -> None:
    kinds = {"model": str, "compute_dtype": str, "ttt": bool}
    if any(not isinstance(manifest.get(key), kind) for key, kind in kinds.items()):
        raise KIND.damaged(path, "its manifest lacks a field")
    if manifest["compute_dtype"] != model.runtime.dtype:
        raise CheckpointError(
            f"session {path}: written in {manifest['compute_dtype']}, the model computes in "
            f"{model.runtime.dtype}; "
            f"use --dtype {manifest['compute_dtype']}"
        )
    if manifest["model"] != fingerprint(model):
        raise CheckpointError(
            f"session {path}: written by another model; use the one that read it, or another file"
        )
