"""Damaged files of every format that is read: a one-line `UserError`, or a result; nothing else
comes out.

`fuzz/test_checkpoints.py` does the same for safetensors, their index, config.json and converted
folders. A few hundred examples of each run with the fast tests, `-m slow` runs 10,000.
"""

import gzip
import io
import json
import lzma
import math
import tempfile
import zlib
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from eval.test_output import results_of
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.damage import (
    CHANGES,
    TREES,
    VALUES,
    damage,
    fuzz,
    fuzz_bytes,
    fuzz_tree,
    one_line,
    replaced,
)
from support.models import config as model_config

from ttt_jax.config import Config, field_names, load_config, replace, to_dict
from ttt_jax.data import corpus, load_tokenizer, make_loader
from ttt_jax.errors import DataError
from ttt_jax.eval import output
from ttt_jax.inference.generation import Session
from ttt_jax.inference.session_file import load_session
from ttt_jax.model.transformer import Transformer
from ttt_jax.run import compile_cache
from ttt_jax.run.curves import curves_of
from ttt_jax.run.folder import read_run_config
from ttt_jax.run.page import _facts, _quarantine, _warnings, read_run

TEXTS = ["first document", "naïve café", "日本語のテキスト", "x" * 50] * 3
JSONL = (
    "\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(TEXTS)).encode() + b"\n"
)
TOKENIZER = load_tokenizer("bytes")

# ------------------------------------------------------------------------------------------- damage


# ------------------------------------------------------------------------------------------ formats


