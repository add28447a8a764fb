"""A small Qwen3 with a memory as other engines serve it: a base folder, adapters on it, and the
log-probabilities that are ours with the frozen memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from support.hf_folders import make_folder

from ttt_jax import Session, load_pretrained, score
from ttt_jax.memory.lora import write_lora
from ttt_jax.memory.merge import merge
from ttt_jax.pretrained.source import open_source

TTT = {
    "ttt_mode": True,
    "ttt_layers": [0, 2],  # of three
    "ttt_proj": True,
    "ttt_lr": 0.5,
    "ttt_chunk": 4,
    "ttt_target": "hidden_states",
}
RAW = TTT | {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 64,  # vLLM's attention on a CPU takes multiples of 32
    "hidden_size": 128,
    "num_attention_heads": 2,
    "intermediate_size": 192,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
IDS = np.random.default_rng(0).integers(4, 97, 24).astype(np.int32)


class Served(NamedTuple):
    """Fields:
    base: folder of the model without TTT.
    adapters: folders by rank.
    expected: log-probabilities of IDS[1:] by rank; None: without an adapter.
    """

    base: Path
    adapters: dict[int, Path]
    expected: dict[int | None, np.ndarray]


def served(folder: Path, ranks: tuple[int, ...]) -> Served:
    """Write the base and adapters of these ranks (128 is the full one) into the folder."""
    make_folder(folder / "model", RAW)
    model = load_pretrained(folder / "model")
    session = Session(model)
    session.read([IDS])
    memory = session.memory() * 0.5
    merge(open_source(folder / "model"), None, folder / "base")
    logprobs = lambda kept: score(model, IDS[None], ttt=False, memory=kept).logprobs_BT[0]
    expected: dict[int | None, np.ndarray] = {None: logprobs(None)}
    adapters = {}
    for rank in ranks:
        kept = memory if rank == RAW["hidden_size"] else memory.truncate(rank)
        adapters[rank] = folder / f"rank{rank}"
        write_lora(kept, adapters[rank], rank=rank)
        expected[rank] = logprobs(kept)
        assert np.abs(expected[rank] - expected[None]).max() > 0.05
    return Served(folder / "base", adapters, expected)
