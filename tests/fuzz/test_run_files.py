"""Damaged files that a run keeps for itself: a refusal in one line, or a result; a record that
nobody can read is no crash.

As in `fuzz/test_inputs.py`, whose helpers are used, `-m slow` runs 10,000 examples of each.
"""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import strategies as st
from support.damage import (
    CHANGES,
    TREES,
    damage,
    fuzz,
    fuzz_bytes,
    fuzz_tree,
    replaced,
)

from ttt_jax.checkpoint.checksums import CHECKSUMS, _digest, find_damage, write_checksums
from ttt_jax.checkpoint.trees import read_json
from ttt_jax.data import cache, corpus
from ttt_jax.errors import CheckpointError
from ttt_jax.pretrained.load import read_eos_ids
from ttt_jax.run.logs import EVENTS_FILE, read_events, truncate_metrics
from ttt_jax.training.guard import ROLLBACKS_FILE, Rollback, read_rollbacks, write_rollbacks

STATE = {"batches": 7, "rows": [[1, 2, 3], [], [4]], "files": "0a1b", "open": {"a": [1, 2]}}


def checksums(folder, examples):
    """Whatever `checksums.json` says, the answer is what is wrong, or that nothing is."""
    for name in ("model/a", "model/b", "extra"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode() * 10)
    write_checksums(folder)
    path = folder / CHECKSUMS
    original = path.read_bytes()
    record = json.loads(original)

    def check(changes):
        path.write_bytes(damage(original, changes))
        wrong = find_damage(folder)
        assert wrong is None or ("\n" not in wrong and wrong.startswith(CHECKSUMS))

    def forged(change):  # it matches itself: then only what it names is compared
        files = replaced(record["files"], *change)
        path.write_text(json.dumps(record | {"files": files, "files_sha256": _digest(files)}))
        find_damage(folder)

    half = examples // 2
    fuzz(half, st.lists(CHANGES, min_size=1, max_size=3), check)
    fuzz(examples - half, TREES, forged)


def checkpoint_json(folder, examples):
    """`data_state` and `extra` of a checkpoint that has no checksums."""
    path = folder / "data_state" / "metadata"
    path.parent.mkdir()
    half = examples // 2
    action = lambda: read_json(folder, "data_state").get("batches")
    fuzz_bytes(half, path, json.dumps(STATE).encode(), action)
    fuzz_tree(examples - half, path, STATE, json.dumps, action)


def rollbacks(folder, examples):
    records = [Rollback(22, 18, STATE), Rollback(40, 0, STATE)]
    write_rollbacks(folder, records)
    path = folder / ROLLBACKS_FILE
    original, half = path.read_bytes(), examples // 2

    def action():
        for found in read_rollbacks(folder):
            assert isinstance(found.step, int)
            assert isinstance(found.data_state, dict)

    fuzz_bytes(half, path, original, action)
    fuzz_tree(
        examples - half,
        path,
        [dataclasses.asdict(record) for record in records],
        json.dumps,
        action,
    )


def line_files(folder, examples):
    """metrics.jsonl (and documents.jsonl) as a run goes on, events.jsonl as it is read."""
    rows = [{"step": step, "loss": 2.5, "documents": [["a", 1]]} for step in range(1, 5)]
    dump = lambda rows: (
        "\n".join(map(json.dumps, rows)) + "\n" if isinstance(rows, list) else json.dumps(rows)
    )
    metrics, events, share = folder / "metrics.jsonl", folder / EVENTS_FILE, examples // 4

    def resume():
        truncate_metrics(metrics, 3)
        if metrics.read_bytes():
            assert all(
                json.loads(line)["step"] <= 3
                for line in metrics.read_text(encoding="utf-8").splitlines()
            )

    def read():
        assert all(isinstance(event, dict) for event in read_events(folder))

    for path, action in ((metrics, resume), (events, read)):
        fuzz_bytes(share, path, dump(rows).encode(), action)
        fuzz_tree(share, path, rows, dump, action)


def generation_config(folder, examples):
    path = folder / "generation_config.json"
    tree = {"eos_token_id": [3, 4], "bos_token_id": 1, "temperature": 0.6, "do_sample": True}
    half = examples // 2

    def action():
        assert all(0 <= i < 50 for i in read_eos_ids(folder, 50))

    fuzz_bytes(half, path, json.dumps(tree).encode(), action)
    fuzz_tree(examples - half, path, tree, json.dumps, action)


def token_cache(folder, examples):
    """The index beside cached tokens: damaged, it is as if there were none, or it says what it
    said.
    """
    tokens, index = cache._paths("k")
    with cache.TokenWriter("k", np.dtype(np.uint16)) as writer:
        writer.append(np.arange(20, dtype=np.uint16), [])
        writer._spill()
        columns = {"length_N": np.array([12, 8])}
        columns |= {"key_N": np.array([5, 6], np.uint64), "digest_N": np.array([7, 8], np.uint64)}
        rejected = np.frombuffer(corpus.Rejected().to_json().encode(), np.uint8)
        writer.finish(**columns, rejected=rejected, has_text=np.asarray(True))
    original = index.read_bytes()

    def check(changes):
        index.write_bytes(damage(original, changes))
        part = corpus._cached_part("k", np.dtype(np.uint16))
        if part is not None:  # zip has checksums
            got = [part.length_N.tolist(), part.key_N.tolist(), part.digest_N.tolist()]
            assert got == [[12, 8], [5, 6], [7, 8]]
            assert part.tokens.read(0, 20).tolist() == list(range(20))

    fuzz(examples, st.lists(CHANGES, min_size=1, max_size=3), check)
    index.write_bytes(original)
    assert corpus._cached_part("k", np.dtype(np.uint16)) is not None
    assert tokens.stat().st_size == 40


FORMATS = {
    "checksums.json": checksums,
    "data_state, extra": checkpoint_json,
    "rollbacks.json": rollbacks,
    "metrics, events": line_files,
    "generation_config.json": generation_config,
    "token cache": token_cache,
}


@pytest.mark.parametrize("what", FORMATS)
def test_damaged_files(what, tmp_path, monkeypatch):
    monkeypatch.setenv("TTT_JAX_CACHE", str(tmp_path))
    FORMATS[what](tmp_path, 100)


@pytest.mark.slow
@pytest.mark.parametrize("what", FORMATS)
def test_damaged_files_10000(what, tmp_path, monkeypatch):
    monkeypatch.setenv("TTT_JAX_CACHE", str(tmp_path))
    FORMATS[what](tmp_path, 10_000)


def test_a_line_of_metrics_that_is_no_row_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for line in (b'{"step": "3"}', b"[" * 100_000, b'{"step": 1, "x": "\x80"}'):
        path.write_bytes(line + b'\n{"step": 2}\n')
        with pytest.raises(CheckpointError, match="line 1: not a JSON object with a step"):
            truncate_metrics(path, 2)
        assert path.read_bytes() == line + b'\n{"step": 2}\n', "nothing is lost"
