"""What is planned: a train step, or one program of inference, with its rows and tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

from ttt_jax.config import Config
from ttt_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Work:
    """What is planned: a train step, or one program of inference.

    Fields:
      prefill: tokens that are read at once. decode: tokens of the streams of which a step writes
        one. At most one of them; without, a train step.
      rows: of inference; None: one on each group of devices that shares one.
    """

    prefill: int | None = None
    decode: int | None = None
    rows: int | None = None

    @property
    def trains(self) -> bool:
        return self.prefill is None and self.decode is None

    @property
    def program(self) -> str:
        if self.decode is not None:
            return f"decode step at {self.decode} tokens"
        return "train step" if self.prefill is None else f"prefill of {self.prefill} tokens"


def workload(config: Config, sizes: dict[str, int], work: Work) -> tuple[int, int]:
    """(rows, tokens of a row). Inference has one row on each group of devices that shares one, if
    nothing else is asked for.

    Raises: ConfigError when the tokens do not split over the context axis in whole chunks, and for
    a mesh that decoding does not use or that does not suit the model.
    """
    prefill, rows = work.prefill, work.rows or sizes["data"] * sizes["fsdp"]
    if work.decode is not None:
        from ttt_jax.parallel.inference_mesh import check_model, check_rows

        check_model(config.model, sizes)
        check_rows(rows, sizes["data"], "--rows")
        return rows, work.decode
    if prefill is None:
        return config.data.batch_size, config.data.seq_len
    shards = sizes["context"] * (config.model.ttt.chunk_size if config.model.ttt.layers else 1)
    if sizes["context"] > 1 and prefill % shards:
        raise ConfigError(
            f"--prefill {prefill}: must be a multiple of mesh.context * model.ttt.chunk_size = "
            f"{shards}"
        )
    return rows, prefill


def abstract_batch(config: Config, mesh: Any) -> dict[str, Any]:
    """Shapes and shardings of a batch of the loader."""
    import jax
    import jax.numpy as jnp

    from ttt_jax.parallel.mesh import batch_sharding

    shape = config.data.batch_size, config.data.seq_len
    sharding = batch_sharding(mesh, shape)
    names = ("ids", "targets", "segment_ids", "positions", "weights")
    dtypes = {"weights": jnp.float32}
    return {
        name: jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.int32), sharding=sharding)
        for name in names
    }
