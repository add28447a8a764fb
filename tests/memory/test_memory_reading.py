"""Reading texts for their memories: as a session reads them, side by side, in parts, on a mesh."""

import hashlib

import jax
import numpy as np
import pytest
from support.models import WINDOW
from support.streams import C, model_of, prompts
from support.tolerance import relative_rms

from ttt_jax import Session
from ttt_jax.config import MeshConfig
from ttt_jax.errors import NotFiniteError, UserError
from ttt_jax.inference.memory_reading import Text, on_mesh, read_texts
from ttt_jax.memory.sources import IdsDigest
from ttt_jax.model.param_path import param_path
from ttt_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("usual_promotion")
LENGTHS = [26, 9, 40, 2, 17]


@pytest.fixture(scope="module")
def expected():
    """What sessions teach."""
    found = []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for ids in prompts(LENGTHS):
            session = Session(model_of())
            session.read([ids])
            found.append(session.memory(name=str(len(ids))))
    return found


def read(model, **options):
    texts = [Text(str(len(ids)), ids) for ids in prompts(LENGTHS)]
    return dict(read_texts(model, texts, **options))


def check(found, expected):
    assert set(found) == set(range(len(LENGTHS)))
    for i, memory in found.items():
        assert memory.sources == expected[i].sources
        for layer in memory.layers:
            assert relative_rms(memory.dW(layer), expected[i].dW(layer)) < 1e-6


@pytest.mark.parametrize("options", [{"batch_size": 2, "piece": 2 * C}, {"batch_size": 8}])
def test_texts_of_any_lengths_side_by_side(expected, options):
    seen = []
    found = read(model_of(), on_progress=seen.append, **options)
    check(found, expected)
    assert seen == sorted(seen)
    assert seen[-1] == sum(n // C * C for n in LENGTHS)
    assert not found[3].dW(1).any()  # less than a chunk


@pytest.mark.parametrize(
    "axes", [{"data": 4, "fsdp": 1}, {"data": 2, "fsdp": 1, "context": 2}], ids=["rows", "context"]
)
def test_on_a_mesh_of_devices(expected, axes):
    """Rows that do not divide, and a batch that is shorter than the mesh."""
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[:4])
    check(read(on_mesh(model_of(), mesh), batch_size=3, piece=4 * C), expected)


@pytest.mark.parametrize("changes", [{}, WINDOW], ids=["full", "window"])
def test_attention_starts_anew_and_the_fast_weights_go_on(changes):
    """As sessions, each of which begins with the memory of the one before."""
    model, (ids,) = model_of(**changes), prompts([43])
    ((_, found),) = read_texts(model, [Text("x", ids)], context=3 * C, piece=2 * C)
    memory = None
    for start in range(0, 40, 3 * C):
        session = Session(model, memory=memory)
        session.read([ids[start : min(start + 3 * C, 40)]])
        memory = session.memory()
    for layer in found.layers:
        assert relative_rms(found.dW(layer), memory.dW(layer)) < 1e-6
    (source,) = found.sources
    assert (source.context, source.tokens, source.written) == (3 * C, 43, 40)


def test_a_text_goes_on_from_the_memory_of_another():
    """In contexts of their own both are one text; what is shorter than a chunk adds nothing."""
    model, (ids,), options = model_of(), prompts([40]), {"context": 2 * C}
    ((_, whole),) = read_texts(model, [Text("x", ids)], **options)
    ((_, first),) = read_texts(model, [Text("a", ids[: 4 * C])], **options)
    texts = [Text("b", ids[4 * C :]), Text("c", ids[: C - 1])]
    found = dict(read_texts(model, texts, start=first, **options))
    for layer in whole.layers:
        assert relative_rms(found[0].dW(layer), whole.dW(layer)) < 1e-6
        assert np.array_equal(found[1].dW(layer), first.dW(layer))
    assert [source.name for source in found[0].sources] == ["a", "b"]


def test_a_text_on_the_disk_is_never_in_memory_as_a_whole(expected, tmp_path):
    ids = prompts(LENGTHS)[2]
    np.save(tmp_path / "ids.npy", ids.astype(np.uint16))
    mapped, longest = np.load(tmp_path / "ids.npy", mmap_mode="r"), []

    class Mapped:
        def __len__(self):
            return len(mapped)

        def __getitem__(self, place):
            longest.append(place.stop - place.start)
            return mapped[place]

    file = hashlib.sha256((tmp_path / "ids.npy").read_bytes()).hexdigest()
    ((_, memory),) = read_texts(model_of(), [Text("40", Mapped(), file)], piece=2 * C)
    assert max(longest) == 2 * C
    for layer in memory.layers:
        assert relative_rms(memory.dW(layer), expected[2].dW(layer)) < 1e-6
    digest = IdsDigest()
    digest.update(ids)
    assert (memory.sources[0].ids, memory.sources[0].file) == (digest.hexdigest(), file)


def test_what_cannot_be_read_is_said_in_one_line():
    model = model_of()
    for texts, options, match in [
        ([Text("t", np.arange(40))], {}, "text t: row 0 holds id 31"),
        ([Text("t", np.arange(40) + 2**32)], {}, "text t: row 0 holds id"),
        ([Text("t", np.zeros(8))], {}, "text t: row 0 has dtype float64"),
        ([Text("t", prompts([8])[0])], {"context": 6}, "context = 6: must be a multiple of"),
    ]:
        with pytest.raises(UserError, match=match):
            list(read_texts(model, texts, **options))
    with pytest.raises(UserError, match="no TTT layers"):
        list(read_texts(model_of(**{"ttt.layers": ()}), [Text("t", prompts([8])[0])]))


def test_numbers_that_are_not_finite_name_the_text():
    def leaf(path, x):
        return x * 1e30 if param_path(path).endswith("target.proj") else x

    broken = jax.tree_util.tree_map_with_path(leaf, model_of())
    texts = [Text(name, ids) for name, ids in zip("ab", prompts([3, 24]), strict=True)]
    with pytest.raises(NotFiniteError, match="memory: b: numbers that are not finite"):
        list(read_texts(broken, texts))
