"""A memory in other engines: our logits with a frozen memory, those of the merged folder in
transformers, and those of the adapter through peft are the same.

    pip install torch transformers peft      # optional; what needs them is skipped without
"""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.adapters import TTT
from support.hf_folders import make_folder, read_folder
from support.tolerance import relative_rms

from ttt_jax import Session, load_pretrained, score
from ttt_jax.data.tokenizer import load_tokenizer
from ttt_jax.errors import CheckpointError, UserError
from ttt_jax.memory.lora import write_lora
from ttt_jax.memory.memory import Memory
from ttt_jax.memory.merge import merge
from ttt_jax.pretrained.fingerprint import weights_fingerprint
from ttt_jax.pretrained.source import open_source

pytestmark = pytest.mark.usefixtures("usual_promotion")
FAMILIES = {
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": 8},
}
IDS = np.random.default_rng(0).integers(0, 97, (2, 40)).astype(np.int32)


def memory_of(folder):
    session = Session(load_pretrained(folder))
    session.read([IDS[0]])
    memory = session.memory(name="x")
    return memory * (0.3 / max(np.linalg.norm(memory.dW(i)) / memory.slow_norms[i] for i in (0, 2)))


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    make_folder(tmp_path / "model", FAMILIES[request.param] | TTT)
    return tmp_path / "model"


def test_the_merged_folder_is_the_model_with_the_memory(folder, tmp_path):
    """As we read it ourselves: no TTT is left, and everything else is as it was."""
    memory = memory_of(folder)
    found = merge(open_source(folder), memory, tmp_path / "merged")
    raw = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert not [name for name in raw if name.startswith("ttt_")]
    before, after = read_folder(folder), read_folder(tmp_path / "merged")
    assert set(after) == {name for name in before if ".ttt_" not in name}
    for name, x in after.items():
        exact = before[name].astype(np.float64)
        layer = int(name.split(".")[2]) if "down_proj" in name else None
        if layer in (0, 2):
            exact = exact + memory.dW(layer)
        np.testing.assert_array_equal(x, exact.astype(np.float32))
    expected = score(load_pretrained(folder), IDS, ttt=False, memory=memory, logits=True)
    merged = load_pretrained(tmp_path / "merged")
    got = score(merged, IDS, ttt=False, logits=True)
    assert relative_rms(got.logits_BTV, expected.logits_BTV) < 1e-5
    without = score(load_pretrained(folder), IDS, ttt=False, logits=True)
    assert relative_rms(got.logits_BTV, without.logits_BTV) > 1e-2
    assert [about.layer for about in found] == [0, 2]
    assert all(about.lost < 1e-6 for about in found)
    for about in found:
        ratio = np.linalg.norm(memory.dW(about.layer)) / memory.slow_norms[about.layer]
        assert about.ratio == pytest.approx(ratio, rel=1e-5)


def test_a_model_that_reads_bytes_has_a_tokenizer_for_other_engines(tmp_path):
    """Runs of bytes hold no tokenizer.json; a folder for other engines does, as converted ones."""
    make_folder(tmp_path / "model", FAMILIES["qwen3"] | TTT | {"vocab_size": 257})
    source = dataclasses.replace(open_source(tmp_path / "model"), tokenizer="bytes")
    merge(source, None, tmp_path / "base")
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    assert tokenizer.encode("Aé") == list("Aé".encode())
    assert tokenizer.eos_id == 256


