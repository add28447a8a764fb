"""`ttt-jax convert`: there and back byte for byte, bounded memory, TTT for plain models, refusals
that leave no trace.
"""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import jit
from support.conversions import OFFICIAL, PLAIN, ROOT, same_params
from support.hf_folders import BF16, FAMILIES, assert_same_tensors, make_folder, read_folder

import train
from ttt_jax import load_pretrained
from ttt_jax.checkpoint.checkpointer import Checkpointer
from ttt_jax.checkpoint.parameters import load_model_params
from ttt_jax.command.cli import main
from ttt_jax.config import CheckpointConfig, Config, MeshConfig, ModelConfig, TTTConfig
from ttt_jax.errors import ConfigError, VerificationError
from ttt_jax.model.param_path import param_path
from ttt_jax.model.transformer import Transformer
from ttt_jax.parallel.mesh import make_mesh, model_shardings
from ttt_jax.pretrained.convert import convert
from ttt_jax.pretrained.hf_config import read_config
from ttt_jax.pretrained.load import initial_model
from ttt_jax.pretrained.orbax_folder import OrbaxWriter
from ttt_jax.pretrained.source import open_source
from ttt_jax.run.folder import prepare_run_dir


def abstract_model(cfg):
    return jax.eval_shape(lambda: Transformer(cfg, key=jax.random.key(0)))


# ----------------------------------------------------------------------------------- there and back


