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

import contextlib
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ttt_jax.config import to_dict
from ttt_jax.errors import CheckpointError
from ttt_jax.inference.prefill import needs_capacity
from ttt_jax.inference.watch import is_finite, not_finite
from ttt_jax.model.param_path import param_path
from ttt_jax.model.stack import LayerState
from ttt_jax.model.transformer import State, Transformer
from ttt_jax.model.ttt_stream import TTTState
from ttt_jax.ops.attention.cached import KVCache
from ttt_jax.pretrained.hf_weights import tensor_names

FORMAT = "ttt_jax session 1"


class StoredSession(NamedTuple):
    """What a file holds of a session.

    Fields:
      ttt: whether it adapts.
      position_B: tokens read by each stream, int64.
      unread: tokens that each stream has still to read, int32.
      state: None before anything has been read.
      conversation: the turns that the stream holds, as conversation.py writes them; None: no chat.
    """

    ttt: bool
    position_B: np.ndarray
    unread: list[np.ndarray]
    state: State | None
    conversation: dict[str, Any] | None = None


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
    fields = {
        "format": FORMAT,
        "model": fingerprint(model),
        "compute_dtype": model.runtime.dtype,
        "ttt": session.ttt,
        "crc32": {name: _crc32(x) for name, x in tensors.items()},
    }
    if session.conversation is not None:  # readers that know nothing of it pass it over
        fields["conversation"] = session.conversation
    manifest = json.dumps(fields, sort_keys=True)
    part = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            tensors,
            part,
            metadata={"manifest": manifest, "manifest_crc32": str(zlib.crc32(manifest.encode()))},
        )
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.rename(path)
    except BaseException as error:  # Ctrl-C, too: nothing half-written stays behind
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if not isinstance(error, OSError | SafetensorError):
            raise
        raise CheckpointError(
            f"session {path}: could not be written ({error}); free space or choose another file"
        ) from None


def load_session(path: str | Path, model: Transformer) -> StoredSession:
    """Read a session that the same model wrote (on any devices, with layers stacked in any way).

    Raises: CheckpointError when the file is missing, damaged, not a session, or of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"session {path}: no such file; give the file that an earlier --session wrote"
        )
    try:
        manifest, tensors = _read(path, model)
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from None
    for name, x in tensors.items():
        if _crc32(x) != manifest["crc32"][name]:
            raise _damaged(path, f"the checksum of tensor {name} does not match")
        if not is_finite(x):
            raise _damaged(
                path,
                f"tensor {name} holds numbers that are not finite, or too large for any stream",
            )
    if tensors["position"].min() < 0:
        raise _damaged(path, "a position is negative")
    position_B = tensors["position"].astype(np.int64)
    unread = [tensors[f"unread.{b}"] for b in range(len(position_B))]
    for b, ids in enumerate(unread):
        if len(ids) and (ids.min() < 0 or ids.max() >= model.config.vocab_size):
            raise _damaged(path, f"tensor unread.{b} holds ids outside the vocabulary")
    state = _state(model, tensors) if "layers.0.k" in tensors else None
    if state is not None and state.capacity is not None and position_B.max() > state.capacity:
        raise _damaged(path, "positions lie behind the keys that it holds")
    conversation = manifest.get("conversation")
    if conversation is not None and not isinstance(conversation, dict):
        raise _damaged(path, "its conversation is not an object")
    return StoredSession(manifest["ttt"], position_B, unread, state, conversation)


def _read(path: Path, model: Transformer) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest, and tensors of the names, shapes and dtypes that it asks for."""
    with safe_open(path, framework="numpy") as file:
        manifest = _manifest(path, file.metadata(), model)
        names = set(file.keys())
        if names != set(manifest["crc32"]):
            raise _damaged(path, "its tensors are not those of its manifest")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        expected = _expected(path, model, shapes, manifest["ttt"])
        for name, (want, dtype) in expected.items():
            found = _numpy_dtype(file.get_slice(name).get_dtype())
            if (shapes[name], found) != (want, np.dtype(dtype)):
                raise _damaged(
                    path,
                    f"tensor {name} is {found} {list(shapes[name])}, not {dtype} {list(want)}",
                )
        return manifest, {name: file.get_tensor(name) for name in names}


