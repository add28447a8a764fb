"""The probe's numbers against a plain computation, on one device and on a mesh; the timer; the page
of a run.
"""

import json
import re
import shutil
import subprocess
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.config import Config, dump_yaml, replace
from ttt_jax.errors import CheckpointError
from ttt_jax.ops import update_cosine
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.parallel.shard_mapped import Parallel
from ttt_jax.run.metrics import MetricsLogger
from ttt_jax.run.page import write_page
from ttt_jax.run.provenance import write_environment
from ttt_jax.run.timing import StepTimer, host_memory_bytes
from ttt_jax.training.heldout import make_probe


def oracle(z_BTF, v_BTD, C, ids_BT=None):
    """Mean cosine of successive updates of row 0, chunk by chunk in float64."""
    deltas = []
    for i in range(z_BTF.shape[1] // C):
        piece = slice(i * C, (i + 1) * C)
        whole = ids_BT is None or (
            (ids_BT[0, piece] == ids_BT[0, i * C]).all() and ids_BT[0, i * C] != 0
        )
        deltas.append(np.float64(v_BTD[0, piece]).T @ np.float64(z_BTF[0, piece]) * whole)
    norms = [np.linalg.norm(d) for d in deltas]
    pairs = [
        (a * b).sum() / m / n
        for a, b, m, n in zip(deltas, deltas[1:], norms, norms[1:], strict=False)
        if m * n > 0
    ]
    return np.mean(pairs) if pairs else 0.0


def arrays(T=22, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, T, 6)).astype(np.float32), rng.standard_normal((2, T, 4)).astype(
        np.float32
    )


@pytest.mark.parametrize("T", [3, 4, 8, 22])
def test_update_cosine(T):
    z, v = arrays(T)
    np.testing.assert_allclose(update_cosine(z, v, 4), oracle(z, v, 4), rtol=1e-5)


def test_update_cosine_of_padding_and_of_equal_chunks():
    z, v = arrays(20)
    ids = np.array([[1] * 10 + [0] * 2 + [2] * 8] * 2)
    np.testing.assert_allclose(update_cosine(z, v, 4, ids), oracle(z, v, 4, ids), rtol=1e-5)
    same = lambda x: np.concatenate([x[:, :4]] * 5, axis=1)
    np.testing.assert_allclose(update_cosine(same(z), same(v), 4), 1.0, rtol=1e-6)
    assert update_cosine(z, np.zeros_like(v), 4) == 0.0


def test_update_cosine_on_a_mesh():
    """Devices that split F give the same; those that split rows or tokens give the mean of what
    each one has.
    """
    z, v = arrays(16)
    mesh = make_mesh(replace(Config(), {"mesh.tensor": 2, "mesh.context": 2, "mesh.fsdp": 2}).mesh)
    with jax.set_mesh(mesh):
        got = jax.jit(lambda z, v: Parallel(mesh).update_cosine(z, v, 4))(
            jnp.asarray(z), jnp.asarray(v)
        )
    want = np.mean(
        [
            oracle(z[row:, half], v[row:, half], 4)
            for row in (0, 1)
            for half in (slice(8), slice(8, 16))
        ]
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_probe_weighs_tokens_and_ignores_padding():
    rows = {
        name: np.zeros((3, 4), np.int32) for name in ("ids", "targets", "segment_ids", "positions")
    }
    rows["weights"] = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], np.float32)
    seen = []

    def position_nll(model, batch, scale):
        seen.append(batch["ids"].shape)
        nll = jnp.array([[1.0, 2.0, jnp.nan, 9.0], [3.0, jnp.inf, 0, 0]]) + (1 - scale)
        return nll, {"layer_01/update_cosine": jnp.float32(0.5)}

    probe = make_probe(
        position_nll,
        rows,
        make_mesh(replace(Config(), {"mesh.fsdp": 1}).mesh, jax.devices()[:1]),
        2,
    )
    found = probe(None)
    assert found == {
        "probe/ttt_off": 3.0,
        "probe/ttt_on": 2.0,
        "probe/gain": 1.0,
        "probe/layer_01/update_cosine": 0.5,
    }
    assert seen == [(2, 4)] * 2  # the first two rows


