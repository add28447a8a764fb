"""The studies' scripts: tables that are in the documents, and the ablation of the convolution."""

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import models

from ttt_jax.config import Config, replace

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script(monkeypatch):
    """Import a file of benchmarks/, which imports its neighbours as a script does."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module


def study(arm, seed, losses, off=0.1):
    heldout = {"ttt_on": losses, "ttt_off": [x + off for x in losses]}
    return {"arm": arm, "seed": seed, "heldout": heldout, "ratio_last": [1.0], "date": "2026-11-30"}


def test_tables_in_the_documents_are_those_of_the_results(script):
    books_tables = script("books_tables")

    made = books_tables.blocks(ROOT / "docs/results")
    assert set(made) == set(books_tables.PAGES)
    for name, page in books_tables.PAGES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        block = text.split(f"<!-- tables: {name} -->\n", 1)[1].split("<!-- tables: end -->", 1)[0]
        assert block.strip() == "\n\n".join(part for part in made[name] if part).strip(), (
            f"{page} is out of date: run python benchmarks/books_tables.py"
        )


def test_differences_are_taken_seed_by_seed(script, tmp_path):
    """Seeds differ by 1, the arms by 0.1, 0.2 and 0.3 within a seed: the interval is that of the
    differences.
    """
    books_tables = script("books_tables")

    rows = [study("none512", s, [9.0] * 7 + [5.0 + s]) for s in range(3)]
    rows += [study("decay358", s, [9.0] * 7 + [5.0 + s - 0.1 * (s + 1)]) for s in range(4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "2026-books.jsonl").write_text(text)
    runs = books_tables.read(tmp_path, "heldout", "*books*.jsonl")
    line = books_tables.differences(runs, {}, [("none512", "decay358")]).splitlines()[-1]
    # Student's t: 0.2 +- 4.30 * 0.1 / sqrt(3); seed 3 has no partner.
    assert line.split("|")[2:4] == [" 3 ", " 0.200 (-0.048 to 0.448) "]


def test_a_later_result_of_a_seed_counts(script, tmp_path):
    books_tables = script("books_tables")

    old, new = study("sum", 0, [2.0]) | {"date": "2026-11-24"}, study("sum", 0, [1.0])
    (tmp_path / "a-books.jsonl").write_text(json.dumps(new) + "\n")
    (tmp_path / "b-books.jsonl").write_text(json.dumps(old) + "\n")
    runs = books_tables.read(tmp_path, "heldout", "*books*.jsonl")
    assert runs["sum", 0]["heldout"]["ttt_on"] == [1.0]


def test_a_document_without_its_block_is_left_alone(script, tmp_path):
    books_tables = script("books_tables")

    page = tmp_path / "page.md"
    page.write_text("<!-- tables: a -->\nold\n<!-- tables: end -->\nkept\n")
    books_tables.put(page, "a", ["new", ""])
    assert page.read_text() == "<!-- tables: a -->\n\nnew\n\n<!-- tables: end -->\nkept\n"
    with pytest.raises(SystemExit, match="has no line <!-- tables: b -->"):
        books_tables.put(page, "b", ["new"])
    assert page.read_text().endswith("kept\n")


def test_the_table_of_memories_is_at_the_best_factor(script, tmp_path):
    gain = lambda mean: {"mean": mean, "low": mean - 0.5, "high": mean + 0.5}
    row = lambda mean: {"none": 4.0, "own": gain(mean), "other": gain(0), "own_over_other": gain(1)}
    scale = [
        {"factor": factor, "place": place} | row(factor + (place == "far"))
        for factor in (1.0, 2.0)
        for place in ("near", "far")
    ]
    sums = [{"books": n, "factor": f, "gain": gain(n + f)} for n in (2, 4) for f in (0.5, 0.25)]
    results = {
        "books": [{}] * 3,
        "arguments": {"read": "512,1024", "score": "64", "dtype": "bfloat16"},
        "hardware": {"device": "card", "platform": "gpu"},
        "date": "2026-11-30T22:00",
        "commit": "0123456789",
        "sizes": {"memory_mb": 3.5, "session_mb": 9.0, "read_tokens_per_second": 1.0},
        "context_read": 512,
        "factor": 2.0,
        "scale": scale,
        "rank": [
            {"rank": n, "mb": n / 4, "energy": 1, "kept": 1} | row(n) for n in (8, 16, 64, 576)
        ],
        "sums": [row | {"alone": gain(0), "lost": gain(0)} for row in sums],
    }
    (tmp_path / "2026-memory-smollm2.json").write_text(json.dumps(results))
    table, about = script("memory_tables").pages(tmp_path)["memory, smollm2"]
    assert table.splitlines()[2:] == [
        "|**smollm2**|3.50 MB|||",
        "|the next chapter, times 2|4.000|2.000 (1.500 to 2.500)|1.000 (0.500 to 1.500)|",
        "|a later chapter|4.000|3.000 (2.500 to 3.500)|1.000 (0.500 to 1.500)|",
        "|rank 16 (4.00 MB)|4.000|16.000 (15.500 to 16.500)|1.000 (0.500 to 1.500)|",
        "|rank 64 (16.00 MB)|4.000|64.000 (63.500 to 64.500)|1.000 (0.500 to 1.500)|",
        "|two books, times 0.5||2.500 (2.000 to 3.000)||",
    ]
    assert about.startswith(
        "smollm2: 3 novels, 1024 tokens read of each with attention anew every "
    )
    assert script("memory_tables").pages(tmp_path / "none")["memory, smollm2"] == []


def test_a_model_without_its_cap_is_one_that_never_had_it(script):
    capped, never = (
        models.make(models.config(num_layers=2, **{"ttt.layers": (1,)}, **cap), "float32")
        for cap in (models.CAP, {})
    )
    ids_BT = np.arange(24, dtype=np.int32).reshape(2, 12)
    found = script("memory_fast").with_ttt(capped, read_cap=None)
    expected_BTD = models.hidden(never, ids_BT)[0]
    np.testing.assert_array_equal(models.hidden(found, ids_BT)[0], expected_BTD)
    assert np.abs(models.hidden(capped, ids_BT)[0] - expected_BTD).max() > 1e-3
    assert found.config == never.config


def test_the_table_of_caps_says_what_is_lost_without(script):
    gain = lambda mean: {"mean": mean, "low": None, "high": None}
    row = {"rank": 8, "factor": 0.5, "place": "near", "own": gain(0.25), "other": gain(-0.5)}
    rows = [row | {"cap": 0.06, "gains": [0.5, 0.0]}]
    rows.append(row | {"cap": None, "gains": [0.75, -0.25], "lost": gain(0.125)})
    table = script("memory_tables").of_part("cap", {"cap": rows})
    assert table.splitlines()[2:] == [
        "|8|0.5|0.06|near|+.2500|-.5000|+.0000||",
        "|8|0.5|-|near|+.2500|-.5000|-.2500|+.1250|",
    ]
    assert script("memory_tables").of_part("cap", {"cap": []}) == "The model has no read cap.\n"


def test_taps_that_are_left_out_stay_at_zero_and_do_not_clip_the_others(script):
    restricted = script("target_taps").restricted

    params = {"mlp": {"target": {"conv": jnp.zeros((2, 1, 5)), "proj": jnp.ones((2, 2))}}}
    grads = {"mlp": {"target": {"conv": jnp.full((2, 1, 5), 3.0), "proj": jnp.zeros((2, 2))}}}
    tx = restricted(optax.clip_by_global_norm(1.0), (1, 2))
    updates, _ = tx.update(grads, tx.init(params), params)
    expected = np.zeros((2, 1, 5))
    expected[..., 1:3] = 0.5  # four gradients are left, of norm 1 together
    np.testing.assert_allclose(updates["mlp"]["target"]["conv"], expected, rtol=1e-6)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize(("on", "adapts"), [([[2.0, 1.0]], False), ([[2.0, 0.9]], True)])
def test_an_evaluation_in_which_nothing_was_written_is_told(script, on, adapts):
    """It happened: a kernel wrote its state where nobody read it, and all modes were equal."""
    positions = [{"per_document": {"on": losses, "off": [2.0, 1.0]}} for losses in on]
    kept = {"perplexity": {"modes": ["off", "on"], "positions": positions}}
    assert script("books_eval").adapts(kept) == adapts
    assert script("books_eval").adapts({"perplexity": {"modes": ["off"], "positions": []}})


def test_names_of_a_book_and_what_they_gain(script):
    names = script("book_names").names_in
    text = "Syme's hat. Then the Door, Mr GREEN and Dr Bull's door. I"
    assert names(text, {"then", "the", "door", "hat", "and"}) == ["Syme", "Mr", "Dr", "Bull"]

    class Letters:
        decode = staticmethod(lambda ids: "".join(map(chr, ids)))

    class Model:
        tokenizer = Letters

    class Book:
        names = ["Syme"]  # noqa: RUF012
        read_T = np.array([*map(ord, "a hat of Syme")])
        next_K1 = np.array([*map(ord, ".Syme a cat")])

    none = np.ones(10)
    own = none - np.array([1, 1, 1, 1, 0, 0.5, 0, -1, -1, -1])  # S y m e _ a _ c a t
    tables = script("book_names_tables")
    found = tables.gained_words(Model, Book, {"none": none, "own": own})["own"]
    assert (found["name"], found["seen"], found["new"], found["mark"]) == (1, 0.5, -1, 0)
    assert found["gain"] == pytest.approx(0.15)
    assert found["top"][0] == ("Syme", 4.0, 4)
    way = {"with a name": 0.5, "own names": 1, "names": 4, "p of ten names": 0.1}
    way |= {"log p of names": -3.0, "different words": 0.8}
    row = {"ways": {"none": way, "own": way | {"own names": 3}}}
    row["words"] = {"none": found, "own": found | {"name": None}}
    shown = tables.tables([row, row])
    assert "| own | 0.500 (+0.000 to +0.000) | - | 0.750 (+0.500 to +0.500) |" in shown
    assert "| own | 0.150 (+0.000 to +0.000) | - | 0.500 (" in shown


def test_a_step_has_as_many_adaptive_layers_as_its_name_says(script):
    """28 layers do not divide by 6: every fourth would be 7."""
    config = replace(Config(), {"model.num_layers": 28})
    changes, _ = script("step_parts").step_changes(config, "6")
    assert changes == {"model.ttt.layers": [3, 7, 11, 15, 19, 23]}
