"""The config of a run that starts from a checkpoint: `model` and the tokenizer are the
checkpoint's, and only what a user or a preset writes differs.

A run that has begun remembers them in its own `config.yaml`. So it goes on without the checkpoint,
and with what it was started with.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ttt_jax.config import (
    Config,
    ModelConfig,
    Written,
    make_config,
    parse_overrides,
    preset_names,
    read_written,
    to_dict,
)
from ttt_jax.config.inner_rate import check_rule
from ttt_jax.config.suggest import ROW, suggestions
from ttt_jax.config.written import AUTO, RATE, merged, value_at
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.pretrained.cpu_proposal import cpu_proposal
from ttt_jax.pretrained.model_changes import compare_models
from ttt_jax.run.folder import CONFIG_FILE, flatten, read_run_config

DEFAULT, CONTINUAL = "default", "continual"  # presets, where none is named
FIELD = "config field init_from"


class Start(NamedTuple):
    """Fields: the config, whether its inner learning rate is still to be measured, lines for the
    user about what a preset had to give up, and what is started on a CPU if that differs.
    """

    config: Config
    open_rate: bool
    remarks: tuple[str, ...] = ()
    on_cpu: Start | None = None

    def here(self) -> Start:
        """Return what is started on the devices at hand, which jax looks for here."""
        import jax

        on_cpu = jax.default_backend() == "cpu" and jax.process_count() == 1
        return self.on_cpu if on_cpu and self.on_cpu is not None else self


class _Running(NamedTuple):
    """Trees of a run that has begun.

    Fields: what came from its checkpoint; what the preset `continual` proposed for its devices, or
    the user wrote there.
    """

    taken: dict[str, Any]
    proposed: dict[str, Any]


def load_start(path: str | Path | None, overrides: Sequence[str]) -> Start:
    """Read the config of a training run, the checkpoint's part included.

    Args: as of `read_written`; without a `path` it is the preset `default`, or `continual` when
      `init_from` is given.

    Raises: ConfigError or CheckpointError, one line.
    """
    if path is None:
        given = dict(parse_overrides(overrides)).get("init_from")
        path = DEFAULT if given is None else CONTINUAL
    written = read_written(path, overrides)
    running = _of_running(written)
    if running is None:
        source = _of_source(written)
        start = _start(written, *source)
        return start._replace(on_cpu=_on_cpu(written, *source, start.config))
    if written.get(RATE) == AUTO:  # it was measured when the run began
        written = written.without(RATE)
    if _is_continual(written):  # which proposed what its devices could do
        written = written.proposing(running.proposed)
    return _start(written, running.taken, None)


def load_start_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config as `load_start` does, for what needs no weights: a plan, a benchmark.

    Of the models that presets name the architecture is known, so they need not be there. The inner
    learning rate is the default where it would be measured.
    """
    written = read_written(path, overrides)
    return _start(written, *_of_source(written, weights=False)).config


def config_to_show(path: str | Path) -> Config:
    """Read a preset for its `--help`: the model is the checkpoint's where that is known or there,
    else the defaults.
    """
    try:
        return load_start_config(path)
    except CheckpointError:
        return make_config(read_written(path).without("init_from"))


def _start(
    written: Written, base: dict[str, Any], found: ModelConfig | None, row: int = ROW
) -> Start:
    """Make the config of what is written over `base`.

    Args:
      found: the checkpoint's model, for a new run; suggestions then go over `base`.
      row: T of the suggested rows.
    """
    if found is not None:
        base = merged(base, suggestions(written, found, row))
    config = make_config(written, base)
    if found is not None:
        assert config.init_from is not None
        compare_models(config.model, found, config.init_from)  # before any data is read
    auto = config.init_from is not None and value_at(written.over(base), RATE) == AUTO
    open_rate = auto and bool(config.model.ttt.layers) and config.model.ttt.write != "ridge"
    if open_rate:
        check_rule(config.model.ttt)
    return Start(config, open_rate, (*written.remarks(), *_one_chunk(config)))