def test_official_models_there_and_back(golden_model, tmp_path):
    folder, _ = golden_model
    report = convert(folder, tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "hf", to="hf")
    stored = read_folder(folder)
    assert (report.tensors, report.nbytes, report.fresh) == (
        len(stored),
        sum(x.nbytes for x in stored.values()),
        0,
    )
    assert_same_tensors(stored, read_folder(tmp_path / "hf"))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text()) == json.loads(
            (folder / name).read_text()
        )
    assert not (tmp_path / "orbax" / "config.json").exists(), (
        "nobody shall take it for a Hugging Face folder"
    )
    model = load_pretrained(tmp_path / "orbax")
    assert model.config == read_config(folder)
    same_params(model, load_pretrained(folder))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "orbax"]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_there_and_back(family, tmp_path):
    """Sharded or not; a tied head that is written out, and a stack whose layers differ in dtype,
    come back as they were.
    """

    def change(stored):
        if family == "smollm2":
            stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
            stored["model.layers.1.mlp.up_proj.weight"] = stored[
                "model.layers.1.mlp.up_proj.weight"
            ].astype(np.float32)

    shards = 4 if family in ("qwen2", "smollm2") else 1
    stored = make_folder(tmp_path / "source", FAMILIES[family], shards=shards, change=change)
    assert ("lm_head.weight" in stored) == (
        family in ("smollm2", "mistral") or family.startswith("llama")
    )
    convert(tmp_path / "source", tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "back", to="hf", max_shard_bytes=20_000)
    convert(tmp_path / "source", tmp_path / "direct", to="hf")
    for out in ("back", "direct"):
        assert_same_tensors(stored, read_folder(tmp_path / out))
        raw = json.loads((tmp_path / "source/config.json").read_text())
        found = json.loads((tmp_path / out / "config.json").read_text())
        found.pop("dtype") if "dtype" not in raw and "torch_dtype" not in raw else None
        assert found == raw
        assert (tmp_path / out / "tokenizer_config.json").read_text() == '{"eos_token": "<end>"}'
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 3
    for dtype in ("float32", "bfloat16"):
        same_params(
            load_pretrained(tmp_path / "orbax", dtype=dtype),
            load_pretrained(tmp_path / "source", dtype=dtype),
        )


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_bfloat16_is_rounded_once(plain, to, tmp_path):
    convert(plain, tmp_path / "half", to=to, dtype="bfloat16")
    convert(tmp_path / "half", tmp_path / "out", to="hf")
    stored = {name: x.astype(BF16) for name, x in read_folder(plain).items()}
    assert_same_tensors(stored, read_folder(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_onto_a_mesh(golden_model, tmp_path):
    """Every parameter is read into its shards, whatever devices it was written from."""
    folder, _ = golden_model
    convert(folder, tmp_path / "orbax", to="orbax")
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    abstract = abstract_model(read_config(folder))
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        model_shardings(abstract, mesh),
    )
    model = load_model_params(tmp_path / "orbax", placed)
    same_params(model, load_pretrained(folder))
    split = [x for x in jax.tree.leaves(model) if not x.sharding.is_fully_replicated]
    assert len(split) > 5
    for x, wanted in zip(jax.tree.leaves(model), jax.tree.leaves(placed), strict=True):
        assert x.sharding == wanted.sharding


def test_a_run_of_train_py(tmp_path):
    """Masters are float32; a chunk on disk holds one layer, so that it can be read layer by
    layer.
    """
    ttt = TTTConfig(layers=(3,), chunk_size=16, lr=0.25)
    model = ModelConfig(
        d_model=256, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=16, d_ff=384, ttt=ttt
    )
    config = Config(name="run", runs_dir=str(tmp_path), model=model)
    prepare_run_dir(config)
    params = jit(lambda key: Transformer(model, key=key))(jax.random.key(1))
    moments = {"count": jnp.zeros((), jnp.int32)}
    with Checkpointer(config.run_dir / "checkpoints", CheckpointConfig()) as checkpointer:
        checkpointer.save(3, model=params, opt_state=moments, data_state={})
        checkpointer.save(
            7, model=jax.tree.map(lambda x: 2 * x, params), opt_state=moments, data_state={}
        )
    for source, factor in (("run", 2), ("run/checkpoints/7", 2), ("run/checkpoints/3", 1)):
        out = tmp_path / f"hf{source.replace('/', '_')}"
        convert(tmp_path / source, out, to="hf")
        same_params(load_pretrained(out), jax.tree.map(lambda x, f=factor: f * x, params))
        assert read_config(out) == model
    assert open_source(tmp_path / "run").tensors.block_bytes == 384 * 256 * 4, (
        "one layer of an MLP weight, not three"
    )
    convert(tmp_path / "run", tmp_path / "orbax", to="orbax")
    again = load_pretrained(tmp_path / "orbax")
    assert again.tokenizer.fingerprint == "bytes-1"
    again.tokenizer = None
    same_params(again, load_pretrained(tmp_path / "hfrun"))


# ------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys
from ttt_jax.pretrained.convert import convert

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

out, shard = sys.argv[1], int(sys.argv[2])
def all_ways(source, out):
    orbax, hf, direct = out + "_o", out + "_h", out + "_d"
    for to, src, dst in (("orbax", source, orbax), ("hf", orbax, hf), ("hf", source, direct)):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts again at what is resident now
        before = status("VmRSS")
        convert(src, dst, to=to, max_shard_bytes=shard)
        yield status("VmHWM") - before

list(all_ways(out + "/tiny", out + "/t"))  # imports, thread pools
print(*all_ways(out + "/big", out + "/b"))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="measured through Linux's /proc"
)
def test_memory_is_bounded_by_a_shard(tmp_path):
    """280 MB in 40 shards: resident memory, mapped pages included, grows by less than 1.3 of the
    largest, any way.
    """
    make_folder(tmp_path / "tiny", PLAIN)
    size = {
        "hidden_size": 512,
        "intermediate_size": 1365,
        "num_hidden_layers": 24,
        "vocab_size": 4096,
    }
    make_folder(tmp_path / "big", PLAIN | size, shards=40)
    largest = max(path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors"))
    words = [sys.executable, "-c", MEASURE, str(tmp_path), str(largest)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    growth = [int(word) for word in done.stdout.split()]
    print(f"largest shard {largest / 1e6:.1f} MB; growth {[round(x / 1e6, 1) for x in growth]} MB")
    assert len(growth) == 3
    assert max(growth) < 1.3 * largest, (growth, largest)
    assert len(list((tmp_path / "b_h").glob("*.safetensors"))) >= 33
    assert_same_tensors(read_folder(tmp_path / "big"), read_folder(tmp_path / "b_h"))


# ------------------------------------------------------------------------------------- as init_from


def test_init_from_a_converted_model(golden_model, plain, tmp_path):
    folder, _ = golden_model
    cfg = read_config(folder)
    convert(folder, tmp_path / "orbax", to="orbax")
    start = initial_model(Config(model=cfg, init_from=str(tmp_path / "orbax")), abstract_model(cfg))
    same_params(start, load_pretrained(folder))
    wrong = dataclasses.replace(cfg, d_ff=81)
    with pytest.raises(ConfigError, match=r"model\.d_ff = 81"):
        initial_model(Config(model=wrong, init_from=str(tmp_path / "orbax")), abstract_model(wrong))
    # Layers that the checkpoint does not adapt group otherwise; their parameters are new, the
    # others' are the checkpoint's.
    convert(plain, tmp_path / "plain_orbax", to="orbax")
    cfg = read_config(plain)
    cfg = dataclasses.replace(cfg, ttt=TTTConfig(layers=(1,), chunk_size=8))
    from_orbax = initial_model(
        Config(model=cfg, init_from=str(tmp_path / "plain_orbax")), abstract_model(cfg)
    )
    from_hf = initial_model(Config(model=cfg, init_from=str(plain)), abstract_model(cfg))
    same_params(from_orbax, from_hf)


@pytest.mark.slow
def test_train_py_continues_from_a_converted_model(tmp_path):
    make_folder(tmp_path / "source", PLAIN | {"vocab_size": 257})
    convert(
        tmp_path / "source", tmp_path / "orbax", to="orbax", ttt={"layers": [1], "chunk_size": 16}
    )
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(
            f"In-place test-time training reads {i} and adapts.\n" * 40
        )
    model = {
        "d_model": 32,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "d_ff": 48,
        "max_positions": 512,
    }
    words = [f"--model.{name}={value}" for name, value in model.items()]
    words += [
        "--model.ttt.layers=1",
        "--model.ttt.chunk_size=16",
        f"--data.train={tmp_path / 'texts'}",
        "--data.seq_len=32",
    ]
    words += [
        "--data.batch_size=8",
        "--steps=2",
        f"--runs_dir={tmp_path / 'runs'}",
        f"--init_from={tmp_path / 'orbax'}",
        "--data.tokenizer=bytes",
    ]
    words += [
        "--data.heldout_fraction=0.5",
        "--eval.rows=2",
        "--log.tensorboard=false",
        "--name=run",
    ]
    words += ["--optimizer.warmup_steps=0", "--optimizer.lr=1e-4"]
    assert train.main(words) == 0
    assert main(["convert", str(tmp_path / "runs/run"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    before, after = read_folder(tmp_path / "source"), read_folder(tmp_path / "hf")
    assert set(after) - set(before) == {
        f"model.layers.1.mlp.ttt_{what}.weight" for what in ("conv", "proj")
    }
    for name, x in before.items():  # two steps of about 1e-4 each
        assert np.abs(after[name] - x).max() < 3e-4, name


# ------------------------------------------------------------------------------------------- verify


def test_verify_reports_what_rounding_costs(tmp_path, capsys):
    words = [
        "convert",
        str(OFFICIAL),
        str(tmp_path / "out"),
        "--to",
        "orbax",
        "--dtype",
        "bfloat16",
        "--verify",
    ]
    assert main(words) == 0
    rms = float(re.search(r"relative RMS of the logits (\S+)", capsys.readouterr().out)[1])
    assert 1e-4 < rms < 3e-2, "bfloat16 keeps 8 bits"


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.ttt_conv.weight"]
)
def test_verify_catches_a_wrong_tensor(name, tmp_path, monkeypatch, capsys):
    """Also one that acts only after an update. Exit code 1, and the old output stays."""
    folder = OFFICIAL
    convert(folder, tmp_path / "out", to="orbax")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    write = OrbaxWriter.write
    monkeypatch.setattr(
        OrbaxWriter,
        "write",
        lambda self, n, i, x: write(self, n, i, x * np.float32(1.01) if n == name else x),
    )
    words = [
        "convert",
        str(folder),
        str(tmp_path / "out"),
        "--to",
        "orbax",
        "--verify",
        "--overwrite",
    ]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "relative RMS (limit 1e-05); not written" in error
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(VerificationError):
        convert(folder, tmp_path / "new", to="orbax", verify=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ------------------------------------------------------------------------------------------- errors


def test_help(capsys):
    assert main(["convert", "--help"]) == 0
    text = capsys.readouterr().out
    assert "ttt-jax convert Qwen3-4B Qwen3-4B-orbax --to orbax --verify" in text
    assert "--ttt.layers" in text
    assert main(["convert", "a", "b", "--to", "onnx"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_paths_of_the_converted_folder_are_the_models(plain, tmp_path):
    """What docs/checkpoints.md says of the layout: Orbax's own reader sees the parameters' dotted
    paths.
    """
    import orbax.checkpoint as ocp

    convert(plain, tmp_path / "orbax", to="orbax")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.restore((tmp_path / "orbax/model").absolute())
    model = load_pretrained(plain)
    expected = {
        param_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]
    }
    assert tree.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(tree[name], x, err_msg=name)
