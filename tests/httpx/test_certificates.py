"""The TLS context: authorities and the client's certificate together, and anew when a file has changed."""

from __future__ import annotations

import json
import os
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from tests.support.shop import Shop
from workerpools import ConfigurationError
from workerpools.httpx import HttpxClient

AUTHORITY = trustme.CA()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_GET(self) -> None:
        found = self.connection.getpeercert() or {}  # type: ignore[attr-defined]
        names = [value for part in found.get("subject", ()) for key, value in part if key == "commonName"]
        body = json.dumps(names).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server that answers with the common name of its client's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    AUTHORITY.issue_cert("127.0.0.1").configure_cert(context)
    AUTHORITY.configure_trust(context)
    context.verify_mode = ssl.CERT_OPTIONAL
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"https://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class Files:
    """The files of a client; `issue` replaces its certificate and key."""

    def __init__(self, folder: Path) -> None:
        self.ca, self.cert, self.key = folder / "ca.pem", folder / "cert.pem", folder / "key.pem"
        AUTHORITY.cert_pem.write_to_path(str(self.ca))

    def issue(self, name: str, *, key: bool = True) -> None:
        made = AUTHORITY.issue_cert(f"{name}.example", common_name=name)
        made.cert_chain_pems[0].write_to_path(str(self.cert))
        self.pending = made.private_key_pem
        if key:
            self.finish()

    def finish(self) -> None:
        self.pending.write_to_path(str(self.key))

    @property
    def pair(self) -> tuple[str, str]:
        return str(self.cert), str(self.key)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    made = Files(tmp_path)
    made.issue("first")
    return made


@pytest.fixture
def shop() -> Iterator[Shop]:
    with closing(Shop()) as made:
        yield made


def names(shop: Shop) -> Any:
    return shop.api.get().get("/").json()


@pytest.mark.parametrize("verify", ["path", "environment", "context", "off"])
def test_a_rotated_certificate_is_presented(
    shop: Shop, url: str, files: Files, verify: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together with whatever authorities; by the next request, without a failed one."""
    options: dict[str, Any] = {"path": str(files.ca), "environment": True, "off": False}
    if verify == "environment":
        monkeypatch.setenv("SSL_CERT_FILE", str(files.ca))
    options["context"] = ssl.create_default_context(cafile=str(files.ca))
    shop.add_api(url, verify=options[verify], cert=files.pair)
    assert names(shop) == ["first"]
    files.issue("second")
    assert names(shop) == ["second"]
    shop.pools.recycle("api")
    assert names(shop) == ["second"]
    shop.pools.close()
    files.issue("third")
    assert names(shop) == ["third"]


def test_half_of_a_rotation_changes_nothing(
    shop: Shop, url: str, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    """The certificate is there, and its key is not yet: the former pair stays in use, and the log says so once."""
    shop.add_api(url, verify=str(files.ca), cert=files.pair)
    assert names(shop) == ["first"]
    files.issue("second", key=False)
    assert names(shop) == names(shop) == ["first"]
    assert len([record for record in caplog.records if "not usable yet" in record.getMessage()]) == 1
    files.finish()
    assert names(shop) == ["second"]


def test_a_new_child_presents_the_new_one(shop: Shop, url: str, files: Files) -> None:
    """It inherits the context that its parent has prepared."""
    shop.add_api(url, verify=str(files.ca), cert=files.pair)
    shop.api.adapter.prepare()
    files.issue("second")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, json.dumps(names(shop)).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert json.load(pipe) == ["second"]


def test_authorities_on_disk_may_change(shop: Shop, url: str, files: Files) -> None:
    other = trustme.CA()
    other.cert_pem.write_to_path(str(files.ca))
    shop.add_api(url, verify=files.ca)
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        names(shop)
    AUTHORITY.cert_pem.write_to_path(str(files.ca))
    assert names(shop) == []


WRONG: list[dict[str, Any]] = [{"verify": 5}, {"cert": 5}, {"cert": ("a", 5)}, {"cert": ("a",) * 4}]


@pytest.mark.parametrize("options", WRONG)
def test_what_is_no_path_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"HttpxClient: (verify|cert) is a value"):
        HttpxClient(**options)
