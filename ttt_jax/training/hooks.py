"""What looks at the model of a run every so many steps, beside the loop and outside of its
program.

A hook is a function and a number of steps. The job calls it where a step is logged, puts its
scalars into the row of that step, and shows its text. So what is measured or written while a run
trains is added where it is made, and neither the loop nor the step knows of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Seen(NamedTuple):
    """What a hook has to say about a step.

    Fields:
      scalars: for the step's row of `metrics.jsonl`.
      text: for the terminal; may have several lines.
      samples: texts that the model wrote, records of `samples.jsonl`.
    """

    scalars: dict[str, float]
    text: str = ""
    samples: tuple[dict[str, Any], ...] = ()


class Hook(NamedTuple):
    """Looks at the model after every `every`-th step; 0: never.

    Fields:
      look: (finished steps, the model after them) -> what it has seen. All processes call it
        together. It keeps no part of the model: the next step takes its memory.
    """

    every: int
    look: Callable[[int, Any], Seen]
