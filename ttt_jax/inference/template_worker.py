"""The process in which a chat template runs; chat_template.py starts it, by this file's name. Needs
jinja2 alone.

It speaks frames of JSON: eight bytes of length, then an object. First it says that it is ready;
then it takes the template, and after that one conversation at a time. A template is a program of
somebody else: it runs in jinja2's immutable sandbox, with a limit on memory, on processor time for
each frame, and on what it may write (nothing but its answers).
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from typing import IO, Any, NoReturn

MEMORY_BYTES = 512 << 20  # of address space; Python and jinja2 take about 40 MB of it
SECONDS = 10  # of processor time for one frame; whoever waits for the answer has a clock of his own
MAX_TEXT = 64 << 20  # characters of a rendered prompt


class Refusal(Exception):
    """The template called raise_exception."""


def write_frame(file: IO[bytes], tree: dict[str, Any]) -> None:
    """Write a length and an object."""
    data = json.dumps(tree).encode()
    file.write(len(data).to_bytes(8, "little") + data)
    file.flush()


def read_frame(file: IO[bytes], limit: int = 1 << 32) -> dict[str, Any] | None:
    """Read an object; None at the end of the file. Raises ValueError for one larger than
    `limit`.
    """
    head = file.read(8)
    size = int.from_bytes(head, "little")
    if len(head) < 8 or size > limit:
        if len(head) == 8:
            raise ValueError(f"a frame of {size} bytes")
        return None
    data = file.read(size)
    return json.loads(data) if len(data) == size else None


def _limit(kind: int, value: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # some systems know a limit by name only
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def _limit_frame() -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + SECONDS + 1)


def _refuse(message: Any) -> NoReturn:
    raise Refusal(str(message)[:500])


def _environment() -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # pyright: ignore[reportMissingImports]

    # As transformers sets it up, which templates are written for.
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    found.globals["raise_exception"] = _refuse
    found.filters["tojson"] = lambda value, **kwargs: json.dumps(
        value, ensure_ascii=False, **kwargs
    )
    return found


def main() -> None:
    """Answer frames until there are no more."""
    source, out = sys.stdin.buffer, sys.stdout.buffer
    environment = _environment()
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    write_frame(out, {"ready": True})
    template = None
    while (frame := read_frame(source)) is not None:
        _limit_frame()
        try:
            if template is None:
                template = environment.from_string(frame["template"])
                answer: dict[str, Any] = {"ready": True}
            else:
                text = template.render(**frame["variables"])
                if len(text) > MAX_TEXT:
                    _refuse(f"gives {len(text)} characters; at most {MAX_TEXT} are taken")
                answer = {"text": text}
        except Refusal as error:
            answer = {"refused": str(error)}
        except Exception as error:  # a template can raise whatever Python can
            answer = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        write_frame(out, answer)


if __name__ == "__main__":
    main()
