"""The loop of `ttt-jax chat`: turns and commands, on a terminal or line by line."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ttt_jax.command.io import as_factor, read_document, read_text
from ttt_jax.errors import UserError
from ttt_jax.process.interrupts import Interrupt
from ttt_jax.process.output_lock import one_writer
from ttt_jax.terminal import for_stream, printable

if TYPE_CHECKING:
    from ttt_jax.inference.conversation import Conversation
    from ttt_jax.inference.sampling import Sampling

_RED, _CYAN, _GREEN, _DIM = "31", "1;36", "1;32", "2"
HELP = {
    "/read FILE": "read a text; the model adapts to it",
    "/ttt on|off": "answer the last question again with, or without, what was learnt",
    "/forget [FACTOR]": "begin anew with what was learnt, keys and values of all tokens go",
    "/undo": "go back to before the last turn",
    "/branch [NAME]": "go on in a copy called NAME, or in that branch if there is one; list them",
    "/stats": "tokens, and ||S||/||W|| of each TTT layer",
    "/save [FILE]": "save the session",
    "/html FILE": "write the conversation as a page, coloured by what TTT gives",
    "/help": "this list",
    "/quit": "leave (also Ctrl-D)",
}


class Chat:
    """A conversation with whoever types. Answers go to stdout, the rest to stderr.

    Args:
      conversation: begins the branch "main".
      limit: tokens of an answer.
      session: where `/save` without a file saves to; None: nowhere.
      context: read texts into the fast weights alone, with attention anew every so many tokens;
        None: into the stream.
      model: its name, for pages.
    """

    def __init__(
        self,
        conversation: Conversation,
        sampling: Sampling,
        limit: int,
        seed: int,
        session: Path | None,
        model: str,
        context: int | None = None,
    ) -> None:
        self.branches, self.branch = {"main": conversation}, "main"
        self.sampling, self.limit, self.seed = sampling, limit, seed
        self.session, self.model, self.context = session, model, context
        self.live = sys.stdin.isatty() and sys.stdout.isatty()
        self._colours = self.live and _terminal_has_colours()
        self._saved: set[Path] = set()  # files that this chat has written
        self.interrupt = Interrupt()  # raises once a turn

    @property
    def talk(self) -> Conversation:
        return self.branches[self.branch]

    # ---------------------------------------------------------------------------------------- loop

    def run(self) -> None:
        """Take turns until there are no more. Raises: KeyboardInterrupt at the second Ctrl-C of a
        prompt; without a terminal whatever a turn raises."""
        if self.live:
            self._interactive()
            return
        try:
            for line in sys.stdin:
                if not self.take(line):
                    return
        except UnicodeDecodeError as error:
            raise UserError(
                f"standard input: not UTF-8 at byte {error.start}; convert it"
            ) from None

    def _interactive(self) -> None:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lets `input` edit lines
        self.note(f"chat with {self.model}; /help lists the commands, Ctrl-D leaves")
        warned = False
        while True:
            self.interrupt.ready = True
            try:
                text = self._typed()
            except EOFError:
                print(flush=True)
                return
            except KeyboardInterrupt:
                print(flush=True)
                if warned:
                    raise
                warned = True
                self.note("Ctrl-C once more leaves")
                continue
            except UnicodeDecodeError:
                self.note("error: what was typed is not UTF-8", colour=_RED)
                continue
            warned = False
            try:
                if not self.take(text):
                    return
            except KeyboardInterrupt:
                self._stopped()
            except UserError as error:
                self.note(f"error: {error}", colour=_RED)

    def _stopped(self) -> None:
        """Say what a Ctrl-C has left for the next turn."""
        _, waiting = self.talk.tokens  # one token always waits
        more = f"; {waiting:,} tokens are still to be read, before the next answer"
        self.note("stopped" + more * (waiting > 1))

    def _typed(self) -> str:
        """Ask for a turn; a line that ends with a backslash goes on in the next one."""
        lines, prompt = [], "you> "
        while True:
            line = input(self._prompt(prompt))
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])
            prompt = "...> "

    def take(self, text: str) -> bool:
        """Answer a turn, or run a command. Returns whether to go on."""
        text = text.strip()
        if text.startswith("/") and not text.startswith("//"):
            name, _, argument = text.partition(" ")
            if name == "/quit":
                return False
            self._commands().get(name, self._unknown(name))(argument.strip())
        elif text:
            self.answer(self.talk, text[1:] if text.startswith("//") else text)
        return True

    def answer(self, talk: Conversation, text: str) -> None:
        """Print an answer as it comes."""
        begun = False

        def show(piece: str) -> None:
            nonlocal begun
            piece = piece if begun else piece.lstrip()
            begun = begun or bool(piece)
            print(for_stream(piece, sys.stdout), end="", flush=True)

        if self.live:
            print(self._paint("model> ", _GREEN), end="", flush=True)
        try:
            answer = talk.ask(
                text, self.sampling, max_new_tokens=self.limit, seed=self.seed, on_text=show
            )
        except BaseException:
            if begun or self.live:
                with contextlib.suppress(OSError):
                    print(flush=True)
            raise
        print(flush=True)
        if answer.read_again:
            self.note(
                f"the template changes earlier turns: {answer.read_again:,} tokens read again"
            )
        if answer.finish_reason == "length":
            self.note(f"stopped after {self.limit:,} tokens; --max-new-tokens allows more")

    def note(self, *lines: object, colour: str = _DIM) -> None:
        """Print lines on stderr."""
        for line in lines:
            print(self._paint(printable(line), colour), file=sys.stderr, flush=True)

    def _paint(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colours else text

    def _prompt(self, text: str) -> str:
        if not self._colours or "readline" not in sys.modules:
            return self._paint(text, _CYAN)
        return f"\x01\x1b[{_CYAN}m\x02{text}\x01\x1b[0m\x02"  # what takes no room on the line

    # ------------------------------------------------------------------------------------ commands

    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "/read": lambda name: self.read(Path(_given(name, "/read FILE"))),
            "/ttt": self._ttt,
            "/forget": self._forget,
            "/undo": self._undo,
            "/branch": self._branch,
            "/stats": self._stats,
            "/save": self._save,
            "/html": lambda name: self._html(Path(_given(name, "/html FILE"))),
            "/help": self._help,
        }

    def _unknown(self, name: str) -> Callable[[str], None]:
        def refuse(argument: str) -> None:
            raise UserError(f"{name}: no such command; /help lists them")

        return refuse

    def read(self, path: Path, text: str | None = None) -> None:
        """Read a text file, with a progress bar. Raises UserError when it cannot be read."""
        text = read_text(path, "/read") if text is None else text
        talk = self.talk
        ids = talk.session.model.tokenizer.encode(text)
        read = functools.partial(talk.read, ids, self.context, path.name)
        self.note(*read_document(talk.session, read, path, len(ids)))

    def _ttt(self, argument: str) -> None:
        if argument not in ("on", "off"):
            raise UserError(f"/ttt {argument}: must be /ttt on or /ttt off")
        copy, question = self.talk.again(argument == "on")
        self.note(f"TTT {argument}, the conversation stays as it is: {question}")
        self.answer(copy, question)

    def _forget(self, argument: str) -> None:
        factor = as_factor(argument or "1")
        gone = self.talk.forget(factor)
        times = f", times {argument}" if argument else ""
        self.note(f"{gone:,} tokens are out of the context; what was learnt stays{times}")

    def _undo(self, argument: str) -> None:
        self.talk.undo()
        self.note(f"back to {self.talk.tokens[0]:,} tokens")

    def _branch(self, name: str) -> None:
        if not name:
            self.note(*(f"{'*' if b == self.branch else ' '} {b}" for b in self.branches))
            return
        new = name not in self.branches
        if new:
            self.branches[name] = self.talk.branch()
        self.branch = name
        self.note(f"{'new branch' if new else 'on branch'} {name}")

    def _stats(self, argument: str) -> None:
        from ttt_jax.inference.prefill import needs_capacity

        talk = self.talk
        (read, waiting), session = talk.tokens, talk.session
        window = session.model.config.sliding_window
        seen = read if needs_capacity(session.model) or window is None else min(read, window)
        lines = [
            f"tokens read {read:,}, waiting {waiting:,}, in the context {seen:,}",
            f"turns {sum(m['role'] == 'user' for m in talk.messages)}, branch {self.branch}",
        ]
        ratios = talk.fast_weights()
        lines += [f"layer {layer:3d}  ||S||/||W|| {x:.3g}" for layer, x in ratios.items()]
        if not ratios:
            adapts = bool(session.model.config.ttt.layers)
            why = (" yet" if session.ttt else ": --no-ttt") if adapts else ""
            lines.append(f"no fast weights{why}")
        self.note(*lines)

    def save(self, path: Path) -> None:
        """Save the branch that is on."""
        self.talk.save(path)

    def _save(self, argument: str) -> None:
        path = Path(argument) if argument else self.session
        if path is None:
            raise UserError("/save: no file; give one, or start with --session FILE")
        if self.session is not None and path.absolute() == self.session.absolute():
            self.save(path)  # locked since the start
        else:
            self._check_new(path, "/save")
            with one_writer(path, "/save"):
                self.save(path)
            self._saved.add(path.absolute())
        self.note(f"saved {path}")

    def _check_new(self, path: Path, command: str) -> None:
        if os.path.lexists(path) and path.absolute() not in self._saved:
            raise UserError(f"{command} {path}: exists already; choose another file")

    def _html(self, path: Path) -> None:
        import numpy as np

        from ttt_jax.eval.diagnostics import text_pieces
        from ttt_jax.eval.page import text_page
        from ttt_jax.files.text import atomic_write_text
        from ttt_jax.inference.scoring import score

        talk = self.talk
        if not talk.whole:
            raise UserError(
                "/html: the session's stream was no chat from its start, and its tokens are not "
                "known; begin a new session"
            )
        if len(talk.ids) < 2:
            raise UserError("/html: there is nothing to show yet; say something first")
        self._check_new(path, "/html")
        if talk.session.holds_memory and talk.session.start is None:
            raise UserError(
                "/html: the conversation has fast weights that none of its tokens wrote, and what "
                "they were at its beginning is not known; write the page before it is saved or "
                "reads on"
            )
        ids, model = np.asarray(talk.ids, np.int32), talk.session.model
        memory, size = talk.session.start, talk.session.size
        adapts = talk.session.ttt or memory is None  # a memory that is only applied stays as it is
        on_T = score(model, [ids], ttt=adapts, piece=size, memory=memory).logprobs_BT[0]
        off_T = score(model, [ids], piece=size, ttt=False).logprobs_BT[0]
        page = text_page(text_pieces(model, ids, on_T, off_T), f"Conversation with {self.model}")
        try:
            atomic_write_text(path, page)
        except OSError as error:
            raise UserError(
                f"/html {path}: {error.strerror or error}; choose another file"
            ) from None
        self._saved.add(path.absolute())
        self.note(f"written {path}")

    def _help(self, argument: str) -> None:
        more = "a line that ends with \\ goes on in the next one; // begins a turn with /"
        self.note(*(f"{name:16s} {what}" for name, what in HELP.items()), more)


def _given(argument: str, usage: str) -> str:
    if not argument:
        raise UserError(f"{usage}: name the file")
    return argument


def _terminal_has_colours() -> bool:
    from rich.console import Console

    console = Console()
    return console.color_system is not None and not console.no_color
