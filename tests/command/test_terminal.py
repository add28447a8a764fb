"""Foreign text: nothing that a terminal obeys and no markup comes through, on the terminal and in
pages.
"""

import io
import json

import pytest
from rich.console import Console
from support.hf_folders import make_folder

from ttt_jax.command.cli import main
from ttt_jax.data.tokenizer import ByteTokenizer
from ttt_jax.display.tables import Table, print_tables
from ttt_jax.errors import UserError
from ttt_jax.eval.output import files_of
from ttt_jax.terminal import for_stream, printable

# Clears the screen, renames the window, rings, asks the terminal to answer, C1 CSI, turns the line
# round, markup, HTML, a lone surrogate of a file name.
HOSTILE = (
    "a\x1b[2J\x1b]0;owned\x07\x9b31m\u202efdp.exe\u2069[/b][red]"
    "<script>alert(1)</script>\r\x00\x7f\udc80"
)
OBEYED = set(
    map(
        chr,
        [
            *range(32),
            *range(127, 160),
            0x2028,
            0x2029,
            *range(0x202A, 0x202F),
            *range(0x2066, 0x206A),
        ],
    )
)


def test_printable():
    shown = printable(HOSTILE)
    assert not OBEYED & set(shown)
    assert shown.startswith(r"a\x1b[2J\x1b]0;owned\x07\x9b31m\u202efdp.exe")
    assert shown.endswith(r"\r\x00\x7f\udc80")
    assert printable("é 漢 😀 ±\t\n", "\n\t") == "é 漢 😀 ±\t\n"
    assert printable("a\nb\tc") == r"a\nb\tc"
    shown.encode("utf-8")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_generated_text_is_raw_in_a_pipe_only():
    assert for_stream(HOSTILE, io.StringIO()) == HOSTILE
    assert not (OBEYED - {"\n"}) & set(for_stream(HOSTILE + "\n", Terminal()))
    assert for_stream("a\n\tb", Terminal()) == "a\n\tb"


def test_errors_that_quote():
    assert not OBEYED & set(str(UserError(f"config field name = {HOSTILE}: no")))


@pytest.mark.parametrize(
    "words",
    [
        [
            "eval",
            "--model",
            "nowhere",
            "--out",
            HOSTILE[:-3].replace("/", "_").replace("\0", ""),
            "--perplexity",
            "x",
        ],
        ["score", "--model", "a\x1b[2Jb", "--text", "\x1b]0;x\x07", "--out", "o"],
        ["report", "a\x9b31m\u202eb"],
        ["\x1b[2J"],
        ["eval", "--\x1b[2J"],
        ["plan", "--config", "\x1b[2J.yaml", "--topology", "h100:1"],
    ],
)
def test_messages_of_commands(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert not (OBEYED - {"\n"}) & set(error)


def table_of(text):
    return Table(text, text, [text, "mode [/b]"], [[text, "[bold]x"]])


def test_tables_take_names_as_they_are():
    """`[/b]` closes nothing, `[red]` colours nothing, and no code reaches the terminal."""
    file = Terminal()
    console = Console(file=file, force_terminal=True, width=400)
    print_tables([table_of(HOSTILE)], console)
    shown = file.getvalue()
    for text in ("[/b]", "[red]", "[bold]x", "mode [/b]", r"\x1b[2J", r"\x07"):
        assert text in shown
    for text in ("\x1b[2J", "\x1b]0;", "\x07", "\x9b", "\u202e", "\r"):
        assert text not in shown


def test_a_comparison_with_markup_in_its_names(tmp_path, capsys):
    """What `--compare` died of."""
    from eval.test_output import results_of

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        results = results_of(name=HOSTILE[:-1])
        results["tasks"] = {
            "modes": ["on"],
            "limit": 1,
            "fewshot": None,
            "chat": False,
            "version": "1",
            "entries": [
                {
                    "task": "[/b]\x1b[2J",
                    "metric": "acc",
                    "samples": 1,
                    "on": {"value": 0.5, "stderr": None},
                }
            ],
        }
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    assert (
        main(
            [
                "eval",
                "--compare",
                str(tmp_path / "a"),
                str(tmp_path / "b"),
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert r"[/b]\x1b[2J acc" in out
    assert not (OBEYED - {"\n"}) & set(out)
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_pages_with_hostile_names():
    from eval.test_output import results_of

    results = results_of(name=HOSTILE[:-1])
    results["options"]["perplexity"] = "<img src=x onerror=alert(1)>"
    page = files_of(results)["report.html"]
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror" in page


def test_events_and_messages_of_a_run(tmp_path, capsys):
    """Names of documents in warnings."""
    from ttt_jax.run.logs import EventLog, read_events

    shown = []
    with EventLog(tmp_path, shown.append) as events:
        events(f"step 7 skipped; its documents: {HOSTILE[:-1]} #812")
    assert not OBEYED & set(shown[0])
    assert read_events(tmp_path)[0]["text"].startswith(
        "step 7 skipped; its documents: a\x1b[2J"
    )  # the file has it as it is


@pytest.mark.filterwarnings("ignore:No artists with labels")
def test_the_page_of_a_run_with_hostile_names(tmp_path, capsys):
    from ttt_jax.config import Config, dump_yaml

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_yaml(Config()))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    event = {"time": "2026", "step": 1, "kind": "<b>", "text": "<script>alert(1)</script>\x1b[2J"}
    (run / "events.jsonl").write_text(json.dumps(event) + "\n")
    bad = {
        "file": "<img src=x onerror=alert(1)>",
        "index": 1,
        "reason": "<script>",
        "text": "<script>",
    }
    (run / "quarantine.jsonl").write_text(json.dumps(bad) + "\n")
    assert main(["report", str(run)]) == 0
    capsys.readouterr()
    page = (run / "report.html").read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_generate_shows_what_a_model_writes(tmp_path, capsys, monkeypatch):
    """Bytes of control codes, streamed to a terminal and to a file."""
    make_folder(
        tmp_path / "m",
        {"model_type": "qwen3", "head_dim": 16, "num_hidden_layers": 1, "vocab_size": 257},
    )
    written = "\x1b]0;owned\x07ok\n"

    class Writes:
        def __init__(self, *arguments, **options):
            self.batch_size, self.unread, self.timings, self.ttt = 1, [[1]], Timings(), True

        def extend(self, rows): ...

        def generate(self, limit, sampling, *, on_text, **options):
            for letter in written:
                on_text(0, letter)
            return [Completion([1], [0.0], written, "length")]

    from ttt_jax.inference.streams import Timings
    from ttt_jax.inference.writing import Completion

    monkeypatch.setattr("ttt_jax.inference.generation.Session", Writes)
    monkeypatch.setattr(
        "ttt_jax.pretrained.load.load_model",
        lambda *a, **o: type("M", (), {"tokenizer": ByteTokenizer()}),
    )
    words = ["generate", "--model", str(tmp_path / "m"), "--prompt", "x"]
    assert main(words) == 0
    assert capsys.readouterr().out == written + "\n"
    monkeypatch.setattr("sys.stdout", Terminal())
    assert main(words) == 0
    import sys

    assert sys.stdout.getvalue() == "\\x1b]0;owned\\x07ok\n\n"
