"""`python -m ttt_jax`, and the console script `ttt-jax`: light, so that a Ctrl-C while it starts
finds somebody at home."""

import os
import sys
from typing import NoReturn


def main() -> int:
    """Run the command of this process; returns its exit code, unless a signal ends it."""
    try:
        if sys.argv[1:2] == ["train"]:
            _train(sys.argv[2:])
        from ttt_jax.command.cli import main as run

        code = run()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        code = 130
    if code > 128:
        # What runs in other threads (a compilation, a write) has not been waited for, and would
        # crash while Python shuts down.
        sys.stderr.flush()
        os._exit(code)
    return code


def _train(words: list[str]) -> NoReturn:
    """Be `train.py`, which handles signals in its own way from its first import on."""
    from ttt_jax.process.signals import StopSignal, end_process
    from ttt_jax.train import main as train

    end_process(train(words, StopSignal(last=True)))


if __name__ == "__main__":
    sys.exit(main())
