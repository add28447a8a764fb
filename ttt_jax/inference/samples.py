"""Text that a model writes while it trains: the same prompt each time, with TTT on and off.

The train step's program stays as it is. The weights of the run are read by the programs of
generation, on one device of process 0: on several devices they are copied there, which has to fit.
The other processes help to copy, and go on to the next step, where they wait.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np

from ttt_jax.config import Config
from ttt_jax.data import Tokenizer
from ttt_jax.errors import ConfigError, NotFiniteError
from ttt_jax.files.text import shorten
from ttt_jax.flops import device_memory_limit, shard_bytes
from ttt_jax.inference.generation import Session
from ttt_jax.inference.sampling import Sampling
from ttt_jax.model.stack import Runtime
from ttt_jax.model.transformer import Transformer
from ttt_jax.parallel.mesh import Batch, on_one_device
from ttt_jax.terminal import printable
from ttt_jax.training.hooks import Hook, Seen
from ttt_jax.training.step import TrainState

_SHOWN = 60  # characters of the prompt's end


def sample_hooks(
    config: Config, tokenizer: Tokenizer, rows: Batch, abstract: TrainState
) -> list[Hook]:
    """Make the hook that `sample.every` asks for; none for 0.

    Args:
      rows: held-out rows [R, T], see `heldout_rows`; the prompt when the config has none.
      abstract: the run's state with its shardings.

    Raises:
      ConfigError: the prompt has no tokens that the model knows, or the weights cannot be read on
        one device.
    """
    if not config.sample.every:
        return []
    _check_devices(abstract)
    return [
        Hook(config.sample.every, Samples(config, tokenizer, prompt_ids(config, tokenizer, rows)))
    ]


def prompt_ids(config: Config, tokenizer: Tokenizer, rows: Batch) -> np.ndarray:
    """Return the tokens that are continued: the prompt's, or else the first half of the longest
    document in the first held-out row. int32 [N].

    Raises: ConfigError.
    """
    prompt, vocab_size = config.sample.prompt, config.model.vocab_size
    if prompt is None:
        segments_T = np.asarray(rows["segment_ids"][0])
        longest = np.bincount(segments_T[segments_T > 0]).argmax()
        ids = np.asarray(rows["ids"][0])[segments_T == longest]
        return ids[: max(len(ids) // 2, 1)].astype(np.int32)
    ids = np.asarray(tokenizer.encode(prompt), np.int32)
    if not len(ids) or ids.max() >= vocab_size:
        why = f"it has id {ids.max()}, model.vocab_size is {vocab_size}" if len(ids) else "no token"
        raise ConfigError(
            f"config field sample.prompt = {shorten(prompt, 60)!r}: {why}; give another text, or "
            "null for one of the held-out rows"
        )
    return ids


class Samples:
    """Writes the samples of one run; called with (finished steps, model).

    Args:
      ids: the prompt's tokens.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, ids: np.ndarray) -> None:
        self._config, self._tokenizer, self._ids = config, tokenizer, ids
        self._prompt = tokenizer.decode(ids)
        runtime = Runtime(dtype=config.compute_dtype)
        make = lambda: Transformer(config.model, runtime, key=jax.random.key(0))
        # how the run's weights are computed on one device; the weights come from the run
        self._plain = jax.eval_shape(make)
        self._plain.tokenizer = tokenizer
        self._structure = jax.tree.structure(self._plain)

    def __call__(self, step: int, model: Any) -> Seen:
        """Continue the prompt, with TTT on and off on the same weights; on process 0."""
        writes, leaves = jax.process_index() == 0, []
        for leaf in jax.tree.leaves(model):
            whole = on_one_device(leaf)
            leaves += [whole] if writes else []
        if not writes:
            return Seen({})
        plain = jax.tree.unflatten(self._structure, leaves)
        modes = (True, False) if self._config.model.ttt.layers else (False,)
        written = {mode: self._write(plain, mode) for mode in modes}
        samples = tuple(
            {"ttt": "on" if mode else "off", "prompt": self._prompt, "text": text}
            for mode, text in written.items()
        )
        return Seen({}, self._show(step, written), samples)

    def _write(self, model: Transformer, ttt: bool) -> str:
        settings = self._config.sample
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run's guard says what it thinks of fast weights
            session = Session(model, 1, ttt=ttt)
            session.extend([self._ids])
            try:
                (completion,) = session.generate(
                    settings.tokens,
                    Sampling(temperature=settings.temperature),
                    seed=self._config.seed,
                )
            except NotFiniteError:
                return "(nothing: the numbers are not finite)"
        return completion.text or ""

    def _show(self, step: int, written: dict[bool, str]) -> str:
        end = printable(self._prompt[-_SHOWN:])
        lines = [f'samples, step {step}, after {len(self._ids):,} tokens that end "{end}"']
        for mode, text in written.items():
            label = f"TTT {'on' if mode else 'off'}" if len(written) > 1 else "text"
            lines.append(f'  {label + ":":8} "{printable(text)}"')
        return "\n".join(lines)


def _check_devices(abstract: TrainState) -> None:
    """Raise ConfigError where one device cannot read the whole model beside its share of the
    state.
    """
    limit = device_memory_limit()
    if jax.device_count() == 1 or limit is None:
        return
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract.model))
    share = shard_bytes(abstract)
    if whole + share > limit:
        raise ConfigError(
            f"config field sample.every: the whole model ({whole / 2**30:.1f} GiB) does not fit "
            f"on one device beside its share of the state ({share / 2**30:.1f} of "
            f"{limit / 2**30:.1f} GiB); set it 0"
        )
