"""One safetensors file with a manifest that protects it: sessions and memories on disk.

The metadata's `manifest` is a JSON object. It names the format, has a CRC-32 of every tensor under
`crc32`, and what else the kind of file says; `manifest_crc32` protects it. Nothing in the file is
executed or unpickled. Names, shapes and dtypes are looked at before a tensor is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ttt_jax.errors import CheckpointError
from ttt_jax.files.text import sync

LARGEST = 1e18  # a sum of a few squares of such numbers still is one of float32
_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I32": "int32"}

Specs = dict[str, tuple[tuple[int, ...], np.dtype]]  # tensor name -> shape and dtype


def is_finite(x: np.ndarray) -> bool:
    """Whether every number is finite, and small enough to be squared in float32."""
    return bool((np.abs(x) <= LARGEST).all()) if x.size else True  # False for NaN


@dataclasses.dataclass(frozen=True)
class SealedKind:
    """A kind of sealed file.

    Fields:
      name: begins every message, such as "session".
      format: the manifest's `format`.
      wanted: what to give instead of a file that is none, for the messages.
    """

    name: str
    format: str
    wanted: str

    def write(self, path: Path, tensors: dict[str, np.ndarray], fields: dict[str, Any]) -> None:
        """Write the file; one of that name is replaced when the new one is complete.

        Args:
          fields: JSON values of the manifest, beside `format` and `crc32`.

        Raises: CheckpointError when it cannot be written.
        """
        crc32 = {name: _crc32(x) for name, x in tensors.items()}
        manifest = json.dumps(fields | {"format": self.format, "crc32": crc32}, sort_keys=True)
        part = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            seal = {"manifest": manifest, "manifest_crc32": str(zlib.crc32(manifest.encode()))}
            save_file(tensors, part, metadata=seal)
            sync(part)
            os.replace(part, path)
            sync(path.parent)
        except BaseException as error:  # Ctrl-C, too: nothing half-written stays behind
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            if not isinstance(error, OSError | SafetensorError):
                raise
            raise CheckpointError(
                f"{self.name} {path}: could not be written ({error}); free space or choose "
                "another file"
            ) from None

    def read(
        self, path: Path, check: Callable[[dict[str, Any], Specs], None]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Read a file: (manifest, tensors), all checksums right and all numbers finite.

        Args:
          check: raises for a manifest, or for tensors, that the kind does not allow. Runs before
            any tensor is read.

        Raises: CheckpointError, one line, when the file is missing, damaged or no such file.
        """
        if not path.is_file():
            raise CheckpointError(f"{self.name} {path}: no such file; give {self.wanted}")
        try:
            with safe_open(path, framework="numpy") as file:
                manifest = self._manifest(path, file.metadata() or {})
                if set(file.keys()) != set(manifest["crc32"]):
                    raise self.damaged(path, "its tensors are not those of its manifest")
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                specs = {
                    name: (tuple(found.get_shape()), _numpy_dtype(found.get_dtype()))
                    for name, found in slices.items()
                }
                check(manifest, specs)
                tensors = {name: file.get_tensor(name) for name in specs}
        except (SafetensorError, OSError, UnicodeDecodeError) as error:
            raise self.damaged(path, str(error).splitlines()[0]) from None
        for name, x in tensors.items():
            if _crc32(x) != manifest["crc32"][name]:
                raise self.damaged(path, f"the checksum of tensor {name} does not match")
            if not is_finite(x):
                raise self.damaged(
                    path,
                    f"tensor {name} holds numbers that are not finite, or too large for any stream",
                )
        return manifest, tensors

    def damaged(self, path: Path, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.name} {path}: damaged ({why}); restore it from a copy or read the input again"
        )

    def _manifest(self, path: Path, metadata: dict[str, str]) -> dict[str, Any]:
        text = metadata.get("manifest")
        if text is None:
            raise CheckpointError(
                f"{self.name} {path}: not a {self.name} of ttt_jax; give {self.wanted}"
            )
        if metadata.get("manifest_crc32") != str(zlib.crc32(text.encode())):
            raise self.damaged(path, "the checksum of its manifest does not match")
        try:
            manifest = json.loads(text)
        except (ValueError, RecursionError):
            raise self.damaged(path, "its manifest is not JSON") from None
        if not isinstance(manifest, dict):
            raise self.damaged(path, "its manifest is not an object")
        if manifest.get("format") != self.format:
            found = f"{manifest.get('format')!r:.80}"
            raise CheckpointError(
                f"{self.name} {path}: its format is {found}, this version reads {self.format!r}"
            )
        if not isinstance(manifest.get("crc32"), dict):
            raise self.damaged(path, "its manifest lacks a field")
        return manifest


def _crc32(x: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)


def _numpy_dtype(name: str) -> np.dtype:
    return np.dtype(_DTYPES.get(name, "V1"))