def fingerprint(model: Transformer) -> str:
    """A hash of the model's config and of every parameter's bits, the same however layers are
    stacked and placed.
    """
    sums = {}
    names = tensor_names(model)
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        ours = param_path(path)
        stacked = leaf.reshape(len(names[ours]), -1)
        for name, pair in zip(names[ours], np.asarray(_checksums(stacked)).tolist(), strict=True):
            sums[name] = [str(leaf.dtype), *pair]
    config = to_dict(model.config)
    if config["ttt"]["decay"] == 1:  # sessions written before there was this field go on
        del config["ttt"]["decay"]
    text = json.dumps([config, sums], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@jax.jit
def _checksums(x_LX):
    """Two uint32 sums over the bits of each row: plain, and weighted by place. Exact whatever the
    order of summation.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x_LX.dtype.itemsize]
    bits_LX = (
        jax.lax.bitcast_convert_type(x_LX, unsigned).astype(jnp.uint32).reshape(x_LX.shape[0], -1)
    )
    place_LX = jax.lax.broadcasted_iota(jnp.uint32, bits_LX.shape, 1) * jnp.uint32(2) + jnp.uint32(
        1
    )
    total = lambda x: jnp.sum(x, axis=1, dtype=jnp.uint32)
    return jnp.stack([total(bits_LX), total(bits_LX * place_LX)], axis=1)


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
    used = int(session.position_B.max())
    pending = int((session.position_B % model.config.ttt.chunk_size).max())
    for g, r, n, layer in _layers(model):
        run = state.layers[g][r]
        take = lambda x, n=n: np.asarray(x.reshape(-1, *x.shape[2:])[n])
        slots = slice(None) if _window(model, layer) else slice(used)
        tensors[f"layers.{layer}.k"] = np.ascontiguousarray(take(run.cache.k_BKLH)[:, :, slots])
        tensors[f"layers.{layer}.v"] = np.ascontiguousarray(take(run.cache.v_BKLH)[:, :, slots])
        if run.ttt is not None:
            tensors[f"layers.{layer}.S"] = take(run.ttt.S_BDF)
            tensors[f"layers.{layer}.z"] = np.ascontiguousarray(take(run.ttt.z_BCF)[:, :pending])
            tensors[f"layers.{layer}.source"] = np.ascontiguousarray(
                take(run.ttt.source_BCD)[:, :pending]
            )
    return tensors


def _expected(
    path: Path, model: Transformer, shapes: dict[str, tuple[int, ...]], ttt: bool
) -> dict[str, tuple[Any, Any]]:
    """Shape and dtype of every tensor that a session of this many streams and slots has."""
    cfg, dtype = model.config, model.runtime.dtype
    if len(shapes.get("position", ())) != 1:
        raise _damaged(path, "tensor position is missing")
    B = shapes["position"][0]
    unread = {f"unread.{b}" for b in range(min(B, len(shapes)))}
    if B < 1 or not unread <= set(shapes) or len(unread) < B:
        raise _damaged(path, f"it has {B} positions but not as many streams")
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
            expected[f"layers.{layer}.S"] = (
                (B, cfg.d_model, cfg.d_ff),
                "float64" if dtype == "float64" else "float32",
            )
            expected[f"layers.{layer}.z"] = ((B, pending, cfg.d_ff), dtype)
            expected[f"layers.{layer}.source"] = ((B, pending, cfg.d_model), dtype)
    if set(shapes) != set(expected):
        name = sorted(set(shapes) ^ set(expected))[0]
        raise _damaged(path, f"tensor {name} is {'missing' if name in expected else 'unknown'}")
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
            stack = lambda *xs, run=run, group=group: jnp.asarray(
                np.stack(xs).reshape(group.repeats, run.count, *xs[0].shape)
            )
            runs.append(jax.tree.map(stack, *layers[g, r]))
        groups.append(tuple(runs))
    return State(jnp.asarray(tensors["position"]), tuple(groups), capacity)


# ------------------------------------------------------------------------------------------- checks


def _manifest(path: Path, metadata: dict[str, str] | None, model: Transformer) -> dict[str, Any]:
    metadata = metadata or {}
    text = metadata.get("manifest")
    if text is None:
        raise CheckpointError(
            f"session {path}: not a session of ttt_jax; give a file that an earlier --session wrote"
        )
    if metadata.get("manifest_crc32") != str(zlib.crc32(text.encode())):
        raise _damaged(path, "the checksum of its manifest does not match")
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        raise _damaged(path, "its manifest is not JSON") from None
    if not isinstance(manifest, dict):
        raise _damaged(path, "its manifest is not an object")
    kinds = {"model": str, "compute_dtype": str, "ttt": bool, "crc32": dict}
    if manifest.get("format") == FORMAT and any(
        not isinstance(manifest.get(key), kind) for key, kind in kinds.items()
    ):
        raise _damaged(path, "its manifest lacks a field")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"session {path}: its format is {manifest.get('format')!r}, this version reads "
            f"{FORMAT!r}"
        )
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
    return manifest


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"session {path}: damaged ({why}); restore it from a copy or read the input again"
    )


def _crc32(x: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).tobytes())


def _numpy_dtype(name: str) -> np.dtype:
    return np.dtype(
        {
            "F64": "float64",
            "F32": "float32",
            "BF16": "bfloat16",
            "F16": "float16",
            "I32": "int32",
        }.get(name, "V1")
    )
