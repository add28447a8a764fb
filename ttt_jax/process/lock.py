"""One writer for a run folder or an output: a lock file that names its holder.

    RUN/.lock           of a run folder: the same file however the folder is mounted
    PARENT/.NAME.lock   beside an output, which is replaced as a whole (output_lock.py)

The operating system's lock (flock) decides on one machine. The file's content decides where that
says nothing, on file systems shared by several hosts: the holder touches the file every few
seconds, and one that no longer does is gone. Clocks are not compared, so one that is set back does
no harm. This module imports no jax, unless several processes have to agree.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import secrets
import shlex
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ttt_jax.errors import TrainingError, UserError

RUN_LOCK = ".lock"
BEAT = 5.0  # seconds between two touches of the file by its holder
WATCH = 30.0  # seconds without a touch after which a holder on another machine is taken for gone
_MAX_BYTES = 1 << 16
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class Lock:
    """One writer: held from `acquire` to `release`, or in a `with` block.

    Args:
      path: the lock file. Missing folders above it are made, and removed again if they stay empty.
      what: begins every message, such as "run folder runs/a".
      fix: ends the message of a refusal: what else to do.
      tell: prints a line, when finding out takes time.
    """

    def __init__(
        self, path: Path, what: str, fix: str, tell: Callable[[str], None] | None = None
    ) -> None:
        self.path, self._what, self._fix = path, what, fix
        self._tell = tell or (lambda text: print(text, file=sys.stderr, flush=True))
        self._file: int | None = None
        self._made: list[Path] = []
        self._me = _describe_me()
        self._written = False
        self._stop = threading.Event()
        self._guard = threading.RLock()  # between the file's last touch and its end

    def acquire(self) -> Lock:
        """Take the lock. Raises UserError, one line, when another process has it or the file cannot
        be written.
        """
        try:
            self._make_parents()
            while not self._try():
                time.sleep(0.01)
        except OSError as error:
            self.release()
            raise UserError(
                f"{self._what}: cannot be written ({error.strerror}: {self.path}); make it "
                f"writable or {self._fix}"
            ) from None
        except BaseException:
            self.release()
            raise
        threading.Thread(target=self._beat, name="lock", daemon=True).start()
        return self

    def release(self) -> None:
        """Give the lock back and remove its file. A second call does nothing."""
        self._stop.set()
        with self._guard:
            if self._file is not None:
                with contextlib.suppress(OSError):
                    if self._is_mine():
                        # a folder that became read-only keeps a file that names nobody
                        os.ftruncate(self._file, 0)
                        self.path.unlink()
                self._drop()
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only when it is empty
        self._made = []

    def __enter__(self) -> Lock:
        return self if self._file is not None else self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()

    def lost(self) -> str | None:
        """Say why the lock is no longer held (folder gone, file removed or another's), or None.
        Errors of the disk say nothing.
        """
        try:
            found = read_holder(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return (
                "it has vanished"
                if not self.path.parent.is_dir()
                else f"its lock file {self.path} was removed"
            )
        except OSError:
            return None
        if not self._written or (found and found.get("token") == self._me["token"]):
            return None
        return (
            f"{_name(found)} has taken it over"
            if found
            else f"its lock file {self.path} was emptied"
        )

    # ------------------------------------------------------------------------------------ taking it

    def _make_parents(self) -> None:
        folder, missing = self.path.parent, []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        self._made = missing  # the deepest first
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def _try(self) -> bool:
        """Make one attempt; False when the file was removed by its holder in between. Raises
        OSError, UserError.
        """
        # No link is followed: the folder may be somebody else's.
        self._file = os.open(
            self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644
        )
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            self._drop()
            raise OSError(0, "not a regular file")
        locked = True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._refuse(_parse(self._file) or self._patiently())
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            locked = False
        if holder := _parse(self._file):
            alive = _runs(holder, self._me, locked)
            if alive is None:
                alive = self._watch(holder)
            if alive:
                self._refuse(holder)
        self._write()
        if not self._is_mine():  # removed in between: this is nobody's file any more
            self._drop()
            return False
        return True

    def _write(self) -> None:
        """Name the holder. On a full disk the file stays empty, and the system's lock has to do."""
        assert self._file is not None
        text = json.dumps(self._me).encode()
        try:
            os.ftruncate(self._file, 0)
            self._written = os.pwrite(self._file, text, 0) == len(text)
            os.fsync(self._file)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._written = False

    def _is_mine(self) -> bool:
        try:
            if self._written:  # file systems in user space may change the numbers of a file
                found = read_holder(self.path)
                return bool(found) and found.get("token") == self._me["token"]
            assert self._file is not None
            return os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def _patiently(self) -> dict[str, Any] | None:
        """Wait for what a holder that has just come writes."""
        assert self._file is not None
        for _ in range(20):
            if found := _parse(self._file):
                return found
            time.sleep(0.05)
        return None

    def _refuse(self, holder: dict[str, Any] | None) -> None:
        self._drop()
        raise UserError(
            f"{self._what}: {_name(holder)} is writing it; wait for it, stop it, or {self._fix}"
        )

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _watch(self, holder: dict[str, Any]) -> bool:
        """Find out whether a holder of whom nothing can be known from here touches the file."""
        self._tell(
            f"{self._what}: locked by {_name(holder)}; looking for {WATCH:g} s whether it is alive"
        )
        before, end = self._state(), time.monotonic() + WATCH
        while time.monotonic() < end:
            time.sleep(min(1.0, WATCH / 10))
            if self._state() != before:
                return True
        self._tell(f"{self._what}: {_name(holder)} is gone; its lock is taken over")
        return False

    def _state(self) -> object:
        """Read the file's time and content. It is opened each time: a network file system then asks
        its server.
        """
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        try:
            return os.fstat(file).st_mtime_ns, os.pread(file, _MAX_BYTES, 0)
        finally:
            os.close(file)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with self._guard, contextlib.suppress(OSError):
                if self._file is not None:
                    os.utime(self._file)


# ------------------------------------------------------------------------------------------ holders


def read_holder(path: Path) -> dict[str, Any] | None:
    """Read who has written a lock file; None when it names nobody. Raises OSError."""
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return _parse(file)
    finally:
        os.close(file)


def _parse(file: int) -> dict[str, Any] | None:
    try:
        found = json.loads(os.pread(file, _MAX_BYTES, 0).decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("pid"), int) else None


def _describe_me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "processes": _process_space(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "command": shlex.join([Path(sys.executable).name, *sys.argv])[:300],
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "token": secrets.token_hex(8),
    }


def _name(holder: dict[str, Any] | None) -> str:
    """Name a holder in a message. The file may be anybody's, so nothing in it reaches the terminal
    as it is.
    """
    if holder is None:
        return "another process"
    clean = lambda key: "".join(c if c.isprintable() else "?" for c in str(holder.get(key, "?")))[
        :100
    ]
    return f"process {clean('pid')} on {clean('host')} ({clean('command')}, since {clean('date')})"


def _runs(holder: dict[str, Any], me: dict[str, Any], locked: bool) -> bool | None:
    """Say whether the holder's process runs; None when that cannot be known from here.

    Args:
      locked: the system's lock was free, and is ours now.
    """
    if holder.get("machine") != me["machine"]:
        return None
    if holder.get("processes") != me["processes"]:  # another container of this machine
        return False if locked else None
    pid = holder["pid"]
    if pid == me["pid"]:
        return False  # an earlier lock of this process
    if me["started"] is None:  # a system without /proc
        return not locked
    # The time it started tells a process from a later one that got its number.
    return _started(pid) is not None and _started(pid) == holder.get("started")


def _machine() -> str:
    """Identify this boot of this machine: containers and users share it, another machine of the
    same name does not.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return f"host {socket.gethostname()}"


def _process_space() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """Return when a process started, in ticks since the boot; None when there is none (or one that
    only waits to be reaped).
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name may hold blanks
    return None if fields[0] in "ZX" else int(fields[19])


# -------------------------------------------------------------------------------------- run folders


class RunLock:
    """The lock of a run folder for all processes of one job: the first one holds it, all get the
    same answers.

    All processes call every method in the same order.
    """

    def __init__(self, run_dir: Path, main: bool) -> None:
        self.run_dir, self._main = run_dir, main
        self._lock = Lock(run_dir / RUN_LOCK, f"run folder {run_dir}", "choose another name")

    def __enter__(self) -> RunLock:
        from ttt_jax.process.multihost import on_first_process

        on_first_process(lambda: self._lock.acquire() and None)
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the lock back; also from a signal's handler."""
        if self._main:
            self._lock.release()

    def check(self) -> None:
        """Raise TrainingError, on all processes, when the folder has vanished or is another job's
        by now.
        """
        from ttt_jax.process.multihost import any_process, from_first_process

        reason = self._lock.lost() if self._main else None
        if reason and not (self.run_dir / "config.yaml").exists():
            reason = "it has vanished"  # a save in flight may have made a folder of that name again
        if any_process(reason is not None):
            raise TrainingError(
                f"run folder {self.run_dir}: {from_first_process(reason)}; stopped, because what "
                "is learnt cannot be saved "
                "there; put the folder back, or choose another name"
            )
