"""Chat templates: small programs in jinja2's language that come with a model and turn a
conversation into a prompt.

They are somebody else's programs, so they run in a process of their own (template_worker.py) with
limits on memory, time and output. jinja2's sandbox alone keeps a template from Python's objects and
bounds `range`, but not time (two nested loops) nor memory (`'x' * 10 ** 10` is one operation,
inside C, which no check or signal in this process could interrupt). A process can be killed. It is
started once for a template and kept, since a harness renders thousands of prompts.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from ttt_jax.errors import CheckpointError, UserError
from ttt_jax.files.reading import (
    MAX_TEMPLATE_BYTES,
    companion_fields,
    find_companion,
    read_text,
    show,
)
from ttt_jax.inference import template_worker
from ttt_jax.pretrained.load import run_folder

START_SECONDS = 60.0  # to start Python and import jinja2, on a busy machine
RENDER_SECONDS = 10.0  # templates in use take milliseconds


def find_template(folder: Path | None, settings: dict[str, Any], name: str = "default") -> str:
    """Find a model's template: in its tokenizer's settings, else in `chat_template.jinja`.

    Args:
      folder: the model's; None: there are only the settings.
      settings: the fields of tokenizer_config.json.
      name: which one, where the settings hold several.

    Raises: UserError when there is none (of this name), CheckpointError when it is malformed or too
    long.
    """
    found = settings.get("chat_template")
    if (
        found is None
        and folder is not None
        and (file := find_companion(folder, "chat_template.jinja")) is not None
    ):
        return read_text(file, MAX_TEMPLATE_BYTES, CheckpointError)
    if isinstance(found, list):
        pairs = [
            (entry.get("name"), entry.get("template")) for entry in found if isinstance(entry, dict)
        ]
        named = {known: template for known, template in pairs if isinstance(known, str)}
        if name not in named:
            known = show(", ".join(sorted(named)))
            raise UserError(
                f"chat template {name!r}: the model has {known or 'none with a name'}; name one "
                "of them"
            )
        found = named[name]
        if not isinstance(found, str):
            raise CheckpointError(
                f"{folder}: chat template {name!r} is no text; fix tokenizer_config.json"
            )
    if not isinstance(found, str):
        raise UserError(
            f"--chat: {folder} has no chat_template in tokenizer_config.json; add it or drop --chat"
        )
    if len(found) > MAX_TEMPLATE_BYTES:
        size = f"{len(found)} characters; at most {MAX_TEMPLATE_BYTES} are read"
        raise CheckpointError(f"{folder}: its chat_template has {size}")
    return found


def special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Return the variables that templates expect for begin and end tokens: `bos_token`,
    `eos_token`, ...
    """
    fields = {name: value for name, value in settings.items() if name.endswith("_token")}
    fields = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in fields.items()
    }
    return {name: value for name, value in fields.items() if isinstance(value, str)}


def template_of(folder: Path) -> ChatTemplate | None:
    """The chat template of a model's folder, or None when it has none (or is no folder). Raises
    UserError for one that is malformed.
    """
    if not folder.is_dir():
        return None
    folder = run_folder(folder) or folder
    settings = companion_fields(folder, "tokenizer_config.json")
    named = settings.get("chat_template")
    if named is None and find_companion(folder, "chat_template.jinja") is None:
        return None
    return ChatTemplate(find_template(folder, settings), special_tokens(settings))


class ChatTemplate:
    """A template, ready to render. Its process starts with the first prompt and ends with this
    object.
    """

    def __init__(
        self, source: str, special: dict[str, str], seconds: float = RENDER_SECONDS
    ) -> None:
        """Keep the template.

        Args:
          source: the text of the template.
          special: see `special_tokens`.
          seconds: for one prompt, and for reading the template.
        """
        self.source = source
        self._special, self._seconds = special, seconds
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """Put messages into the template; without `add_generation_prompt` the last one is left
        open, to be continued.

        Raises: UserError, one line, when the template fails, refuses, or passes its limits.
        """
        process = self._process or self._start()
        variables = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            **self._special,
        }
        text = self._ask(process, {"variables": variables}, self._seconds).get("text")
        if not isinstance(text, str):
            raise _unusable("gave no text")
        if add_generation_prompt or not messages:
            return text
        last = str(messages[-1].get("content", "")).strip()
        end = text.rfind(last)
        if end < 0:
            raise _unusable("leaves out the last message, which was to be continued")
        return text[: end + len(last)]

    def close(self) -> None:
        """End the process, if one runs."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: a file beside the worker must not be taken for a module.
        command = [sys.executable, "-P", template_worker.__file__]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            process_group=0,  # a Ctrl-C of the terminal is not meant for it
        )
        weakref.finalize(self, _end, process)
        self._process = process
        try:
            self._ask(process, None, START_SECONDS)
        except UserError:
            raise UserError(
                "chat template: jinja2 could not be started; pip install jinja2"
            ) from None
        self._ask(process, {"template": self.source}, self._seconds)
        return process

    def _ask(
        self, process: subprocess.Popen[bytes], frame: dict[str, Any] | None, seconds: float
    ) -> dict[str, Any]:
        """Send a frame (None: only listen) and wait for its answer."""
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        clock = threading.Timer(seconds, stop)
        clock.start()
        answer = None
        try:
            if frame is not None:
                template_worker.write_frame(process.stdin, frame)
            answer = template_worker.read_frame(process.stdout, 8 * template_worker.MAX_TEXT)
        except (OSError, ValueError):  # the process has ended, or speaks nonsense
            answer = None
        finally:
            clock.cancel()
            # Also when this process is interrupted: an answer that comes later answers nothing.
            if answer is None:
                self.close()
        if answer is None:
            limit = f"took more than {seconds:g} s" if late.is_set() else _how_it_ended(process)
            raise _unusable(limit)
        if (reason := answer.get("refused")) is not None:
            raise UserError(f"chat template: {show(str(reason))}")
        if (reason := answer.get("error")) is not None:
            raise _unusable(show(str(reason)))
        return answer


def _unusable(reason: str) -> UserError:
    return UserError(
        f"chat template: cannot be rendered ({reason}); fix the template, or do without it "
        "(drop --chat; in chat: --no-template)"
    )


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    code = process.poll()
    how = f"with signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
    return f"its process ended {how}: too much memory, time or nesting"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # of what a dead process will not read
            if pipe is not None:
                pipe.close()
    process.wait()