def test_the_timer_counts_only_what_the_device_waits_for():
    timer = StepTimer()
    result = SimpleNamespace(is_ready=lambda: ready)
    slow = lambda: time.sleep(0.03)
    ready = True
    timer.fetch(slow)
    timer.dispatched(result)
    first = timer.scalars()
    assert first["time/to_first_step"] >= 0.03
    assert first["time/input_wait"] > 0.5
    timer.fetch(slow)
    assert 0.5 < timer.scalars()["time/input_wait"] <= 1
    ready = False  # the device was busy all the while
    timer.fetch(slow)
    assert timer.scalars() == {"time/input_wait": 0.0}
    assert timer.save(slow)["time/checkpoint"] >= 0.03
    assert 10_000_000 < host_memory_bytes() < 1 << 40


# --------------------------------------------------------------------------------------------- page


@pytest.fixture
def run(tmp_path):
    """A run folder as train.py leaves it, with hostile texts in it."""
    folder = tmp_path / "demo"
    folder.mkdir()
    config = replace(Config(), {"name": "demo", "log.tensorboard": False})
    (folder / "config.yaml").write_text(dump_yaml(config))
    with MetricsLogger(config, folder, total_steps=60, start_step=0) as logger:
        for step in range(1, 61):
            row = {
                "loss": 6 / step,
                "grad_norm": 1.0,
                "tokens_per_second": 100.0 + step,
                "time/input_wait": 0.01,
            }
            row |= {f"ttt/layer_{i:02d}/state_ratio": 0.1 * i + step / 100 for i in (1, 3)}
            if step % 20 == 0:
                row |= {
                    "probe/ttt_on": 5 / step,
                    "probe/ttt_off": 5.5 / step,
                    "probe/gain": 0.5 / step,
                }
                row |= {"probe/layer_01/update_cosine": 0.5}
            logger.log(step, row)
            if step % 30 == 0:
                logger.log(step, {"time/checkpoint": 0.1})
    bad = {
        "path": "a.jsonl",
        "line": 3,
        "kind": "not JSON",
        "reason": "is not JSON",
        "excerpt": "<script>alert(1)</script>",
    }
    (folder / "quarantine.jsonl").write_text(json.dumps({"field": "data.train", **bad}) + "\n{cut")
    event = {"time": "now", "step": 7, "kind": "warning", "text": "<img src=x>"}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    write_environment(folder, parameters=123_456)
    return folder


def test_page_is_self_contained_and_shows_everything(run):
    page = write_page(run).read_text()
    assert page.count("data:image/svg+xml;base64,") == 9
    groups = re.findall(r"<div class='figures'>(.*?)</div>", page, re.DOTALL)
    assert [group.count("<img ") for group in groups] == [3, 2, 1, 3], "they wrap in a small window"
    for text in (
        "123,456",
        "60 of 100",
        "state_ratio",
        "step 7: &lt;img src=x&gt;",
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "quarantine.jsonl: 1 lines could not be read",
        "hardware.device",
        "chunk_size",
    ):
        assert text in page, text
    assert "<script" not in page
    assert "<img src=x" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)


def test_page_of_a_run_that_has_just_begun(run, tmp_path):
    for path in run.iterdir():
        if path.name != "config.yaml":
            path.unlink()
    assert "No metrics yet" in write_page(run, tmp_path / "deep" / "page.html").read_text()
    with pytest.raises(
        CheckpointError, match=r"no config\.yaml; give the folder of a training run"
    ):
        write_page(tmp_path)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_page_in_a_browser(run, tmp_path):
    """Headless Chromium, without a network, draws the curves: the screenshot has their colours."""
    page, picture = write_page(run), tmp_path / "page.png"
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=1300,2200",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--screenshot={picture}",
        page.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    from matplotlib.image import imread

    pixels = np.round(imread(picture)[:, :, :3] * 255).astype(int)
    for colour in ((0, 114, 178), (213, 94, 0)):  # TTT on, TTT off
        assert (np.abs(pixels - colour).max(axis=2) <= 2).sum() > 200
