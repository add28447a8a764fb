"""`python -m ttt_jax`, and the console script `ttt-jax`: light, so that a Ctrl-C while it starts finds somebody at home."""

import sys


def main() -> int:
    """Run the command of this process; returns its exit code."""
    try:
        from ttt_jax.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
