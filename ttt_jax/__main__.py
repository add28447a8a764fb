"""`python -m ttt_jax`, same as the console script `ttt-jax`."""

import sys

from ttt_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
