"""The one exception family that a user is meant to see.

Every error caused by a config, an argument, a data file or a checkpoint is a `UserError` whose
message is one line that names the field, the value and the fix. Command lines print it and exit
with code 2 (1 for what went wrong while computing). Anything else is a bug; `ttt-jax` shows its
traceback with TTT_JAX_TRACEBACK=1.
"""

from __future__ import annotations

from typing import Any

from ttt_jax.terminal import printable


class UserError(ValueError):
    """Something the user can fix. The message is one line: what, its value, and what to do."""

    def __init__(self, message: str) -> None:
        # A value that is quoted may hold line breaks and escape codes, and could pass for another
        # message.
        super().__init__(printable(message))


class ConfigError(UserError):
    """A configuration field is unknown, malformed or contradicts another one."""


class DataError(UserError):
    """A data source is missing, empty, unreadable or does not fit the model."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or belongs to another model."""


class TrainingError(UserError):
    """Training cannot go on (for instance a loss that is not finite)."""


class NotFiniteError(UserError):
    """A model computed numbers that are not finite.

    Fields:
      partial: what was computed before, as the raising function says; None where it says nothing.
    """

    partial: Any = None


class VerificationError(UserError):
    """Two models that should compute the same do not."""
