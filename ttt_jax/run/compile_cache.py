"""jax's cache of compiled programs, in the run folder, so that a run that is started again need not
compile again.

A cache entry is machine code. jax runs whatever it finds, a damaged or a planted entry too, and it
writes entries in place, so that a kill leaves half of one. Hence entries are sealed: `seals.json`
has an HMAC-SHA-256 of each one, under a key that only this user has (`TTT_JAX_CACHE`/compile_key),
and an entry without its seal is removed before jax sees it. A run folder from somebody else
therefore compiles anew. On CPUs the entries of each kind of CPU have a folder of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import platform
import secrets
from pathlib import Path

import jax

from ttt_jax.config import Config
from ttt_jax.files.text import atomic_write_text, cache_folder
from ttt_jax.process.multihost import any_process

FOLDER = "compile_cache"
_SEALS = "seals.json"
_MAX_SEALS = 10_000_000  # bytes


class CompileCache:
    """The cache of one run; `open_cache` makes it."""

    def __init__(self, folder: Path, key: bytes) -> None:
        self.folder, self._key = folder, key

    def check(self) -> list[str]:
        """Remove what is not sealed or has changed since; returns the names."""
        seals = self._seals()
        removed = []
        for path in self._entries():
            if not hmac.compare_digest(seals.get(path.name, ""), self._seal(path)):
                path.unlink(missing_ok=True)
                removed.append(path.name)
        return removed

    def seal(self) -> None:
        """Seal the entries that have been written. A failure, of a full disk for instance, costs a
        compilation later.
        """
        with contextlib.suppress(OSError):
            seals = {path.name: self._seal(path) for path in self._entries()}
            if seals != self._seals():
                atomic_write_text(self.folder / _SEALS, json.dumps(seals, indent=0, sort_keys=True))

    def _entries(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*-cache") if path.is_file())

    def _seal(self, path: Path) -> str:
        """Compute an entry's seal. The name is part of it: it is what the entry will be run for."""
        digest = hmac.new(self._key, path.name.encode() + b"\0", hashlib.sha256)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def _seals(self) -> dict[str, str]:
        path = self.folder / _SEALS
        try:
            if path.stat().st_size > _MAX_SEALS:
                return {}
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        valid = isinstance(found, dict) and all(
            isinstance(seal, str) and seal.isascii() for seal in found.values()
        )
        return found if valid else {}


def open_cache(config: Config) -> tuple[CompileCache | None, list[str]]:
    """Let jax keep compiled programs where `compile_cache` says. Before anything is compiled; all
    processes together.

    A cache that jax was told of already (`JAX_COMPILATION_CACHE_DIR`) is left alone.

    Returns: the cache, to be sealed once the programs of the run are compiled (on one process;
    None: there is nothing to seal), and warnings.
    """
    if config.compile_cache is None or getattr(jax.config, "jax_compilation_cache_dir", None):
        return None, []
    base = (
        config.run_dir / FOLDER
        if config.compile_cache == "run"
        else Path(config.compile_cache).expanduser()
    )
    main, warnings = jax.process_index() == 0, []
    cache = None
    if main:
        try:
            folder = base.absolute() / _machine()
            folder.mkdir(parents=True, exist_ok=True)
            cache = CompileCache(folder, _read_key(cache_folder() / "compile_key"))
            if removed := cache.check():
                warnings.append(
                    f"compile_cache: {len(removed)} entries without a valid seal were removed; "
                    "compiling again"
                )
        except OSError as error:
            cache = None
            warnings.append(
                f"compile_cache: off, because {error.filename or base} cannot be used "
                f"({error.strerror})"
            )
    # The others wait here until nothing unsealed is left, and go without where process 0 does.
    if any_process(main and cache is None):
        return None, warnings
    jax.config.update("jax_compilation_cache_dir", str(base.absolute() / _machine()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # files that nothing would seal
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_raise_persistent_cache_errors", False)
    _forget_earlier_cache()
    return cache, warnings


def _forget_earlier_cache() -> None:
    """Let jax look for its cache again: it does so once, at the first compilation; that may have
    been before.
    """
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()


def _read_key(path: Path) -> bytes:
    """Read this user's key; made on first use. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(file, secrets.token_bytes(32))
        finally:
            os.close(file)
    key = path.read_bytes()
    if len(key) != 32:
        raise OSError(0, "it does not hold 32 bytes; delete it", str(path))
    return key


def _machine() -> str:
    """Name a folder for this machine: programs for accelerators do not depend on the host, those
    for CPUs on its instruction set.
    """
    if jax.default_backend() != "cpu":
        return jax.default_backend()
    features = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        features = next(
            (line for line in lines if line.startswith(("flags", "Features"))), features
        )
    return f"cpu-{hashlib.sha256(f'{platform.machine()} {features}'.encode()).hexdigest()[:12]}"