def config_yaml(folder, examples):
    path = folder / "a.yaml"
    tree = to_dict(Config())
    text = yaml.safe_dump(tree, sort_keys=False).encode()
    half = examples // 2
    fuzz_bytes(half, path, text, lambda: load_config(path))
    fuzz_tree(examples - half, path, tree, json.dumps, lambda: load_config(path))  # JSON is YAML
    (folder / "run").mkdir()
    run = folder / "run" / "config.yaml"
    fuzz_bytes(half // 4, run, text, lambda: read_run_config(folder / "run"))


def overrides(folder, examples):
    names = st.sampled_from(field_names()) | st.text(max_size=10)
    traps = st.sampled_from(["2001-99-99", "!!int x", "[" * 1200, "&a [*a]", "{?: }"])
    values = st.text(max_size=12) | VALUES.map(json.dumps) | traps
    words = st.lists(st.tuples(names, values), min_size=1, max_size=3)

    def check(pairs):
        one_line(lambda: load_config(None, [f"--{k}={v}" for k, v in pairs]))

    fuzz(examples, words, check)


def data_config(path, **changes):
    heldout = Path(__file__).parents[1] / "support/tolerance.py"  # any small text
    base = {
        "data.train": [str(path)],
        "data.heldout": [str(heldout)],
        "data.seq_len": 32,
        "data.batch_size": 2,
    }
    return replace(
        Config(), base | {"data.max_bad_records": 1.0, "data.max_record_bytes": 10_000} | changes
    )


def read_data(path, **changes):
    config = data_config(path, **changes)

    def action():
        # files of one size written within one tick of the clock look the same
        corpus._recent.clear()
        next(make_loader(config, tokenizer=TOKENIZER))

    return action


def parquet_bytes():
    stream = io.BytesIO()
    pq.write_table(
        pa.table({"text": TEXTS, "n": list(range(len(TEXTS)))}), stream, row_group_size=5
    )
    return stream.getvalue()


def arrayrecord_bytes():
    with tempfile.TemporaryDirectory() as folder:
        writer = ArrayRecordWriter(f"{folder}/a", "group_size:1")
        for record in [text.encode() for text in TEXTS] + [npy_bytes(9)]:
            writer.write(record)
        writer.close()
        return Path(folder, "a").read_bytes()


def npy_bytes(*shape):
    stream = io.BytesIO()
    np.save(stream, np.arange(math.prod(shape), dtype=np.uint16).reshape(shape))
    return stream.getvalue()


FILES = {
    "a.jsonl": lambda: JSONL,
    "a.jsonl.gz": lambda: gzip.compress(JSONL, mtime=0),
    "a.jsonl.xz": lambda: lzma.compress(JSONL),
    "a.jsonl.zst": lambda: zstandard.ZstdCompressor(write_checksum=True).compress(JSONL),
    "a.parquet": parquet_bytes,
    "a.arrayrecord": arrayrecord_bytes,
    "a.npy": lambda: npy_bytes(4, 30),
    "a.txt": lambda: "naïve text ".encode() * 20,
}


def data_file(name):
    def run(folder, examples):
        path = folder / name
        fuzz_bytes(examples, path, FILES[name](), read_data(path))

    return run


def json_lines(folder, examples):
    """Lines that are JSON, of any shape."""
    path = folder / "a.jsonl"

    def check(records):
        path.write_text("\n".join(json.dumps(record) for record in records))
        one_line(read_data(path))

    records = VALUES | st.dictionaries(st.sampled_from(["text", "id"]), VALUES)
    fuzz(examples, st.lists(records, max_size=5), check)


def tokenizer_json(folder, examples):
    from data.test_tokenizer import make_tokenizer

    make_tokenizer(
        folder, tokenizer_config={"eos_token": "<|im_end|>"}, config={"eos_token_id": [1]}
    )
    path = folder / "tokenizer.json"
    original = path.read_bytes()

    def action():
        tokenizer = load_tokenizer(str(folder))
        assert tokenizer.eos_id is None or 0 <= tokenizer.eos_id < tokenizer.vocab_size

    half = examples // 2
    fuzz_bytes(half, path, original, action)
    fuzz_tree(examples - half, path, json.loads(original), json.dumps, action)
    path.write_bytes(original)
    for name in ("tokenizer_config.json", "config.json"):
        side = folder / name
        fuzz_bytes(half // 10, side, side.read_bytes(), action)


def results_json(folder, examples):
    output.write_folder(folder / "a", output.files_of(results_of()), False)
    output.write_folder(folder / "b", output.files_of(results_of((1.0, 2.0), "b")), False)
    path = folder / "b" / "results.json"
    original = path.read_bytes()

    def action():
        a, b = (output.read_results(folder / name) for name in "ab")
        compared, made = output.comparison(a, b)
        output.comparison_files([a, b], compared, made)

    half = examples // 2
    fuzz_bytes(half, path, original, action)
    fuzz_tree(examples - half, path, json.loads(original), json.dumps, action)


def session_file(folder, examples):
    model = Transformer(model_config(), key=jax.random.key(0))
    path = folder / "s.safetensors"
    session = Session(model, 2)
    session.extend([[1, 2, 3, 4, 5], [3, 1]])
    session.generate(3)
    session.save(path)
    original = path.read_bytes()
    tensors, size = load_file(path), int.from_bytes(original[:8], "little")
    manifest = json.loads(json.loads(original[8 : 8 + size])["__metadata__"]["manifest"])
    quarter = max(examples // 4, 1)
    fuzz_bytes(2 * quarter, path, original, lambda: load_session(path, model))

    def forged(change):  # with checksums that are right
        text = json.dumps(replaced(manifest, *change))
        save_file(
            tensors,
            path,
            metadata={"manifest": text, "manifest_crc32": str(zlib.crc32(text.encode()))},
        )
        one_line(lambda: load_session(path, model))

    fuzz(quarter, TREES, forged)

    def other_tensors(change):
        name, shape, dtype = change
        changed = tensors | {name: np.ones(shape, dtype)}
        crc32 = {
            n: zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).tobytes())
            for n, x in changed.items()
        }
        text = json.dumps(manifest | {"crc32": crc32})
        save_file(
            changed,
            path,
            metadata={"manifest": text, "manifest_crc32": str(zlib.crc32(text.encode()))},
        )
        one_line(lambda: load_session(path, model))

    shapes = st.lists(st.integers(0, 3), max_size=4)
    dtypes = st.sampled_from(["int32", "float32", "float64", "int8"])
    fuzz(
        quarter,
        st.tuples(st.sampled_from(sorted(tensors)) | st.just("new"), shapes, dtypes),
        other_tensors,
    )


def run_folder(folder, examples):
    """All that `ttt-jax report` reads."""
    row = {
        "step": 1,
        "loss": 2.0,
        "ttt/layer_01/state_ratio": 0.1,
        "probe/gain": 0.5,
        "time/input_wait": 0.01,
    }
    entry = {
        "field": "data.train",
        "path": "x",
        "line": 3,
        "kind": "not JSON",
        "reason": "r",
        "excerpt": "<b>",
    }
    event = {"time": "t", "step": 3, "kind": "warning", "text": "<script>"}
    files = {
        "metrics.jsonl": [row, row | {"step": 2}],
        "quarantine.jsonl": [entry, {"field": "x", "not_listed": 3}],
        "events.jsonl": [event],
        "environment.json": [{"date": "d", "parameters": 3, "hardware": {"device": "cpu"}}],
        "report.json": [{"steps": 2, "heldout": {"positions": []}}],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(Config())))
    texts = {name: "\n".join(map(json.dumps, rows)).encode() for name, rows in files.items()}
    for name, text in texts.items():
        (folder / name).write_bytes(text)

    def action():
        run = read_run(folder)
        curves = curves_of(run.metrics)
        assert all(math.isfinite(value) for _, values in curves.values() for value in values)
        page = _facts(run, curves) + _warnings(run) + _quarantine(run)
        assert "<script" not in page

    for name, text in texts.items():
        path, share = folder / name, max(examples // (2 * len(files)), 1)
        fuzz_bytes(share, path, text, action)
        dump = lambda rows: "\n".join(map(json.dumps, rows))
        fuzz_tree(share, path, files[name], dump, action)
        path.write_bytes(text)


def data_state(folder, examples):
    """The data iterator's state, a JSON file of a checkpoint."""
    path = folder / "a.jsonl"
    path.write_bytes(JSONL)
    config = data_config(path)
    loader = make_loader(config, tokenizer=TOKENIZER)
    for _ in range(7):
        next(loader)
    state = loader.get_state()
    small = st.one_of(VALUES, st.integers(-2, 300))  # `batches` tells how far to plan ahead

    def check(change):
        changed = replaced(state, *change)
        done = changed.get("batches") if isinstance(changed, dict) else None
        if isinstance(done, int) and done > 1000:
            return
        fresh = make_loader(config, tokenizer=TOKENIZER)
        try:
            fresh.set_state(changed)
        except DataError as refusal:
            message = str(refusal)
            assert "\n" not in message
            assert fresh.get_state()["batches"] == 0  # as it was
        else:
            next(fresh)

    fuzz(examples, st.tuples(st.integers(0, 1 << 16), small, st.booleans()), check)


def cache_seals(folder, examples):
    """Whatever the seals and entries are, what is left after the check is sealed."""
    cache = compile_cache.CompileCache(folder, b"k" * 32)

    def check(changes):
        for n in range(3):
            (folder / f"jit_{n}-cache").write_bytes(bytes([n]) * 100)
        cache.seal()
        seals, which = (folder / "seals.json"), folder / "jit_1-cache"
        path = seals if len(changes) % 2 else which
        original = path.read_bytes()
        path.write_bytes(damage(original, changes))
        same = which.read_bytes() == bytes([1]) * 100
        removed = cache.check()
        assert ("jit_1-cache" in removed) or same
        assert sorted(removed + [p.name for p in folder.glob("*-cache")]) == [
            f"jit_{n}-cache" for n in range(3)
        ]

    fuzz(examples, st.lists(CHANGES, min_size=1, max_size=3), check)


FORMATS = {
    "config.yaml": config_yaml,
    "overrides": overrides,
    **{name: data_file(name) for name in FILES},
    "lines": json_lines,
    "tokenizer.json": tokenizer_json,
    "results.json": results_json,
    "session": session_file,
    "run folder": run_folder,
    "data state": data_state,
    "cache seals": cache_seals,
}


@pytest.mark.parametrize("what", FORMATS)
def test_damaged_files(what, tmp_path):
    FORMATS[what](tmp_path, 100)


@pytest.mark.slow
@pytest.mark.parametrize("what", FORMATS)
def test_damaged_files_10000(what, tmp_path):
    FORMATS[what](tmp_path, 10_000)
