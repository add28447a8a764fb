"""Malformed records are left out, counted and listed; documents keep their identity; none is lost
or seen twice.
"""

import collections
import errno
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ttt_jax.config import Config, replace
from ttt_jax.data import (
    cache,
    corpus,
    load_tokenizer,
    make_loader,
    quarantine,
    rejected_records,
    write_quarantine,
)
from ttt_jax.data.quarantine import _HOPELESS
from ttt_jax.errors import DataError
from ttt_jax.run import provenance

TOKENIZER = load_tokenizer("bytes")
BAD = {
    b'{"text": "cut': "not JSON",
    b"[1, 2]": "wrong type",
    b'{"text": 3}': "wrong type",
    b'{"body": "x"}': "no text",
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": ""}': "empty",
    b'{"text": "' + b"x" * 5000 + b'"}': "too large",
}


def config_of(*paths, **changes):
    base = {
        "data.train": [str(path) for path in paths],
        "data.seq_len": 64,
        "data.batch_size": 4,
        "data.max_bad_records": 0.1,
        "data.max_record_bytes": 4000,
    }
    return replace(
        Config(), base | {key.replace("__", "."): value for key, value in changes.items()}
    )


def write_lines(path, good=100):
    """`good` documents with a bad line behind every tenth; returns line number (from 1) -> kind of
    the bad ones.
    """
    lines, bad, kinds = [], {}, iter(BAD.items())
    for i in range(good):
        lines.append(json.dumps({"text": f"document {i} " * 5}).encode())
        if i % 10 == 9 and (item := next(kinds, None)):
            lines.append(item[0])
            bad[len(lines)] = item[1]
        if i == 50:
            lines.append(b"")  # a blank line is no record
    path.write_bytes(b"\n".join(lines) + b"\n")
    return bad


def texts(found):
    return [TOKENIZER.decode(found.tokens(i, 0, int(found.length_N[i]))) for i in range(len(found))]