def test_rounding_is_said_and_what_does_not_fit_is_refused(tmp_path):
    make_folder(tmp_path / "model", FAMILIES["qwen3"] | TTT)
    memory = memory_of(tmp_path / "model")
    source = open_source(tmp_path / "model")
    found = merge(source, memory, tmp_path / "half", dtype="bfloat16", max_shard_bytes=1)
    stored = read_folder(tmp_path / "half")
    before = read_folder(tmp_path / "model")
    for about in found:
        name = f"model.layers.{about.layer}.mlp.down_proj.weight"
        assert stored[name].dtype == jnp.bfloat16
        dW = memory.dW(about.layer).astype(np.float64)
        lost = stored[name].astype(np.float64) - before[name].astype(np.float64) - dW
        assert about.lost == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(dW), rel=1e-6)
        assert 1e-3 < about.lost < 0.1
    tiny = merge(source, 1e-3 * memory, tmp_path / "tiny", dtype="bfloat16")
    assert tiny[0].lost > 100 * found[0].lost
    with pytest.raises(CheckpointError, match="exists already"):
        merge(source, memory, tmp_path / "half")
    make_folder(tmp_path / "other", FAMILIES["llama"] | TTT)
    with pytest.raises(UserError, match=r"memory: was not read by .*other; give the model"):
        merge(open_source(tmp_path / "other"), memory, tmp_path / "out")
    huge = lambda stored: stored["model.norm.weight"].fill(3.4e38)  # infinite in bfloat16
    make_folder(tmp_path / "huge", FAMILIES["llama"] | TTT, change=huge)
    of_huge = weights_fingerprint(load_pretrained(tmp_path / "huge"))
    none = Memory(of_huge, 32, 48, {0: 1.0, 2: 1.0}, ())
    merge(open_source(tmp_path / "huge"), none, tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"tensor model.norm.weight does not fit into bfloat"):
        merge(open_source(tmp_path / "huge"), none, tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_the_best_of_its_rank(tmp_path):
    make_folder(tmp_path / "model", FAMILIES["llama"] | TTT)
    memory = memory_of(tmp_path / "model")
    found = write_lora(memory, tmp_path / "adapter", rank=3, base="some/model")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["layers_to_transform"]) == (3, 3, [0, 2])
    assert config["base_model_name_or_path"] == "some/model"
    modes = {path.stat().st_mode for path in (tmp_path / "adapter").iterdir()}
    assert len(modes) == 1, "whoever may read the config may read the weights"
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 4
    for kept in found:
        module = f"base_model.model.model.layers.{kept.layer}.mlp.down_proj"
        A, B = (tensors[f"{module}.lora_{name}.weight"] for name in "AB")
        assert (A.shape, B.shape) == ((3, 48), (32, 3))
        exact = memory.dW(kept.layer).astype(np.float64)
        values = np.linalg.svd(exact, compute_uv=False)
        best = np.sqrt((values[3:] ** 2).sum() / (values**2).sum())
        assert np.linalg.norm(B @ A - exact) / np.linalg.norm(exact) == pytest.approx(
            best, rel=1e-4
        )
        assert kept.error == pytest.approx(best, rel=1e-4)
    (half,) = {
        x.dtype
        for x in load_half(
            write_lora(memory, tmp_path / "half", rank=32, dtype="bfloat16"), tmp_path
        )
    }
    assert half == jnp.bfloat16
    (tmp_path / "nowhere").symlink_to("gone")
    for taken in ("adapter", "nowhere"):
        with pytest.raises(CheckpointError, match="exists already"):
            write_lora(memory, tmp_path / taken, rank=3)
    with pytest.raises(UserError, match="rank 33: must be from 1 to 32"):
        write_lora(memory, tmp_path / "none", rank=33)
    assert not (tmp_path / "none").exists()


def load_half(kept, folder):
    assert all(1e-4 < about.error < 1e-2 for about in kept)
    return load_file(folder / "half" / "adapter_model.safetensors").values()


# ------------------------------------------------------------------------------------------ engines


@pytest.mark.filterwarnings("ignore")  # of torch, transformers and peft
def test_three_engines_agree(folder, tmp_path):
    torch = pytest.importorskip("torch", reason="pip install torch transformers peft")
    transformers = pytest.importorskip("transformers", reason="pip install torch transformers peft")
    peft = pytest.importorskip("peft", reason="pip install torch transformers peft")
    memory = memory_of(folder)
    model = load_pretrained(folder)
    expected = score(model, IDS, ttt=False, memory=memory, logits=True).logits_BTV
    merge(open_source(folder), memory, tmp_path / "merged")
    merge(open_source(folder), memory - memory, tmp_path / "base")
    write_lora(memory, tmp_path / "adapter", rank=min(memory.D, memory.F))
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    load = transformers.AutoModelForCausalLM.from_pretrained

    def logits(engine):
        with torch.no_grad():
            return engine.eval()(torch.from_numpy(IDS).long()).logits.numpy()

    assert relative_rms(logits(load(tmp_path / "merged", **options)), expected) < 1e-4
    adapted = peft.PeftModel.from_pretrained(
        load(tmp_path / "base", **options), tmp_path / "adapter"
    )
    assert relative_rms(logits(adapted), expected) < 1e-4
    # Also on the folder that still has TTT's tensors, which transformers leaves out.
    adapted = peft.PeftModel.from_pretrained(load(folder, **options), tmp_path / "adapter")
    assert relative_rms(logits(adapted), expected) < 1e-4
    assert relative_rms(logits(load(tmp_path / "base", **options)), expected) > 1e-2
    wrapped = {name for name, _ in adapted.named_modules() if name.endswith("down_proj.lora_A")}
    assert wrapped == {f"base_model.model.model.layers.{i}.mlp.down_proj.lora_A" for i in (0, 2)}
