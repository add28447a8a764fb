"""Whole tasks of lm-evaluation-harness: its command line, and dummies that score 1.0 on RULER's."""

import collections
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.harness import lm_of, model_of, requests
from support.hf_folders import make_folder
from support.models import config, make

from ttt_jax import load_pretrained
from ttt_jax.data.tokenizer import ByteTokenizer
from ttt_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'ttt-jax[eval]'")
pytestmark = [
    pytest.mark.slow,  # importing the harness and indexing its tasks takes half a minute
    pytest.mark.filterwarnings("ignore"),  # of the harness and its packages
]


def byte_folder(folder):
    """A tiny random LLaMA whose tokenizer.json has the 256 bytes and an end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    make_folder(
        folder,
        {
            "model_type": "llama",
            "vocab_size": 257,
            "max_position_embeddings": 8192,
            "rope_theta": 1e4,
        },
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={char: i for i, char in enumerate([*alphabet, "</s>"])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}]
"""


def test_the_harness_own_command_line(tmp_path):
    """`python -m ttt_jax.eval.harness run`, in a process of its own, on a task that lies in a
    folder: the model is known, and the score is what log-probabilities give.
    """
    folder = byte_folder(tmp_path / "model")
    docs = [
        {"question": q, "choices": [" left", " right"], "answer": n % 2}
        for n, q in enumerate(["a", "bb", "c c", "dd"])
    ]
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(file=data))
    words = [
        "run",
        "--model",
        "ttt_jax",
        "--model_args",
        f"pretrained={folder},piece=16",
        "--tasks",
        "tiny_choice",
    ]
    words += [
        "--include_path",
        str(tmp_path / "tasks"),
        "--output_path",
        str(tmp_path / "out"),
        "--batch_size",
        "2",
    ]
    command = [sys.executable, "-m", "ttt_jax.eval.harness", *words]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    lm = lm_of(folder, model=load_pretrained(folder, dtype="float32"))
    pairs = [(doc["question"], choice) for doc in docs for choice in doc["choices"]]
    logprobs = [
        x for x, _ in lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    ]
    right = [
        int(right > left) == doc["answer"]
        for doc, left, right in zip(docs, logprobs[::2], logprobs[1::2], strict=True)
    ]
    assert json.loads(file.read_text())["results"]["tiny_choice"]["acc,none"] == pytest.approx(
        np.mean(right)
    )


def test_the_harness_own_command_line_says_what_is_wrong(tmp_path):
    words = ["run", "--model", "ttt_jax", "--model_args", "ttt=false", "--tasks", "niah_single_1"]
    command = [sys.executable, "-m", "ttt_jax.eval.harness", *words]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: model_args path: missing")


def regex_dummy(*args, **options):
    """Answers with what the prompt says about the key that is asked for."""
    from ttt_jax.eval.harness import TTTJaxLM

    class Dummy(TTTJaxLM):
        def write(self, prompts, max_new_tokens, stop, sampling):
            texts = [self.tokenizer.decode(prompt) for prompt in prompts]
            keys = [re.search(r"for ([\w-]+) mentioned in", text) for text in texts]
            answer = lambda key, text: (
                key and re.search(rf"for {re.escape(key[1])} is: ([\w-]+)\.", text)
            )
            found = list(map(answer, keys, texts))
            return [match[1] if match else "" for match in found]

    return Dummy(*args, **options)


def test_needles_through_the_adapter(tmp_path):
    """RULER, made here without network, also at a length that it has no metric for: the dummy is
    right, silence is wrong.
    """
    pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install 'ttt-jax[eval]'"
    )
    pytest.importorskip(
        "wonderwords", reason="wonderwords is not installed: pip install 'ttt-jax[eval]'"
    )
    from ttt_jax.eval.harness_tasks import evaluate_tasks

    options = {"lengths": [1024, 4096], "limit": 3, "modes": ["on"]}
    part = evaluate_tasks(
        model_of(), tmp_path, ["niah_single_1", "niah_multikey_3"], make=regex_dummy, **options
    )
    assert {(e["task"], e["metric"]): e["on"]["value"] for e in part["entries"]} == {
        (task, length): 1.0
        for task in ("niah_single_1", "niah_multikey_3")
        for length in ("1024", "4096")
    }
    assert {entry["samples"] for entry in part["entries"]} == {3}

    def silent(*args, **given):
        lm = regex_dummy(*args, **given)
        lm.write = lambda prompts, *rest: [""] * len(prompts)
        return lm

    part = evaluate_tasks(
        model_of(), tmp_path, ["niah_single_1"], make=silent, **options | {"lengths": [1024]}
    )
    assert part["entries"][0]["on"]["value"] == 0.0


class WordTokenizer:
    """Words and single signs, numbered as they come: RULER's samples have as many tokens as real
    vocabularies give them.
    """

    eos_id, fingerprint = 0, "words"

    def __init__(self):
        self.words = ["</s>"]
        self.ids = {}

    def encode(self, text):
        ids = []
        for word in re.findall(r" ?\w+|\W", text):
            if word not in self.ids:
                self.ids[word] = len(self.words)
                self.words.append(word)
            ids.append(self.ids[word])
        return ids

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


