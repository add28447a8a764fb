"""A run from a checkpoint: what comes from it, what a user changes, and what a run remembers."""

import dataclasses
import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import jax
import pytest
from support.fuzzing import SMALL
from support.hf_folders import make_folder
from support.tokenizers import write_tokenizer

from ttt_jax.config import (
    Config,
    MeshConfig,
    dump_yaml,
    load_config,
    preset_names,
    read_written,
    replace,
)
from ttt_jax.config.suggest import suggested_chunk, suggested_row
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.pretrained.convert import convert
from ttt_jax.pretrained.hf_config import read_config
from ttt_jax.pretrained.hub import model_folder
from ttt_jax.pretrained.load import training_tokenizer
from ttt_jax.pretrained.start_config import config_to_show, load_start, load_start_config
from ttt_jax.run.folder import prepare_run_dir
from ttt_jax.training.step import abstract_state
from ttt_jax.training.step_memory import settled_remat

TTT = SMALL | {"vocab_size": 300, "max_position_embeddings": 100, "num_hidden_layers": 8}
PLAIN = {name: value for name, value in TTT.items() if not name.startswith("ttt_")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders of each kind: `plain` has no TTT layers, the others hold the same model with one."""
    root = tmp_path_factory.mktemp("sources")
    for name, raw in (("plain", PLAIN), ("hf", TTT)):
        make_folder(root / name, raw)
        write_tokenizer(root / name)
    convert(root / "hf", root / "orbax", to="orbax")
    run = Config(name="run", runs_dir=str(root), model=read_config(root / "hf"))
    prepare_run_dir(run)
    return root


def words(source, *more):
    return [f"--init_from={source}", "--data.train=book.txt", *more]


@pytest.mark.parametrize("kind", ["hf", "orbax", "run"])
def test_the_model_is_that_of_the_checkpoint(sources, kind, monkeypatch):
    monkeypatch.chdir(sources)
    start = load_start(None, words(kind))
    assert start.config.model == read_config(sources / "hf")
    assert not start.open_rate
    assert start.config.data.tokenizer == ("bytes" if kind == "run" else kind)
    assert start.config.name == "continual"
    assert start.config.data.seq_len == 100  # whole chunks of 4, as many as it has positions for


def test_a_plain_model_gets_layers_and_chunks(sources):
    start = load_start(None, words(sources / "plain"))
    model, found = start.config.model, read_config(sources / "plain")
    assert dataclasses.replace(model, ttt=found.ttt) == found
    assert (model.ttt.layers, model.ttt.chunk_size, model.ttt.write) == ((0, 6), 16, "sum")
    assert (model.ttt.normalize_source, model.ttt.target) == (True, "hidden_states")
    assert start.open_rate
    assert start.config.data.seq_len == 96


def test_only_what_is_written_differs(sources):
    more = ["--model.ttt.lr=0.5", "--model.max_positions=256", "--model.ttt.layers=1,2"]
    start = load_start(None, words(sources / "plain", *more))
    assert not start.open_rate
    plain = load_start(None, words(sources / "plain")).config
    changes = {"model.ttt.lr": 0.5, "model.max_positions": 256, "model.ttt.layers": [1, 2]}
    changes |= {"data.seq_len": 256}  # follows from them
    assert start.config == replace(plain, changes)
    off = load_start(None, words(sources / "plain", "--model.ttt.layers=[]"))
    assert (off.open_rate, off.config.model.ttt.layers) == (False, ())
    mesh = make_mesh(MeshConfig())
    abstract_state(settled_remat(off.config, mesh), mesh)  # groups for TTT layers are no error
    ridge = load_start(None, words(sources / "plain", "--model.ttt.write=ridge"))
    assert (ridge.open_rate, ridge.config.model.ttt.lr) == (False, 1.0)


def test_auto_is_a_word_for_the_rate_too(sources):
    assert load_start(None, words(sources / "plain", "--model.ttt.lr=auto")).open_rate
    ridge = ["--model.ttt.lr=auto", "--model.ttt.write=ridge"]
    start = load_start(None, words(sources / "hf", *ridge))
    assert (start.open_rate, start.config.model.ttt.lr) == (False, 1.0)
    normalised = ["--model.ttt.lr=auto", "--model.ttt.normalize_source=yes"]
    assert load_start(None, words(sources / "hf", *normalised)).open_rate


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.d_model=16"], "model.d_model = 16: "),
        (["--model.max_positions=50"], "model.max_positions = 50: "),
        (["--model.ttt.write=spectral"], "spectral: was taken out"),
        (["--model.ttt.normalize_source=no"], "model.ttt.normalize_source = false; give"),
        (["--data.seq_len=97"], "data.seq_len = 97: packed rows hold whole chunks"),
        (["--data.seq_len=many"], "data.seq_len = many: "),
        (["--model.ttt.layers=some"], "model.ttt.layers"),
        (["--steps=0"], "steps = 0"),
    ],
)
def test_what_does_not_fit_is_one_line(sources, more, message):
    with pytest.raises(ConfigError) as caught:
        load_start(None, words(sources / "plain", *more))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["/no/such/folder", "nothing", "a/b/c", "../x", "CHECKPOINT"])
def test_a_missing_source_is_one_line(source, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match=r"field init_from = .*: no such folder; give"):
        load_start(None, words(source))


def test_a_preset_for_another_model_is_refused(sources):
    with pytest.raises(
        ConfigError, match=r"model\.\w+ = .*; set model\.\w+ to .*, or leave it out"
    ):
        load_start("default", words(sources / "plain"))


def test_a_run_that_has_begun_needs_no_checkpoint(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sources / "plain", tmp_path / "source")
    first = load_start(None, words("source", "--steps=5")).config
    begun = replace(first, {"model.ttt.lr": 0.125})  # as measured
    prepare_run_dir(begun)
    shutil.rmtree(tmp_path / "source")
    again = load_start(None, words("source", "--steps=5"))
    assert again == (begun, False, (), None)
    auto = load_start(None, words("source", "--steps=5", "--model.ttt.lr=auto"))
    assert auto == (begun, False, (), None)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_start(None, words("source", "--name=other"))
    # Moved: the folder itself says where it is.
    shutil.move("runs/continual", "moved")
    moved = load_start("moved", []).config
    assert moved.run_dir.absolute() == tmp_path / "moved"
    assert replace(moved, {"runs_dir": "runs", "name": "continual"}) == begun


def test_a_preset_needs_no_checkpoint_for_a_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_start_config("qwen3_1p7b").model.d_model == 2048
    second = load_start_config("qwen3_4b_longct_128k").model  # starts from the first stage's run
    assert (second.num_layers, second.rope.kind, second.ttt.chunk_size) == (36, "yarn", 4096)
    with pytest.raises(ConfigError, match="its model is not read here"):
        load_config("qwen3_1p7b")
    assert config_to_show("qwen3_1p7b") == load_start_config("qwen3_1p7b")
    assert config_to_show("continual").optimizer.lr == 1e-5


def test_suggestions_are_whole_chunks():
    for T in (96, 100, 2048, 4096, 32768, 65536, 1000):
        C = suggested_chunk(T)
        assert C == 16 or (T % C == 0 and C <= T // 16)
    assert [suggested_chunk(T) for T in (2048, 4096, 65536)] == [128, 256, 4096]
    assert suggested_chunk(65536, shards=32) == 2048
    assert [suggested_row(n, None) for n in (131072, 2048, 100, 7)] == [4096, 2048, 96, 7]
    assert [suggested_row(n, 4096) for n in (131072, 10000, 100)] == [16384, 8192, 100]


# -------------------------------------------------------------------------------------------- CPUs

# The shapes of SmolLM2-135M; its config is read here, and no weights.
LARGE = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


@pytest.fixture
def large(tmp_path, monkeypatch):
    """An empty folder with a checkpoint whose steps a CPU cannot do in seconds."""
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path / "large")
    (tmp_path / "large" / "config.json").write_text(json.dumps(LARGE))
    return "large"


def shape(start):
    """Rows, tokens of a row, tokens of a chunk, held-out rows."""
    data, ttt = start.config.data, start.config.model.ttt
    return data.batch_size, data.seq_len, ttt.chunk_size, start.config.eval.rows


def test_steps_on_a_cpu_are_small_and_the_differences_are_said(large, monkeypatch):
    start = load_start(None, words(large))
    assert shape(start) == (4, 4096, 256, 16)
    assert shape(start.on_cpu) == (1, 512, 32, 8)
    assert start.remarks == ()
    (line,) = start.on_cpu.remarks
    assert line == (
        "init_from large: jax finds a CPU only, so steps are small: model.ttt.chunk_size 32 "
        "(elsewhere 256), data.seq_len 512 (elsewhere 4096), data.batch_size 1 (elsewhere 4), "
        "eval.rows 8 (elsewhere 16); what you set stays"
    )
    same = {"model.ttt.chunk_size": 256, "data.seq_len": 4096, "data.batch_size": 4}
    assert replace(start.on_cpu.config, same | {"eval.rows": 16}) == start.config
    assert start.here() == start.on_cpu
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert start.here() is start
    monkeypatch.undo()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert start.here() is start


@pytest.mark.parametrize(
    ("more", "want"),
    [
        (["--data.batch_size=4"], (4, 512, 32, 8)),
        (["--data.seq_len=2048"], (1, 2048, 128, 8)),
        (["--data.seq_len=4096", "--data.batch_size=2"], None),
        (["--eval.rows=3"], (1, 512, 32, 3)),
        (["--optimizer.accumulate=2"], (2, 512, 32, 8)),
        (["--optimizer.accumulate=4"], (4, 512, 32, 8)),
        (["--model.ttt.chunk_size=512"], (1, 2048, 512, 8)),  # a few chunks in a row
        (["--model.max_positions=8192"], (1, 512, 32, 8)),
    ],
)
def test_what_a_user_sets_counts_on_a_cpu_too(large, more, want):
    on_cpu = load_start(None, words(large, *more)).on_cpu
    assert want == (on_cpu and shape(on_cpu))


def test_rows_become_fewer_before_they_become_shorter(large):
    """The same shapes with a tenth of the words and two layers."""
    small = LARGE | {"vocab_size": 4915, "num_hidden_layers": 2}
    Path(large, "config.json").write_text(json.dumps(small))
    assert shape(load_start(None, words(large)).on_cpu) == (1, 4096, 256, 8)


def test_a_small_model_and_other_configs_are_the_same_on_a_cpu(sources, large, tmp_path):
    assert load_start(None, words(sources / "plain")).on_cpu is None
    assert load_start("qwen3_0p6b", words(large)).on_cpu is None
    (tmp_path / "mine.yaml").write_text("name: mine")
    assert load_start("mine.yaml", words(large)).on_cpu is None
    assert load_start_config("continual", words(large)).data.batch_size == 4


def test_a_run_goes_on_with_its_rows_on_other_devices(large):
    begun = load_start(None, words(large)).here().config
    prepare_run_dir(begun)
    assert load_start(None, words(large)) == (begun, False, (), None)
    more = load_start(None, words(large, "--data.batch_size=2")).config
    assert more == replace(begun, {"data.batch_size": 2})  # refused when the folder is checked


# ---------------------------------------------------------------------------- presets, shorter runs


@pytest.mark.parametrize("preset", [name for name in preset_names() if name != "continual"])
def test_presets_run_with_two_steps(preset):
    assert load_start_config(preset, ["--steps=2"]).optimizer.warmup(2) < 2
    if load_start_config(preset).init_from is None:
        yields = read_written(preset).preset["optimizer"].get("warmup_steps") is not None
        assert bool(load_start(preset, ["--steps=2"]).remarks) == yields
        assert not load_start(preset, []).remarks


def test_a_preset_s_warm_up_yields_and_a_user_s_does_not(tmp_path):
    def warmup(*overrides, path="books"):
        optimizer = load_config(path, overrides).optimizer
        return optimizer.warmup(load_config(path, overrides).steps)

    assert warmup() == warmup("--steps=300") == warmup("--steps=41") == 40
    assert [warmup(f"--steps={n}") for n in (2, 40)] == [0, 1]
    (line,) = load_start("books", ["--steps=40"]).remarks
    assert line.startswith("the preset's optimizer.warmup_steps = 40 is not shorter than the run")
    assert warmup("--steps=20", "--optimizer.warmup_ratio=0.5") == 10
    assert warmup("--optimizer.warmup_ratio=0.5") == 200  # of 400
    (line,) = load_start("books", ["--optimizer.warmup_ratio=0.5"]).remarks
    assert line.startswith("the preset's optimizer.warmup_steps = 40 yields to your ratio")
    assert warmup("--optimizer.warmup_ratio=0.5", "--optimizer.warmup_steps=7") == 7
    assert warmup("--steps=20", "--optimizer.warmup_steps=19") == 19
    for steps in ("--steps=20", "--steps=400"):
        with pytest.raises(ConfigError, match=r"warmup_steps = 500: must be below steps"):
            warmup(steps, "--optimizer.warmup_steps=500")
    mine = tmp_path / "mine.yaml"
    mine.write_text(dump_yaml(load_config("books")))
    with pytest.raises(ConfigError, match=r"optimizer\.warmup_steps = 40: must be below steps = 2"):
        warmup("--steps=2", path=mine)


@pytest.mark.parametrize(("T", "C", "said"), [(64, 64, True), (64, 128, True), (128, 64, False)])
def test_rows_of_one_chunk_are_said_to_train_without_ttt(T, C, said):
    """Nothing that the only chunk of a row writes is read."""
    more = [f"--data.seq_len={T}", f"--model.ttt.chunk_size={C}", "--data.pack=false"]
    remarks = load_start("default", more).remarks
    assert bool(remarks) == said
    if said:
        assert f"data.seq_len = {T} holds one chunk of model.ttt.chunk_size = {C}" in remarks[0]
    assert not load_start("default", [*more, "--model.ttt.layers=[]"]).remarks


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--optimizer.decay_ratio=0.5"], "optimizer.decay_ratio = 0.5: has no effect with "
         "optimizer.schedule = cosine"),
        (["--optimizer.schedule=constant", "--optimizer.final_lr_ratio=0.5"],
         "optimizer.final_lr_ratio = 0.5: has no effect with optimizer.schedule = constant"),
        (["--sample.tokens=9"], "sample.tokens = 9: has no effect with sample.every = 0"),
        (["--data.heldout=b.txt", "--data.heldout_fraction=0.5"],
         "data.heldout_fraction = 0.5: has no effect with data.heldout = "),
        (["--optimizer.decay_ratio=0.5", "--optimizer.schedule=wsd"], None),
        (["--optimizer.decay_ratio=0.2"], None),  # as it is anyway
        (["--sample.tokens=9", "--sample.every=3"], None),
    ],
)  # fmt: skip
def test_what_a_user_writes_for_nothing_is_said(words, line):
    remarks = load_start("default", words).remarks
    assert len(remarks) == (line is not None)
    assert all(remark.startswith(f"config field {line}") for remark in remarks)


def test_auto_is_every_sixth_layer():
    small = ["--model.ttt.layers=auto", "--model.ttt.chunk_size=64"]
    assert load_config(None, small).model.ttt.layers == (0,)
    config = load_config("500m", ["--model.ttt.layers", "auto", "--model.num_layers=13"])
    assert config.model.ttt.layers == (0, 6, 12)
    with pytest.raises(ConfigError, match="num_layers = many"):
        load_config(None, [*small, "--model.num_layers=many"])
    assert read_written(None).get("model.ttt.layers") is None


# ------------------------------------------------------------------------------------------ the Hub


@pytest.fixture
def hub(sources, tmp_path, monkeypatch):
    """A cache of the Hub that holds `org/model`, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "hub" / "models--org--model"
    shutil.copytree(sources / "plain", folder / "snapshots" / ("0" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    return folder / "snapshots" / ("0" * 40)


def test_a_model_of_the_hub_comes_from_its_cache(hub, sources):
    config = load_start(None, words("org/model")).config
    assert config.model == load_start(None, words(sources / "plain")).config.model
    assert (config.init_from, config.data.tokenizer) == ("org/model", "org/model")
    assert training_tokenizer(config) == str(hub)
    assert model_folder("org/model", "field", weights=True) == hub


def test_what_the_hub_does_not_give_is_one_line(hub):
    with pytest.raises(CheckpointError) as caught:
        load_start(None, words("org/other"))
    line = str(caught.value)
    assert line.startswith(
        "config field init_from = 'org/other': no such folder; the Hub cannot be"
    )
    assert "\n" not in line
