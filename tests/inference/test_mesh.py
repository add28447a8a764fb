"""Inference on meshes of fake devices equals inference on one: token ids the same,
log-probabilities within 1e-5, float32.

`data` splits rows, `fsdp` parameters by D and rows where they divide, `tensor` heads and F,
`context` tokens and slots where they divide (a window of 4 does, one of 3 does not).
"""

import functools
import re

import jax
import numpy as np
import pytest
from support.hlo import collectives
from support.models import CAP, LAST_ERRORS, RIDGE, config
from support.streams import C, model_of, prompts

from ttt_jax import Session, generate, load_pretrained, save_pretrained, score
from ttt_jax.config import MeshConfig
from ttt_jax.errors import ConfigError
from ttt_jax.eval.answers import judge_piece
from ttt_jax.inference.memory_reading import on_mesh
from ttt_jax.inference.prefill import score_piece
from ttt_jax.inference.sampling import Sampling
from ttt_jax.model.stack import Runtime
from ttt_jax.parallel.inference_mesh import check_model, inference_mesh
from ttt_jax.pretrained.convert import convert
from ttt_jax.pretrained.fingerprint import fingerprint, weights_fingerprint
from ttt_jax.pretrained.hf_weights import parameters

pytestmark = pytest.mark.usefixtures("usual_promotion")
# Two kinds of layers. ||S||/||W|| stays below 3 behind 40 tokens: rounding stays rounding.
SMALL = {"num_layers": 2, "ttt.layers": (1,), "ttt.lr": 0.1, "vocab_size": 32}
WINDOW = {"sliding_window": 3, "full_attention_layers": (0,)}
# The sizes of the axes, the lengths of the prompts, and the model.
ALL = {"data": 2, "fsdp": 2, "tensor": 2}
CASES = [
    (ALL, (3, 9, 30, 14), {}),
    ({"tensor": 2}, (19, 1, 26), WINDOW),
    ({"fsdp": 4, "tensor": 2}, (22,), RIDGE),
    ({"fsdp": 2, "context": 2}, (22, 5), WINDOW | {"sliding_window": 4}),
    ({"context": 2, "tensor": 2}, (3, 27, 14), WINDOW),
    ({"fsdp": 2, "context": 2, "tensor": 2}, (22, 5), LAST_ERRORS | CAP),
    ({"context": 2}, (7,), CAP),
]
cases = pytest.mark.parametrize(
    ("sizes", "lengths", "changes"), CASES, ids=lambda x: "x".join(map(str, x))
)


def mesh_of(sizes):
    return inference_mesh(MeshConfig(**({"data": 1, "fsdp": 1} | sizes)))


@functools.cache
def meshed(pairs, **changes):
    return on_mesh(model_of(**SMALL | changes), mesh_of(dict(pairs)))


def both(sizes, changes):
    """The model on one device and on a mesh."""
    return model_of(**SMALL | changes), meshed(tuple(sizes.items()), **changes)


def assert_close(x, y):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


def assert_same_text(found, expected):
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    for x, y in zip(found, expected, strict=True):
        assert_close(x.logprobs, y.logprobs)


@cases
def test_a_ragged_batch_is_continued_as_on_one_device(sizes, lengths, changes):
    """Sampled, across several chunk boundaries of every row."""
    one, model = both(sizes, changes)
    rows, sampling = prompts(lengths), Sampling(temperature=0.8, top_k=20)
    found, expected = (Session(m, len(rows), piece=2 * C) for m in (model, one))
    for session in (found, expected):
        session.extend(rows)
    options = {"sampling": sampling, "eos_ids": (), "seed": 3}
    assert_same_text(found.generate(11, **options), expected.generate(11, **options))
    for x, y in zip(fast_weights(found), fast_weights(expected), strict=True):
        assert_close(x, y)


def fast_weights(session):
    runs = [run for runs in session.state.layers for run in runs]
    return [run.ttt.S_BDF for run in runs if run.ttt is not None]


