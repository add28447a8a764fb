"""`ttt-jax memory`: read texts into memories, look at them, add and subtract, truncate.

How they go into other engines is in memory_export.py.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ttt_jax.command.io import as_factor, keep_inputs
from ttt_jax.command.memory_export import base, lora, merge
from ttt_jax.command.options import DTYPE, EXISTING, PIECE, Command, Group, examples
from ttt_jax.errors import UserError
from ttt_jax.process.output_lock import one_writer
from ttt_jax.terminal import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ttt_jax.inference.memory_reading import Text
    from ttt_jax.memory.memory import Memory
    from ttt_jax.model.transformer import Transformer

OUT = click.option("--out", required=True, type=EXISTING, help="File of the result.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an existing result.")
COLLAPSE = click.option(
    "--collapse",
    is_flag=True,
    help="One term of all: smaller, and nothing can be taken out bit for bit any more.",
)
MEMORY = click.argument("path", metavar="M", type=EXISTING)
SUFFIX = ".memory"  # of the files of --each


@click.command(
    cls=Command,
    epilog=examples(
        "ttt-jax memory read runs/books book.txt --out book.memory",
        "ttt-jax memory read runs/books a.txt b.txt c.npy --out all.memory",
        "ttt-jax memory read checkpoints/smollm2 books.jsonl --each --context 8192 --out memories",
    ),
)
@click.argument("folder", metavar="MODEL", type=EXISTING)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=EXISTING)
@click.option("--out", required=True, type=EXISTING, help="File, or folder with --each.")
@click.option("--each", is_flag=True, help="One memory per text, in the folder --out.")
@COLLAPSE
@click.option(
    "--context",
    type=click.IntRange(1),
    help="Attention starts anew every so many tokens; full attention needs it for long texts.",
)
@click.option("--batch-size", type=click.IntRange(1), default=8, help="Texts read at once.")
@OVERWRITE
@DTYPE
@PIECE
def read(folder, files, out, each, collapse, context, batch_size, overwrite, dtype, piece) -> None:
    """Read texts, or token ids in .npy, and write what they teach.

    Each text is read from a fresh state. The memories of several are added, as terms that can be
    taken out again. With several devices each reads its share of the texts.
    """
    if each and collapse:
        raise click.UsageError("--collapse is for one memory of all texts; drop it, or --each")
    _open_out(out, overwrite, each)
    keep_inputs(out, "--out", *files)

    from ttt_jax.display.progress import progress
    from ttt_jax.inference.memory_reading import read_texts
    from ttt_jax.pretrained.load import load_model

    model = load_model(folder, dtype)
    texts = [text for file in files for text in _texts(model, file)]
    model = _over_devices(model, len(texts))
    total, begin = sum(len(text.ids) for text in texts), time.perf_counter()
    options = {"batch_size": batch_size, "piece": piece, "context": context}
    seen: list[tuple[int, float]] = []  # tokens that are read, and when
    with progress("reading", total, "tokens") as advance_to:

        def note(tokens: int) -> None:
            seen.append((tokens, time.perf_counter()))
            advance_to(tokens)

        found = read_texts(model, texts, on_progress=note, **options)
        told = _save_each(found, out, overwrite) if each else _save_sum(found, out, collapse)
    end = time.perf_counter()
    for i in range(len(texts)):
        print(printable(told[i]))
    rate = f"{total / (end - begin):,.0f} tokens/s with compilation"
    if len(seen) > 1 and end > seen[0][1]:
        after = (seen[-1][0] - seen[0][0]) / (end - seen[0][1])
        rate += f", {after:,.0f} after the first piece"
    print(printable(f"{total:,} tokens in {end - begin:.1f} s, {rate}: {out}"))


def _texts(model: Transformer, path: Path) -> list[Text]:
    """The documents of a file; token ids stay on the disk."""
    import hashlib

    from ttt_jax.eval.documents import open_documents
    from ttt_jax.inference.memory_reading import Text

    corpus = open_documents(model, path, "FILE")
    digest = None
    if path.is_file():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    count = len(corpus)
    names = [path.name] if count == 1 else [f"{path.name}#{i}" for i in range(count)]
    return [Text(name, _Document(corpus, i), digest) for i, name in enumerate(names)]


class _Document:
    """A document of a corpus as a sequence of token ids."""

    def __init__(self, corpus: Any, number: int) -> None:
        self.corpus, self.number = corpus, number

    def __len__(self) -> int:
        return int(self.corpus.length_N[self.number])

    def __getitem__(self, place: slice):
        first, last, _ = place.indices(len(self))
        return self.corpus.tokens(self.number, first, max(last - first, 0))


def _over_devices(model: Transformer, texts: int) -> Transformer:
    """The model on as many devices as there are texts for."""
    import jax

    from ttt_jax.config import MeshConfig
    from ttt_jax.inference.memory_reading import on_mesh
    from ttt_jax.parallel.mesh import make_mesh

    devices = jax.local_devices()[: max(texts, 1)]
    if len(devices) == 1:
        return model
    return on_mesh(model, make_mesh(MeshConfig(data=-1, fsdp=1), devices))


def _save_sum(found: Iterator[tuple[int, Memory]], out: Path, collapse: bool) -> dict[int, str]:
    """Write the sum of memories as they come; returns a line about each."""
    total, told = None, {}
    for i, memory in found:
        told[i] = _about(memory)
        total = memory if total is None else _maybe_collapsed(total + memory, collapse)
    assert total is not None
    total.save(out)
    return told


def _save_each(found: Iterator[tuple[int, Memory]], out: Path, overwrite: bool) -> dict[int, str]:
    """Write each memory as it comes; returns a line about each."""
    from ttt_jax.files.new_folder import new_folder

    told = {}
    try:
        with new_folder(out, overwrite) as folder:
            for i, memory in found:
                told[i] = _about(memory)
                # A file's name has 255 bytes at most.
                name = os.fsencode(memory.sources[0].name)[:200].decode("utf-8", "ignore")
                memory.save(folder / f"{i:04d}-{name}{SUFFIX}")
    except OSError as error:
        raise UserError(
            f"--out {out}: could not be written ({error}); free space or choose another folder"
        ) from None
    return told


def _about(memory: Memory) -> str:
    import numpy as np

    (source,) = memory.sources
    ratio = max(np.linalg.norm(memory.dW(i)) / (memory.slow_norms[i] or 1) for i in memory.layers)
    told = f"{source.name}: {source.tokens:,} tokens, {source.written:,} of them in whole chunks"
    if not source.written:
        told += "; shorter than a chunk, it writes nothing"
    elif not ratio:
        told += "; NOTHING WAS WRITTEN, every dW is zero"
    return f"{told}; largest ||dW||/||W|| {ratio:.3g}"


# ------------------------------------------------------------------------------------------ looking


@click.command(
    cls=Command, epilog=examples("ttt-jax memory info book.memory", "ttt-jax memory info M --json")
)
@MEMORY
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def info(path, as_json) -> None:
    """Norms, ratio to ||W||, effective rank, energy by rank, and where it comes from."""
    from ttt_jax.display.progress import progress
    from ttt_jax.display.tables import print_tables
    from ttt_jax.memory.description import describe, description_tables

    memory = load(path)
    with progress("info", len(memory.layers), "layers") as advance_to:
        about = describe(memory, on_layer=advance_to)
    if as_json:
        print(json.dumps(about, allow_nan=False))
    else:
        print_tables(description_tables(about, str(path)))


@click.command(cls=Command, epilog=examples("ttt-jax memory diff a.memory b.memory"))
@click.argument("first", metavar="M1", type=EXISTING)
@click.argument("second", metavar="M2", type=EXISTING)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def diff(first, second, as_json) -> None:
    """How far two memories are apart, layer by layer, and which sources only one has."""
    from ttt_jax.display.tables import print_tables
    from ttt_jax.memory.description import compare, comparison_tables

    about = compare(load(first), load(second))
    if as_json:
        print(json.dumps(about, allow_nan=False))
    else:
        print_tables(comparison_tables(about, str(first), str(second)))


# ----------------------------------------------------------------------------------------- changing


@click.command(cls=Command, epilog=examples("ttt-jax memory add a.memory b.memory --out c.memory"))
@click.argument("paths", metavar="M...", nargs=-1, required=True, type=EXISTING)
@OUT
@COLLAPSE
@OVERWRITE
def add(paths, out, collapse, overwrite) -> None:
    """Add memories of one model. Each stays a term that can be taken out again."""
    _open_out(out, overwrite)
    memories = [load(path) for path in paths]
    _write(_maybe_collapsed(sum(memories[1:], memories[0]), collapse), out)


@click.command(
    cls=Command,
    epilog=examples(
        "ttt-jax memory sub all.memory b.memory --out without_b.memory",
        "ttt-jax memory sub all.memory --source b.txt --out without_b.memory",
    ),
)
@MEMORY
@click.argument("others", metavar="[M...]", nargs=-1, type=EXISTING)
@click.option("--source", multiple=True, help="Take out what this source wrote: name or hash.")
@OUT
@COLLAPSE
@OVERWRITE
def sub(path, others, source, out, collapse, overwrite) -> None:
    """Subtract memories, or take out a source.

    What is a term of the first comes out bit for bit. Anything else is subtracted as numbers, and a
    line says so.
    """
    if not others and not source:
        raise click.UsageError("nothing to subtract: give further memories, or --source NAME")
    _open_out(out, overwrite)
    memory = load(path)
    for name in source:
        memory = memory.without(name)
    for other_path in others:
        other = load(other_path)
        known = {term.key for term in memory.terms}
        if any(term.key not in known for term in other.terms):
            print(
                printable(
                    f"note: {other_path} is not among the terms of {path}: it is subtracted as "
                    "numbers, and its terms stay with a negative weight"
                )
            )
        memory = memory - other
    _write(_maybe_collapsed(memory, collapse), out)


@click.command(
    cls=Command,
    context_settings={"ignore_unknown_options": True},  # -0.5 is no option
    epilog=examples("ttt-jax memory scale book.memory 0.5 --out half.memory"),
)
@MEMORY
@click.argument("factor", metavar="FACTOR")
@OUT
@OVERWRITE
def scale(path, factor, out, overwrite) -> None:
    """Multiply a memory by a number such as 0.5, -1 or 1/3, exactly."""
    weight = as_factor(factor)
    _open_out(out, overwrite)
    _write(weight * load(path), out)


@click.command(
    cls=Command, epilog=examples("ttt-jax memory truncate book.memory --rank 32 --out small.memory")
)
@MEMORY
@click.option("--rank", required=True, type=int, help="Of the factors that are kept.")
@OUT
@OVERWRITE
def truncate(path, rank, out, overwrite) -> None:
    """Keep the best factors of a rank: a smaller file, of one term."""
    _open_out(out, overwrite)
    memory = load(path)
    memory.check_rank(rank)
    _write(memory.truncate(rank), out)


# ------------------------------------------------------------------------------------------- shared


def load(path: Path) -> Memory:
    from ttt_jax.memory.memory import Memory

    return Memory.load(path)


def _open_out(out: Path, overwrite: bool, folder: bool = False) -> None:
    """Take the output for the rest of the command. Raises UserError when it exists and may not be
    replaced.

    Args:
      folder: it is to be a folder of memories.
    """
    click.get_current_context().with_resource(one_writer(out, "--out"))
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise UserError(f"--out {out}: exists already; choose another one or pass --overwrite")
    if not folder and out.is_dir():
        raise UserError(f"--out {out}: is a folder; choose a file")
    if folder and not (out.is_dir() and all(p.suffix == SUFFIX for p in out.iterdir())):
        raise UserError(
            f"--out {out}: --overwrite replaces folders of memories only; choose another one"
        )


def _maybe_collapsed(memory: Memory, collapse: bool) -> Memory:
    return memory.collapse() if collapse else memory


def _write(memory: Memory, out: Path) -> None:
    memory.save(out)
    print(printable(f"{memory}: {out}"))


@click.group(
    cls=Group,
    commands=[read, info, add, sub, scale, truncate, diff, merge, base, lora],
    epilog=examples(
        "ttt-jax memory read runs/books a.txt --out a.memory",
        "ttt-jax memory sub all.memory a.memory --out others.memory",
        "ttt-jax memory lora a.memory adapter --rank 32",
    ),
)
def memory() -> None:
    """What texts teach, as files: read, change, compare, and take into other engines."""
