"""`ttt-jax convert --ttt.calibrate`: fast weights that gain on a text before any training."""

import hashlib
import json

import numpy as np
import pytest
from support.byte_models import byte_model
from support.hf_folders import read_folder
from support.models import config, hidden, make

from ttt_jax import load_pretrained, score
from ttt_jax.command.cli import main
from ttt_jax.errors import CheckpointError, ConfigError, NotFiniteError
from ttt_jax.pretrained import calibration
from ttt_jax.pretrained.calibration import (
    SCALES,
    as_target,
    newton_step,
    predicted_covariance,
)
from ttt_jax.pretrained.convert import convert

C = 8
TEXT = "the cat sat on the mat and " * 20  # 540 bytes
CHUNK = ["--ttt.chunk_size", str(C)]
PLAIN = {"num_layers": 2, "ttt.layers": ()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A plain model of 64 positions that reads bytes."""
    return byte_model(tmp_path_factory.mktemp("models") / "plain", max_positions=64, **PLAIN)


@pytest.mark.parametrize("lr", ["1e-40", "1e50"])
def test_a_rate_with_which_the_target_does_not_fit(plain, text, tmp_path, lr, capsys):
    """Before: infinity or zeros were written, and the gain of what they had been was printed."""
    assert run(plain, tmp_path, text, *CHUNK, "--ttt.lr", lr) == 2
    error = capsys.readouterr().err
    assert f"--ttt.lr {float(lr):g}: W_target would have elements of " in error
    assert "which float32 does not hold; leave it out, or give 113 or" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_records_are_no_text(tmp_path, capsys):
    """Before: W_target from the quotes and names of JSON."""
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a"}\n' * 500)
    assert run("nowhere", tmp_path, path) == 2
    assert "text.jsonl: is JSON, whose names and quotes are no text" in capsys.readouterr().err


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run(source, tmp_path, text, *words, to="hf"):
    out = tmp_path / "out"
    return main(
        ["convert", str(source), str(out), "--to", to, "--ttt.calibrate", str(text), *words]
    )


def relative_rms(x, y):
    return np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))


@pytest.mark.parametrize("tied", [True, False])
def test_the_step_is_that_of_the_full_softmax(tied):
    """Two rows of 301 tokens: more than a block of logits, and no multiple of one."""
    model = make(config(tie_embeddings=tied, **PLAIN), "float32")
    rows = np.random.default_rng(0).integers(0, 31, (2, 301))
    weight = model.embed if tied else model.head
    w_VD, g_D = (np.asarray(x[...], np.float64) for x in (weight, model.norm.scale))
    n_ND = np.asarray(hidden(model, rows.astype(np.int32))[0], np.float64).reshape(-1, 16)
    p_NV = np.exp(n_ND @ w_VD.T)
    p_NV /= p_NV.sum(1, keepdims=True)
    each_NDD = np.einsum("nv,vd,ve->nde", p_NV, w_VD, w_VD)
    e_ND = p_NV @ w_VD
    expected_DD = np.mean(each_NDD - e_ND[:, :, None] * e_ND[:, None], axis=0)
    found_DD = predicted_covariance(model, list(rows))
    assert relative_rms(found_DD, expected_DD) < 1e-5
    m = np.trace(expected_DD) / 16
    step_DD = np.linalg.inv(expected_DD + 0.3 * m * np.eye(16)) @ np.diag(1 / g_D)
    assert relative_rms(newton_step(found_DD, g_D), step_DD) < 1e-5
    target_DD, rate = as_target(step_DD, 0.4)
    np.testing.assert_allclose(rate * target_DD, 0.4 * step_DD, rtol=1e-12)
    assert 0.0495 < np.sqrt(np.mean(target_DD**2)) < 0.0505


def test_a_step_that_is_not_finite_is_refused():
    with pytest.raises(NotFiniteError, match="predictions on the text are not finite"):
        newton_step(np.full((2, 2), np.nan), np.ones(2))
    for covariance_DD, g_D in ((np.eye(2), np.array([1.0, 0.0])), (np.zeros((2, 2)), np.ones(2))):
        with pytest.raises(CheckpointError, match="final norm has zeros, or its output weight"):
            newton_step(covariance_DD, g_D)


@pytest.mark.parametrize(
    ("lr", "piece", "statistics", "word"),
    [(None, 64, 360, None), (2.5, 24, 352, "100"), (2.5, 64, 360, "null")],
)
def test_the_folder_gains_what_is_printed(
    plain, text, tmp_path, lr, piece, statistics, word, capsys, monkeypatch
):
    """Rows of 64 tokens, all that the model has positions for, from the last third of the text; in
    one piece, and in three of which the last is shorter.
    """
    monkeypatch.setattr(calibration, "PIECE", piece)
    words = CHUNK if lr is None else [*CHUNK, "--ttt.lr", str(lr), "--ttt.read_cap", word]
    cap, least = {None: (0.06, 0.05), "100": (100, 0.3), "null": (None, 0.3)}[word]
    assert run(plain, tmp_path, text, *words) == 0
    out = capsys.readouterr().out
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    found = raw["ttt_calibration"]
    assert found["text_sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert (found["choice"], found["row"], found["statistics"]) == (128, 64, statistics)
    model = load_pretrained(tmp_path / "out")
    ttt = model.config.ttt
    assert (ttt.layers, ttt.target, ttt.write) == ((1,), "prediction_error", "ridge")
    assert (ttt.decay, ttt.chunk_size, ttt.normalize_source) == (0.95, C, False)
    assert lr is None or ttt.lr == lr
    line = "target prediction_error, write ridge, decay 0.95, normalize_source false, chunk_size 8"
    assert f"ttt: layers [1], {line}, read_cap {ttt.read_cap}, lr {ttt.lr:g}\n" in out
    assert ttt.read_cap == cap
    *_, note = lines = out.splitlines()
    assert [f"{s:g}" for s in SCALES] == [row.split()[0] for row in lines[-5:-1]]
    assert note.startswith("note: the text has 540 tokens, and up to 24,576 are used; with a lon")
    told = f"on 128 of its end, 2 rows of 64 (loss {found['loss']:.4f} without), and one standard"
    assert f"{told} error over their 16 chunks:\n" in out
    (taken,) = (row for row in lines if row.endswith("  taken"))
    gain, error = (float(x) for x in taken.split()[1:4:2])
    assert gain == round(found["gain"], 4)
    ids = model.tokenizer.encode(TEXT)[-176:][:128]
    rows = [np.asarray(ids[:64]), np.asarray(ids[64:])]
    on_RT, off_RT = (-np.asarray(score(model, rows, ttt=ttt)[0], float) for ttt in (True, False))
    on, off = np.mean(on_RT), np.mean(off_RT)
    each = [x.mean() for row in off_RT - on_RT for x in np.split(row, range(C, 64, C))]
    assert abs(np.std(each, ddof=1) / 4 - error) < 1e-4
    assert abs((off - on) - found["gain"]) < 2e-5
    assert abs(off - found["loss"]) < 2e-5
    assert found["gain"] > least
    before, after = read_folder(plain), read_folder(tmp_path / "out")
    for name, x in before.items():
        np.testing.assert_array_equal(after[name], x)
    conv_D1K = after["model.layers.1.mlp.ttt_conv.weight"]
    np.testing.assert_array_equal(conv_D1K, np.broadcast_to([0, 0, 0, 1, 0], conv_D1K.shape))


@pytest.mark.parametrize(
    ("content", "words", "told"),
    [
        (TEXT[:39], CHUNK, "the text has 39 tokens and needs 40, five chunks of 8"),
        (
            TEXT,
            [*CHUNK, "--ttt.target", "input_embed"],
            "--ttt.target input_embed: --ttt.calibrate",
        ),
        (TEXT, [*CHUNK, "--ttt.layers", "0"], "--ttt.layers [0]: --ttt.calibrate sets layers to"),
        (TEXT, [*CHUNK, "--ttt.proj", "false"], "--ttt.proj False: "),
        (TEXT, [*CHUNK, "--ttt.lr", "0"], "--ttt.lr 0.0: "),
        (TEXT, [*CHUNK, "--verify"], "--verify: --ttt.calibrate changes what the model computes"),
        (TEXT, ["--ttt.chunk_size", "22"], "64 positions; give --ttt.chunk_size 21 or less"),
        # No token comes back.
        ("".join(map(chr, range(40, 80))), CHUNK, "nothing gains on the last 24 tokens"),
        ("\udcff" * 600, CHUNK, "not UTF-8 at byte 0"),
    ],
)
def test_a_refusal_is_one_line_and_writes_nothing(plain, tmp_path, content, words, told, capsys):
    path = tmp_path / "text.txt"
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert run(plain, tmp_path, path, *words) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["text.txt"]


def test_models_that_cannot_be_calibrated_are_refused(plain, text, tmp_path, capsys):
    assert run(plain, tmp_path, text, *CHUNK, to="orbax") == 2
    assert "--to orbax: --ttt.calibrate writes --to hf" in capsys.readouterr().err
    adapts = byte_model(tmp_path / "adapts")
    assert run(adapts, tmp_path, text) == 2
    assert "has TTT layers already, [0]; start from the plain" in capsys.readouterr().err
    mute = byte_model(tmp_path / "mute", **PLAIN)
    (mute / "tokenizer.json").unlink()
    assert run(mute, tmp_path, text, *CHUNK) == 2
    assert "the folder holds no tokenizer.json" in capsys.readouterr().err
    with pytest.raises(
        ConfigError, match=r"--ttt\.write sum: --ttt\.calibrate sets write to ridge"
    ):
        convert(plain, tmp_path / "out", to="hf", text=TEXT, ttt={"write": "sum"})
    assert not (tmp_path / "out").exists()
