"""`ttt-jax train` among the other commands. `ttt_jax/__main__.py` runs the job itself before it
comes to this file, which waits for click."""

from __future__ import annotations

import click


@click.command(
    add_help_option=False,  # the job has its own
    context_settings={"ignore_unknown_options": True},
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def train(words: tuple[str, ...]) -> int:
    """Train a model: [PRESET|FILE] [--FIELD VALUE ...], as train.py."""
    from ttt_jax.train import main

    return main(list(words))
