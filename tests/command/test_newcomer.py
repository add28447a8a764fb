"""What somebody types who has just installed it: twenty wrong inputs and their one-line answers.

All in one empty folder, which stays as it is. Nothing is compiled.
"""

import shlex

import pytest
from support.byte_models import byte_model

from ttt_jax.command.cli import main

pytestmark = pytest.mark.usefixtures("usual_promotion")
ANSWERS = {
    "trian": "ttt-jax: No such command 'trian'. Did you mean 'train'?",
    "train my.txt": "config my.txt: not valid YAML: *; to train on this file write"
    " --data.train my.txt",
    "train notes.txt": "config notes.txt: the top level must be a mapping of fields, not str; to"
    " train on this file write --data.train notes.txt",
    "train defualt": "config defualt: no such file, and no preset of this name; did you mean"
    " default? (presets: *)",
    "train folder": "config folder: a folder without config.yaml; give a run folder, a YAML file or"
    " a preset, and data with --data.train",
    "train --data my.txt": "config field data = my.txt: is a group of fields; set one of them, such"
    " as data.train",
    "train --data.train mine.txt": "config field data.train = 'mine.txt': no such file or folder;"
    " give an existing path, or 'stdlib'",
    "train --data.train nothing.txt": "config field data.train = 'nothing.txt': empty: none of its"
    " 1 documents has 2 tokens or more; give more data or lower data.min_document",
    "train --data.train picture.png": "config field data.train = 'picture.png': picture.png: the"
    " file is not UTF-8 at byte 0, *",
    "train --data.train my.txt --data.heldout my.txt": "config field data.heldout = 'my.txt':"
    " my.txt: is a training file, too: *",
    "train --lr 3e-4": "config field lr: unknown; did you mean optimizer.lr or model.ttt.lr?",
    "train --batch_size 8": "config field batch_size: unknown; did you mean data.batch_size?",
    "train --optimizer.lr fast": "config field optimizer.lr = fast: input should be a valid number,"
    " unable to parse string as a number",
    "train --steps 0": "config field steps = 0: input should be greater than 0",
    "train --hepl": "config field hepl: unknown; see --help for the known fields",
    "train --init_from no": "config field init_from = false: no folder and no name; write ./no for"
    " a folder that is called so, and null for none",
    "train --init_from s3://bucket/model --data.train my.txt": "config field init_from ="
    " 's3://bucket/model': is a URL; a model is read from a disk: copy it to a folder",
    "train --steps": "argument '--steps' has no value: write --steps VALUE",
    "train --data.seq_len 100": "config field data.seq_len = 100: packed rows hold whole chunks;"
    " make it a multiple of model.ttt.chunk_size = 64, or set data.pack false",
    "train --init_from folder --data.train my.txt": "config field init_from = 'folder': holds no"
    " config that says what model it is; give a Hugging Face, converted or run folder, or write"
    " every field of model",
    "train --init_from gpt2 --data.train my.txt": "config field init_from = 'gpt2': no such folder;"
    " give a Hugging Face, converted or run folder, or a model of the Hugging Face Hub"
    " (organisation/name)",
    "train --name my/run": "config field name = 'my/run': use letters, digits, '.', '_' and '-'"
    " only",
    "chat": "ttt-jax chat: Missing option '--model'.",
    "chat --model runs/default": "model runs/default: no such folder; give a Hugging Face,"
    " converted or run folder",
    "chat --model my.txt": "model my.txt: a file, no folder; give a Hugging Face, converted or run"
    " folder",
    "chat --model folder": "model folder: no config.json, and no config.yaml of a run; give a"
    " Hugging Face, converted or run folder",
    "chat --model model --read mine.txt": "--read mine.txt: No such file or directory; give a"
    " readable text file",
    "generate --model model": "ttt-jax generate: no prompt: give --prompt TEXT, --prompt-file FILE"
    " or --ids FILE.npy",
    "generate --model model --promt hello": "ttt-jax generate: No such option '--promt'. (Did you"
    " mean one of: '--prompt', '--prompt-file'?)",
    "generate --model model --prompt ''": "--prompt: the text is empty; give at least one token",
    "report runs/default": "run folder runs/default: no such folder; give the folder of a training"
    " run",
    "score --model model --text my.txt": "ttt-jax score: Missing option '--out'.",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a text and what else lies about."""
    root = tmp_path_factory.mktemp("place")
    byte_model(root / "model")
    (root / "folder").mkdir()
    (root / "my.txt").write_text("A title: of: a text\n\tand its words\n" * 900)
    (root / "notes.txt").write_text("a few words\n")
    (root / "nothing.txt").touch()
    (root / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    return root


@pytest.mark.parametrize("words", ANSWERS)
def test_a_wrong_input_has_one_line(words, place, capsys, monkeypatch):
    """`*` stands for the rest, or for a part of the line."""
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    assert main(shlex.split(words)) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    begin, star, end = f"error: {ANSWERS[words]}\n".partition("*")
    assert err == begin if not star else err.startswith(begin)
    assert not star or err.endswith(end.lstrip("\n"))
    assert sorted(place.rglob("*")) == before


def test_there_are_twenty():
    assert len(ANSWERS) >= 20