def _one_chunk(config: Config) -> tuple[str, ...]:
    """Return a line for the user about rows in which no chunk comes after another."""
    T, C = config.data.seq_len, config.model.ttt.chunk_size
    if not config.model.ttt.layers or T > C:
        return ()
    return (
        f"data.seq_len = {T} holds one chunk of model.ttt.chunk_size = {C}: nothing that it writes "
        "is ever read, so this trains without TTT; make rows longer or chunks smaller",
    )


def _on_cpu(
    written: Written, base: dict[str, Any], found: ModelConfig | None, elsewhere: Config
) -> Start | None:
    """Return what is started on a CPU, with a remark that names every difference; None: the same as
    elsewhere.
    """
    if found is None or not _is_continual(written):
        return None
    proposal = cpu_proposal(written, found)
    if proposal is None:
        return None
    start = _start(written.proposing(proposal.preset), base, found, proposal.row)
    here, there = (flatten(to_dict(config)) for config in (start.config, elsewhere))
    differ = [
        f"{name} {here[name]} (elsewhere {there[name]})"
        for name in here
        if here[name] != there[name]
    ]
    remark = (
        f"init_from {elsewhere.init_from}: jax finds a CPU only, so steps are small: "
        f"{', '.join(differ)}; what you set stays"
    )
    return start._replace(remarks=(*start.remarks, remark))


def _is_continual(written: Written) -> bool:
    """Say whether the preset is that of any checkpoint and any device. Others are recipes."""
    return written.preset.get("name") == CONTINUAL


def _of_running(written: Written) -> _Running | None:
    """Return what a run of this `init_from` was started with; None: there is none."""
    tree, default = written.over({}), Config()
    place = [tree.get(name, getattr(default, name)) for name in ("runs_dir", "name")]
    source = tree.get("init_from")
    if source is None or not all(isinstance(part, str) for part in place):
        return None
    folder = Path(*place)
    if not os.path.lexists(folder / CONFIG_FILE):
        return None
    try:
        before = to_dict(read_run_config(folder))
    except CheckpointError:
        return None  # said when the folder is checked
    if before["init_from"] != source:
        return None  # refused when the folder is checked
    data = {name: before["data"][name] for name in ("tokenizer", "seq_len")}
    proposed = {
        "data": {"batch_size": before["data"]["batch_size"]},
        "eval": {"rows": before["eval"]["rows"]},
    }
    return _Running({"model": before["model"], "data": data}, proposed)


def _of_source(written: Written, weights: bool = True) -> tuple[dict[str, Any], ModelConfig | None]:
    """Return what a run takes from the checkpoint that it begins with, suggestions left out, and
    the checkpoint's model if that is known.
    """
    source = written.get("init_from")
    if source is None:
        return {}, None
    if not isinstance(source, str):
        word = str(source)[:60].lower()
        raise ConfigError(
            f"{FIELD} = {word}: no folder and no name; write ./no for a folder that is called so, "
            "and null for none"
        )
    if not weights:
        model, tokenizer = _architecture(source), source
    else:
        model, tokenizer = _read(source)
    if model is None and written.has_model():
        return {}, None  # parameters alone, of a model that the user describes
    if model is None:
        raise CheckpointError(
            f"{FIELD} = {source!r}: holds no config that says what model it is; give a Hugging "
            "Face, converted or run folder, or write every field of model"
        )
    return {"model": to_dict(model), "data": {"tokenizer": tokenizer}}, model


def _read(source: str) -> tuple[ModelConfig | None, str]:
    """Read the model's config, and say where its tokenizer is."""
    # Not before: jax comes with them, and a second job is refused at once.
    from ttt_jax.pretrained.hub import model_folder
    from ttt_jax.pretrained.load import source_config, source_tokenizer

    folder = model_folder(source, FIELD, weights=False)
    return source_config(folder), source_tokenizer(folder, source)


def _architecture(source: str) -> ModelConfig | None:
    """Find out what model a checkpoint has that need not be there."""
    from ttt_jax.pretrained.hf_config import config_from_hf
    from ttt_jax.pretrained.published import PUBLISHED

    folder = Path(source).expanduser()
    if not folder.is_dir() and folder.name in PUBLISHED:
        return config_from_hf(PUBLISHED[folder.name], folder.name)
    if not folder.is_dir() and folder.name in preset_names():  # the run of another preset
        return load_start_config(folder.name).model
    return _read(source)[0]
