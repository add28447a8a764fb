"""Text that is written while a run trains: which prompt, which weights, with TTT on and off."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from support.jobs import TINY, write_corpus

import train
from ttt_jax.config import from_dict, replace
from ttt_jax.config.fields import Config
from ttt_jax.data import ByteTokenizer, heldout_rows
from ttt_jax.errors import ConfigError
from ttt_jax.inference import samples as samples_module
from ttt_jax.inference.generation import generate
from ttt_jax.inference.samples import Samples, prompt_ids, sample_hooks
from ttt_jax.model.transformer import Transformer
from ttt_jax.pretrained.load import load_pretrained
from ttt_jax.run.folder import read_run_config
from ttt_jax.terminal import printable
from ttt_jax.training.hooks import Seen

ROWS = {
    "ids": np.array([[9, 9, 1, 2, 3, 4, 5, 0], [7] * 8]),
    "segment_ids": np.array([[1, 1, 2, 2, 2, 2, 2, 0], [1] * 8]),
}
CONFIG = from_dict(Config, {"sample": {"every": 2, "prompt": "ab"}})


def ids_of(prompt, **changes):
    config = replace(CONFIG, {"sample.prompt": prompt, **changes})
    return prompt_ids(config, ByteTokenizer(), ROWS).tolist()


def test_the_prompt():
    assert ids_of("ab") == [97, 98]
    assert ids_of(None) == [1, 2], "half of the longest document of the first row"
    for prompt, changes, why in (
        ("", {}, "no token"),
        ("ab", {"model.vocab_size": 98}, "it has id 98, model.vocab_size is 98"),
    ):
        with pytest.raises(ConfigError) as error:
            ids_of(prompt, **changes)
        assert str(error.value).startswith(f"config field sample.prompt = {prompt!r}: {why}; give")


def test_what_cannot_be_sampled_is_refused_before_anything_starts(monkeypatch):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    array = jax.ShapeDtypeStruct((1 << 20,), "float32", sharding=sharding)
    abstract = SimpleNamespace(model=array)
    monkeypatch.setattr(samples_module, "shard_bytes", lambda tree: 6 << 20)
    make = lambda config=CONFIG: sample_hooks(config, ByteTokenizer(), ROWS, abstract)
    assert make(replace(CONFIG, {"sample.every": 0})) == []
    assert [hook.every for hook in make()] == [2]
    monkeypatch.setattr(samples_module, "device_memory_limit", lambda: 9 << 20)
    with pytest.raises(ConfigError, match=r"sample\.every: the whole model \(0\.0 GiB\) does not"):
        make()
    monkeypatch.setattr(samples_module, "device_memory_limit", lambda: 10 << 20)
    assert make()


def test_what_is_written_is_what_the_saved_model_writes(tmp_path, capsys):
    """A run on eight devices, its samples at the last step, and `generate` of its checkpoint."""
    corpus = write_corpus(tmp_path / "corpus")
    words = [
        *TINY, f"--data.train={corpus}", f"--runs_dir={tmp_path}", "--name=run", "--steps=4",
        "--model.ttt.lr=5", "--optimizer.lr=0.05", "--optimizer.warmup_steps=0",
        "--guard.max_state_ratio=1e9", "--log.every=100", "--log.probe_every=0",
        "--sample.every=2", "--sample.tokens=16", "--sample.temperature=1",
    ]  # fmt: skip
    assert train.main(words) == 0
    out = capsys.readouterr().out
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [(s["step"], s["ttt"]) for s in found] == [(2, "on"), (2, "off"), (4, "on"), (4, "off")]
    model, config = load_pretrained(tmp_path / "run"), read_run_config(tmp_path / "run")
    rows = heldout_rows(config, tokenizer=model.tokenizer, rows=1)
    ids = prompt_ids(config, model.tokenizer, rows)
    assert len(ids) == 2 * config.model.ttt.chunk_size, "it has updates behind it"
    texts = {}
    for ttt, mode in ((True, "on"), (False, "off")):
        (completion,) = generate(model, [ids], max_new_tokens=16, temperature=1.0, ttt=ttt)
        texts[mode] = completion.text
    assert texts["on"] != texts["off"], "otherwise nothing is told apart"
    assert {s["ttt"]: s["text"] for s in found[2:]} == texts
    assert {s["prompt"] for s in found} == {model.tokenizer.decode(ids)}
    assert f"samples, step 4, after {len(ids)} tokens that end " in out
    assert f'  TTT on:  "{printable(texts["on"])}"\n' in out


def test_a_model_without_fast_weights_writes_once_and_lost_numbers_are_said(monkeypatch):
    config = replace(
        CONFIG,
        {
            "model.d_model": 16,
            "model.num_layers": 1,
            "model.head_dim": 4,
            "model.d_ff": 8,
            "model.sliding_window": 4,
            "sample.tokens": 2,
            "sample.temperature": 1.0,
        },
    )
    model = Transformer(config.model, key=jax.random.key(0))
    look = Samples(config, ByteTokenizer(), np.array([97, 98], np.int32))
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_index", lambda: 1)
        assert look(7, model) == Seen({}), "process 0 writes"
    seen = look(7, model)
    assert [sample["ttt"] for sample in seen.samples] == ["off"]
    assert seen.samples == look(7, model).samples, "the same randomness each time"
    assert seen.text.splitlines()[1].startswith('  text:    "')
    model.embed[...] = model.embed[...] * np.nan
    (lost,) = look(8, model).samples
    assert lost["text"] == "(nothing: the numbers are not finite)"