def test_bad_lines_are_left_out_and_listed(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = write_lines(path)
    config = config_of(path)
    found = corpus.load_corpus(config, TOKENIZER)
    assert texts(found) == [f"document {i} " * 5 for i in range(100)]
    assert found.rejected.records == 107
    assert found.rejected.kinds == dict(collections.Counter(bad.values()))
    (line,) = write_quarantine(tmp_path, rejected_records(config, TOKENIZER))
    assert "data.train: 7 of 107 records left out as malformed" in line
    rows = [json.loads(row) for row in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {row["line"]: row["kind"] for row in rows} == bad
    assert all(
        row["path"] == str(path) and row["field"] == "data.train" and row["reason"] for row in rows
    )
    assert all(len(row["excerpt"]) <= 200 for row in rows)
    assert rows[1]["excerpt"].strip() == "[1, 2]"
    path.write_text(json.dumps({"text": "x" * 20}) + "\n")
    assert (
        write_quarantine(tmp_path, {"data.train": corpus.load_corpus(config, TOKENIZER).rejected})
        == []
    )
    assert not (tmp_path / "quarantine.jsonl").exists()  # nothing of an earlier start is left


def test_the_threshold_is_a_share_of_all_records(tmp_path):
    write_lines(tmp_path / "a.jsonl")
    for limit in (7 / 107, 1.0):
        assert (
            len(
                corpus.load_corpus(
                    config_of(tmp_path / "a.jsonl", data__max_bad_records=limit), TOKENIZER
                )
            )
            == 100
        )
    with pytest.raises(DataError) as error:
        corpus.load_corpus(config_of(tmp_path / "a.jsonl", data__max_bad_records=0.065), TOKENIZER)
    assert "a.jsonl: line 11 is not JSON" in str(error.value)
    assert (
        "(7 of 107 records are malformed, 6.54 %); fix them, or raise data.max_bad_records = 0.065"
        in str(error.value)
    )
    assert "\n" not in str(error.value)


def test_a_wrong_setting_is_found_before_everything_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"body": "x"}\n' * 100_000)
    with pytest.raises(
        DataError,
        match=rf"first {_HOPELESS} records.* line 1 has no field 'text' .*set data.text_field",
    ):
        corpus.load_corpus(config_of(path), TOKENIZER)


def test_bad_rows_of_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    column = pa.array([b"good one", None, b"\xff", b"", b"x" * 5000, b"good two"]).cast(pa.binary())
    # Built from buffers, because pyarrow itself would refuse to make a string of these bytes.
    column = pa.Array.from_buffers(pa.string(), 6, column.buffers())
    pq.write_table(pa.table({"text": column}), path)
    found = corpus.load_corpus(config_of(path, data__max_bad_records=0.9), TOKENIZER)
    assert texts(found) == ["good one", "good two"]
    listed = {entry["row"]: entry["kind"] for entry in found.rejected.listed}
    assert listed == {1: "no text", 2: "not UTF-8", 3: "empty", 4: "too large"}
    assert found.locate(found.key_N) == [("a.parquet", 0), ("a.parquet", 5)]


def test_repairing_a_line_moves_no_document(tmp_path):
    """A document's identity, which the held-out split hangs on, counts the records before it, good
    or bad.
    """
    path = tmp_path / "a.jsonl"
    write_lines(path)
    before = corpus.load_corpus(config_of(path), TOKENIZER)
    path.write_bytes(path.read_bytes().replace(b"[1, 2]", b'{"text": "repaired"}'))
    after = corpus.load_corpus(config_of(path), TOKENIZER)
    assert len(after) == len(before) + 1
    texts = lambda found: {
        int(key): bytes(found.tokens(i, 0, int(found.length_N[i]) - 1).astype(np.uint8))
        for i, key in enumerate(found.key_N)
    }
    assert texts(before).items() < texts(after).items(), "each text under the name that it had"


def test_rejections_are_kept_with_cached_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("TTT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "MEMORY_LIMIT", 64)
    path = tmp_path / "a.jsonl"
    write_lines(path)
    first = corpus.load_corpus(config_of(path), TOKENIZER)
    corpus._recent.clear()
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "read_documents", None)  # a second reading would fail
        again = corpus.load_corpus(config_of(path), TOKENIZER)
    assert again.rejected == first.rejected
    np.testing.assert_array_equal(again.key_N, first.key_N)
    assert again.locate(again.key_N) == first.locate(first.key_N)
    corpus._recent.clear()
    index = next((tmp_path / "cache").glob("*.npz"))
    index.write_bytes(index.read_bytes()[:-40])  # a damaged index: read again
    assert corpus.load_corpus(config_of(path), TOKENIZER).rejected == first.rejected


def test_a_file_that_shrinks_during_the_run_is_named(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(200_000, dtype=np.uint16).reshape(100, 2000) % 250)
    np.save(tmp_path / "heldout.npy", np.arange(2000, dtype=np.uint16) % 240)
    config = config_of(
        path, data__heldout=[str(tmp_path / "heldout.npy")], data__seq_len=2000, data__batch_size=2
    )
    loader = make_loader(config, tokenizer=TOKENIZER)
    next(loader)
    fresh = make_loader(replace(config, {"seed": 1}), tokenizer=TOKENIZER)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(DataError, match=rf"data file {path}: became shorter during the run"):
        list(itertools.islice(loader, 50))
    path.unlink()
    # as in a worker process, which opens the file again
    fresh._table.corpus.arrays[0]._array = None
    with pytest.raises(DataError, match=rf"data file {path}: vanished"):
        next(fresh)


def pieces_of(loader, batches):
    """Every piece that the batches hold."""
    found = []
    for _ in range(batches):
        batch = next(loader)
        pieces = loader.documents(loader.pieces)
        for row, (segment_ids_T, ids_T) in enumerate(
            zip(batch["segment_ids"], batch["ids"], strict=True)
        ):
            here = [piece for piece in pieces if piece.row == row]
            assert len(here) == segment_ids_T.max()
            for number, piece in enumerate(here, 1):
                tokens = ids_T[segment_ids_T == number]
                assert len(tokens) == piece.tokens
                text = f"document {piece.document - min(piece.document // 11, 7)} " * 5
                assert TOKENIZER.decode(tokens) == text[piece.start : piece.start + piece.tokens]
        found += [(piece.file, piece.document, piece.start) for piece in pieces]
    return found


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_no_document_is_lost_or_seen_twice_over_resumes(tmp_path, workers):
    """By document ids: what is delivered, and what waits in open rows, is the beginning of the
    order, each piece once.
    """
    path = tmp_path / "a.jsonl"
    write_lines(path)
    config = config_of(path, data__workers=workers)
    whole = make_loader(config, tokenizer=TOKENIZER)
    expected = pieces_of(whole, 90)
    resumed, state = [], None
    for batches in (1, 30, 7, 52) if workers == 0 else (38, 52):
        loader = make_loader(config, tokenizer=TOKENIZER)
        if state is not None:
            loader.set_state(json.loads(json.dumps(state)))
        resumed += pieces_of(loader, batches)
        state = loader.get_state()
        loader.close()
    whole.close()
    assert resumed == expected
    assert state == whole.get_state()

    table, order, slots = whole._table, whole._order, state["slots"]
    describe = lambda place: (table.document_P[order[place]], table.start_P[order[place]])
    started = [
        place for slot, s in slots.items() for place in range(int(slot), s["next"], len(slots))
    ]
    waiting = [place for s in slots.values() for places in s["bins"] for place in places]
    names = {place: d for d, place in enumerate(table.corpus.locate(table.corpus.key_N))}
    delivered = [(names[file, record], start) for file, record, start in expected]
    count = collections.Counter
    assert count(delivered) + count(map(describe, waiting)) == count(map(describe, started))
    assert min(count(delivered).values()) >= 1
    assert len(count(delivered)) == len(table)  # more than an epoch was read


def test_a_full_disk_keeps_no_run_from_starting(tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(quarantine, "atomic_write_text", full)
    monkeypatch.setattr(provenance, "atomic_write_text", full)
    rejected = quarantine.Rejected(3, {"empty": 1}, ({"path": "a", "line": 2, "kind": "empty"},))
    (text,) = quarantine.write_quarantine(tmp_path, {"data.train": rejected})
    assert text.startswith("data.train: 1 of 3 records")
    assert text.endswith("could not be written (No space left on device)")
    assert provenance.write_environment(tmp_path) == [
        f"{tmp_path / 'environment.json'}: not written (No space left on device)"
    ]
    assert not list(tmp_path.iterdir())


def test_lines_that_nest_too_deep_are_bad_records(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"text": "a good line"}).encode()
    deep = [b'{"text": ' + b"[" * n + b"]" * n + b"}" for n in (900, 990, 1000, 5000, 100_000)]
    deep += [b'{"a":' * n + b"1" + b"}" * n for n in (900, 990, 1000, 100_000)]
    path.write_bytes(b"\n".join([good] * 20 + deep))
    config = config_of(path, data__max_record_bytes=1 << 20)
    with pytest.raises(DataError, match="line 21") as error:
        corpus.load_corpus(config, TOKENIZER)
    assert "\n" not in str(error.value)
    found = corpus.load_corpus(replace(config, {"data.max_bad_records": 0.5}), TOKENIZER)
    assert (len(found), found.rejected.bad) == (20, len(deep))
    assert all(
        entry["kind"] in ("not JSON", "wrong type", "no text") for entry in found.rejected.listed
    )


def test_what_killed_writers_left_in_the_cache_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TTT_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "MEMORY_LIMIT", 64)
    ids = np.arange(100, dtype=np.uint16)
    (tmp_path / "partial-killed").write_bytes(b"x")
    (tmp_path / "partial-killed.npz").write_bytes(b"x")
    os.utime(tmp_path / "partial-killed.npz", (0, 0))
    with cache.TokenWriter("living", ids.dtype) as living:
        living.append(ids, [])
        (mine,) = tmp_path.glob("partial-*")  # that of the killed one is gone
        assert mine.name != "partial-killed"
        with cache.TokenWriter("other", ids.dtype) as other:
            other.append(ids, [])
            assert mine.exists()
            assert len(list(tmp_path.glob("partial-*"))) == 2
            other.finish(np.array([100]))
        living.finish(np.array([100]))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("tokens-living.bin", "tokens-living.npz", "tokens-other.bin", "tokens-other.npz")
    ]


def test_a_disk_that_is_full_at_the_end_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TTT_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "MEMORY_LIMIT", 64)

    def full(path, **arrays):
        Path(path).write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.np, "savez", full)
    with cache.TokenWriter("x", np.dtype(np.uint16)) as writer:
        writer.append(np.arange(100), [])
        with pytest.raises(DataError, match="cannot write tokenised text there") as error:
            writer.finish(np.array([100]))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_tokenising_leaves_nothing_for_good(tmp_path):
    """A process that is killed cannot clean up; the next one does."""
    script = (
        "import os, numpy as np; from ttt_jax.data import cache; cache.MEMORY_LIMIT = 64\n"
        "w = cache.TokenWriter('k', np.dtype(np.uint16)); w.append(np.arange(100), [])\n"
        "print(os.listdir(os.environ['TTT_JAX_CACHE']), flush=True); os.kill(os.getpid(), 9)"
    )
    env = {
        **os.environ,
        "TTT_JAX_CACHE": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False
    )
    assert "partial-" in done.stdout, done.stderr
    assert len(list(tmp_path.iterdir())) == 1
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False
    )
    assert len(list(tmp_path.iterdir())) == 1  # its own, not that of the first
