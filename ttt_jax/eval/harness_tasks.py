"""Tasks of lm-evaluation-harness for `ttt-jax eval --tasks`: found, loaded with errors that help,
run with TTT on and off.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.metadata
import math
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from ttt_jax.errors import DataError, NotFiniteError, UserError
from ttt_jax.eval.unfinished import Unfinished
from ttt_jax.files.text import reason_of
from ttt_jax.model.transformer import Transformer

_SCARCE = "pip install 'ttt-jax[eval]'"


def check_tasks(names: Sequence[str]) -> None:
    """Raise UserError when lm_eval is missing or a task unknown, before a model is loaded."""
    try:
        known = _known_tasks()
    except ImportError as error:
        raise UserError(
            f"--tasks {','.join(names)}: needs lm-evaluation-harness ({error}); {_SCARCE}"
        ) from None
    for name in names:
        if name not in known and not Path(name).is_file():
            near = difflib.get_close_matches(name, known, 3)
            hint = f"did you mean {', '.join(near)}?" if near else "lm-eval ls tasks lists them"
            raise UserError(
                f"--tasks {name}: neither 'synthetic' nor a task of lm-evaluation-harness; {hint}"
            )


@functools.cache
def _known_tasks() -> list[str]:
    return importlib.import_module("lm_eval.tasks").TaskManager().all_tasks


def evaluate_tasks(
    model: Transformer,
    path: Path,
    names: Sequence[str],
    *,
    modes: Sequence[str] = ("off", "on"),
    lengths: Sequence[int] = (4096,),
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = False,
    batch_size: int = 8,
    piece: int | None = None,
    seed: int = 0,
    make: Callable[..., Any] | None = None,
    kept: Unfinished | None = None,
) -> dict[str, Any]:
    """Run tasks, the same samples for each mode.

    Args:
      path: the model's folder, for tokenizer_config.json.
      lengths: of tasks that make their own samples (RULER), in tokens of the model's tokenizer.
      limit: samples per task; None: all.
      make: builds the harness's LM from (path, model=, ttt=, batch_size=, piece=); None:
        `TTTJaxLM`. Tests put dummies here.
      kept: lengths and modes that an earlier start finished, and where this one keeps its own.

    Returns: the "tasks" part of results.json.
    Raises: UserError for unknown tasks, DataError when a task's data cannot be had, saying what to
    put where.
    """
    check_tasks(names)
    kept = Unfinished(None, {}) if kept is None else kept
    from ttt_jax.eval.harness import TTTJaxLM

    values: dict[tuple[str, str], dict[str, Any]] = {}
    options = {"limit": limit, "fewshot": fewshot, "chat": chat, "seed": seed}
    build = cast(Any, make or TTTJaxLM)
    models = {
        mode: build(path, model=model, ttt=mode == "on", batch_size=batch_size, piece=piece)
        for mode in modes
    }
    # The tasks that make samples of a wanted length; all of them, until they are loaded.
    generated = list(names)
    # One length at a time: the harness applies `limit` to the samples of all lengths together.
    for length in sorted(lengths):
        manager, loaded = _load_all(generated, path, model.tokenizer, length, seed)
        items = [item for group in loaded.values() for item in group]
        for mode, lm in models.items():
            run = functools.partial(_run, lm, items, manager, **options)
            for task, metric, samples, value, error in kept.piece(
                ("tasks", *names, length, mode), run
            ):
                entry = values.setdefault(
                    (task, metric), {"task": task, "metric": metric, "samples": samples}
                )
                entry[mode] = {"value": value, "stderr": error}
        generated = [
            name for name, group in loaded.items() if any(map(_makes_samples, _leaves(group)))
        ]
        if not generated:
            break
    entries = [entry for entry in values.values() if all(mode in entry for mode in modes)]
    version = importlib.metadata.version("lm_eval")
    shown = {"limit": limit, "fewshot": fewshot, "chat": chat}
    return {"modes": list(modes), "version": version} | shown | {"entries": entries}


def _load_all(
    names: list[str], path: Path, tokenizer: Any, length: int, seed: int
) -> tuple[Any, dict[str, list[Any]]]:
    """Load tasks for samples of one length: the harness's manager, and name -> tasks.

    Raises: UserError.
    """
    TaskManager = importlib.import_module("lm_eval.tasks").TaskManager
    manager = TaskManager(metadata={"max_seq_lengths": [length], "tokenizer": str(path)})
    random.seed(seed)  # RULER draws its samples from the global generators
    np.random.seed(seed)
    with _ruler_tokenizer(path, tokenizer, length):
        loaded = {name: _load(manager, name) for name in names}
    for task in _leaves([item for group in loaded.values() for item in group]):
        _check_answers(task, length)
        _report_length(task, length)
    return manager, loaded


def _makes_samples(task: Any) -> bool:
    """Tell the tasks that make samples of a wanted length from those that have a data set."""
    return callable(task.config.custom_dataset)


def _run(
    lm: Any, items: list[Any], manager: Any, *, limit, fewshot, chat, seed
) -> list[tuple[Any, ...]]:
    """Run tasks: (task, metric, samples, value, standard error or None) of every metric."""
    found: Any = importlib.import_module("lm_eval").simple_evaluate(
        model=lm,
        tasks=items,
        task_manager=manager,
        num_fewshot=fewshot,
        limit=limit,
        apply_chat_template=chat,
        bootstrap_iters=1000,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=None,  # torch may not be there
        fewshot_random_seed=seed,
    )
    rows = []
    for task, metric, value, error in _values(found):
        if not math.isfinite(value):
            raise NotFiniteError(
                f"--tasks {task}: {metric} = {value}; leave the task out, or give more samples"
            )
        # One sample has no standard error.
        error = error if error is not None and math.isfinite(error) else None
        samples = found["n-samples"].get(task, {}).get("effective", 0)
        rows.append((task, metric, samples, value, error))
    return rows


def _leaves(items: list[Any]) -> list[Any]:
    """Return the tasks of tasks and groups."""
    return [
        task
        for item in items
        for task in (item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item])
    ]


def _check_answers(task: Any, length: int) -> None:
    """Refuse what RULER's ruler_cwe makes: samples without words to find where one with ten of them
    is too long.
    """
    if _makes_samples(task) and any(not doc.get("outputs", True) for doc in task.test_docs()):
        problem = f"its shortest sample is longer than {length} tokens of this model's tokenizer"
        raise UserError(
            f"--tasks {task.task_name}: {problem}; raise --lengths or leave the task out"
        )


def _report_length(task: Any, length: int) -> None:
    """Let RULER's tasks report any length, which name one metric for each of a few lengths, in the
    same way.
    """
    aggregations = task.aggregation()
    if _makes_samples(task) and "4096" in aggregations and str(length) not in aggregations:
        aggregations[str(length)] = aggregations["4096"]
        task.higher_is_better()[str(length)] = True


def _values(found: dict[str, Any]) -> Iterator[tuple[str, str, float, float | None]]:
    for task, metrics in found["results"].items():
        for name, value in metrics.items():
            metric, _, filter_name = name.partition(",")
            # RULER reports every length that exists, -1 for those that were not asked for.
            unused = metric.isdecimal() and value == -1
            if (
                not filter_name
                or metric.endswith("_stderr")
                or not isinstance(value, int | float)
                or unused
            ):
                continue
            error = metrics.get(f"{metric}_stderr,{filter_name}")
            metric = metric if filter_name == "none" else f"{metric} ({filter_name})"
            yield (
                task,
                metric,
                float(value),
                float(error) if isinstance(error, int | float) else None,
            )


def _load(manager: Any, name: str) -> list[Any]:
    """Return a task, or the tasks of a group."""
    try:
        loaded = manager.load([name])
        return list(loaded["groups"].values()) or list(loaded["tasks"].values())
    except UserError as error:
        raise UserError(f"--tasks {name}: {error}") from None
    except ImportError as error:
        raise UserError(
            f"--tasks {name}: needs a package that is missing ({reason_of(error, 300)}); {_SCARCE}"
        ) from None
    # A download may raise errors of OSError, requests, httpx, datasets or nltk.
    except Exception as error:
        raise _no_data(name, error) from None


def _no_data(name: str, error: Exception) -> UserError:
    reason = reason_of(error, 300)
    if isinstance(error, LookupError) and "punkt" in reason:
        fix = "put nltk's tokenizers/punkt_tab folder into ~/nltk_data/tokenizers/"
        return DataError(f"--tasks {name}: nltk's punkt_tab cannot be downloaded; {fix}")
    data_set = re.search(r"['\"]([\w.-]+/[\w.-]+)['\"]", reason)
    if data_set:
        folder = data_set.group(1)
        fix = (
            f"put its files (train, validation, test, each .jsonl or .parquet) into ./{folder}/ "
            "of the working folder"
        )
        return DataError(
            f"--tasks {name}: the data set {folder} cannot be downloaded ({reason}); {fix}"
        )
    host = re.search(r"host='([^']+)'", reason)
    if host:
        where = f"fetches {host.group(1)}, which cannot be reached, and takes no local file"
        return DataError(
            f"--tasks {name}: {where}; run it on a machine with network, or leave it out"
        )
    reason = f"{type(error).__name__}: {reason}"
    return DataError(
        f"--tasks {name}: could not be loaded ({reason}); see the task's README in lm_eval"
    )


@contextlib.contextmanager
def _ruler_tokenizer(path: Path, tokenizer: Any, length: int) -> Iterator[None]:
    """Give RULER the model's tokenizer, which it loads through transformers by the name `path`,
    whatever file that came from.
    """
    try:
        AutoTokenizer: Any = importlib.import_module("transformers").AutoTokenizer
    except ImportError:  # loading one of RULER's tasks says so
        yield
        return
    original: Any = AutoTokenizer.from_pretrained
    # RULER keeps tokenizers by name; this one is of one length
    for name, module in list(sys.modules.items()):
        if name.startswith("lm_eval.tasks.ruler.") and hasattr(module, "get_tokenizer"):
            module.get_tokenizer.cache_clear()

    def from_pretrained(name: Any, *args: Any, **kwargs: Any) -> Any:
        return (
            _TaskTokenizer(tokenizer, length)
            if str(name) == str(path)
            else original(name, *args, **kwargs)
        )

    AutoTokenizer.from_pretrained = from_pretrained
    try:
        yield
    finally:
        AutoTokenizer.from_pretrained = original


class _TaskTokenizer:
    """What RULER's tasks use of a transformers tokenizer, for samples of one length.

    A sample is made by removing words until it has that length. Where the shortest one is too long,
    two tasks of lm_eval 0.4.13 go on for ever, ruler_vt deaf to Ctrl-C too. They ask for the length
    of the shortest one first: that call raises UserError.
    """

    def __init__(self, tokenizer: Any, length: int) -> None:
        self._tokenizer, self._length = tokenizer, length
        self._example: int | None = None  # tokens of ruler_vt's worked example, once it is made

    def __call__(self, text: str, **kwargs: Any) -> SimpleNamespace:
        ids = self.encode(text)
        if text.startswith("Memorize and track the chain(s)"):
            self._check_variables(text, len(ids))
        if text.startswith("Read the following coded text") and "coded words. \nQuestion" in text:
            self._check_room(len(ids), self._length)
        return SimpleNamespace(input_ids=ids)

    def _check_variables(self, text: str, tokens: int) -> None:
        """Check ruler_vt: first the worked example, of 5 lines and more and at most 500 tokens,
        then samples of 10 lines and more.
        """
        lines, answer = text.count("There and back again."), 30
        if text.endswith("\n\n"):
            self._example = tokens
        elif self._example is None and lines == 5:
            self._check_room(tokens + answer, 500)
        elif self._example is not None and lines == 10:
            self._check_room(tokens + answer + self._example, self._length)

    def _check_room(self, tokens: int, room: int) -> None:
        if tokens > room:
            problem = f"has {tokens} tokens of this model's tokenizer, and room for {room}"
            fix = (
                "raise --lengths"
                if room == self._length
                else "leave the task out: the harness fixes this room"
            )
            raise UserError(
                f"its shortest {'sample' if room == self._length else 'example'} {problem}; {fix}"
            )

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int], **kwargs: Any) -> str:
        return self._tokenizer.decode(ids)