@cases
def test_a_ragged_batch_is_scored_as_on_one_device(sizes, lengths, changes):
    one, model = both(sizes, changes)
    rows = prompts(lengths, seed=1)
    options = {"piece": 2 * C, "logits": True}
    found, expected = (score(m, rows, **options) for m in (model, one))
    assert_close(found.logprobs_BT, expected.logprobs_BT)
    assert_close(found.logits_BTV, expected.logits_BTV)


@pytest.mark.parametrize(
    ("sizes", "rows", "judge"),
    [({"context": 2, "tensor": 2}, 2, score_piece), ({"fsdp": 4, "tensor": 2}, 1, judge_piece)],
    ids=["rows divide", "one row"],
)
def test_scoring_sends_no_logits_and_repeats_no_product(sizes, rows, judge):
    """What is sent is the weight, gathered where D is split, and a few numbers for each token; each
    device multiplies its share of tokens and vocabulary.
    """
    V, T, n = 1536, 64, int(np.prod(list(sizes.values())))
    model = meshed(tuple(sizes.items()), vocab_size=V)
    static = {"with_logits": False} if judge is score_piece else {}
    static |= {"capacity": T, "at_chunk_start": True, "ttt": True}
    ids_BP, lengths_B = np.zeros((rows, T), np.int32), np.full(rows, T, np.int32)
    run = lambda model, *arrays: judge.__wrapped__(model, None, *arrays, **static)
    text = jax.jit(run).lower(model, ids_BP, ids_BP, lengths_B).compile().as_text()
    products = re.findall(r"= f32\[(\d+),(\d+)\]\S* dot\(.*?/logits/", text)
    assert [int(x) * int(y) for x, y in products] == [rows * T * V // n]
    weight = 4 * V * model.config.d_model
    assert max(size for _, size in collectives(text)) <= weight


def test_no_device_holds_more_than_its_share():
    """Parameters and states of a stream are split as far as they divide: D by 2, heads, F and V by
    2, rows by 2.
    """
    one, model = both(ALL, {})
    assert_split(model, 4)
    session = Session(model, 4)
    session.read(prompts((3, 9, 30, 14)))
    for runs in session.state.layers:
        for run in runs:
            shares = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(run)]
            B, K, F = 4, one.config.num_kv_heads, one.config.d_ff
            assert shares[0][2:4] == shares[1][2:4] == (B // 4, K // 2)
            if run.ttt is not None:
                assert shares[2][2:] == (B // 2, one.config.d_model // 2, F // 2)


def assert_split(model, ways):
    """Matrices are split so many ways; W_target and the convolution by D alone, norms not."""
    for name, x in parameters(model).items():
        share = np.prod(x.sharding.shard_shape(x.shape))
        by_D = model.embed[...].sharding.mesh.shape["fsdp"]
        ours = by_D if ".target." in name else 1 if "norm" in name else ways
        assert share == x.size // ours, name


def test_one_row_splits_fast_weights_over_all_devices():
    _, model = both({"fsdp": 4, "tensor": 2}, RIDGE)
    session = Session(model)
    session.extend(prompts((9,)))
    session.generate(4, eos_ids=())
    for S in fast_weights(session):
        assert np.prod(S.sharding.shard_shape(S.shape)[2:]) == np.prod(S.shape[2:]) // 8


def test_a_session_moves_between_meshes(tmp_path):
    """Written on one mesh, read on by another, then by one device, then by the first again."""
    file, rows = tmp_path / "s.safetensors", prompts((13, 6))
    one = model_of(**SMALL | WINDOW)
    whole = Session(one, 2)
    session = None
    places = [
        both(sizes, WINDOW)[1]
        for sizes in ({"data": 2, "fsdp": 1, "tensor": 2}, {"fsdp": 2, "context": 2})
    ]
    for i, model in enumerate([*places, one, places[0]]):
        session = Session(model, 2) if session is None else Session.load(file, model)
        more = rows if i == 0 else prompts((3, 9), seed=i)
        for stream in (session, whole):
            stream.extend(more)
        assert_same_text(session.generate(5, eos_ids=()), whole.generate(5, eos_ids=()))
        session.save(file)


def test_branches_go_their_own_ways():
    one, model = both({"fsdp": 2, "tensor": 2}, {})
    results = []
    for m in (one, model):
        session = Session(m)
        session.read(prompts((17,)))
        asked = session.branch(2)
        asked.extend(prompts((3, 5), seed=4))
        results.append((asked.generate(6, eos_ids=()), session.generate(6, eos_ids=())))
    for expected, found in zip(*results, strict=True):
        assert_same_text(found, expected)


def test_memories_come_from_a_mesh_and_go_to_one():
    one, model = both({"fsdp": 2, "tensor": 2}, {})
    text, rows = prompts((29,)), prompts((9, 14), seed=2)
    memories = []
    for m in (one, model):
        session = Session(m)
        session.read(text)
        memories.append(session.memory())
    for layer in memories[0].layers:
        assert_close(memories[1].dW(layer), memories[0].dW(layer))
    assert memories[0].model == memories[1].model
    for ttt in (True, False):
        options = {"memory": memories[0], "ttt": ttt, "max_new_tokens": 6, "eos_ids": ()}
        assert_same_text(generate(model, rows, **options), generate(one, rows, **options))
    found, expected = (score(m, rows, memory=memories[0]) for m in (model, one))
    assert_close(found.logprobs_BT, expected.logprobs_BT)


# ------------------------------------------------------------------------------------------ folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same weights as Hugging Face stores them, and converted."""
    place = tmp_path_factory.mktemp("models")
    save_pretrained(model_of(**SMALL), place / "hf", dtype="float32")
    convert(place / "hf", place / "orbax", to="orbax")
    return place


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_a_folder_is_read_onto_the_mesh(folders, kind, scan_layers, monkeypatch):
    """Every device gets its share, and no array is whole on one device on its way."""
    runtime = Runtime(scan_layers=scan_layers)
    expected = load_pretrained(folders / kind, runtime=runtime)
    mesh = mesh_of({"fsdp": 4, "tensor": 2})
    put = jax.device_put

    def watched(x, where=None, *rest, **options):
        assert not isinstance(where, jax.sharding.SingleDeviceSharding | jax.Device | None)
        return put(x, where, *rest, **options)

    monkeypatch.setattr(jax, "device_put", watched)
    model = load_pretrained(folders / kind, runtime=runtime, mesh=mesh)
    for x, y in zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)
    assert_split(model, 8)
    assert fingerprint(model) == fingerprint(expected)
    assert weights_fingerprint(model) == weights_fingerprint(expected)
    (found,), (want,) = (
        generate(m, prompts((9,)), max_new_tokens=5, eos_ids=()) for m in (model, expected)
    )
    assert found.token_ids == want.token_ids


@pytest.mark.parametrize(
    ("sizes", "changes", "words"),
    [
        ({"tensor": 4}, {}, "mesh.tensor 4: does not divide model.num_kv_heads = 2"),
        ({"tensor": 2}, {"d_ff": 25}, "mesh.tensor 2: does not divide model.d_ff = 25"),
        ({"fsdp": 3}, {}, "mesh.fsdp 3: does not divide model.d_model = 16"),
        ({"fsdp": 2, "context": 4}, {"d_model": 28}, "mesh.fsdp 2 x mesh.context 4: does not div"),
        ({"fsdp": 3, "tensor": 4}, {}, "mesh.fsdp 3 x mesh.tensor 4: needs 12 devices, there are"),
    ],
    ids=lambda x: "",
)
def test_a_mesh_that_does_not_suit(sizes, changes, words):
    with pytest.raises(ConfigError, match=words) as error:
        check_model(config(**changes), mesh_of(sizes).shape)
    assert "\n" not in str(error.value)


def test_all_devices_where_a_size_is_left_open():
    assert dict(inference_mesh(MeshConfig(tensor=2)).shape)["fsdp"] == 4
    with pytest.raises(ConfigError, match="does not divide 8 devices"):
        inference_mesh(MeshConfig(tensor=3))


def test_rows_that_do_not_split_are_said():
    one, model = both({"data": 2, "fsdp": 1, "tensor": 2}, {})
    rows = prompts((5, 2, 9))
    with pytest.warns(UserWarning, match="mesh.data = 2 does not divide 3 rows"):
        found = score(model, rows)
    assert_close(found.logprobs_BT, score(one, rows).logprobs_BT)
