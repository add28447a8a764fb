"""Object stores for tests: fsspec's `memory://`; `s3://` and `gs://` served on loopback by moto and
gcp-storage-emulator, if those are installed.

    pip install 'moto[server]' s3fs gcsfs gcp-storage-emulator
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest


def _installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


HAS_S3 = _installed("moto", "flask", "s3fs")
HAS_GCS = _installed("gcp_storage_emulator", "gcsfs")
REMOTE = [
    pytest.param("s3", marks=pytest.mark.skipif(not HAS_S3, reason="no moto[server], s3fs")),
    pytest.param("gs", marks=pytest.mark.skipif(not HAS_GCS, reason="no gcp-storage-emulator")),
]
STORES = ["memory", *REMOTE]


@contextlib.contextmanager
def serving(scheme: str) -> Iterator[None]:
    """Serve a kind of store, as this process and those that it starts then find it."""
    if scheme == "memory":
        yield
        return
    with pytest.MonkeyPatch.context() as patch, (_s3 if scheme == "s3" else _gcs)() as variables:
        for name, value in variables.items():
            patch.setenv(name, value)
        _forget(scheme)
        yield
        _forget(scheme)


def _forget(scheme: str) -> None:
    """Let fsspec look at the environment again."""
    import fsspec
    from fsspec.config import set_conf_env

    set_conf_env(fsspec.config.conf)
    fsspec.get_filesystem_class(scheme).clear_instance_cache()


@contextlib.contextmanager
def _s3() -> Iterator[dict[str, str]]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.stop()


@contextlib.contextmanager
def _gcs() -> Iterator[dict[str, str]]:
    from gcp_storage_emulator.server import create_server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True)
    server.start()
    yield {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
        "FSSPEC_GS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which the emulator does not know
    }
    server.stop()


def bucket(scheme: str) -> str:
    """The URL of a new bucket."""
    import fsspec

    name = f"b{uuid.uuid4().hex}"
    fsspec.filesystem(scheme).mkdir(name)
    return f"{scheme}://{name}"


def upload(folder: Path, url: str) -> None:
    """Put every regular file of a folder below a URL, hidden ones included."""
    import fsspec

    store = fsspec.filesystem(url.partition("://")[0])
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if path.is_file():
                store.pipe_file(f"{url}/{path.relative_to(folder)}", path.read_bytes())


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def listed(target: str) -> dict[str, bytes]:
    """The files of the copy of run `a`."""
    store = fsspec.filesystem(target.partition("://")[0] if "://" in target else "file")
    store.invalidate_cache()
    return {path.partition("/a/")[2]: store.cat_file(path) for path in store.find(f"{target}/a")}