def solve(text):
    """The answer to a sample of RULER's variable tracking, common or frequent words, from its text
    alone.
    """
    if "chain(s)" in text:
        task = text[text.rindex("Memorize and track") :]  # behind the worked example
        value = re.search(r"assigned the value (\d+)", task)[1]
        found = re.findall(rf"VAR (\w+) = {value}\b", task)
        for name in found:
            found += re.findall(rf"VAR (\w+) = VAR {name}\b", task)
        return " ".join(found)
    body, common = text.split("Question:")[0], "numbered list" in text
    words = (
        re.findall(r"\d+\. (\S+)", body)
        if common
        else re.findall(r"\b[a-z]{6}\b", body.split("coded words. ")[1])
    )
    return " ".join(word for word, _ in collections.Counter(words).most_common(10 if common else 3))


def test_tracking_and_counting_through_the_adapter(tmp_path):
    """RULER's vt, cwe and fwe: a solver that sees the prompt only is right, silence wrong, half an
    answer half right.
    """
    pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install 'ttt-jax[eval]'"
    )
    pytest.importorskip(
        "wonderwords", reason="wonderwords is not installed: pip install 'ttt-jax[eval]'"
    )
    from ttt_jax.eval.harness import TTTJaxLM
    from ttt_jax.eval.harness_tasks import evaluate_tasks

    model = make(
        config(num_layers=2, vocab_size=257, **{"ttt.layers": (1,), "ttt.chunk_size": 4}), "float32"
    )
    model.tokenizer = WordTokenizer()
    # new tokens, by words of the task
    limits = {"chain(s)": 30, "numbered list": 120, "coded text": 50}

    def run(names, answer, length):
        prompts = []

        class Dummy(TTTJaxLM):
            def write(self, rows, max_new_tokens, stop, sampling):
                texts = [self.tokenizer.decode(row) for row in rows]
                prompts.extend((len(row), text) for row, text in zip(rows, texts, strict=True))
                assert all(
                    limits[words] == max_new_tokens
                    for text in texts
                    for words in limits
                    if words in text
                )
                return [answer(text) for text in texts]

        part = evaluate_tasks(
            model, tmp_path, names, make=Dummy, lengths=[length], limit=3, modes=["on"]
        )
        assert {(entry["metric"], entry["samples"]) for entry in part["entries"]} == {
            (str(length), 3)
        }
        return {entry["task"]: entry["on"]["value"] for entry in part["entries"]}, sorted(prompts)

    names = ["ruler_vt", "ruler_fwe", "ruler_cwe"]
    found, prompts = run(names, solve, 4096)
    assert found == dict.fromkeys(names, 1.0)
    assert 2048 < prompts[0][0] <= prompts[-1][0] <= 4096
    found, again = run(names, lambda text: "", 4096)
    assert found == dict.fromkeys(names, 0.0)
    # The same samples at each call; but ruler_cwe shuffles with a generator of its module, which
    # goes on.
    assert [p for p in again if "numbered list" not in p[1]] == [
        p for p in prompts if "numbered list" not in p[1]
    ]
    found, _ = run(["ruler_cwe"], lambda text: " ".join(solve(text).split()[:5]), 2048)
    assert found == {"ruler_cwe": 0.5}


def test_samples_that_cannot_be_made_are_an_error(tmp_path):
    """With one token per byte: left to itself, the harness would not end, or divide by zero."""
    pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install 'ttt-jax[eval]'"
    )
    pytest.importorskip(
        "wonderwords", reason="wonderwords is not installed: pip install 'ttt-jax[eval]'"
    )
    from ttt_jax.eval.harness_tasks import _ruler_tokenizer, evaluate_tasks

    def make_samples(module, function, length, tokenizer):
        module = importlib.import_module(f"lm_eval.tasks.ruler.{module}")
        with _ruler_tokenizer(tmp_path, tokenizer, length):
            getattr(module, function)(tokenizer=str(tmp_path), max_seq_lengths=[length])

    with pytest.raises(
        UserError, match=r"its shortest example has \d+ tokens .* room for 500; leave the task out"
    ):
        make_samples("vt_utils", "get_vt_dataset", 4096, ByteTokenizer())
    with pytest.raises(
        UserError, match=r"its shortest sample has \d+ tokens .* room for 512; raise --lengths"
    ):
        make_samples("vt_utils", "get_vt_dataset", 512, WordTokenizer())
    with pytest.raises(
        UserError, match=r"its shortest sample has \d+ tokens .* room for 256; raise --lengths"
    ):
        make_samples("fwe_utils", "fwe_download", 256, ByteTokenizer())
    words = (
        "--tasks ruler_cwe: its shortest sample is longer than 4096 tokens of this model's "
        "tokenizer; raise --lengths"
    )
    with pytest.raises(UserError, match=words):
        evaluate_tasks(model_of(), tmp_path, ["ruler_cwe"], lengths=[4096], limit=1, modes=["on"])
