"""Object stores for tests: fsspec's `memory://`, and `s3://` served on loopback by moto if that is
installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

HAS_S3 = all(importlib.util.find_spec(name) for name in ("moto", "flask", "s3fs"))
needs_s3 = pytest.mark.skipif(not HAS_S3, reason="needs moto[server] and s3fs")
STORES = ["memory", pytest.param("s3", marks=needs_s3)]


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """An S3 server on loopback; the environment variables that lead to it, which are set."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables
    server.stop()


def bucket(scheme: str) -> str:
    """The URL of a new bucket."""
    import fsspec

    url = f"{scheme}://b{uuid.uuid4().hex}"
    fsspec.filesystem(scheme).mkdir(url)
    return url


def upload(folder: Path, url: str) -> None:
    """Put every regular file of a folder below a URL, links and hidden names included."""
    import fsspec

    store = fsspec.filesystem(url.partition("://")[0])
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if path.is_file():
                store.pipe_file(f"{url}/{path.relative_to(folder)}", path.read_bytes())
