"""`ttt-jax eval`: one evaluation from options to a result folder."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ttt_jax.errors import NotFiniteError, UserError
from ttt_jax.eval.unfinished import Unfinished
from ttt_jax.terminal import printable

if TYPE_CHECKING:
    from ttt_jax.config import MeshConfig
    from ttt_jax.memory.memory import Memory
    from ttt_jax.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Options:
    """What to evaluate; the command line's options (docs/evaluation.md).

    Fields:
      model: folder. dtype: of parameters and compute; None: float32 on CPUs, bfloat16 elsewhere.
      perplexity: data source, or None. lengths, block, documents: of the perplexity; `lengths` of
        the recall probe and the synthetic suite too, `documents` of the recall probe too.
      ttt: "on", "off" or "both". shuffled: the control; None: where it is possible.
      strict: perplexity with nothing but the fast weights of the text before, too.
      memory: files of memories, M[,M...]: perplexity with them, too.
      recall: data source of the recall probe, or None; passage: its tokens.
      tasks: harness tasks, and "synthetic". form, examples: of the synthetic suite.
      limit, fewshot, chat: of the harness.
      diagnostics, text_page: look at the first document; text_page colours it.
      mesh: sizes of the mesh to split the model over; None: one device.
    """

    model: Path
    dtype: str | None = None
    perplexity: str | None = None
    lengths: tuple[int, ...] = (2048, 4096)
    block: int | None = None
    documents: int | None = 64
    ttt: str = "both"
    shuffled: bool | None = None
    strict: bool = False
    memory: str | None = None
    recall: str | None = None
    passage: int = 256
    tasks: tuple[str, ...] = ()
    form: str = "ids"
    examples: int = 32
    limit: int | None = None
    fewshot: int | None = None
    chat: bool = False
    batch_size: int = 8
    piece: int | None = None
    seed: int = 0
    diagnostics: bool = False
    text_page: bool = False
    html_tokens: int = 8192
    mesh: MeshConfig | None = None


def parse_lengths(text: str) -> tuple[int, ...]:
    """Parse `2k,4k,1m` -> (2048, 4096, 1048576). Raises UserError."""
    lengths = []
    for word in text.replace(" ", "").lower().split(","):
        factor = {"k": 1 << 10, "m": 1 << 20}.get(word[-1:], 1)
        digits = word[:-1] if factor > 1 else word
        if not digits.isdecimal() or int(digits) < 1:
            raise UserError(
                f"--lengths {text}: {word!r} is not a number of tokens; write them as 2k,4k,16384"
            )
        lengths.append(int(digits) * factor)
    return tuple(sorted(set(lengths)))


def modes_of(ttt: str) -> tuple[str, ...]:
    return ("off", "on") if ttt == "both" else (ttt,)


def check(options: Options) -> None:
    """Check what can be checked without a model. Raises UserError."""
    from ttt_jax.eval.perplexity import check_lengths

    if not asks_something(options):
        raise UserError(
            "nothing to evaluate: give --perplexity DATA, --recall DATA or --tasks TASKS"
        )
    if options.mesh is not None:
        from ttt_jax.parallel.inference_mesh import check_rows

        check_rows(options.batch_size, options.mesh.data, "rows of --batch-size")
    if options.perplexity:
        check_lengths(options.lengths, options.block)
    if options.shuffled and (options.ttt != "both" or not options.perplexity):
        raise UserError(
            "--shuffled: is a control of --perplexity with --ttt both; drop it or change them"
        )
    if options.strict and (options.ttt != "both" or not options.perplexity):
        raise UserError(
            "--strict: is a mode of --perplexity with --ttt both; drop it or change them"
        )
    if options.memory and not options.perplexity:
        raise UserError("--memory: is a mode of --perplexity; give --perplexity DATA, or drop it")
    if (options.diagnostics or options.text_page) and not options.perplexity:
        raise UserError(
            "--diagnostics and --html look at the first document of --perplexity DATA; give it"
        )
    if harness_tasks(options):
        from ttt_jax.eval.harness_tasks import check_tasks

        check_tasks(harness_tasks(options))


def asks_something(options: Options) -> bool:
    return bool(options.perplexity or options.recall or options.tasks)


def harness_tasks(options: Options) -> list[str]:
    return [task for task in options.tasks if task != "synthetic"]


def evaluate(
    options: Options, out: Path | None = None, overwrite: bool = False
) -> tuple[dict[str, Any], str | None]:
    """Evaluate; return (results, the page of the coloured text or None).

    Args:
      out: keep what is finished in this folder, and go on behind what an interrupted start of the
        same command has kept there.
      overwrite: drop what another command has kept there.

    Raises: UserError, one line, for whatever the options get wrong; before anything is compiled
      where that can be known. NotFiniteError, and KeyboardInterrupt, whose messages say what is
      kept.
    """
    check(options)
    memory = _load_memory(options)
    about = _plain_options(options) | _code()
    if memory is not None:
        about |= {"memory_terms": [[term.key, str(term.weight)] for term in memory.terms]}
    Unfinished(out, about, overwrite)  # refuses another command before the model is loaded
    from ttt_jax.inference.watch import one_warning, warn_of_zero_targets
    from ttt_jax.pretrained.fingerprint import fingerprint

    begin = time.perf_counter()
    model = _load(options)
    if memory is not None:
        from ttt_jax.memory.fast_weights import check_belongs

        check_belongs(memory, model)
    dtype = model.runtime.dtype
    about |= {"compute_dtype": dtype, "parameters": fingerprint(model) if out is not None else None}
    kept = Unfinished(out, about, overwrite)
    if len(kept):
        where = printable(out)
        print(
            f"going on: {len(kept)} finished pieces of work are in {where}",
            file=sys.stderr,
            flush=True,
        )
    results: dict[str, Any] = {
        "model": str(options.model),
        "dtype": dtype,
        "options": _plain_options(options),
    }
    if memory is not None:
        results["memory"] = [source.to_json() for source in memory.sources]
    try:
        with one_warning():
            if options.ttt != "off":
                warn_of_zero_targets(model)
            text_html = _parts(options, model, memory, results, kept)
    except (KeyboardInterrupt, NotFiniteError) as error:
        if not len(kept):
            raise
        told = (
            f"{len(kept)} finished pieces of work are kept in {out}; the same command goes on "
            "behind them"
        )
        interrupted = isinstance(error, KeyboardInterrupt)
        raise type(error)(told if interrupted else f"{error}; {told}") from None
    from ttt_jax.config import to_dict
    from ttt_jax.run.provenance import provenance

    results |= provenance() | {
        "seconds": time.perf_counter() - begin,
        "config": to_dict(model.config),
    }
    return results, text_html


def _load(options: Options) -> Transformer:
    from ttt_jax.pretrained.load import load_model

    decodes = bool(harness_tasks(options))
    model = load_model(options.model, options.dtype, decodes=decodes, mesh=options.mesh)
    if not model.config.ttt.layers and options.ttt != "off":
        raise UserError(
            "--ttt: the model has no TTT layers (model.ttt.layers is empty); pass --ttt off"
        )
    return model


def _code() -> dict[str, Any]:
    """Return what else decides the figures: the commit and the version of jax."""
    import importlib.metadata

    from ttt_jax.run.provenance import commit

    return {"commit": commit(), "jax": importlib.metadata.version("jax")}


def _load_memory(options: Options) -> Memory | None:
    if options.memory is None:
        return None
    from ttt_jax.memory.memory import Memory

    return Memory.load_sum(options.memory)


def _parts(
    options: Options, model, memory: Memory | None, results: dict[str, Any], kept: Unfinished
) -> str | None:
    """Fill the results; returns the page of the coloured text or None."""
    text_html = None
    if options.perplexity:
        text_html = _perplexity(options, model, memory, results, kept)
    if options.recall:
        _recall(options, model, results, kept)
    if "synthetic" in options.tasks:
        _synthetic(options, model, results, kept)
    if harness_tasks(options):
        from ttt_jax.eval.harness_tasks import evaluate_tasks

        results["tasks"] = evaluate_tasks(
            model,
            options.model,
            harness_tasks(options),
            modes=modes_of(options.ttt),
            lengths=options.lengths,
            limit=options.limit,
            fewshot=options.fewshot,
            chat=options.chat,
            kept=kept,
            **_shared(options),
        )
    return text_html


def _shared(options: Options) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("batch_size", "piece", "seed")}


def _plain_options(options: Options) -> dict[str, Any]:
    return {
        key: str(value)
        if isinstance(value, Path)
        else list(value)
        if isinstance(value, tuple)
        else value
        for key, value in dataclasses.asdict(options).items()
    }


def _perplexity(
    options: Options, model, memory: Memory | None, results: dict[str, Any], kept: Unfinished
) -> str | None:
    from ttt_jax.display.progress import progress
    from ttt_jax.eval import diagnostics, perplexity
    from ttt_jax.eval.documents import choose, open_documents
    from ttt_jax.eval.page import text_page

    assert options.perplexity is not None
    corpus = open_documents(model, options.perplexity)
    documents = choose(corpus, max(options.lengths) + 1, options.documents)
    control = (
        options.shuffled
        if options.shuffled is not None
        else options.ttt == "both" and len(documents) > 1
    )
    modes = modes_of(options.ttt) + (("shuffled",) if control else ())
    modes += ("strict",) if options.strict else ()
    if memory is not None:
        modes = ("off", "memory", *modes[1:]) if modes[0] == "off" else ("memory", *modes)
    perplexity.check_modes(model, modes, len(documents))
    total = perplexity.tokens_to_read(options.lengths, options.block, modes) * len(documents)
    with progress("perplexity", total, "tokens") as advance_to:
        begin = time.perf_counter()
        results["perplexity"] = perplexity.evaluate(
            model,
            corpus,
            documents,
            lengths=options.lengths,
            block=options.block,
            modes=modes,
            memory=memory,
            on_progress=advance_to,
            kept=kept,
            **_shared(options),
        )
        results["perplexity"]["seconds"] = time.perf_counter() - begin
    if not (options.diagnostics or options.text_page):
        return None
    ids = np.asarray(
        corpus.tokens(documents[0], 0, min(int(corpus.length_N[documents[0]]), options.html_tokens))
    )
    part, pieces = diagnostics.diagnose(model, ids.astype(np.int32), piece=options.piece)
    results["diagnostics"] = part
    return text_page(pieces, f"{options.model}: where TTT helps") if options.text_page else None


def _recall(options: Options, model, results: dict[str, Any], kept: Unfinished) -> None:
    from ttt_jax.display.progress import progress
    from ttt_jax.eval import recall
    from ttt_jax.eval.documents import open_documents

    assert options.recall is not None
    recall.check_recall(model.config, options.lengths, options.passage)
    corpus = open_documents(model, options.recall, "--recall")
    documents = recall.choose_documents(corpus, options.lengths, options.passage, options.documents)
    modes = modes_of(options.ttt)
    total = 2 * sum(options.lengths) * len(modes) * len(documents)
    with progress("recall", total, "tokens") as advance_to:
        results["recall"] = recall.evaluate(
            model,
            corpus,
            documents,
            lengths=options.lengths,
            passage=options.passage,
            modes=modes,
            on_progress=advance_to,
            kept=kept,
            **_shared(options),
        )


def _synthetic(options: Options, model, results: dict[str, Any], kept: Unfinished) -> None:
    from ttt_jax.display.progress import progress
    from ttt_jax.eval import synthetic

    modes = modes_of(options.ttt)
    total = synthetic.count_sequences(
        options.lengths, synthetic.TASKS, options.examples, len(modes)
    )
    with progress("synthetic", total, "sequences") as advance_to:
        results["synthetic"] = synthetic.evaluate(
            model,
            lengths=options.lengths,
            ttt=modes,
            examples=options.examples,
            form=options.form,
            on_progress=advance_to,
            kept=kept,
            **_shared(options),
        )


def compare(folders: Sequence[Path], options: Options | None, out: Path | None, overwrite: bool):
    """Compare result folders, or models evaluated with the same options (their results go to OUT/a,
    OUT/b, ...).

    Returns: the tables of the comparison.
    Raises: UserError when they have nothing in common, or a model is given without anything to
    evaluate.
    """
    from ttt_jax.eval import output

    if len(folders) > len(output.LETTERS):
        raise UserError(f"--compare: {len(folders)} results; give at most {len(output.LETTERS)}")
    files, found = {}, []
    for name, folder in zip(output.LETTERS.lower(), folders, strict=False):
        if (folder / output.RESULTS).is_file():
            found.append(output.read_results(folder))
            continue
        if options is None or not asks_something(options):
            raise UserError(
                f"--compare {folder}: holds no {output.RESULTS}; give the --out folder of an "
                "evaluation, or a model and --perplexity DATA, --recall DATA or --tasks TASKS"
            )
        results, text_html = evaluate(
            dataclasses.replace(options, model=folder), out and out / name, overwrite
        )
        files |= {
            f"{name}/{file}": text for file, text in output.files_of(results, text_html).items()
        }
        found.append(results)
    compared, made = output.comparison(*found)
    if out is not None:
        output.write_folder(out, files | output.comparison_files(found, compared, made), overwrite)
    return made
